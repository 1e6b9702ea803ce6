"""The picture of a report: throughput and latency over load, one line per configuration.

Owns the drawing. matplotlib is the extra `bench` and is imported when something is drawn; no
display is needed.

Source: colours by Okabe and Ito, "Color Universal Design" (2008), told apart with any colour
vision; each line has a marker of its own as well.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from console.bench.report import Box, Configuration, Point, Report, Spread
from console.errors import InputFileError, PlotMissingError

FORMATS = (".png", ".svg", ".pdf")

_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK, _FAINT = "#222222", "#dddddd"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "edgeward",
}
_PANEL_INCHES = (4.6, 2.7)
_DPI = 160
# From here on figures are shown without decimals.
_WHOLE = 1000

Costs = Sequence[tuple[int, float]]
"""Pairs of rows and milliseconds."""
Axis = Callable[[Point], int]


def check_format(path: Path) -> None:
    """Refuse a file that could not be drawn, before anything is measured.

    Raises:
        InputFileError: the suffix is none that can be drawn.
        PlotMissingError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        msg = f"{path.name}: a plot is one of {', '.join(FORMATS)}"
        raise InputFileError(msg)
    if not is_available():
        msg = "drawing needs matplotlib, which is not installed: pip install 'edgeward[bench]'"
        raise PlotMissingError(msg)


