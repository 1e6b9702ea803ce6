"""Pruning: fewer operations for nets that bear it, a plain word for those that do not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.compression.pruning import run
from converters.errors import CompressionError, RecipeError, TrainingError
from converters.task import Facts, ModelFile, ModelFormat, Task
from tests.harness import digit_nets
from tests.integration.compression.conftest import Nets

# torch-pruning and torch's export warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")

BUILDERS = {"cnn": "ConvNet", "mlp": "Perceptron", "encoder": "Encoder"}


@pytest.fixture(scope="module")
def data(nets: Nets) -> Path:
    path = nets.folder / "pruning.npz"
    np.savez(path, x=nets.train.x, y=nets.train.y, held_x=nets.test.x, held_y=nets.test.y)
    return path


def prune(nets: Nets, net: str, folder: Path, options: Mapping[str, Any]) -> tuple[Path, Facts]:
    weights = folder / f"{net}.pt"
    torch.save(nets.get_net(net).state_dict(), weights)
    builder = Path(digit_nets.__file__)
    source = ModelFile(weights, ModelFormat.STATE_DICT, name=BUILDERS[net], builder=builder)
    target = folder / f"{net}.pt2"
    return target, run(Task(source, target, folder, options))


def test_pruned_net_has_far_fewer_operations_and_still_knows_the_digits(
    nets: Nets, data: Path, tmp_path: Path
) -> None:
    options = {"data": str(data), "ratio": 0.4, "round_to": 4, "epochs": 8, "rate": 3e-3}
    target, facts = prune(nets, "cnn", tmp_path, options)
    program: Any = torch.export.load(target)
    scores = program.module()(torch.from_numpy(nets.test.x))
    accuracy = float((scores.argmax(1).numpy() == nets.test.y).mean())

    assert not facts["is_no_op"]
    assert facts["macs"] < 0.55 * facts["macs_before"]
    assert facts["parameters"] < 0.55 * facts["parameters_before"]
    assert facts["score_is"] == "accuracy"
    assert facts["score_pruned"] < facts["score_after"]
    assert accuracy == pytest.approx(facts["score_after"], abs=0.01)
    assert accuracy > 0.85
    json.dumps(facts)


def test_masks_are_called_a_no_op(nets: Nets, data: Path, tmp_path: Path) -> None:
    options = {"data": str(data), "method": "masks", "epochs": 1}
    target, facts = prune(nets, "mlp", tmp_path, options)
    weights = torch.export.load(target).state_dict["1.weight"]

    assert facts["is_no_op"]
    assert "size and speed" in facts["no_op_reason"]
    assert facts["macs"] == facts["macs_before"]
    # They are zeros all the same.
    assert float((weights == 0).float().mean()) > 0.3


def test_attention_written_by_hand_is_reported_and_nothing_is_written(
    nets: Nets, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompressionError, match="attention written by hand") as caught:
        prune(nets, "encoder", tmp_path, {"data": str(data)})
    assert "distill" in str(caught.value)
    assert not (tmp_path / "encoder.pt2").exists()


def test_net_of_one_layer_has_nothing_to_take_out_and_it_is_said(
    data: Path, tmp_path: Path
) -> None:
    builder = tmp_path / "one.py"
    net = "nn.Sequential(nn.Flatten(), nn.Linear(64, 10))"
    builder.write_text(f"from torch import nn\n\ndef one():\n    return {net}\n", "utf-8")
    source = ModelFile(builder, ModelFormat.CALLABLE, name="one")
    options = {"data": str(data), "epochs": 0}
    facts = run(Task(source, tmp_path / "one.pt2", tmp_path, options))

    assert facts["is_no_op"]
    assert "no channel could be taken out" in facts["no_op_reason"]
    assert facts["score_after"] == facts["score_before"]


def test_rows_without_labels_are_taught_by_the_net_as_it_was(nets: Nets, tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", x=nets.train.x[:400])
    options = {"data": str(tmp_path / "bare.npz"), "ratio": 0.3, "epochs": 4, "rate": 3e-3}
    _, facts = prune(nets, "mlp", tmp_path, options)

    assert facts["score_is"] == "agreement"
    assert facts["score_before"] == 1.0
    assert facts["score_after"] > 0.8


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({}, RecipeError, "needs the option data"),
        ({"data": "x", "ratio": 1.5}, RecipeError, "between 0 and 1"),
        ({"data": "x", "method": "magic"}, RecipeError, "channels, masks"),
        ({"data": "/nowhere.npz"}, TrainingError, "no .npz"),
    ],
)
def test_bad_options_are_refused(
    nets: Nets, tmp_path: Path, options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        prune(nets, "mlp", tmp_path, options)
