"""Users' own steps, announced by an installed distribution."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.manifest import Manifest, Step
from platforms.artifact import Datatype
from tests.unit.test_processing_tensor import declare
from worker.errors import UnknownStepError
from worker.processing.registry import build_postprocessors, build_preprocessor
from worker.processing.step import JobInput

SOURCE = """
import numpy as np

def build_length(params, manifest, folder):
    def measure(given):
        return {"x": np.array([len(given.data) * params["factor"]], np.float32)}
    return measure

def build_verdict(params, manifest, folder):
    def judge(outputs, value, params):
        return "long" if value["y"].max() > 3 else "short"
    return judge
"""

ENTRY_POINTS = """
[edgeward.preprocess]
length = acme_steps:build_length
tensor = acme_steps:build_length
broken = acme_steps:no_such_name
absent = acme_no_such_module:build

[edgeward.postprocess]
verdict = acme_steps:build_verdict
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution as pip leaves it in a site folder, seen by this process."""
    (tmp_path / "acme_steps.py").write_text(SOURCE, encoding="utf-8")
    info = tmp_path / "acme_steps-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-steps\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def manifest(pre: Step | None = None, *post: Step) -> Manifest:
    base = declare(("x", Datatype.FP32, (-1,)))
    return base.model_copy(update={"preprocess": pre or base.preprocess, "postprocess": post})


@pytest.mark.usefixtures("distribution")
def test_installed_steps_are_built_with_their_parameters_and_run() -> None:
    own = manifest(Step(name="length", params={"factor": 2}), Step(name="verdict"))
    arrays = build_preprocessor(own, Path())(JobInput(data=b"four"))
    assert arrays["x"].tolist() == [8]
    (verdict,) = build_postprocessors(own, Path())
    outputs = {"y": np.array([4.0])}
    assert verdict(outputs, outputs, {}) == "long"


@pytest.mark.usefixtures("distribution")
def test_built_in_name_cannot_be_taken_over() -> None:
    step = build_preprocessor(manifest(), Path())
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [5]}
    assert step(JobInput(tensors=[tensor]))["x"].tolist() == [5]


@pytest.mark.usefixtures("distribution")
@pytest.mark.parametrize("name", ["broken", "absent"])
def test_step_that_cannot_be_loaded_says_which_and_why(name: str) -> None:
    with pytest.raises(UnknownStepError, match=f"{name}.*acme_.*cannot be loaded"):
        build_preprocessor(manifest(Step(name=name)), Path())


def test_unknown_step_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(UnknownStepError, match="byte_window, image, tensor"):
        build_preprocessor(manifest(Step(name="nonesuch")), Path())
    with pytest.raises(UnknownStepError, match="softmax, tensors, top_k"):
        build_postprocessors(manifest(None, Step(name="nonesuch")), Path())


def test_manifest_without_postprocessing_gets_plain_tensors() -> None:
    (step,) = build_postprocessors(manifest(), Path())
    outputs: dict[str, Any] = {"y": np.array([1.0], np.float32)}
    assert step(outputs, outputs, {})["outputs"][0]["data"] == [1.0]
