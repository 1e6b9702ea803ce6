"""What a rollout looks like: as documents for scripts, as tables for people.

Owns the wording; decides nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agent.clock import format_ms
from console.output import build_table
from console.rollout.conductor import Happening
from console.rollout.progress import Cause, Lane, LaneState, Member, MemberState, Tally
from console.rollout.store import Rollout

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

Document = dict[str, Any]

_COLUMNS = (
    ("Waiting", (MemberState.WAITING,)),
    ("Asked", (MemberState.ASKED, MemberState.RETURNING)),
    ("Done", (MemberState.SUCCEEDED,)),
    ("Failed", (MemberState.FAILED,)),
    ("Unknown", (MemberState.UNKNOWN,)),
    ("Other", (MemberState.PINNED, MemberState.SUPERSEDED)),
    ("Back", (MemberState.RETURNED,)),
    ("Not back", (MemberState.NOT_RETURNED,)),
)
_COLOURS = {
    "running": "cyan",
    "done": "green",
    "stopped": "red",
    "stalled": "yellow",
    "paused": "yellow",
}
_TROUBLED = (
    MemberState.FAILED,
    MemberState.UNKNOWN,
    MemberState.PINNED,
    MemberState.SUPERSEDED,
    MemberState.NOT_RETURNED,
)
_SHOWN = 10


def describe_rollout(
    rollout: Rollout, members: Sequence[Member], lanes: Sequence[Lane]
) -> Document:
    """Return a rollout with its classes and members as JSON for scripts."""
    begun = {lane.hardware_class: lane for lane in lanes}
    names = sorted({member.hardware_class for member in members})
    return {
        **summarize(rollout),
        "wishes": {
            "groups": rollout.wishes.groups,
            "success": rollout.wishes.success,
            "error": rollout.wishes.error,
            "min_failures": rollout.wishes.min_failures,
            "probation": rollout.wishes.probation,
            "device_timeout_s": rollout.wishes.device_timeout_s,
        },
        "classes": [
            describe_class(begun.get(name, Lane(name)), _of_class(members, name)) for name in names
        ],
        "devices": [_describe_member(member) for member in members],
    }


def summarize(rollout: Rollout) -> Document:
    """Return what one line says of a rollout."""
    return {
        "rollout": rollout.rollout_id,
        "model": rollout.model,
        "release": rollout.release,
        "state": rollout.state.value,
        "started_at": format_ms(rollout.started_ms),
        "changed_at": format_ms(rollout.changed_ms),
    }


def describe_class(lane: Lane, members: Sequence[Member]) -> Document:
    """Return one hardware class of a rollout as JSON for scripts."""
    counts = Tally.of(members).counts
    return {
        "class": lane.hardware_class,
        "state": lane.state.value,
        "group": lane.group,
        "groups": sorted({member.group for member in members}),
        "reason": _describe_reason(lane.reason),
        "members": len(members),
        "counts": {state.value: count for state, count in counts.items() if count},
    }


def describe_happening(rollout_id: str, happening: Happening) -> Document:
    """Return something that happened as one JSON line's document."""
    document: Document = {"event": happening.kind, "rollout": rollout_id}
    if happening.member is not None:
        document |= _describe_member(happening.member)
    if happening.lane is not None:
        lane = happening.lane
        document |= {"class": lane.hardware_class, "group": lane.group, "state": lane.state.value}
        document["reason"] = _describe_reason(lane.reason)
    if happening.state is not None:
        document["state"] = happening.state.value
    if happening.version is not None:
        document["version"] = happening.version
    return document


def word_happening(happening: Happening) -> str | None:
    """Return a line about what happened to a class or to the whole, or None for a device."""
    lane = happening.lane
    if lane is None:
        return None
    if lane.state is LaneState.RUNNING:
        return f"{lane.hardware_class}: group {lane.group} is asked"
    why = f": {lane.reason.message}" if lane.reason.message else ""
    return f"{lane.hardware_class}: {lane.state.value} in group {lane.group}{why}"


def build_classes(lanes: Sequence[Lane], members: Sequence[Member]) -> "RenderableType":
    """Return the table of hardware classes."""
    begun = {lane.hardware_class: lane for lane in lanes}
    names = sorted({member.hardware_class for member in members})
    rows = [_row_of(begun.get(name, Lane(name)), _of_class(members, name)) for name in names]
    used = [at for at in range(len(_COLUMNS)) if at < 5 or any(row[3 + at] for row in rows)]
    headers = ("Class", "Group", "Devices", *(_COLUMNS[at][0] for at in used), "State")
    cells = [(*row[:3], *(row[3 + at] or "·" for at in used), row[-1]) for row in rows]
    return build_table(headers, cells)


def build_troubles(members: Sequence[Member]) -> "RenderableType | None":
    """Return the table of the devices that have not what they were asked for, or None."""
    found = [member for member in members if member.state in _TROUBLED]
    if not found:
        return None
    rows: list[tuple[object, ...]] = [
        (
            member.device,
            member.hardware_class,
            member.group,
            member.state.value,
            " ".join(part for part in (member.reason.message, _code(member.reason)) if part),
        )
        for member in found[:_SHOWN]
    ]
    if len(found) > _SHOWN:
        rows.append((f"… and {len(found) - _SHOWN} more", "", "", "", "see --json"))
    return build_table(("Device", "Class", "Group", "State", "Why"), rows)


def build_plan(members: Sequence[Member]) -> "RenderableType":
    """Return the table of how many devices of each class are in each group."""
    numbers = sorted({member.group for member in members})
    names = sorted({member.hardware_class for member in members})
    rows = [
        (
            name,
            *(
                sum(item.group == number for item in _of_class(members, name)) or "·"
                for number in numbers
            ),
            len(_of_class(members, name)),
        )
        for name in names
    ]
    headers = ("Class", *(f"Group {number}" for number in numbers), "Devices")
    return build_table(headers, rows)


def colour_state(state: str) -> "Text":
    """Return a state of a rollout or a class in its colour."""
    from rich.text import Text

    return Text(state, style=_COLOURS.get(state, ""))


def _row_of(lane: Lane, members: Sequence[Member]) -> tuple[Any, ...]:
    counts = Tally.of(members).counts
    groups = sorted({member.group for member in members})
    at = sum(group <= lane.group for group in groups)
    cells = (sum(counts[state] for state in states) for _, states in _COLUMNS)
    state = colour_state(lane.state.value)
    if lane.reason.message:
        state.append(f": {lane.reason.message}")
    return (lane.hardware_class, f"{at}/{len(groups)}", len(members), *cells, state)


def _of_class(members: Sequence[Member], name: str) -> list[Member]:
    return [member for member in members if member.hardware_class == name]


def _describe_member(member: Member) -> Document:
    return {
        "device": member.device,
        "class": member.hardware_class,
        "group": member.group,
        "state": member.state.value,
        "detail": member.detail or None,
        "reason": _describe_reason(member.reason),
    }


def _describe_reason(reason: Cause) -> Document | None:
    return {"code": reason.code, "message": reason.message} if reason.code else None


def _code(reason: Cause) -> str:
    return f"[{reason.code}]" if reason.code else ""
