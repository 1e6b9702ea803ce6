"""`edgeward leases`: keep the box undisturbed for a while."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.exits import Exit
from console.invocation import Invocation, command, end_with
from console.output import build_table

if TYPE_CHECKING:
    from agent.lease import Lease

app = typer.Typer(
    help="Ask that nothing disturbs the box: no new version, no work with a maintenance window.",
    no_args_is_help=True,
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Who holds it.")]


def take(
    call: Invocation,
    name: NameArgument,
    duration: Annotated[
        str, typer.Option("--for", metavar="TIME", help="For how long at most: 90s, 10m, 2h.")
    ] = "30m",
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="For people.")] = "",
) -> None:
    """Take a lease, or take it anew. It ends by itself."""
    from agent.clock import SystemClock
    from agent.lease import take_lease
    from console.duration import parse_duration

    try:
        duration_s = parse_duration(duration)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--for") from exc
    clock = SystemClock()
    lease = take_lease(call.box_settings.leases_dir, clock, name, duration_s, why)
    call.out.show(
        _describe(lease, duration_s), lambda: f"{name} holds the box for {duration_s:g} s at most"
    )


def release(call: Invocation, name: NameArgument) -> None:
    """Give a lease back before its time."""
    from agent.lease import release_lease

    was_held = release_lease(call.box_settings.leases_dir, name)
    text = f"{name} is given back" if was_held else f"nobody called {name} held the box"
    call.out.show({"name": name, "released": was_held}, lambda: text)
    end_with(Exit.OK if was_held else Exit.NOT_FOUND)


def show(call: Invocation) -> None:
    """List the leases that hold now."""
    from agent.clock import SystemClock
    from agent.lease import list_leases

    clock = SystemClock()
    found = [
        _describe(one, one.compute_left_s(clock))
        for one in list_leases(call.box_settings.leases_dir, clock)
    ]
    call.out.show({"leases": found}, lambda: _render(found))


def _describe(lease: "Lease", left_s: float) -> dict[str, Any]:
    return {"name": lease.name, "why": lease.why, "left_s": round(left_s, 1)}


def _render(found: list[dict[str, Any]]) -> Any:
    if not found:
        return "nobody holds the box"
    rows = [(one["name"], f"{one['left_s']:.0f} s", one["why"]) for one in found]
    return build_table(("Lease", "Left", "Why"), rows)


command(app, "take")(take)
command(app, "release")(release)
command(app, "list")(show)
