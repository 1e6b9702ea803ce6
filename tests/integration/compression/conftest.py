"""Trained nets, made once a process and only where a test asks for one."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.compression.calibration import load_calibration
from converters.compression.toolchain import read_inputs
from tests.harness.digit_nets import (
    ConvNet,
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
        self.get_openvino = cache(self._make_openvino)
        self.get_coreml = cache(self._make_coreml)
        self.get_tflite = cache(self._make_tflite)

    def _make_net(self, name: str) -> torch.nn.Module:
        kind, epochs = KINDS[name]
        return train(build(kind), self.train, epochs)

    def _make_onnx(self, name: str) -> Path:
        # The exporter warns of its own insides.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return export_onnx(self.get_net(name), self.folder / f"{name}.onnx")

    def _make_openvino(self, name: str) -> Path:
        import openvino

        path = self.folder / f"{name}.xml"
        model = openvino.Core().read_model(self.get_onnx(name))
        openvino.save_model(model, path, compress_to_fp16=False)
        return path

    def _make_coreml(self, name: str) -> Path:
        """Return an ML program of fp32, its batch fixed at 1."""
        import coremltools

        # Any: torch leaves `trace` untyped.
        script: Any = torch.jit
        made = coremltools.convert(
            script.trace(self.get_net(name), torch.zeros(1, 1, 8, 8)),
            convert_to="mlprogram",
            inputs=[coremltools.TensorType(name="x", shape=(1, 1, 8, 8))],
            minimum_deployment_target=coremltools.target.iOS16,
            compute_precision=coremltools.precision.FLOAT32,
            skip_model_load=True,
        )
        path = self.folder / f"{name}.mlpackage"
        made.save(str(path))
        return path

    def _make_tflite(self) -> Path:
        """Return a small CNN, written operator by operator; it has no signature."""
        from benchmarks.make_proof_formats import Proof, build_float

        weights = {
            "kernel": np.zeros((4, 1, 3, 3), np.float32),
            "weights": np.zeros((144, 10), np.float32),
            "bias": np.zeros(10, np.float32),
        }
        torch.manual_seed(0)
        net = Proof(weights)
        net.conv.reset_parameters()
        net.linear.reset_parameters()
        train(net, self.train, 8)
        weights = {
            "kernel": net.conv.weight.detach().numpy(),
            "weights": net.linear.weight.detach().numpy().T.copy(),
            "bias": net.linear.bias.detach().numpy(),
        }
        path = self.folder / "small.tflite"
        path.write_bytes(build_float(weights))
        return path

    def save_calibration(self, onnx_file: Path, samples: int = 64) -> Path:
        raw = self.folder / "raw.npz"
        np.savez(raw, x=self.train.x)
        found = load_calibration(raw, read_inputs(onnx_file, "ort"), samples=samples)
        return found.save(self.folder / f"calibration{samples}.npz")


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    torch.set_num_threads(1)
    return Nets(tmp_path_factory.mktemp("nets"))
