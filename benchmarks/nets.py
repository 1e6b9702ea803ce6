"""Nets to measure with: a small MLP, whose batches pay, and a CNN, whose batches cost.

Random weights from a fixed seed: speed depends on shapes, not on what a net knows. Batch
normalization is left out, as every exporter folds it into the convolutions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from agent.manifest import TensorEntry
from benchmarks.tiny_model import write_version
from platforms.artifact import Datatype

_SEED = 7
MLP_INPUTS, MLP_OUTPUTS = 64, 10
CNN_CLASSES = 1000

# Expansion, channels, repeats, first stride. Source: MobileNetV2 (arXiv:1801.04381), table 2.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _HEAD = 32, 1280


@dataclass
class _Net:
    """Nodes and weights in the making; each layer returns the name of what it computes."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(_SEED))

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [*inputs], [name], **attributes))
        return name

    def add_weight(self, shape: tuple[int, ...], fan_in: int) -> str:
        name = f"w{len(self.weights)}"
        values = self.rng.standard_normal(shape) * np.sqrt(2 / fan_in)
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def add_dense(self, x: str, inputs: int, outputs: int) -> str:
        weight, bias = self.add_weight((inputs, outputs), inputs), self.add_weight((outputs,), 100)
        return self.add("Gemm", (x, weight, bias))

    def add_convolution(
        self, x: str, channels: tuple[int, int], kernel: int, stride: int = 1, group: int = 1
    ) -> str:
        per_group = channels[0] // group
        weight = self.add_weight(
            (channels[1], per_group, kernel, kernel), per_group * kernel * kernel
        )
        bias = self.add_weight((channels[1],), 100)
        return self.add(
            "Conv",
            (x, weight, bias),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=group,
        )

    def add_relu6(self, x: str) -> str:
        return self.add("Clip", (x, "zero", "six"))

    def finish(self, name: str, x_shape: list[Any], y_shape: list[Any]) -> onnx.GraphProto:
        self.nodes[-1].output[0] = "y"
        limits = [
            numpy_helper.from_array(np.array(value, np.float32), label)
            for label, value in (("zero", 0), ("six", 6))
        ]
        return helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
            [*self.weights, *limits],
        )


def _make_mlp(hidden: int) -> onnx.GraphProto:
    net = _Net()
    x = net.add("Relu", (net.add_dense("x", MLP_INPUTS, hidden),))
    x = net.add("Relu", (net.add_dense(x, hidden, hidden),))
    net.add_dense(x, hidden, MLP_OUTPUTS)
    return net.finish("mlp", ["batch", MLP_INPUTS], ["batch", MLP_OUTPUTS])


def _scale(channels: int, width: float) -> int:
    return max(8, round(channels * width / 8) * 8)


def _make_cnn(side: int, width: float) -> onnx.GraphProto:
    net = _Net()
    before = _scale(_STEM, width)
    x = net.add_relu6(net.add_convolution("x", (3, before), 3, stride=2))
    for expansion, channels, repeats, first_stride in _STAGES:
        after = _scale(channels, width)
        for number in range(repeats):
            stride = first_stride if number == 0 else 1
            x = _add_block(net, x, (before, after), expansion, stride)
            before = after
    head = _scale(_HEAD, max(width, 1.0))
    x = net.add_relu6(net.add_convolution(x, (before, head), 1))
    x = net.add("Flatten", (net.add("GlobalAveragePool", (x,)),))
    net.add_dense(x, head, CNN_CLASSES)
    return net.finish("cnn", ["batch", 3, side, side], ["batch", CNN_CLASSES])


def _add_block(net: _Net, x: str, channels: tuple[int, int], expansion: int, stride: int) -> str:
    """Add an inverted residual: widen, convolve each channel by itself, narrow."""
    before, after = channels
    wide = before * expansion
    inner = x
    if expansion > 1:
        inner = net.add_relu6(net.add_convolution(x, (before, wide), 1))
    inner = net.add_relu6(net.add_convolution(inner, (wide, wide), 3, stride, group=wide))
    inner = net.add_convolution(inner, (wide, after), 1)
    return net.add("Add", (x, inner)) if stride == 1 and before == after else inner


def _save(path: Path, graph: onnx.GraphProto) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def build_mlp(path: Path, hidden: int = 128) -> Path:
    """Write an ONNX file: float32[batch, 64] → float32[batch, 10], two hidden layers."""
    return _save(path, _make_mlp(hidden))


def build_cnn(path: Path, side: int = 160, width: float = 1.0) -> Path:
    """Write an ONNX file of MobileNetV2's shape: float32[batch, 3, side, side] → [batch, 1000].

    Args:
        path: of the file.
        side: height and width of the picture, a multiple of 32.
        width: what every number of channels is multiplied by; 0.25 makes it quick.
    """
    return _save(path, _make_cnn(side, width))


def write_mlp_version(folder: Path, name: str = "mlp", hidden: int = 128) -> Path:
    """Write a version folder of the MLP, manifest included; return the ONNX file."""
    return write_version(
        folder, name, _make_mlp(hidden), _make_entries((-1, MLP_INPUTS), (-1, MLP_OUTPUTS))
    )


def write_cnn_version(folder: Path, name: str = "cnn", side: int = 160, width: float = 1.0) -> Path:
    """Write a version folder of the CNN, manifest included; return the ONNX file."""
    entries = _make_entries((-1, 3, side, side), (-1, CNN_CLASSES))
    return write_version(folder, name, _make_cnn(side, width), entries)


def _make_entries(x: tuple[int, ...], y: tuple[int, ...]) -> tuple[TensorEntry, TensorEntry]:
    return (
        TensorEntry(name="x", datatype=Datatype.FP32, shape=x),
        TensorEntry(name="y", datatype=Datatype.FP32, shape=y),
    )
