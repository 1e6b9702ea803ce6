"""What a measurement found, as it is kept in a file: `edgeward.bench/v1`.

Owns the schema, the statistics over rounds, and the Markdown form. Measures nothing.

Invariants: every figure that was taken in several rounds keeps its median and its range;
memory is in MB of 10⁶ bytes, times in ms, CPU in per cent of one core.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from console.errors import InputFileError

SCHEMA = "edgeward.bench/v1"

_D2 = {2: 1.128, 3: 1.693, 4: 2.059, 5: 2.326, 6: 2.534, 7: 2.704, 8: 2.847, 9: 2.970, 10: 3.078}
"""Mean range of n normal numbers in standard deviations. Source: control chart constant d2."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Record):
    """A figure over rounds."""

    median: float
    min: float
    max: float
    rounds: int = Field(ge=1)

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of one value per round."""
        return cls(
            median=statistics.median(values),
            min=min(values),
            max=max(values),
            rounds=len(values),
        )

    @property
    def relative_sd(self) -> float:
        """Estimate the standard deviation as a share of the median, from the range.

        0 where there was one round only, which says nothing about noise.
        """
        if self.rounds < 2 or self.median == 0:
            return 0.0
        return (self.max - self.min) / _D2[min(self.rounds, max(_D2))] / abs(self.median)


class Point(_Record):
    """One load on one configuration."""

    concurrency: int
    batch: int
    runs: int
    """Counted ones, of all rounds."""
    mean_ms: Spread
    p50_ms: Spread
    p95_ms: Spread
    p99_ms: Spread
    rows_per_s: Spread
    cpu_percent: Spread


class Stress(_Record):
    """A long run under full load."""

    seconds: float
    concurrency: int
    batch: int
    runs: int
    failures: dict[str, int]
    """Failed runs by error code."""
    first_failure: str
    rows_per_s: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    longest_ms: float
    slow_runs: int
    """Over ten times the median."""
    longest_gap_ms: float
    """In which no run ended."""
    rss_start_mb: float
    rss_steady_mb: float
    """After a tenth of the time."""
    rss_end_mb: float


class Configuration(_Record):
    """One artifact on one runtime."""

    artifact: str
    format: str
    precision: str
    size_bytes: int
    sha256: str
    runtime: str | None
    status: Literal["measured", "failed", "ruled_out"]
    detail: str = ""
    """Why it failed or was ruled out; or which points were left out, and why."""
    is_chosen: bool = False
    """It is what the worker would run."""
    runtime_version: str | None = None
    provider: str | None = None
    import_ms: Spread | None = None
    """Of the runtime's library."""
    load_ms: Spread | None = None
    """Of the model, after that."""
    warm_up_ms: Spread | None = None
    """The first run."""
    base_rss_mb: Spread | None = None
    """Of the interpreter with NumPy, before the runtime is imported."""
    rss_mb: Spread | None = None
    """After load."""
    pss_mb: Spread | None = None
    rss_end_mb: Spread | None = None
    pss_end_mb: Spread | None = None
    points: tuple[Point, ...] = ()
    stress: Stress | None = None

    @property
    def label(self) -> str:
        """Return what a person calls it."""
        return f"{self.artifact} · {self.runtime}" if self.runtime else self.artifact

    def find_point(self, concurrency: int, batch: int) -> Point | None:
        """Return the point of this load, or None."""
        at = (concurrency, batch)
        return next((item for item in self.points if (item.concurrency, item.batch) == at), None)


class Box(_Record):
    """Where it was measured."""

    hardware_class: str
    os: str
    arch: str
    cpu_model: str
    cores: float
    memory_mb: int
    python: str


class Conditions(_Record):
    """How it was measured."""

    seconds: float
    """Per point, all rounds together."""
    rounds: int
    threads: int
    """Inside one operator."""
    concurrency: tuple[int, ...]
    batch: tuple[int, ...]
    inputs: str
    """Where the input rows came from."""


class Model(_Record):
    """What was measured."""

    name: str
    version: str | None
    release: str | None
    digest: str


class Report(_Record):
    """A whole measurement."""

    schema_: Literal["edgeward.bench/v1"] = Field(alias="schema")
    measured_at: str
    """UTC, ISO 8601."""
    edgeward: str
    box: Box
    model: Model
    conditions: Conditions
    configurations: tuple[Configuration, ...]

    @property
    def measured(self) -> tuple[Configuration, ...]:
        """Return the configurations that have figures."""
        return tuple(item for item in self.configurations if item.status == "measured")

    @property
    def failed(self) -> tuple[Configuration, ...]:
        """Return the configurations that should have figures and have none, or failed runs."""
        return tuple(
            item
            for item in self.configurations
            if item.status == "failed" or (item.stress is not None and item.stress.failures)
        )

    def to_text(self) -> str:
        """Return the file's text."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def read_report(path: Path) -> Report:
    """Read a report that was saved.

    Raises:
        InputFileError: it cannot be read, or is no report of this schema.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as exc:
        msg = f"{path} cannot be read: {exc.strerror}"
        raise InputFileError(msg) from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(whole document)"
        msg = f"{path} is no report of `edgeward bench` ({SCHEMA}): {where}: {first['msg']}"
        raise InputFileError(msg) from exc


# --- for people --------------------------------------------------------------------------

