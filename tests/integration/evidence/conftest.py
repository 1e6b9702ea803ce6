"""Trained nets with their golden sets, made once a process and only where a test asks for one."""

import copy
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.make_proof_formats import Proof, build_float
from converters.evidence.proof import Golden
from platforms.runtimes.base import Array
from tests.harness.digit_nets import (
    ConvNet,
    Encoder,
    Perceptron,
    build,
    export_onnx,
    load_split,
    train,
)

GOLDEN_ROWS = 96


def unbalance(net: torch.nn.Module, factor: float = 100.0) -> torch.nn.Module:
    """Make the depthwise weights of one channel far larger than the others, in place.

    The channel's input is made smaller by as much, so the net answers as before; but 8 bits for
    the whole tensor leave nearly none for the other channels.
    """
    layers = cast("ConvNet", net)
    norm = cast("nn.BatchNorm2d", layers[1])
    depthwise = cast("nn.Conv2d", cast("nn.Sequential", layers[3])[0])
    with torch.no_grad():
        # The channel that the net has least use for: with its small values it is as good as lost.
        strength = depthwise.weight.abs().sum((1, 2, 3)) * norm.weight.abs()
        least = int(strength.argmin())
        norm.weight[least] /= factor
        norm.bias[least] /= factor
        depthwise.weight[least] *= factor
    return net


class Nets:
    """Nets by name: `mlp`, `cnn`, `encoder`; `unbalanced`: a CNN with large weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train, self.test = load_split()
        self.get_net = cache(self._make_net)
        self.get_onnx = cache(self._make_onnx)
        self.get_tflite = cache(self._make_tflite)

    def _make_net(self, name: str) -> torch.nn.Module:
        if name == "unbalanced":
            return unbalance(copy.deepcopy(self.get_net("cnn")))
        kind = {"mlp": Perceptron, "cnn": ConvNet, "encoder": Encoder}[name]
        return train(build(kind), self.train, 5)

    def _make_onnx(self, name: str) -> Path:
        # The exporter warns of its own insides.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return export_onnx(self.get_net(name), self.folder / f"{name}.onnx")

    def _make_tflite(self) -> tuple[Path, Golden]:
        torch.manual_seed(0)
        empty = {"kernel": (4, 1, 3, 3), "weights": (144, 10), "bias": (10,)}
        net = Proof({name: np.zeros(shape, np.float32) for name, shape in empty.items()})
        net.conv.reset_parameters()
        net.linear.reset_parameters()
        train(net, self.train, 8)
        path = self.folder / "small.tflite"
        weights = {
            "kernel": net.conv.weight.detach().numpy(),
            "weights": net.linear.weight.detach().numpy().T.copy(),
            "bias": net.linear.bias.detach().numpy(),
        }
        path.write_bytes(build_float(weights))
        return path, self._answer(net)

    def get_golden(self, name: str) -> Golden:
        return self._answer(self.get_net(name))

    def _answer(self, net: torch.nn.Module) -> Golden:
        x = self.test.x[:GOLDEN_ROWS]
        with torch.no_grad():
            y: Array = net(torch.from_numpy(x)).numpy()
        return Golden({"x": x}, {"y": y}, "digits that the net was not trained with")


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    torch.set_num_threads(1)
    return Nets(tmp_path_factory.mktemp("nets"))


@pytest.fixture(scope="session")
def legacy_python() -> Path:
    """The interpreter of the environment with tflite-runtime."""
    path = Path(sys.prefix) / "tflite-legacy" / "bin" / "python"
    if not path.exists():
        advice = f"{path} is not there: `./run test` makes it"
        if os.environ.get("CI"):
            pytest.fail(advice)
        pytest.skip(advice)
    return path
