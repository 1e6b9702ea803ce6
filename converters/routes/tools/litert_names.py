"""The signature of a `.tflite` file: the names under which the runtime finds its tensors.

A converter invents names (`args_0`, `serving_default_x:0`). Owns their replacement by those of
the manifest, in its order, and the reading of a file's tensors and operators. Nothing else
of the file changes.

Source: schema.fbs of TFLite, as ai_edge_litert 2.3 generates Python from it.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from converters.errors import HopFailedError
from platforms.artifact import Datatype, Precision, TensorSpec
from platforms.runtimes.base import DATATYPES

_IDENTIFIER = b"TFL3"
_KEY = b"serving_default"
_TOLERANCE = 1e-3
"""Between several rows and one: other kernels, the same arithmetic."""
_NUMBER = re.compile(r"_(\d+)$")


def name_signature(
    source: Path, target: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """Copy a file with one signature that has these names, in this order.

    The file's own tensors are put in order by these names where it has them, else by the number
    that ends their names in its signature (`args_0`, `output_1`), else they stay as they are.

    Raises:
        HopFailedError: the file has another number of inputs or outputs.
    """
    model = schema.ModelT.InitFromPackedBuf(source.read_bytes(), 0)
    graph = model.subgraphs[0]
    signatures = model.signatureDefs or []
    own = signatures[0] if len(signatures) == 1 else None
    graph.inputs = _order(graph, graph.inputs, own.inputs if own else [], inputs)
    graph.outputs = _order(graph, graph.outputs, own.outputs if own else [], outputs)
    signature = schema.SignatureDefT()
    signature.signatureKey = own.signatureKey if own else _KEY
    signature.subgraphIndex = 0
    signature.inputs = _name(graph.inputs, inputs)
    signature.outputs = _name(graph.outputs, outputs)
    model.signatureDefs = [signature]
    _write(model, target)


def fix_batch(path: Path) -> None:
    """Make the shapes that a file has now, of one row, its only ones."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            tensor.shapeSignature = None
    _write(model, path)


def _write(model: Any, path: Path) -> None:
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    path.write_bytes(builder.Output())


def _order(graph: Any, tensors: Any, maps: Any, names: Sequence[str]) -> list[int]:
    """Return the graph's tensors in the order of the names, or of the signature's numbers."""
    found = [int(index) for index in tensors]
    if len(found) != len(names):
        msg = f"the file has {len(found)} tensors in place of {', '.join(names)}"
        raise HopFailedError(msg)
    known = {_decode(graph.tensors[index].name): index for index in found}
    known |= {_decode(entry.name): entry.tensorIndex for entry in maps}
    if all(name in known for name in names):
        return [known[name] for name in names]
    numbered = [
        (int(number[1]), entry.tensorIndex)
        for entry in maps
        if (number := _NUMBER.search(_decode(entry.name)))
    ]
    if len(numbered) == len(found):
        return [index for _, index in sorted(numbered)]
    return found


def _decode(text: Any) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


def _name(tensors: Sequence[int], names: Sequence[str]) -> list[Any]:
    maps = []
    for index, name in zip(tensors, names, strict=True):
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name.encode(), index
        maps.append(entry)
    return maps


def read_specs(path: Path) -> tuple[list[TensorSpec], list[TensorSpec], dict[str, int]]:
    """Return a file's inputs and outputs by their names in its signature, and its operators.

    Raises:
        HopFailedError: LiteRT makes no interpreter of it.
    """
    try:
        interpreter = Interpreter(str(path), num_threads=1)
    except (ValueError, RuntimeError) as exc:
        msg = f"LiteRT refuses what was made: {exc}"
        raise HopFailedError(msg) from exc
    names = _read_names(interpreter)
    inputs, outputs = (
        [_to_spec(item, names) for item in side]
        for side in (interpreter.get_input_details(), interpreter.get_output_details())
    )
    return inputs, outputs, _count_operators(path)


def _read_names(interpreter: Any) -> dict[int, str]:
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        return {}
    runner = interpreter.get_signature_runner(next(iter(signatures)))
    details = {**runner.get_input_details(), **runner.get_output_details()}
    return {item["index"]: name for name, item in details.items()}


def _to_spec(item: dict[str, Any], names: dict[int, str]) -> TensorSpec:
    signature = item.get("shape_signature")
    shape = signature if signature is not None and len(signature) else item["shape"]
    datatype = DATATYPES.get(np.dtype(item["dtype"]), Datatype.BYTES)
    name = names.get(item["index"], item["name"])
    return TensorSpec(name, datatype, tuple(int(axis) for axis in shape))


def _count_operators(path: Path) -> dict[str, int]:
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if name.isupper()}
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    counted: Counter[str] = Counter()
    for graph in model.subgraphs:
        for operator in graph.operators or []:
            code = model.operatorCodes[operator.opcodeIndex]
            number = max(code.builtinCode, code.deprecatedBuiltinCode)
            custom = code.customCode
            counted[_decode(custom) if custom else names.get(number, str(number))] += 1
    return dict(counted)


def count_weights(path: Path) -> tuple[int, int, Precision]:
    """Return how many numbers a file's weights are, their bytes, and what most of them are."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    kinds = {value: name for name, value in vars(schema.TensorType).items() if name.isupper()}
    sizes: Counter[str] = Counter()
    count = 0
    for graph in model.subgraphs:
        for tensor in graph.tensors or []:
            data = model.buffers[tensor.buffer].data
            if data is not None and len(data):
                sizes[kinds.get(tensor.type, "")] += len(data)
                count += math.prod(int(axis) for axis in tensor.shape)
    known = {"FLOAT16": Precision.FP16, "INT8": Precision.INT8, "INT4": Precision.INT4_WEIGHTS}
    largest = max(sizes, key=lambda kind: sizes[kind], default="FLOAT32")
    return count, sum(sizes.values()), known.get(largest, Precision.FP32)


def has_working_batch(path: Path, rows: int = 3) -> bool:
    """Say whether a file answers several rows at once as it answers each alone.

    A batch that a converter left free may be fixed inside all the same.
    """
    rng = np.random.default_rng(rows)
    interpreter = Interpreter(str(path), num_threads=1)
    details = interpreter.get_input_details()
    if any(item["shape_signature"][:1].tolist() != [-1] for item in details):
        return False
    values = [rng.random((rows, *item["shape"][1:])).astype(item["dtype"]) for item in details]
    try:
        together = _invoke(interpreter, details, values)
        alone = [
            _invoke(interpreter, details, [value[row : row + 1] for value in values])
            for row in range(rows)
        ]
    except (ValueError, RuntimeError):
        return False
    return all(
        len(whole) == rows
        and np.allclose(whole, np.concatenate(parts), rtol=_TOLERANCE, atol=_TOLERANCE)
        for whole, *parts in zip(together, *alone, strict=True)
    )


def _invoke(interpreter: Any, details: Any, values: Sequence[Any]) -> list[Any]:
    for item, value in zip(details, values, strict=True):
        interpreter.resize_tensor_input(item["index"], value.shape)
    interpreter.allocate_tensors()
    for item, value in zip(details, values, strict=True):
        interpreter.set_tensor(item["index"], value)
    interpreter.invoke()
    return [interpreter.get_tensor(item["index"]) for item in interpreter.get_output_details()]