def is_available() -> bool:
    """Say whether matplotlib is installed; does not import it."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def draw_report(report: Report, path: Path) -> None:
    """Write the picture of a report with at least one measured point; its suffix is the format.

    Raises:
        InputFileError, PlotMissingError: as `check_format`.
    """
    check_format(path)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = _choose_columns(report)
    with mpl.rc_context(_STYLE):
        width, height = _PANEL_INCHES
        figure = Figure(figsize=(width * len(columns) + 0.4, 2 * height + 1.2))
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, len(columns), squeeze=False)
        for column, (label, find_x, keep) in enumerate(columns):
            for row, (title, find_y) in enumerate(_ROWS):
                axes = grid[row][column]
                _draw_panel(axes, report, (find_x, find_y, keep))
                axes.set_title(title, pad=10)
                axes.set_xlabel(label if row else "")
        _add_heading(figure, grid[0][0], report)
        _save(figure, path)


def draw_costs(title: str, reason: str, costs: Costs, chosen_rows: int, path: Path) -> None:
    """Write the picture of what batches of a model cost; its suffix is the format.

    Args:
        title: above the picture.
        reason: why so many rows were chosen, one line below the title.
        costs: pairs of rows and milliseconds, by rows, ascending.
        chosen_rows: the largest batch that is made.
        path: of the picture.

    Raises:
        InputFileError, PlotMissingError: as `check_format`.
    """
    check_format(path)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (
        ("Latency of a run, ms", [ms for _, ms in costs]),
        ("Throughput, rows per second", [1000 * row / ms for row, ms in costs]),
    )
    rows = [row for row, _ in costs]
    with mpl.rc_context(_STYLE):
        width, height = _PANEL_INCHES
        figure = Figure(figsize=(2 * width + 0.4, height + 1.1))
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, 2)
        for number, (axes, (name, values)) in enumerate(zip(grid, panels, strict=True)):
            _draw_costs_panel(axes, number, rows, values, chosen_rows)
            axes.set_title(name, pad=10)
        top = figure.get_size_inches()[1]
        _write_heading(figure, title, reason)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.7 / top), w_pad=1.6)
        _save(figure, path)


def _draw_costs_panel(
    axes: Any, number: int, rows: Sequence[int], values: Sequence[float], chosen_rows: int
) -> None:
    colour = _COLOURS[number]
    axes.plot(rows, values, color=colour, linewidth=1.8, zorder=2)
    axes.scatter(
        rows, values, s=34, color=colour, marker=_MARKERS[number], edgecolor="white", zorder=3
    )
    for row, value in zip(rows, values, strict=True):
        if row == chosen_rows:
            axes.axvline(row, color=colour, alpha=0.35, linestyle=(0, (4, 3)), linewidth=1.2)
            axes.scatter([row], [value], s=130, facecolor="none", edgecolor=colour, zorder=4)
            axes.annotate(
                f"{value:,.3g}" if value < _WHOLE else f"{value:,.0f}",
                (row, value),
                # Left of the line where there is room: it may rise.
                xytext=(9, 9) if row == rows[0] else (-9, 9),
                textcoords="offset points",
                ha="left" if row == rows[0] else "right",
                weight="bold",
                color=colour,
            )
    _style_axes(axes, rows)
    axes.set_ylim(top=1.2 * max(values))
    axes.set_xlabel(f"Rows in a run; circled: the largest batch made, {chosen_rows}")


def _save(figure: Any, path: Path) -> None:
    # No date inside: the same report makes the same file.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    figure.savefig(path, dpi=_DPI, metadata=metadata)


_ROWS: tuple[tuple[str, Callable[[Point], Spread]], ...] = (
    ("Throughput, rows per second", lambda point: point.rows_per_s),
    ("Latency of a run, p95 in ms", lambda point: point.p95_ms),
)


def _choose_columns(report: Report) -> list[tuple[str, Axis, Callable[[Point], bool]]]:
    """Return the sweeps that have more than one point, or the first."""
    sweeps: list[tuple[str, Axis, Callable[[Point], bool]]] = [
        (
            "Threads that ask at the same time, one row each",
            lambda point: point.concurrency,
            lambda point: point.batch == 1,
        ),
        (
            "Rows in a run, one thread",
            lambda point: point.batch,
            lambda point: point.concurrency == 1,
        ),
    ]
    points = [point for item in report.measured for point in item.points]
    wide = [sweep for sweep in sweeps if len({sweep[1](p) for p in points if sweep[2](p)}) > 1]
    return wide or sweeps[:1]


def _draw_panel(
    axes: Any,
    report: Report,
    what: tuple[Axis, Callable[[Point], Spread], Callable[[Point], bool]],
) -> None:
    find_x, find_y, keep = what
    ticks: set[int] = set()
    for number, item in enumerate(report.measured):
        points = sorted((point for point in item.points if keep(point)), key=find_x)
        ticks |= {find_x(point) for point in points}
        _draw_line(axes, number, item, [(find_x(p), find_y(p)) for p in points])
    _style_axes(axes, sorted(ticks))


def _style_axes(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.06)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.yaxis.set_tick_params(length=0, labelleft=True)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_line(
    axes: Any, number: int, item: Configuration, points: Sequence[tuple[int, Spread]]
) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    xs = [x for x, _ in points]
    lows, highs = [y.min for _, y in points], [y.max for _, y in points]
    # Beyond the palette the line's form tells them apart.
    form = "-" if number < len(_COLOURS) else "--"
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)
    axes.plot(
        xs,
        [y.median for _, y in points],
        form,
        color=colour,
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        linewidth=1.8,
        label=item.label,
    )


def _add_heading(figure: Any, axes: Any, report: Report) -> None:
    """Put title, conditions and legend above the panels, all flush left."""
    release = f" {report.model.release}" if report.model.release else ""
    _write_heading(figure, f"{report.model.name}{release}", _describe(report.box, report))
    height = figure.get_size_inches()[1]
    handles, labels = axes.get_legend_handles_labels()
    per_line = max(1, int(figure.get_size_inches()[0] // 2.6))
    lines = -(-len(labels) // per_line)
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.003, 1 - 0.66 / height),
        ncols=per_line,
        frameon=False,
        handlelength=1.8,
        columnspacing=1.6,
    )
    top = 1 - (0.72 + 0.22 * lines) / height
    figure.tight_layout(rect=(0, 0, 1, top), h_pad=1.4, w_pad=1.6)


def _write_heading(figure: Any, title: str, text: str) -> None:
    height = figure.get_size_inches()[1]
    figure.text(0.012, 1 - 0.16 / height, title, size=14, weight="bold", va="top")
    figure.text(0.012, 1 - 0.45 / height, text, size=9, color="#555555", va="top")


def _describe(box: Box, report: Report) -> str:
    rounds = report.conditions.rounds
    how = "one round" if rounds == 1 else f"median of {rounds} rounds, shaded from least to most"
    return f"{box.cpu_model}, {box.cores:g} cores · {how} · {report.measured_at[:10]}"
