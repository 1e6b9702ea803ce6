"""Choosing a batch from a cost curve: rules that hold for every curve, and known curves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.costs import (
    GAIN_MIN,
    LATENCY_MULTIPLE,
    CostPoint,
    Objective,
    choose_rows,
)

LATENCIES = st.lists(st.floats(0.001, 10_000), min_size=1, max_size=8)
P95, THROUGHPUT = Objective.LATENCY_P95, Objective.THROUGHPUT

# Measured on 2 vCPU x86-64, onnxruntime 1.32, one thread (`python -m benchmarks.engine`), ms.
MLP = (0.012, 0.012, 0.013, 0.015, 0.019, 0.028)
CNN = (4.431, 8.201, 15.462, 31.378, 62.327, 146.026)


def make_points(latencies: list[float] | tuple[float, ...]) -> list[CostPoint]:
    return [CostPoint(1 << n, latency_ms) for n, latency_ms in enumerate(latencies)]


@given(LATENCIES, st.sampled_from(Objective))
def test_choice_is_a_measured_batch_that_pays(latencies: list[float], objective: Objective) -> None:
    points = {point.rows: point for point in make_points(latencies)}
    rows, reason = choose_rows(tuple(points.values()), objective)
    assert reason
    if rows > 1:
        assert points[rows].latency_ms / rows <= (1 - GAIN_MIN) * latencies[0] * (1 + 1e-9)
    if objective is P95:
        assert points[rows].latency_ms <= LATENCY_MULTIPLE * latencies[0]


@given(LATENCIES)
def test_no_batch_costs_noticeably_less_per_row_than_the_one_for_throughput(
    latencies: list[float],
) -> None:
    points = make_points(latencies)
    rows, _ = choose_rows(points, THROUGHPUT)
    chosen = next(point.per_row_ms for point in points if point.rows == rows)
    lowest = min(point.per_row_ms for point in points)
    # 2 % are noise; under 10 % nothing is batched at all.
    assert lowest >= chosen * (1 - (0.02 if rows > 1 else 0.12)) * (1 - 1e-9)


@given(LATENCIES, st.sampled_from(Objective), st.sampled_from([0.5, 2.0, 1024.0]))
def test_choice_does_not_depend_on_how_fast_the_box_is(
    latencies: list[float], objective: Objective, factor: float
) -> None:
    slower = [latency_ms * factor for latency_ms in latencies]
    assert (
        choose_rows(make_points(latencies), objective)[0]
        == choose_rows(make_points(slower), objective)[0]
    )


@given(st.floats(0.001, 1000), st.integers(1, 8), st.sampled_from(Objective))
def test_cost_that_grows_with_the_rows_makes_no_batches(
    alone_ms: float, count: int, objective: Objective
) -> None:
    points = make_points([alone_ms * (1 << n) for n in range(count)])
    assert choose_rows(points, objective)[0] == 1


def test_mlp_is_batched_and_a_cnn_hardly() -> None:
    assert choose_rows(make_points(MLP), THROUGHPUT)[0] == 32
    assert choose_rows(make_points(MLP), P95)[0] == 32
    assert choose_rows(make_points(CNN), THROUGHPUT)[0] == 4
    assert choose_rows(make_points(CNN), P95)[0] == 4


def test_reason_names_the_gain_or_why_there_is_none() -> None:
    assert "13% less" in choose_rows(make_points(CNN), P95)[1]
    assert "gains 5% per row, under 10%" in choose_rows(make_points([10, 19]), P95)[1]
    assert "could not be measured" in choose_rows(make_points([10]), P95)[1]
    assert "4 times as long" in choose_rows(make_points([10, 15, 30, 55]), P95)[1]


def test_curve_without_a_single_row_is_refused() -> None:
    for points in ([], [CostPoint(2, 1.0)]):
        with pytest.raises(ValueError, match="begins at 1 row"):
            choose_rows(points, P95)
