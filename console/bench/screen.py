"""A report as a person reads it on a screen of 80 columns.

Owns what is left out for want of room: a block per configuration, without its name in each line,
without means and counts. All figures are in the JSON report and the Markdown table.
"""

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from console.bench.baseline import Judgement
from console.bench.report import (
    Configuration,
    Report,
    Stress,
    describe_box,
    describe_conditions,
    describe_model,
    format_figure,
    format_spread,
    iterate_left_out,
)
from console.output import build_facts, build_table

_HEADERS = ("Load", "Rows/s", "p50 ms", "p95 ms", "p99 ms", "CPU %")


def render_report(report: Report, judgement: Judgement | None) -> Group:
    """Return the report, and what a baseline says of it."""
    head = build_facts(
        [
            ("Model", describe_model(report)),
            ("Box", describe_box(report)),
            ("How", describe_conditions(report)),
            ("Load", "threads that ask at the same time × rows in a run"),
        ]
    )
    parts: list[Any] = [head]
    for item in report.measured:
        parts += [Text(), *_iterate_block(item)]
    left_out = [*iterate_left_out(report)]
    if left_out:
        parts.append(Text())
    parts += [Text(f"– {line}", style="yellow") for line in left_out]
    if judgement is not None:
        parts += [Text(), *_iterate_judgement(judgement)]
    return Group(*parts)


def _iterate_block(item: Configuration) -> Iterator[Any]:
    """Yield what there is to say of one artifact on one runtime."""
    star = " ★" if item.is_chosen else ""
    size = format_figure(item.size_bytes / 1e6)
    form = f"{item.precision}, {size} MB, on {item.runtime} {item.runtime_version}"
    yield Text.assemble((f"{item.artifact}{star}", "bold"), f"  {form}")
    loading = f"{format_spread(item.load_ms)}; first run {format_spread(item.warm_up_ms)}"
    facts = [("To load, ms", loading), *_iterate_memory(item)]
    yield Padding(build_facts(facts), (0, 0, 0, 2))
    if item.points:
        rows = [
            (
                f"{point.concurrency} × {point.batch}",
                format_spread(point.rows_per_s),
                format_figure(point.p50_ms.median),
                format_spread(point.p95_ms),
                format_figure(point.p99_ms.median),
                f"{point.cpu_percent.median:.0f}",
            )
            for point in item.points
        ]
        yield build_table(_HEADERS, rows)
    if item.stress is not None:
        yield Padding(build_facts(_list_stress(item.stress)), (0, 0, 0, 2))


def _iterate_memory(item: Configuration) -> Iterator[tuple[str, str]]:
    kinds = (("RSS", item.rss_mb, item.rss_end_mb), ("PSS", item.pss_mb, item.pss_end_mb))
    for name, before, after in kinds:
        if before is not None and after is not None:
            start, end = format_figure(before.median), format_figure(after.median)
            yield f"{name}, MB", f"{start} when loaded, {end} at the end"


def _list_stress(found: Stress) -> list[tuple[str, object]]:
    failed = sum(found.failures.values())
    times = (("p50", found.p50_ms), ("p99", found.p99_ms), ("longest", found.longest_ms))
    shown = ", ".join(f"{name} {format_figure(ms)}" for name, ms in times if ms is not None)
    outcome = f"{found.runs:,} runs, {failed:,} failed"
    return [
        ("Stress", f"{found.seconds:g} s of {found.concurrency} × {found.batch}"),
        ("Runs", Text(outcome, style="red" if failed else "green")),
        ("Rows/s", format_figure(found.rows_per_s)),
        ("Run, ms", f"{shown}; {found.slow_runs:,} over ten times the median"),
        ("Gap, ms", f"{format_figure(found.longest_gap_ms)}, the longest without an answer"),
        ("RSS, MB", f"{format_figure(found.rss_steady_mb)} → {format_figure(found.rss_end_mb)}"),
    ]


def _iterate_judgement(judgement: Judgement) -> Iterator[Text]:
    bad = [*judgement.broken, *map(str, judgement.regressions)]
    for note in judgement.notes:
        yield Text(f"– {note}")
    for line in bad:
        yield Text(f"✗ {line}", style="red")
    if not bad:
        text = f"✓ no slower than the baseline beyond noise ({judgement.compared} points)"
        yield Text(text, style="green")
