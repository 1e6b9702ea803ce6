"""An inference request from its bytes, an answer to its bytes.

Owns the JSON in front, the raw tensors behind it, and what a request may ask of its answer (which
outputs, binary or JSON, the best classes). Knows nothing of HTTP but the length of the JSON part.

Invariants: a request is either taken as a whole or refused by `RequestFormatError`, whatever its
bytes; no error but that one leaves this module for a request's sake; tails lie in the order of the
JSON, with nothing between or behind them.

Source: https://github.com/kserve/open-inference-protocol, Triton's `extension_binary_data.md`,
`extension_classification.md`, `extension_schedule_policy.md`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from platforms.artifact import Datatype
from platforms.runtimes.base import DTYPES, Array
from worker.engine.service import ModelInfo, TensorRequest, TensorResponse
from worker.rest.classification import rank
from worker.rest.errors import RequestFormatError, UnsupportedRequestError
from worker.rest.tensors import (
    count_bytes,
    get_datatype,
    parse_datatype,
    parse_shape,
    read_binary,
    read_json,
    write_binary,
    write_json,
)

_NUMBER_MAX = 2**63 - 1
US_PER_S = 1_000_000
# A client sends the same JSON before each binary tensor: it is parsed once. 1 MB at most in all.
_KEPT_HEADS, _KEPT_HEAD_BYTES = 256, 4096
REFUSED_PARAMETERS = ("sequence_id", "sequence_start", "sequence_end")
_SHARED_MEMORY = "shared_memory_region"


@dataclass(frozen=True, slots=True)
class InputHead:
    """What the JSON says of one input."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    size: int | None
    """Bytes of its tail; None where `data` holds it."""
    data: Any = None


@dataclass(frozen=True, slots=True)
class OutputHead:
    """What the JSON asks of one output."""

    is_binary: bool | None = None
    """None: as the request says for all."""
    classes: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    """The JSON of a request, checked."""

    inputs: tuple[InputHead, ...]
    outputs: Mapping[str, OutputHead]
    """Empty: all."""
    id: str = ""
    is_binary: bool = False
    priority: int = 0
    timeout_s: float | None = None
    is_classifying: bool = False
    names: tuple[str, ...] = ()
    """Of the outputs."""
    key: str = ""
    """What a split of traffic goes by."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request, and what its answer is to look like."""

    head: Head
    request: TensorRequest


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's body."""

    body: bytes
    head_bytes: int | None
    """Length of the JSON where binary tensors follow it."""


# --- requests -------------------------------------------------------------------------------


def parse_call(model: str, version: str | None, body: bytes, head_bytes: int | None) -> Call:
    """Return the request in a body.

    Args:
        model: its name, from the path.
        version: its version, from the path.
        body: the whole body, decompressed.
        head_bytes: length of the JSON at its beginning; None: all of it.

    Raises:
        RequestFormatError: it is no request of the protocol.
        UnsupportedRequestError: it asks for sequences or shared memory.
    """
    end = len(body) if head_bytes is None else head_bytes
    if not 0 <= end <= len(body):
        msg = f"the header says {end} bytes of JSON, the body has {len(body)} bytes"
        raise RequestFormatError(msg)
    if head_bytes is not None and end <= _KEPT_HEAD_BYTES:
        head = _parse_kept_head(body[:end])
    else:
        head = parse_head(body if end == len(body) else body[:end])
    inputs: dict[str, Array] = {}
    place = end
    for item in head.inputs:
        if item.size is None:
            inputs[item.name] = read_json(item.name, item.datatype, item.shape, item.data)
            continue
        if place + item.size > len(body):
            msg = f"input {item.name!r}: the body ends before its {item.size} bytes do"
            raise RequestFormatError(msg)
        inputs[item.name] = read_binary(
            item.name, item.datatype, item.shape, body, place, item.size
        )
        place += item.size
    if place != len(body):
        msg = f"{len(body) - place} bytes follow the last tensor"
        raise RequestFormatError(msg)
    request = TensorRequest(
        model, inputs, version, head.names, head.priority, head.timeout_s, head.key
    )
    return Call(head, request)


