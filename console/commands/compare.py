"""`edgeward compare`: how alike two models answer on this box, and how fast each is."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.bench.options import ShapeOption, ThreadsOption, parse_shapes
from console.commands.bench import make_advance
from console.exits import Exit
from console.invocation import Invocation, command, end_with
from console.output import build_table

if TYPE_CHECKING:
    from console.bench.comparison import Comparison, Side
    from console.bench.feed import Feed
    from console.bench.target import Target
    from platforms.spec import PlatformSpec


def register(parent: typer.Typer) -> None:
    """Add the command to `parent`."""
    command(parent, "compare")(compare_two)


def compare_two(
    call: Invocation,
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="The reference: NAME@VERSION, NAME@VERSION:FILE, or a path."
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What is held against it; the same forms.")],
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|golden", help="Else the golden set, where there is one, or chance."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Of inputs, at most.")] = 100,
    top_k: Annotated[int, typer.Option(min=2, help="For classifiers.")] = 5,
    threads: ThreadsOption = None,
    shape: ShapeOption = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail below this top-1 agreement.")
    ] = None,
    min_sqnr: Annotated[
        float | None, typer.Option(metavar="DB", help="Fail below this SQNR.")
    ] = None,
) -> None:
    """Say how alike two models answer on the same inputs, and how fast each is."""
    from console.bench.comparison import compare_models
    from console.bench.feed import choose_feed
    from console.bench.target import find_side, look_at_box
    from platforms.threads import compute_threads

    found = [find_side(call.settings, text) for text in (a, b)]
    with call.out.spinner("looking at this box"):
        spec = look_at_box(call.settings)
    sides = (_choose_side(*found[0], spec), _choose_side(*found[1], spec))
    feed = choose_feed([target for target, _ in found], inputs, count)
    if feed.warning:
        call.out.note(f"note: {feed.warning}")
    with call.out.progress("inputs") as progress:
        result = compare_models(
            sides,
            feed,
            threads or compute_threads(spec.cores, 1),
            k=top_k,
            shapes=parse_shapes(shape),
            advance=make_advance(progress, feed.count),
        )
    faults = result.find_faults(min_agreement, min_sqnr)
    call.out.show(
        _to_document(result, feed, faults), lambda: _render_comparison(result, feed, faults)
    )
    end_with(Exit.ERROR if faults else Exit.OK)


def _choose_side(target: "Target", artifact: str | None, spec: "PlatformSpec") -> "Side":
    """Return the artifact that was named, or the one that the worker would run.

    Raises:
        NoArtifactError: it cannot run on this box.
    """
    from console.bench.comparison import Side
    from platforms.runtimes.registry import RUNTIME_FORMATS
    from platforms.selection import select_artifact

    kept = [item for item in target.artifacts if artifact in (None, item.file)]
    return Side(target, select_artifact(kept, spec, RUNTIME_FORMATS).get_chosen())


def _to_document(result: "Comparison", feed: "Feed", faults: list[str]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "schema": "edgeward.compare/v1",
        "likeness": result.likeness.value,
        "passed": not faults,
        "faults": faults,
        "inputs": {"count": result.inputs, "from": feed.description, "warning": feed.warning},
        "a": asdict(result.sides[0]),
        "b": asdict(result.sides[1]),
        "latency_ratio": result.latency_ratio,
        "outputs": [item.to_json() for item in result.outputs],
        "notes": list(result.notes),
    }


def _render_comparison(result: "Comparison", feed: "Feed", faults: list[str]) -> Any:
    from rich.console import Group
    from rich.text import Text

    from console.bench.report import format_figure

    outputs = [
        (
            item.name,
            item.rows,
            "–" if item.top_1 is None else f"{item.top_1:.4f}",
            "–" if item.top_k is None else f"{item.top_k:.4f} (k = {item.k})",
            *(
                "–" if value is None else form.format(value)
                for form, value in (
                    ("{:.1f}", item.sqnr_db),
                    ("{:.3g}", item.max_abs),
                    ("{:.3g}", item.mean_abs),
                    ("{:.6f}", item.cosine),
                )
            ),
        )
        for item in result.outputs
    ]
    sides = [
        (
            name,
            side.label,
            side.runtime,
            format_figure(side.size_bytes / 1e6),
            format_figure(side.p50_ms),
            format_figure(side.p95_ms),
            format_figure(side.rss_mb),
        )
        for name, side in zip("AB", result.sides, strict=True)
    ]
    speed = result.latency_ratio
    pace = f"{1 / speed:.2f} times as fast" if speed < 1 else f"{speed:.2f} times as slow"
    colour = "red" if faults else "green"
    verdict = Text(f"B is {result.likeness} on {feed.description}, and {pace}.", style=colour)
    columns = ("Output", "Rows", "Top-1", "Top-k", "SQNR, dB", "Max-abs", "Mean-abs", "Cosine")
    return Group(
        build_table(("", "Model", "Runtime", "File, MB", "p50, ms", "p95, ms", "RSS, MB"), sides),
        Text(),
        build_table(columns, outputs),
        *(Text(f"– {note}", style="yellow") for note in result.notes),
        Text(),
        verdict,
        *(Text(f"✗ {fault}", style="red") for fault in faults),
    )
