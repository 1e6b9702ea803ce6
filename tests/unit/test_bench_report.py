"""A report's statistics and forms, and when a point counts as slower than a baseline."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from console.bench.baseline import Judgement, confirm, find_mismatches, judge
from console.bench.campaign import plan_loads
from console.bench.report import (
    Box,
    Conditions,
    Configuration,
    Model,
    Point,
    Report,
    Spread,
    format_figure,
    format_spread,
    read_report,
    render_markdown,
)
from console.bench.screen import render_report
from console.errors import InputFileError


def spread(*values: float) -> Spread:
    return Spread.from_values(values)


def make_point(p95: Spread, rate: Spread, concurrency: int = 1) -> Point:
    one = spread(1.0)
    return Point(
        concurrency=concurrency,
        batch=1,
        runs=10,
        mean_ms=one,
        p50_ms=one,
        p95_ms=p95,
        p99_ms=one,
        rows_per_s=rate,
        cpu_percent=one,
    )


def make_configuration(*points: Point, **changed: Any) -> Configuration:
    facts: dict[str, Any] = {
        "artifact": "a.onnx",
        "format": "onnx",
        "precision": "fp32",
        "size_bytes": 1_000_000,
        "sha256": "0" * 64,
        "runtime": "ort",
        "status": "measured",
        "runtime_version": "1.32.0",
        "points": points,
    }
    return Configuration(**{**facts, **changed})


def make_report(*configurations: Configuration, cpu: str = "A CPU", digest: str = "d") -> Report:
    return Report(
        schema="edgeward.bench/v1",
        measured_at="2026-11-23T00:00:00+00:00",
        edgeward="0.1.0",
        box=Box(
            hardware_class="x",
            os="linux",
            arch="x86_64",
            cpu_model=cpu,
            cores=2,
            memory_mb=1,
            python="3.11",
        ),
        model=Model(name="m", version="1", release="1.0.0", digest=digest),
        conditions=Conditions(
            seconds=3, rounds=3, threads=2, concurrency=(1,), batch=(1,), inputs="random tensors"
        ),
        configurations=configurations,
    )


def judge_p95(before: Spread, now: Spread) -> bool:
    rate = spread(100.0, 100.0, 100.0)
    old = make_report(make_configuration(make_point(before, rate)))
    return judge(old, make_report(make_configuration(make_point(now, rate)))).is_worse


def test_spread_estimates_the_standard_deviation_from_the_range() -> None:
    # Three values with a range of 0.4: 0.4 / 1.693 of a median of 2.
    assert spread(1.8, 2.0, 2.2).relative_sd == pytest.approx(0.4 / 1.693 / 2)
    assert spread(5.0).relative_sd == 0.0


def test_quiet_point_regresses_beyond_ten_per_cent() -> None:
    before = spread(1.0, 1.0, 1.0)
    assert not judge_p95(before, spread(1.09, 1.09, 1.09))
    assert judge_p95(before, spread(1.11, 1.11, 1.11))


def test_noisy_point_regresses_beyond_three_standard_deviations() -> None:
    # The range of 0.2 is a standard deviation of 11.8 %, so 35 % are allowed, on either side.
    noisy, quiet = spread(0.9, 1.0, 1.1), spread(1.0, 1.0, 1.0)
    assert not judge_p95(noisy, spread(1.34, 1.34, 1.34))
    assert judge_p95(noisy, spread(1.37, 1.37, 1.37))
    assert not judge_p95(quiet, spread(1.17, 1.3, 1.43))


def test_lower_throughput_is_a_regression_and_higher_is_none() -> None:
    p95 = spread(1.0, 1.0, 1.0)

    def judge_rate(now: float) -> list[str]:
        old = make_report(make_configuration(make_point(p95, spread(100, 100, 100))))
        new = make_report(make_configuration(make_point(p95, spread(now, now, now))))
        return [change.figure for change in judge(old, new).regressions]

    assert judge_rate(89.0) == ["rows_per_s"]
    assert judge_rate(91.0) == []
    assert judge_rate(300.0) == []


def test_regression_is_worded_with_both_figures() -> None:
    rate = spread(100, 100, 100)
    old = make_report(make_configuration(make_point(spread(1, 1, 1), rate, concurrency=8)))
    new = make_report(make_configuration(make_point(spread(2, 2, 2), rate, concurrency=8)))
    (change,) = judge(old, new).regressions
    expected = "a.onnx · ort, 8 × 1: p95 1.00 → 2.00 ms, 100% worse (10% allowed)"
    assert str(change) == expected


def test_what_is_slower_once_only_is_noted_and_no_regression() -> None:
    rate, slow, good = spread(100, 100, 100), spread(2, 2, 2), spread(1, 1, 1)

    def judge_points(first: Spread, second: Spread) -> Judgement:
        points = make_point(good, rate), make_point(good, rate, 2)
        now = make_point(first, rate), make_point(second, rate, 2)
        return judge(
            make_report(make_configuration(*points)), make_report(make_configuration(*now))
        )

    first = judge_points(slow, slow)
    kept = confirm(first, judge_points(good, slow))
    assert [change.concurrency for change in kept.regressions] == [2]
    assert kept.notes == (
        "measured again, 1 of the figures that looked worse are within the noise",
    )
    # What was good at first is not made worse by a second look.
    assert not confirm(judge_points(good, good), judge_points(slow, slow)).is_worse


def test_what_ran_and_fails_now_is_worse() -> None:
    point = make_point(spread(1), spread(1))
    old = make_report(make_configuration(point))
    new = make_report(make_configuration(status="failed", detail="its process died with SIGABRT"))
    judgement = judge(old, new)
    assert judgement.is_worse
    assert "SIGABRT" in judgement.broken[0]


def test_points_and_files_on_one_side_are_noted() -> None:
    point, other = make_point(spread(1), spread(1)), make_point(spread(1), spread(1), 2)
    old = make_report(make_configuration(point), make_configuration(point, artifact="b.onnx"))
    new = make_report(make_configuration(other, runtime_version="1.33.0"))
    judgement = judge(old, new)
    assert (judgement.compared, judgement.is_worse) == (0, False)
    assert len(judgement.notes) == 3


def test_other_box_or_model_is_a_mismatch() -> None:
    old = make_report()
    assert find_mismatches(old, make_report()) == []
    assert find_mismatches(old, make_report(cpu="B CPU")) == ["the CPU: A CPU, now B CPU"]
    assert len(find_mismatches(old, make_report(cpu="B CPU", digest="e"))) == 2


def test_report_survives_a_file(tmp_path: Path) -> None:
    report = make_report(make_configuration(make_point(spread(1, 2, 3), spread(4, 5, 6))))
    path = tmp_path / "bench.json"
    path.write_text(report.to_text())
    assert read_report(path) == report


def test_file_that_is_no_report_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"schema": "something/v9"}')
    with pytest.raises(InputFileError, match=r"other\.json is no report"):
        read_report(path)
    with pytest.raises(InputFileError, match="cannot be read"):
        read_report(tmp_path / "missing.json")


def test_markdown_tables_have_as_many_cells_as_headers() -> None:
    point = make_point(spread(1, 2, 3), spread(1000, 2000, 3000))
    ruled_out = make_configuration(status="ruled_out", detail="needs | a GPU", artifact="g.onnx")
    text = render_markdown(make_report(make_configuration(point), ruled_out))
    for table in text.split("\n\n"):
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1
    assert "2,000 (1,000–3,000)" in text
    assert "- g.onnx · ort ruled out: needs | a GPU" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123")],
)
def test_figures_have_three_digits(value: float, shown: str) -> None:
    assert format_figure(value) == shown


def test_spread_of_one_round_has_no_range() -> None:
    assert format_spread(spread(2.0)) == "2.00"
    assert format_spread(spread(1.0, 2.0, 4.0)) == "2.00 (1.00–4.00)"


def test_sweeps_share_their_common_point() -> None:
    assert plan_loads((1, 2), (1, 4)) == ((1, 1), (2, 1), (1, 4))


def test_screen_of_eighty_columns_holds_each_load_in_one_line() -> None:
    rate, p95 = spread(304_270, 359_990, 392_906), spread(0.036, 0.064, 0.107)
    points = [make_point(p95, rate, concurrency) for concurrency in (1, 16)]
    memory = dict.fromkeys(("rss_mb", "rss_end_mb", "pss_mb", "pss_end_mb"), spread(98.3, 101))
    measured = make_configuration(*points, load_ms=p95, is_chosen=True, **memory)
    failed = make_configuration(artifact="b.onnx", status="failed", detail="it died with SIGILL")
    console = Console(width=80, file=StringIO(), record=True)
    console.print(render_report(make_report(measured, failed), None))
    lines = console.export_text().splitlines()
    (line,) = [line for line in lines if line.startswith("16 × 1")]
    assert "359,990 (304,270–392,906)" in line
    assert "0.064 (0.036–0.107)" in line
    assert max(map(len, lines)) <= 80
    assert any("a.onnx ★" in line and "ort 1.32.0" in line for line in lines)
    assert any("it died with SIGILL" in line for line in lines)