def parse_raw_call(info: ModelInfo, version: str | None, body: bytes) -> Call:
    """Return the request of a body that is nothing but the tensor of a model's one input.

    Its batch is 1; its one free axis beside the batch, if there is any, is what the bytes fill.

    Raises:
        RequestFormatError: the model has several inputs, or the bytes do not fill its shape.
    """
    if len(info.inputs) != 1:
        msg = f"a raw request needs a model with one input; {info.name} has {len(info.inputs)}"
        raise RequestFormatError(msg)
    spec = info.inputs[0]
    datatype = parse_datatype(spec.name, spec.datatype)
    shape = list(spec.shape)
    if info.max_batch_size and shape:
        shape[0] = 1
    if datatype is Datatype.BYTES:
        # Triton too takes the whole body for one element.
        body = len(body).to_bytes(4, "little") + body
        shape = [1 if axis == -1 else axis for axis in shape]
    free = [place for place, axis in enumerate(shape) if axis == -1]
    if len(free) > 1:
        msg = f"a raw request cannot say which shape of {list(spec.shape)} it has"
        raise RequestFormatError(msg)
    if free:
        others = int(np.prod([axis for axis in shape if axis != -1], dtype=np.int64))
        shape[free[0]] = len(body) // (DTYPES[datatype].itemsize * max(1, others))
    array = read_binary(spec.name, datatype, tuple(shape), body, 0, len(body))
    head = Head((), {}, is_binary=True)
    return Call(head, TensorRequest(info.name, {spec.name: array}, version))


def parse_head(text: bytes) -> Head:
    """Return the JSON part of a request, checked.

    Raises:
        RequestFormatError: it is no JSON, or not the protocol's.
        UnsupportedRequestError: it asks for sequences or shared memory.
    """
    document = parse_json(text)
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        msg = "the request needs a list of inputs"
        raise RequestFormatError(msg)
    parameters = _get_parameters(document, "the request")
    refused = next((key for key in REFUSED_PARAMETERS if parameters.get(key)), None)
    if refused is not None:
        msg = f"{refused}: sequences are not supported; no model here keeps a state"
        raise UnsupportedRequestError(msg)
    outputs = _parse_outputs(document.get("outputs"))
    timeout_us = _get_count(parameters, "timeout")
    read = tuple(_parse_input(item) for item in inputs)
    if len({item.name for item in read}) < len(read):
        msg = "an input is given twice"
        raise RequestFormatError(msg)
    return Head(
        inputs=read,
        outputs=outputs,
        id=_parse_id(document.get("id")),
        is_binary=bool(_get_flag(parameters, "binary_data_output")),
        priority=_get_count(parameters, "priority"),
        timeout_s=timeout_us / US_PER_S if timeout_us else None,
        is_classifying=any(item.classes for item in outputs.values()),
        names=tuple(outputs),
        key=_get_key(parameters),
    )


def _get_key(parameters: Mapping[str, Any]) -> str:
    value = parameters.get("key", "")
    if isinstance(value, str):
        return value
    msg = "parameter key must be a text"
    raise RequestFormatError(msg)


_parse_kept_head = lru_cache(_KEPT_HEADS)(parse_head)


def parse_json(text: bytes) -> dict[str, Any]:
    """Return a JSON object; NaN and the infinities are taken, as Triton's clients send them.

    Raises:
        RequestFormatError: it is not one.
    """
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        document = _parse_loose_json(text, exc)
    if not isinstance(document, dict):
        msg = "the request is no JSON object"
        raise RequestFormatError(msg)
    return document


def _parse_loose_json(text: bytes, error: ValueError) -> Any:
    if b"NaN" not in text and b"Infinity" not in text:
        msg = f"the request is no JSON: {error}"
        raise RequestFormatError(msg) from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        msg = f"the request is no JSON: {error}"
        raise RequestFormatError(msg) from exc


