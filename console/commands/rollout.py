"""`edgeward rollout`: a release to many devices, group by group, over MQTT."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.exits import Exit
from console.invocation import Invocation, command, end_with

if TYPE_CHECKING:
    from console.rollout.conductor import Conductor, Happening
    from console.rollout.fleet import Fleet
    from console.rollout.progress import Order
    from console.rollout.store import Rollout, RolloutStore, Wishes

app = typer.Typer(
    help="Bring a release to many devices, group by group, over MQTT.", no_args_is_help=True
)

_STATE = Path("rollouts")
_ORDER_LIMIT_S = 15.0
_REDRAW_S = 0.25

StateOption = Annotated[
    Path, typer.Option("--state", metavar="DIR", help="Folder that keeps the rollouts.")
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The rollout.")]
QuietOption = Annotated[
    float,
    typer.Option(
        "--discover", min=0.1, max=60, metavar="S", help="Time without a new device that ends it."
    ),
]


def start(
    call: Invocation,
    model: Annotated[str, typer.Argument(help="The model's name.")],
    release: Annotated[str, typer.Argument(help="The release to bring to the devices.")],
    groups: Annotated[
        str, typer.Option(metavar="LIST", help="How far each group goes: 1%,10%,all or 5,50,all.")
    ] = "1%,10%,100%",
    success: Annotated[
        str, typer.Option(metavar="P%", help="Of the devices that answer, so many must have it.")
    ] = "95%",
    error: Annotated[
        str, typer.Option(metavar="P%", help="So many failures stop a hardware class.")
    ] = "5%",
    min_failures: Annotated[
        int | None,
        typer.Option(min=1, help="Fewer never stop it; else 1 in groups below 10, 2 above."),
    ] = None,
    devices: Annotated[str, typer.Option(metavar="GLOB", help="Only these devices.")] = "*",
    hardware_class: Annotated[
        str, typer.Option("--class", metavar="GLOB", help="Only these hardware classes.")
    ] = "*",
    probation: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Probation on each device, such as 10m; else its own."),
    ] = None,
    device_timeout: Annotated[
        str,
        typer.Option(metavar="TIME", help="A device that says nothing for so long is unknown."),
    ] = "15m",
    state: StateOption = _STATE,
    discover: QuietOption = 2.0,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before it starts.")] = False,
) -> None:
    """Bring a release to the devices that the broker knows; until all groups are done.

    Each hardware class goes its own way: where too many devices fail it stops, and goes on
    elsewhere. Ctrl-C leaves everything as it is; `rollout resume` goes on.

    Ends with 0 where every class has done all groups, 1 where errors have stopped one, 5 where
    it was paused or aborted, or where too few devices answer.
    """
    from console.errors import RolloutPlanError
    from console.rollout.account import build_plan
    from console.rollout.conductor import Choice, plan_rollout
    from console.rollout.store import Wishes

    wishes = Wishes(
        groups,
        success,
        error,
        min_failures,
        {"duration_s": _read_duration(probation)} if probation else None,
        _read_duration(device_timeout),
    )
    _check_wishes(wishes)
    if not yes and (call.out.as_json or not sys.stdin.isatty()):
        msg = "nobody can be asked whether to start: say --yes"
        raise RolloutPlanError(msg)
    with _open_claimed(state, create=True) as store, _open_fleet(call, discover) as fleet:
        choice = Choice(devices, hardware_class)
        rollout, members = plan_rollout(fleet, model, release, wishes, choice)
        call.out.write(build_plan(members))
        if not yes and not typer.confirm(f"Bring {model} {release} to these devices?", err=True):
            end_with(Exit.NOT_AS_ASKED)
        store.add(rollout, members)
        call.out.note(f"rollout {rollout.rollout_id}")
        _print_line(call, {"event": "started", "rollout": rollout.rollout_id})
        _conduct(call, fleet, store, rollout.rollout_id)


def resume(
    call: Invocation,
    rollout_id: IdArgument,
    state: StateOption = _STATE,
    discover: QuietOption = 2.0,
) -> None:
    """Go on with a rollout that was paused, killed, stalled, or interrupted while rolling back."""
    from console.rollout.progress import Order, obey

    with _open_claimed(state) as store:
        obey(store.get(rollout_id).state, Order.RESUME)
        with _open_fleet(call, discover) as fleet:
            _conduct(call, fleet, store, rollout_id)


def pause(call: Invocation, rollout_id: IdArgument, state: StateOption = _STATE) -> None:
    """Ask no further devices; those that were asked go on. `rollout resume` goes on."""
    from console.rollout.progress import Order, obey
    from console.rollout.store import RolloutStore

    with RolloutStore(state) as store:
        obey(store.get(rollout_id).state, Order.PAUSE)
        with _give_order(store, rollout_id, Order.PAUSE):
            _show_end(call, store, rollout_id)


def abort(
    call: Invocation,
    rollout_id: IdArgument,
    roll_back: Annotated[
        bool, typer.Option("--roll-back", help="Ask each device for the release it had before.")
    ] = False,
    state: StateOption = _STATE,
    discover: QuietOption = 2.0,
) -> None:
    """End a rollout for good: ask no further devices, and with --roll-back bring all back."""
    from console.rollout.progress import Order, RolloutState, obey
    from console.rollout.store import RolloutStore, Step

    order = Order.ROLL_BACK if roll_back else Order.ABORT
    with RolloutStore(state) as store:
        obey(store.get(rollout_id).state, order)
        with _give_order(store, rollout_id, Order.ABORT):
            if not roll_back:
                _show_end(call, store, rollout_id)
                return
            obey(store.get(rollout_id).state, order)
            store.save(rollout_id, Step(state=RolloutState.ROLLING_BACK))
            with _open_fleet(call, discover) as fleet:
                _conduct(call, fleet, store, rollout_id)


def show_status(
    call: Invocation,
    rollout_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="One rollout, with its classes.")
    ] = None,
    state: StateOption = _STATE,
) -> None:
    """List the rollouts, newest first, or show one, as last known here."""
    from console.output import build_table
    from console.rollout.account import describe_rollout, summarize
    from console.rollout.store import RolloutStore

    with RolloutStore(state) as store:
        if rollout_id is None:
            documents = [summarize(rollout) for rollout in store.list_rollouts()]
            names = ("rollout", "model", "release", "state", "started_at", "changed_at")
            cells = [tuple(item[name] for name in names) for item in documents]
            headers = ("Rollout", "Model", "Release", "State", "Started", "Changed")
            call.out.show(documents, lambda: build_table(headers, cells))
            return
        rollout = store.get(rollout_id)
        members, lanes = store.read_members(rollout_id), store.read_lanes(rollout_id)
    document = describe_rollout(rollout, members, lanes)
    if call.out.as_json:
        call.out.show(document, lambda: "")
    else:
        _show_tables(call, rollout, members, lanes)


# --- a run --------------------------------------------------------------------------------


def _read_duration(text: str) -> float:
    from console.duration import parse_duration
    from console.errors import RolloutPlanError

    try:
        return parse_duration(text)
    except ValueError as exc:
        raise RolloutPlanError(str(exc)) from exc


def _check_wishes(wishes: "Wishes") -> None:
    """Refuse bad wishes before anything else is done.

    Raises:
        RolloutPlanError: one makes no sense.
    """
    from console.rollout.conductor import read_thresholds
    from console.rollout.plan import parse_groups

    parse_groups(wishes.groups)
    read_thresholds(wishes)


@contextmanager
def _open_claimed(folder: Path, *, create: bool = False) -> "Iterator[RolloutStore]":
    from console.rollout.store import RolloutStore

    with RolloutStore(folder, create=create) as store, store.claim():
        yield store


@contextmanager
def _open_fleet(call: Invocation, quiet_s: float) -> "Iterator[Fleet]":
    from console.rollout.fleet import Fleet

    with Fleet(call.box_settings) as fleet:
        with call.out.spinner("looking for devices"):
            fleet.discover(quiet_s)
        yield fleet


def _conduct(call: Invocation, fleet: "Fleet", store: "RolloutStore", rollout_id: str) -> None:
    """Run a rollout to its end, show it, and end the command with its exit code."""
    import signal

    from console.rollout.conductor import Conductor

    stop = threading.Event()
    caught: list[int] = []

    def end(number: int, _frame: object) -> None:
        caught.append(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    view = _View(call, rollout_id)
    conductor = Conductor(fleet, store, rollout_id, view.show)
    with view.live(conductor):
        conductor.run(stop)
    _show_end(call, store, rollout_id)
    if caught:
        call.out.note(f"interrupted: `edgeward rollout resume {rollout_id}` goes on")
        raise typer.Exit(128 + caught[0])
    end_with(_exit_of(store, rollout_id))


class _View:
    """What is seen of a run: JSON lines, a live table, or a line for what matters."""

    def __init__(self, call: Invocation, rollout_id: str) -> None:
        self._call = call
        self._rollout_id = rollout_id
        self._draw: Callable[[], None] = lambda: None

    def show(self, happening: "Happening") -> None:
        """Show something that happened."""
        from console.rollout.account import describe_happening, word_happening

        if self._call.out.as_json:
            _print_line(self._call, describe_happening(self._rollout_id, happening))
            return
        self._draw()
        text = word_happening(happening)
        if text is not None and not self._call.out.is_watched:
            self._call.out.note(text)

    @contextmanager
    def live(self, conductor: "Conductor") -> Iterator[None]:
        """Show the table of classes while the block runs, where a person watches."""
        if not self._call.out.is_watched:
            yield
            return
        from rich.console import Console
        from rich.live import Live

        from console.rollout.account import build_classes

        def build() -> Any:
            progress = conductor.progress
            return build_classes(list(progress.lanes.values()), list(progress.members.values()))

        with Live(build(), console=Console(file=sys.stderr), auto_refresh=False) as live:
            drawn_s = 0.0

            def draw() -> None:
                nonlocal drawn_s
                if time.monotonic() - drawn_s >= _REDRAW_S:
                    drawn_s = time.monotonic()
                    live.update(build(), refresh=True)

            self._draw = draw
            yield
            live.update(build(), refresh=True)


def _show_end(call: Invocation, store: "RolloutStore", rollout_id: str) -> None:
    """Show a rollout as the file has it: one JSON line, or tables."""
    from console.rollout.account import describe_class, summarize
    from console.rollout.progress import Lane

    rollout = store.get(rollout_id)
    members, lanes = store.read_members(rollout_id), store.read_lanes(rollout_id)
    if not call.out.as_json:
        _show_tables(call, rollout, members, lanes)
        return
    begun = {lane.hardware_class: lane for lane in lanes}
    classes = [
        describe_class(
            begun.get(name, Lane(name)), [item for item in members if item.hardware_class == name]
        )
        for name in sorted({item.hardware_class for item in members})
    ]
    _print_line(call, {"event": "end", **summarize(rollout), "classes": classes})


def _show_tables(call: Invocation, rollout: "Rollout", members: Any, lanes: Any) -> None:
    from console.rollout.account import build_classes, build_troubles

    name = f"{rollout.model} {rollout.release}"
    call.out.write(f"rollout {rollout.rollout_id}: {name} is {rollout.state.replace('_', ' ')}")
    call.out.write(build_classes(lanes, members))
    troubles = build_troubles(members)
    if troubles is not None:
        call.out.write(troubles)


def _print_line(call: Invocation, document: dict[str, Any]) -> None:
    if call.out.as_json:
        print(json.dumps(document, ensure_ascii=False), flush=True)


def _exit_of(store: "RolloutStore", rollout_id: str) -> Exit:
    from console.rollout.progress import LaneState, MemberState, RolloutState

    state = store.get(rollout_id).state
    if state is RolloutState.ROLLED_BACK:
        left = [item.state for item in store.read_members(rollout_id)]
        return Exit.NOT_AS_ASKED if MemberState.NOT_RETURNED in left else Exit.OK
    if state is RolloutState.DONE:
        return Exit.OK
    # A class that errors have stopped counts for more than one that waits.
    lanes = [lane.state for lane in store.read_lanes(rollout_id)]
    is_over = state in (RolloutState.STOPPED, RolloutState.STALLED)
    return Exit.ERROR if is_over and LaneState.STOPPED in lanes else Exit.NOT_AS_ASKED


# --- orders -------------------------------------------------------------------------------


@contextmanager
def _give_order(store: "RolloutStore", rollout_id: str, order: "Order") -> Iterator[None]:
    """Let the process that works on a rollout obey, or do it here; then hold the folder.

    Raises:
        RolloutOrderError: the rollout takes no such order.
        RolloutBusyError: another process keeps the folder for longer than 15 s.
    """
    from console.rollout.progress import RolloutState, obey
    from console.rollout.store import Step

    takes_it = store.get(rollout_id).state not in (
        RolloutState.DONE,
        RolloutState.ROLLED_BACK,
        RolloutState.ROLLING_BACK,
    )
    if takes_it:
        obey(store.get(rollout_id).state, order)
        store.put_order(rollout_id, order)
    with _wait_for_claim(store):
        rollout = store.get(rollout_id)
        if rollout.order is order:
            store.save(rollout_id, Step(state=obey(rollout.state, order), clears_order=True))
        yield


@contextmanager
def _wait_for_claim(store: "RolloutStore") -> Iterator[None]:
    from console.errors import RolloutBusyError

    deadline = time.monotonic() + _ORDER_LIMIT_S
    between = threading.Event()
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(store.claim())
                break
            except RolloutBusyError:
                if time.monotonic() >= deadline:
                    raise
            between.wait(0.1)
        yield


command(app, "start")(start)
command(app, "status")(show_status)
command(app, "resume")(resume)
command(app, "pause")(pause)
command(app, "abort")(abort)
