"""Scores become probabilities and labels."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.manifest import Manifest, TensorEntry
from platforms.artifact import Datatype
from tests.unit.test_processing_tensor import declare
from worker.errors import NanOutputError, OutputError, PreprocessError, StepParamsError
from worker.processing.classify import build_softmax, build_top_k

LABELS = ["cat", "dog", "owl"]
SCORES = {"y": np.array([[1.0, 3.0, 2.0]], np.float32)}


def classifier(classes: int = 3, files: dict[str, str] | None = None) -> Manifest:
    output = TensorEntry(name="y", datatype=Datatype.FP32, shape=(-1, classes))
    return declare(("x", Datatype.FP32, (1,))).model_copy(
        update={"outputs": (output,), "files": files or {}}
    )


def test_softmax_gives_the_textbook_numbers() -> None:
    found = build_softmax({}, classifier(), Path())(SCORES, SCORES, {})["y"]
    powers = np.exp([1.0, 3.0, 2.0])
    assert np.allclose(found[0], powers / powers.sum(), atol=1e-6)


def test_softmax_neither_overflows_nor_minds_a_masked_class() -> None:
    scores = {"y": np.array([[1e30, 1e30, -np.inf]], np.float32)}
    found = build_softmax({}, classifier(), Path())(scores, scores, {})["y"]
    assert found.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize("row", [[np.nan, 1, 2], [np.inf, 1, 2], [-np.inf] * 3])
def test_scores_without_a_softmax_are_an_error(row: list[float]) -> None:
    scores = {"y": np.array([row], np.float32)}
    with pytest.raises(NanOutputError):
        build_softmax({}, classifier(), Path())(scores, scores, {})


def test_top_k_names_the_best_first() -> None:
    step = build_top_k({"k": 2, "labels": LABELS}, classifier(), Path())
    assert step(SCORES, SCORES, {}) == [
        {"label": "dog", "index": 1, "score": 3.0},
        {"label": "owl", "index": 2, "score": 2.0},
    ]


def test_job_may_ask_for_another_k_but_not_for_nonsense() -> None:
    step = build_top_k({"labels": LABELS}, classifier(), Path())
    assert [len(step(SCORES, SCORES, {"top_k": k})) for k in (1, 3, 1000)] == [1, 3, 3]
    for bad in (0, -1, 1001, 1.5, "2", True, None, [1]):
        with pytest.raises(PreprocessError, match="top_k"):
            step(SCORES, SCORES, {"top_k": bad})


def test_equal_scores_rank_by_index_and_no_labels_means_the_index() -> None:
    even = {"y": np.zeros((1, 3), np.float32)}
    found = build_top_k({}, classifier(), Path())(even, even, {})
    assert [(one["label"], one["index"]) for one in found] == [("0", 0), ("1", 1), ("2", 2)]


def test_several_rows_get_a_list_each() -> None:
    rows = {"y": np.array([[1, 0, 0], [0, 0, 1]], np.float32)}
    found = build_top_k({"k": 1, "labels": LABELS}, classifier(), Path())(rows, rows, {})
    assert [one[0]["label"] for one in found] == ["cat", "owl"]


def test_labels_come_from_a_file_that_the_manifest_vouches_for(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    digest = hashlib.sha256((tmp_path / "labels.txt").read_bytes()).hexdigest()
    params = {"k": 1, "labels_file": "labels.txt"}
    step = build_top_k(params, classifier(files={"labels.txt": digest}), tmp_path)
    assert step(SCORES, SCORES, {})[0]["label"] == "dog"
    with pytest.raises(StepParamsError, match="not among the manifest's files"):
        build_top_k(params, classifier(), tmp_path)


@pytest.mark.parametrize(
    "params",
    [
        {"k": 0},
        {"k": 1.5},
        {"k": True},
        {"labels": ["a", "b"]},
        {"labels": LABELS, "labels_file": "labels.txt"},
        {"output": "z"},
        {"lables": LABELS},
    ],
)
def test_bad_parameters_are_refused_when_the_model_loads(params: dict[str, Any]) -> None:
    with pytest.raises(StepParamsError):
        build_top_k(params, classifier(), Path())


def test_missing_labels_file_is_refused_when_the_model_loads(tmp_path: Path) -> None:
    with pytest.raises(StepParamsError, match="cannot be read"):
        build_top_k({"labels_file": "gone"}, classifier(files={"gone": "0" * 64}), tmp_path)


@pytest.mark.parametrize("value", [{}, None, {"y": [1, 2, 3]}, {"y": np.float32(1)}])
def test_step_whose_array_is_not_there_says_so(value: Any) -> None:
    for build in (build_softmax, build_top_k):
        with pytest.raises(OutputError):
            build({}, classifier(), Path())({}, value, {})


def test_outputs_that_do_not_fit_the_labels_are_an_error() -> None:
    step = build_top_k({"labels": LABELS}, classifier(-1), Path())
    for bad in (np.zeros((1, 4)), np.zeros(3), np.zeros((1, 1, 3))):
        with pytest.raises(OutputError):
            step({}, {"y": bad}, {})
    with pytest.raises(NanOutputError):
        step({}, {"y": np.array([[1, np.inf, 0]])}, {})