def _parse_id(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        msg = "id must be a text"
        raise RequestFormatError(msg)
    return value


def _parse_input(item: object) -> InputHead:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        msg = "an input must be an object with a name"
        raise RequestFormatError(msg)
    name = item["name"]
    parameters = _get_parameters(item, f"input {name!r}")
    _refuse_shared_memory(parameters)
    datatype = parse_datatype(name, item.get("datatype"))
    shape = parse_shape(name, item.get("shape"))
    size = parameters.get("binary_data_size")
    if size is None:
        return InputHead(name, datatype, shape, None, item.get("data"))
    if "data" in item:
        msg = f"input {name!r} has both data and binary_data_size"
        raise RequestFormatError(msg)
    return InputHead(name, datatype, shape, _get_count(parameters, "binary_data_size"))


def _parse_outputs(items: object) -> dict[str, OutputHead]:
    outputs: dict[str, OutputHead] = {}
    if items is None:
        return outputs
    if not isinstance(items, list):
        msg = "outputs must be a list"
        raise RequestFormatError(msg)
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            msg = "an output must be an object with a name"
            raise RequestFormatError(msg)
        parameters = _get_parameters(item, f"output {item['name']!r}")
        _refuse_shared_memory(parameters)
        outputs[item["name"]] = OutputHead(
            _get_flag(parameters, "binary_data"), _get_count(parameters, "classification")
        )
    return outputs


def _refuse_shared_memory(parameters: Mapping[str, Any]) -> None:
    if _SHARED_MEMORY in parameters:
        msg = f"{_SHARED_MEMORY}: shared memory is not supported; send the tensor itself"
        raise UnsupportedRequestError(msg)


def _get_parameters(document: Mapping[str, Any], whose: str) -> dict[str, Any]:
    parameters = document.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        msg = f"parameters of {whose} must be an object"
        raise RequestFormatError(msg)
    return parameters


def _get_flag(parameters: Mapping[str, Any], key: str) -> bool | None:
    value = parameters.get(key)
    if value is None or isinstance(value, bool):
        return value
    msg = f"parameter {key} must be true or false"
    raise RequestFormatError(msg)


def _get_count(parameters: Mapping[str, Any], key: str) -> int:
    value = parameters.get(key, 0)
    if type(value) is int and 0 <= value <= _NUMBER_MAX:
        return value
    msg = f"parameter {key} must be a whole number from 0 on"
    raise RequestFormatError(msg)


# --- answers --------------------------------------------------------------------------------


def encode_answer(call: Call, response: TensorResponse, info: ModelInfo | None = None) -> Answer:
    """Return the body of an answer.

    Args:
        call: what was asked.
        response: what the engine answered.
        info: the model; needed where the call asks for classes.
    """
    head = call.head
    described: list[str] = []
    parts: list[Any] = [b""]
    for name, found in response.outputs.items():
        asked = head.outputs.get(name)
        is_binary = head.is_binary
        array = found
        if asked is not None:
            is_binary = is_binary if asked.is_binary is None else asked.is_binary
            if asked.classes and info is not None:
                array = rank(found, asked.classes, info, name)
        start = _describe(name, get_datatype(array), array.shape)
        if is_binary:
            tail = write_binary(array)
            parts.append(tail)
            described.append(f'{start}"parameters":{{"binary_data_size":{count_bytes(tail)}}}}}')
        else:
            described.append(f'{start}"data":{write_json(array).decode()}}}')
    identity = f'"id":{_quote(head.id)},' if head.id else ""
    text = (
        f'{{{identity}"model_name":{_quote(response.model)},'
        f'"model_version":{_quote(response.version)},"outputs":[{",".join(described)}]}}'
    ).encode()
    if len(parts) == 1:
        return Answer(text, None)
    parts[0] = text
    return Answer(b"".join(parts), len(text))


@lru_cache(1024)
def _describe(name: str, datatype: Datatype, shape: tuple[int, ...]) -> str:
    axes = ",".join(map(str, shape))
    return f'{{"name":{_quote(name)},"datatype":"{datatype}","shape":[{axes}],'


@lru_cache(1024)
def _quote(text: str) -> str:
    # A lone surrogate cannot come in: orjson refuses it; json.loads, for NaN's sake, does not.
    return orjson.dumps(text.encode("utf-8", "replace").decode()).decode()
