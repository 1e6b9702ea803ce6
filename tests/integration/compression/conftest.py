"""Trained nets, made once a process and only where a test asks for one."""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.compression.calibration import load_calibration
from converters.compression.toolchain import read_inputs
from tests.harness.digit_nets import (
    ConvNet,
    Digits,
    Encoder,
    Perceptron,
    build,
    export_onnx,
    load_split,
    train,
)

KINDS: dict[str, tuple[type[torch.nn.Module], int]] = {
    "mlp": (Perceptron, 12),
    "cnn": (ConvNet, 8),
    "encoder": (Encoder, 12),
}


class Nets:
    """The trained nets and the data that they were trained and are judged with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train, self.test = load_split()
        self.get_net = cache(self._make_net)
        self.get_onnx = cache(self._make_onnx)

    def _make_net(self, name: str) -> torch.nn.Module:
        kind, epochs = KINDS[name]
        return train(build(kind), self.train, epochs)

    def _make_onnx(self, name: str) -> Path:
        # The exporter warns of its own insides.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return export_onnx(self.get_net(name), self.folder / f"{name}.onnx")

    def save_calibration(self, onnx_file: Path, samples: int = 64) -> Path:
        raw = self.folder / "raw.npz"
        np.savez(raw, x=self.train.x)
        found = load_calibration(raw, read_inputs(onnx_file, "ort"), samples=samples)
        return found.save(self.folder / f"calibration{samples}.npz")

    @property
    def golden(self) -> Digits:
        return self.test


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    torch.set_num_threads(1)
    return Nets(tmp_path_factory.mktemp("nets"))


@pytest.fixture
def scratch(tmp_path: Path) -> Callable[[], Path]:
    """Makes empty folders."""
    made: list[Path] = []

    def make() -> Path:
        folder = tmp_path / f"scratch{len(made)}"
        folder.mkdir()
        made.append(folder)
        return folder

    return make
