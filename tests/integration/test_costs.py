"""Measuring real sessions: the curve's form, its bounds, and that it is kept."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from benchmarks.nets import build_mlp
from platforms.errors import PlatformError
from platforms.runtimes.base import LoadOptions, Session
from platforms.runtimes.registry import get_runtime
from tests.harness.sessions import load_graph, load_loop, load_table
from worker.engine.costs import (
    CostCurve,
    CostIdentity,
    CostPoint,
    CostPolicy,
    Objective,
    build_curve,
    find_curves,
    load_curve,
    make_inputs,
    measure_costs,
)

IDENTITY = CostIdentity("sha", "ort", "1", 1, 2.0, "cpu", "CPUExecutionProvider", True)


@pytest.fixture
def mlp(tmp_path: Path) -> Session:
    return get_runtime("ort").load(build_mlp(tmp_path / "mlp.onnx"), LoadOptions(threads=1))


def test_curve_doubles_up_to_the_limit_and_says_what_was_chosen(mlp: Session) -> None:
    curve = measure_costs(mlp, CostPolicy(rows_max=8, budget_s=30))
    rows = [point.rows for point in curve.points]
    assert rows == [1, 2, 4, 8][: len(rows)]
    assert all(point.latency_ms > 0 for point in curve.points)
    assert curve.chosen_rows in rows
    shown = curve.to_json()
    assert json.loads(json.dumps(shown)) == shown
    assert [point[0] for point in shown["points"]] == rows
    assert shown["max_rows"] == curve.chosen_rows


def test_budget_bounds_the_measuring_but_one_row_is_always_measured(mlp: Session) -> None:
    curve = measure_costs(mlp, CostPolicy(budget_s=0))
    assert [point.rows for point in curve.points] == [1]
    assert curve.chosen_rows == 1


def test_model_without_a_batch_axis_is_measured_as_it_is(tmp_path: Path) -> None:
    curve = measure_costs(load_loop(tmp_path), CostPolicy(), is_batchable=False)
    assert (len(curve.points), curve.chosen_rows) == (1, 1)
    assert "no batch axis" in curve.reason


def test_batch_that_does_not_run_ends_the_curve(tmp_path: Path) -> None:
    # Reshaped to 4 rows at most: the model itself fails at 8.
    nodes = [
        helper.make_node("Constant", [], ["w"], value_floats=[1.0, 1.0, 1.0, 1.0]),
        helper.make_node("Shape", ["x"], ["s"], start=0, end=1),
        helper.make_node("Constant", [], ["zero"], value_ints=[0]),
        helper.make_node("Slice", ["w", "zero", "s"], ["ones"]),
        helper.make_node("Constant", [], ["column"], value_ints=[-1, 1]),
        helper.make_node("Reshape", ["ones", "column"], ["c"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Expand", ["c", "shape"], ["wide"]),
        helper.make_node("Mul", ["x", "wide"], ["y"]),
    ]
    session = load_graph(tmp_path / "m.onnx", nodes)
    with pytest.raises(PlatformError):
        session.run({"x": np.ones((8, 2), np.float32)})
    curve = measure_costs(session, CostPolicy(budget_s=30))
    assert curve.points[-1].rows <= 4


def test_given_input_is_what_is_run(tmp_path: Path) -> None:
    table = load_table(tmp_path)
    with pytest.raises(PlatformError):
        measure_costs(table, CostPolicy(), inputs={"x": np.array([[99]])})
    assert measure_costs(table, CostPolicy(), inputs={"x": np.array([[2]])}).points


def test_made_up_inputs_fit_every_kind_of_tensor(tmp_path: Path) -> None:
    for number, kind in enumerate(
        (
            TensorProto.BOOL,
            TensorProto.INT8,
            TensorProto.UINT64,
            TensorProto.FLOAT16,
            TensorProto.DOUBLE,
            TensorProto.STRING,
        )
    ):
        both = (kind, ["N", 2, "M"])
        session = load_graph(
            tmp_path / f"{number}.onnx", [helper.make_node("Identity", ["x"], ["y"])], both, both
        )
        inputs = make_inputs(session, 3)
        assert inputs["x"].shape == (3, 2, 1)
        assert session.run(inputs)["y"].shape == (3, 2, 1)


def test_shrinking_leaves_a_session_that_answers_as_before(mlp: Session) -> None:
    one = make_inputs(mlp)
    before = mlp.run(one)["y"]
    mlp.run(make_inputs(mlp, 64))
    mlp.shrink(one)
    np.testing.assert_array_equal(mlp.run(one)["y"], before)
    with pytest.raises(PlatformError):
        mlp.shrink({})
    mlp.close()
    with pytest.raises(PlatformError):
        mlp.shrink(one)


def test_kept_curve_is_used_until_something_it_depends_on_differs(tmp_path: Path) -> None:
    policy = CostPolicy(folder=tmp_path / "costs")
    measured: list[int] = []

    def measure() -> CostCurve:
        measured.append(1)
        return build_curve([CostPoint(1, 4.0), CostPoint(2, 5.0)], policy.objective)

    first = load_curve(policy, IDENTITY, measure)
    assert load_curve(policy, IDENTITY, measure) == first
    assert len(measured) == 1
    newer = replace(IDENTITY, runtime_version="2")
    load_curve(policy, newer, measure)
    assert len(measured) == 2
    other = CostPolicy(objective=Objective.THROUGHPUT, folder=policy.folder)
    assert load_curve(other, IDENTITY, measure).objective is Objective.THROUGHPUT
    assert len(measured) == 2

    newest, oldest = find_curves(tmp_path / "costs", "sha", Objective.LATENCY_P95)
    assert (newest.identity, oldest.identity) == (newer, IDENTITY)
    question = replace(IDENTITY, provider=None, is_batchable=None)
    assert question.is_answered_by(oldest.identity)
    assert not question.is_answered_by(newest.identity)
    assert not replace(question, is_batchable=False).is_answered_by(oldest.identity)
    assert oldest.curve == first
    assert find_curves(tmp_path / "costs", "other", Objective.LATENCY_P95) == []
    assert find_curves(tmp_path / "none", "sha", Objective.LATENCY_P95) == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"points": []}', '{"points": [[2, 1]]}', '{"points": [[1, -1]]}']
)
def test_damaged_curve_is_measured_again(tmp_path: Path, text: str) -> None:
    policy = CostPolicy(folder=tmp_path)
    curve = build_curve([CostPoint(1, 4.0)], policy.objective)
    load_curve(policy, IDENTITY, lambda: curve)
    (kept,) = tmp_path.iterdir()
    kept.write_text(text)
    assert load_curve(policy, IDENTITY, lambda: curve) == curve
    assert json.loads(kept.read_text())["points"] == [[1, 4.0]]


def test_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    policy = CostPolicy(folder=tmp_path / "file" / "costs")
    curve = build_curve([CostPoint(1, 4.0)], policy.objective)
    assert load_curve(policy, IDENTITY, lambda: curve) == curve


def test_budget_ends_the_doubling_where_no_limit_does(mlp: Session) -> None:
    curve = measure_costs(mlp, CostPolicy(budget_s=0.05, rows_max=1 << 30))
    assert curve.points[-1].rows < 1 << 20
