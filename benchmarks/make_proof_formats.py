"""Write the proof model in the other formats, from the weights inside `proof.onnx`.

The same function as `proof.onnx`, built op by op, converted by nobody: `proof.tflite` by
LiteRT's own schema classes (and `proof_int8.tflite`, with int8 at both edges),
`proof.torchscript` and `proof.pt2` by torch, `proof.xml` and `proof.bin` by OpenVINO.

    python benchmarks/make_proof_formats.py
"""

import zipfile
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import onnx
import openvino
import torch
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

FOLDER = Path(__file__).parent.parent / "platforms" / "runtimes" / "data"
SIDE, CHANNELS, CLASSES = 8, 4, 10
FLAT = CHANNELS * (SIDE - 2) ** 2

Array = NDArray[Any]


class Proof(torch.nn.Module):
    """The proof model: 3x3 convolution, ReLU, matrix product, bias."""

    def __init__(self, weights: dict[str, Array]) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, CHANNELS, 3, bias=False)
        self.linear = torch.nn.Linear(FLAT, CLASSES)
        with torch.no_grad():
            self.conv.weight.copy_(torch.from_numpy(weights["kernel"].copy()))
            self.linear.weight.copy_(torch.from_numpy(weights["weights"].T.copy()))
            self.linear.bias.copy_(torch.from_numpy(weights["bias"].copy()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `y` float32[N, 10] of `x` float32[N, 1, 8, 8]."""
        answer: torch.Tensor = self.linear(torch.relu(self.conv(x)).flatten(1))
        return answer


class TfliteFile:
    """A `.tflite` file of one subgraph, put together tensor by tensor."""

    def __init__(self) -> None:
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.model = schema.ModelT()
        self.model.version, self.model.description = 3, "edgeward-proof"
        self.model.subgraphs, self.model.operatorCodes = [self.graph], []
        self.model.buffers = [schema.BufferT()]

    def add(
        self,
        name: str,
        shape: list[int],
        kind: int = schema.TensorType.FLOAT32,
        content: Array | None = None,
        scale: tuple[float, int] | None = None,
    ) -> int:
        """Add a tensor; −1 is a free axis; return its index."""
        tensor = schema.TensorT()
        tensor.name, tensor.type = name, kind
        tensor.shape = [max(axis, 1) for axis in shape]
        if -1 in shape:
            tensor.shapeSignature = shape
        tensor.buffer = 0
        if content is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(content.tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            tensor.buffer = len(self.model.buffers) - 1
        if scale is not None:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = [scale[0]], [scale[1]]
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def call(
        self, code: int, takes: list[int], gives: int, options: Any = None, version: int = 1
    ) -> None:
        """Add an operator."""
        known = schema.OperatorCodeT()
        known.builtinCode, known.version = code, version
        known.deprecatedBuiltinCode = min(code, 127)
        self.model.operatorCodes.append(known)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        operator.inputs, operator.outputs = takes, [gives]
        if options is not None:
            operator.builtinOptions = options
            kind = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        self.graph.operators.append(operator)

    def build(self, takes: int, gives: int) -> bytes:
        """Return the file."""
        self.graph.inputs, self.graph.outputs = [takes], [gives]
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def add_layers(file: TfliteFile, weights: dict[str, Array], x: int, y: int, batch: int) -> None:
    """Add the model's layers between the float tensors `x` and `y`."""
    ints = schema.TensorType.INT32
    as_image = file.add("as_image", [4], ints, np.array([-1, SIDE, SIDE, 1], np.int32))
    as_row = file.add("as_row", [2], ints, np.array([-1, FLAT], np.int32))
    kernel = weights["kernel"].transpose(0, 2, 3, 1)
    # A flattened NHWC image has its channels last, the ONNX file has them first.
    inner = SIDE - 2
    dense = weights["weights"].reshape(CHANNELS, inner, inner, CLASSES).transpose(3, 1, 2, 0)
    image = file.add("image", [batch, SIDE, SIDE, 1])
    filters = file.add("kernel", list(kernel.shape), content=kernel)
    no_bias = file.add("no_bias", [CHANNELS], content=np.zeros(CHANNELS, np.float32))
    features = file.add("features", [batch, inner, inner, CHANNELS])
    flat = file.add("flat", [batch, FLAT])
    matrix = file.add("weights", [CLASSES, FLAT], content=dense.reshape(CLASSES, FLAT))
    bias = file.add("bias", [CLASSES], content=weights["bias"])
    convolution = schema.Conv2DOptionsT()
    convolution.padding, convolution.strideH, convolution.strideW = schema.Padding.VALID, 1, 1
    convolution.fusedActivationFunction = schema.ActivationFunctionType.RELU
    ops = schema.BuiltinOperator
    file.call(ops.RESHAPE, [x, as_image], image, schema.ReshapeOptionsT())
    file.call(ops.CONV_2D, [image, filters, no_bias], features, convolution)
    file.call(ops.RESHAPE, [features, as_row], flat, schema.ReshapeOptionsT())
    file.call(ops.FULLY_CONNECTED, [flat, matrix, bias], y, schema.FullyConnectedOptionsT())


def build_float(weights: dict[str, Array]) -> bytes:
    """Return the float `.tflite`, its batch free."""
    file = TfliteFile()
    x = file.add("x", [-1, 1, SIDE, SIDE])
    y = file.add("y", [-1, CLASSES])
    add_layers(file, weights, x, y, -1)
    return file.build(x, y)


def build_int8(weights: dict[str, Array]) -> bytes:
    """Return the `.tflite` with int8 edges and its batch fixed at 1."""
    file = TfliteFile()
    int8 = schema.TensorType.INT8
    x = file.add("x", [1, 1, SIDE, SIDE], int8, scale=(0.02, -3))
    y = file.add("y", [1, CLASSES], int8, scale=(0.125, 5))
    inner, outer = file.add("x_float", [1, 1, SIDE, SIDE]), file.add("y_float", [1, CLASSES])
    ops = schema.BuiltinOperator
    file.call(ops.DEQUANTIZE, [x], inner, schema.DequantizeOptionsT(), version=2)
    add_layers(file, weights, inner, outer, 1)
    file.call(ops.QUANTIZE, [outer], y, schema.QuantizeOptionsT())
    return file.build(x, y)


def write_torch(weights: dict[str, Array]) -> None:
    """Write both of torch's formats."""
    module = Proof(weights).eval()
    example = torch.zeros(2, 1, SIDE, SIDE)
    # Any: torch leaves `trace` untyped.
    script: Any = torch.jit
    script.trace(module, example).save(str(FOLDER / "proof.torchscript"))
    program = torch.export.export(
        module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    for node in program.graph.nodes:
        # They name the machine's folders.
        node.meta.pop("stack_trace", None)
    torch.export.save(program, FOLDER / "proof.pt2")
    drop_debug_records(FOLDER / "proof.torchscript")


def drop_debug_records(path: Path) -> None:
    """Take out the source positions, which name the machine's folders; loading needs none."""
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if "debug_pkl" not in name}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in kept.items():
            # A fixed date: the file is the same whenever it is made.
            archive.writestr(zipfile.ZipInfo(name), content)


def main() -> None:
    """Write all files."""
    graph = onnx.load(FOLDER / "proof.onnx").graph
    weights = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    (FOLDER / "proof.tflite").write_bytes(build_float(weights))
    (FOLDER / "proof_int8.tflite").write_bytes(build_int8(weights))
    write_torch(weights)
    model = openvino.Core().read_model(FOLDER / "proof.onnx")
    openvino.save_model(model, FOLDER / "proof.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main()