POINT_HEADERS = (
    "Artifact",
    "Runtime",
    "Threads × rows",
    "Rows/s",
    "Mean, ms",
    "p50, ms",
    "p95, ms",
    "p99, ms",
    "CPU, %",
    "Runs",
)
LOAD_HEADERS = (
    "Artifact",
    "Runtime",
    "Precision",
    "File, MB",
    "Load, ms",
    "First run, ms",
    "RSS / PSS, MB",
    "At the end, MB",
)
STRESS_HEADERS = (
    "Artifact",
    "Runtime",
    "Seconds",
    "Runs",
    "Failed",
    "Rows/s",
    "p50 / p99 / max, ms",
    "Slow runs",
    "Longest gap, ms",
    "RSS, MB: steady → end",
)


def format_figure(value: float) -> str:
    """Return a number with three significant digits or all its whole ones, `1,234`."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    decimals = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{decimals}f}"


def format_spread(spread: Spread | None) -> str:
    """Return the median, and the range where there was more than one round."""
    if spread is None:
        return "–"
    median = format_figure(spread.median)
    if spread.rounds == 1:
        return median
    return f"{median} ({format_figure(spread.min)}–{format_figure(spread.max)})"


def iterate_load_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Yield a row of `LOAD_HEADERS` per measured configuration."""
    for item in report.measured:
        yield (
            f"{item.artifact}{' ★' if item.is_chosen else ''}",
            f"{item.runtime} {item.runtime_version}",
            item.precision,
            format_figure(item.size_bytes / 1e6),
            format_spread(item.load_ms),
            format_spread(item.warm_up_ms),
            f"{_median(item.rss_mb)} / {_median(item.pss_mb)}",
            f"{_median(item.rss_end_mb)} / {_median(item.pss_end_mb)}",
        )


def _median(spread: Spread | None) -> str:
    return "–" if spread is None else format_figure(spread.median)


def iterate_point_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Yield a row of `POINT_HEADERS` per point."""
    for item in report.measured:
        for point in item.points:
            yield (
                item.artifact,
                str(item.runtime),
                f"{point.concurrency} × {point.batch}",
                format_spread(point.rows_per_s),
                _median(point.mean_ms),
                _median(point.p50_ms),
                format_spread(point.p95_ms),
                _median(point.p99_ms),
                f"{point.cpu_percent.median:.0f}",
                f"{point.runs:,}",
            )


def iterate_stress_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Yield a row of `STRESS_HEADERS` per configuration that was stressed."""
    for item in report.measured:
        found = item.stress
        if found is None:
            continue
        times = (found.p50_ms, found.p99_ms, found.longest_ms)
        yield (
            item.artifact,
            str(item.runtime),
            f"{found.seconds:g}",
            f"{found.runs:,}",
            f"{sum(found.failures.values()):,}",
            format_figure(found.rows_per_s),
            " / ".join("–" if value is None else format_figure(value) for value in times),
            f"{found.slow_runs:,}",
            format_figure(found.longest_gap_ms),
            f"{format_figure(found.rss_steady_mb)} → {format_figure(found.rss_end_mb)}",
        )


def iterate_left_out(report: Report) -> Iterator[str]:
    """Yield a sentence per configuration without figures, and per one with a remark."""
    for item in report.configurations:
        if item.status != "measured":
            yield f"{item.label} {item.status.replace('_', ' ')}: {item.detail}"
            continue
        if item.detail:
            yield f"{item.label}: {item.detail}"
        if item.stress is not None and item.stress.first_failure:
            yield f"{item.label}: the first failure was: {item.stress.first_failure}"


def describe_conditions(report: Report) -> str:
    """Return one sentence on how it was measured."""
    how = report.conditions
    rounds = "1 round" if how.rounds == 1 else f"{how.rounds} rounds, median (min–max)"
    threads = "1 thread" if how.threads == 1 else f"{how.threads} threads"
    time = f"{how.seconds:g} s per point in {rounds}"
    return f"{threads} inside an operator; {how.inputs}; {time}"


def describe_box(report: Report) -> str:
    """Return one sentence on where it was measured."""
    box = report.box
    return (
        f"{box.cpu_model}, {box.cores:g} cores, {box.memory_mb:,} MB "
        f"({box.hardware_class}), Python {box.python}"
    )


def describe_model(report: Report) -> str:
    """Return the model's name, version and digest."""
    model = report.model
    version = f", version {model.version}" if model.version else ""
    release = f", release {model.release}" if model.release else ""
    return f"{model.name}{version}{release}, sha256 {model.digest[:12]}…"


def render_markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """Return the report as a Markdown document.

    Args:
        report: what to show.
        pictures: files beside the document.
    """
    parts = [
        f"# {report.model.name} on this box",
        f"{describe_model(report)}. Measured {report.measured_at} "
        f"with Edgeward {report.edgeward}.\n\n"
        f"Box: {describe_box(report)}.\n\nHow: {describe_conditions(report)}.",
        *(f"![Throughput and latency]({name})" for name in pictures),
        "## Load and memory\n\n" + _table(LOAD_HEADERS, [*iterate_load_rows(report)]),
    ]
    points, stressed = [*iterate_point_rows(report)], [*iterate_stress_rows(report)]
    if points:
        parts.append("## Speed\n\n" + _table(POINT_HEADERS, points))
    if stressed:
        parts.append("## Under stress\n\n" + _table(STRESS_HEADERS, stressed))
    left_out = [f"- {line}" for line in iterate_left_out(report)]
    if left_out:
        parts.append("## Left out, and remarks\n\n" + "\n".join(left_out))
    parts.append("★ what the worker runs. MB are 10⁶ bytes; CPU is of one core.")
    return "\n\n".join(parts) + "\n"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * 2 + ["---:"] * (len(headers) - 2), *rows]
    return "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")
