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
_NUMBER = re.compile(r"_(\d+)$")


def name_signature(
    source: Path, target: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """Copy a file with one signature that has these names, in this order.

    The file's own tensors are put in order by the number that ends their names in its signature
    (`args_0`, `output_1`), or, where there is none, stay in the order they have.

    Raises:
        HopFailedError: the file has another number of inputs or outputs.
    """
    model = schema.ModelT.InitFromPackedBuf(source.read_bytes(), 0)
    graph = model.subgraphs[0]
    signatures = model.signatureDefs or []
    own = signatures[0] if len(signatures) == 1 else None
    graph.inputs = _order(graph.inputs, own.inputs if own else None, inputs)
    graph.outputs = _order(graph.outputs, own.outputs if own else None, outputs)
    signature = schema.SignatureDefT()
    signature.signatureKey = own.signatureKey if own else _KEY
    signature.subgraphIndex = 0
    signature.inputs = _name(graph.inputs, inputs)
    signature.outputs = _name(graph.outputs, outputs)
    model.signatureDefs = [signature]
    builder = flatbuffers.Builder(source.stat().st_size)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    target.write_bytes(builder.Output())


def _order(tensors: Any, maps: Any, names: Sequence[str]) -> list[int]:
    """Return the graph's tensors in the order of the signature's numbers."""
    found = [int(index) for index in tensors]
    if maps:
        numbered = [
            (int(number[1]), entry.tensorIndex)
            for entry in maps
            if (number := _NUMBER.search(_decode(entry.name)))
        ]
        if len(numbered) == len(found):
            found = [index for _, index in sorted(numbered)]
    if len(found) != len(names):
        msg = f"the file has {len(found)} tensors in place of {', '.join(names)}"
        raise HopFailedError(msg)
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
