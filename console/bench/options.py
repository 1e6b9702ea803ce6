"""The options of `edgeward bench`, some of which `edgeward compare` shares.

Owns their help and the reading of lists and shapes. Kept light: it is imported when the command
line starts.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_LARGEST = 4096


class _Panel(StrEnum):
    LOAD = "Load"
    FILES = "Files"
    BASELINE = "Baseline"


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model here, NAME@VERSION, or a path.")
]
VersionOption = Annotated[str | None, typer.Option(help="Number or release.")]
ArtifactOption = Annotated[list[str] | None, typer.Option(help="Only this file; may be repeated.")]
RuntimeOption = Annotated[
    list[str] | None, typer.Option(help="Only this runtime; may be repeated.")
]
ConcurrencyOption = Annotated[
    str, typer.Option(help="Threads that ask at the same time.", rich_help_panel=_Panel.LOAD)
]
BatchOption = Annotated[
    str, typer.Option(help="Rows per run, of one thread.", rich_help_panel=_Panel.LOAD)
]
SecondsOption = Annotated[
    float,
    typer.Option(min=0.01, help="Per point, all rounds together.", rich_help_panel=_Panel.LOAD),
]
RoundsOption = Annotated[
    int, typer.Option(min=1, max=100, help="Fresh starts of each.", rich_help_panel=_Panel.LOAD)
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads inside an operator; else as the worker's."),
]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=3,224,224",
        help="An input's free axes, without the batch; for random inputs.",
    ),
]
StressOption = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        metavar="SECONDS",
        help="Instead: full load for so long, at the highest concurrency; count failures.",
        rich_help_panel=_Panel.LOAD,
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Write bench.json, .md, .svg there.", rich_help_panel=_Panel.FILES
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf.", rich_help_panel=_Panel.FILES),
]
SaveBaselineOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Keep it to compare with later.", rich_help_panel=_Panel.BASELINE
    ),
]
AgainstOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Fail where it is slower than this baseline beyond noise.",
        rich_help_panel=_Panel.BASELINE,
    ),
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force", help="Also against another box or model.", rich_help_panel=_Panel.BASELINE
    ),
]


def parse_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of `1,2,4`, each once.

    Raises:
        typer.BadParameter: one is none, or out of range.
    """
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 1,2,4") from exc
    if any(not 1 <= number <= _LARGEST for number in found):
        raise typer.BadParameter(f"{text!r}: each number is from 1 to {_LARGEST}")
    return found


def parse_shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `x=3,224,224` by input name.

    Raises:
        typer.BadParameter: one has another form.
    """
    found = {}
    for text in texts or ():
        name, _, axes = text.rpartition("=")
        parts = axes.split(",")
        if not name or not all(part.isdecimal() and int(part) for part in parts):
            raise typer.BadParameter(f"{text!r} has not the form NAME=3,224,224")
        found[name] = tuple(map(int, parts))
    return found
