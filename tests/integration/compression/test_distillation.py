"""Distillation beside plain training, from the same first weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.compression.distillation import run
from converters.errors import RecipeError, TrainingError
from converters.task import Facts, ModelFile, ModelFormat, Task
from tests.integration.compression.conftest import Nets

# torch's export warns of its own future.
pytestmark = pytest.mark.filterwarnings("ignore")

STUDENT = """
import torch
from tests.harness.digit_nets import Perceptron

def small():
    return Perceptron(12)

def with_example():
    return Perceptron(12), torch.zeros(2, 1, 8, 8)

def odd():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 7))

def broken():
    raise KeyError("weights")

def text():
    return "net"
"""


def write_data(nets: Nets, path: Path, labels: int | None) -> Path:
    """Write rows of which only so many have a label; None: no row has."""
    y = nets.train.y.copy()
    arrays: dict[str, Any] = {"x": nets.train.x, "held_x": nets.test.x}
    if labels is not None:
        y[labels:] = -1
        arrays |= {"y": y, "held_y": nets.test.y}
    np.savez(path, **arrays)
    return path


def distill(
    nets: Nets, folder: Path, data: Path, name: str = "small", **options: Any
) -> tuple[Path, Facts]:
    builder = folder / "student.py"
    builder.write_text(STUDENT, encoding="utf-8")
    target = folder / "student.pt2"
    merged = {"data": str(data), "teacher": str(nets.get_onnx("cnn")), "epochs": 25, **options}
    task = Task(ModelFile(builder, ModelFormat.CALLABLE, name=name), target, folder, merged)
    return target, run(task)


def test_with_few_labels_the_distilled_student_wins_and_both_are_told(
    nets: Nets, tmp_path: Path
) -> None:
    data = write_data(nets, tmp_path / "few.npz", labels=60)
    target, facts = distill(nets, tmp_path, data)
    program: Any = torch.export.load(target)
    scores = program.module()(torch.from_numpy(nets.test.x))
    accuracy = float((scores.argmax(1).numpy() == nets.test.y).mean())

    assert facts["labelled_rows"] == 60
    assert facts["distilled"]["accuracy"] > facts["plain"]["accuracy"] + 0.05
    assert facts["kept"] == "distilled"
    assert accuracy == pytest.approx(facts["distilled"]["accuracy"], abs=0.01)
    json.dumps(facts)


def test_the_same_seed_trains_the_same_student(nets: Nets, tmp_path: Path) -> None:
    data = write_data(nets, tmp_path / "few.npz", labels=60)
    first = distill(nets, tmp_path, data, epochs=3)[1]
    again = distill(nets, tmp_path, data, epochs=3)[1]

    assert first == again


def test_without_labels_agreement_with_the_teacher_is_told(nets: Nets, tmp_path: Path) -> None:
    data = write_data(nets, tmp_path / "none.npz", labels=None)
    _, facts = distill(nets, tmp_path, data, epochs=8)

    assert "plain" not in facts
    assert facts["distilled"]["accuracy"] is None
    assert facts["distilled"]["agreement"] > 0.7
    assert facts["teacher_accuracy"] is None


def test_the_one_asked_for_is_kept_even_where_it_is_worse(nets: Nets, tmp_path: Path) -> None:
    data = write_data(nets, tmp_path / "few.npz", labels=30)
    _, facts = distill(nets, tmp_path, data, "with_example", epochs=4, keep="plain")

    assert facts["kept"] == "plain"


def test_training_ends_early_and_at_its_time_limit(nets: Nets, tmp_path: Path) -> None:
    data = write_data(nets, tmp_path / "none.npz", labels=None)
    _, facts = distill(nets, tmp_path, data, epochs=25, time_limit_s=0.0)

    assert facts["distilled"]["epochs"] == 1
    assert facts["distilled"]["why_ended"] == "the time was over"


@pytest.mark.parametrize(
    ("name", "options", "kind", "words"),
    [
        ("small", {"data": ""}, RecipeError, "needs the option data"),
        ("small", {"teacher_format": "magic"}, RecipeError, "no format 'magic'"),
        ("small", {"teacher_format": "coreml"}, RecipeError, "a teacher is"),
        ("odd", {}, TrainingError, "7 classes, the teacher 10"),
        ("broken", {}, TrainingError, "KeyError"),
        ("text", {}, TrainingError, "gives a str"),
        ("nowhere", {}, TrainingError, "AttributeError"),
    ],
)
def test_what_does_not_fit_is_refused(
    nets: Nets,
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    kind: type[Exception],
    words: str,
) -> None:
    data = write_data(nets, tmp_path / "few.npz", labels=60)
    with pytest.raises(kind, match=words):
        distill(nets, tmp_path, options.pop("data", data), name, **options)
