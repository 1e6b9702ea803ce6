"""gRPC's messages to the engine's words and back.

Owns the two forms of a tensor in a message (typed `contents`, or its bytes in `raw_input_contents`)
and what a request's parameters mean. Answers carry bytes, which Triton's clients expect.

Invariants: a request is taken as a whole or refused by `RequestFormatError`.

Source: https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto
"""

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2, service_pb2

from platforms.artifact import Datatype, TensorSpec
from platforms.runtimes.base import Array
from worker.engine.service import (
    BatchStats,
    Duration,
    IndexEntry,
    ModelInfo,
    ModelStats,
    TensorRequest,
    TensorResponse,
)
from worker.rest.classification import rank
from worker.rest.codec import REFUSED_PARAMETERS, US_PER_S
from worker.rest.errors import RequestFormatError, UnsupportedRequestError
from worker.rest.tensors import (
    get_datatype,
    parse_datatype,
    parse_shape,
    read_binary,
    read_json,
    write_binary,
)

_FIELDS: Mapping[Datatype, str] = {
    Datatype.BOOL: "bool_contents",
    Datatype.INT8: "int_contents",
    Datatype.INT16: "int_contents",
    Datatype.INT32: "int_contents",
    Datatype.INT64: "int64_contents",
    Datatype.UINT8: "uint_contents",
    Datatype.UINT16: "uint_contents",
    Datatype.UINT32: "uint_contents",
    Datatype.UINT64: "uint64_contents",
    Datatype.FP32: "fp32_contents",
    Datatype.FP64: "fp64_contents",
    Datatype.BYTES: "bytes_contents",
}
_SHARED_MEMORY = "shared_memory_region"


def read_request(message: Any) -> TensorRequest:
    """Return the request in a `ModelInferRequest`.

    Raises:
        RequestFormatError: it is none of the protocol.
        UnsupportedRequestError: it asks for sequences or shared memory.
    """
    parameters = _read_parameters(message.parameters)
    refused = next((key for key in REFUSED_PARAMETERS if parameters.get(key)), None)
    if refused is not None:
        msg = f"{refused}: sequences are not supported; no model here keeps a state"
        raise UnsupportedRequestError(msg)
    for tensor in (*message.inputs, *message.outputs):
        if _SHARED_MEMORY in tensor.parameters:
            msg = f"{_SHARED_MEMORY}: shared memory is not supported; send the tensor itself"
            raise UnsupportedRequestError(msg)
    timeout_us = _read_count(parameters, "timeout")
    return TensorRequest(
        message.model_name,
        _read_inputs(message),
        message.model_version or None,
        tuple(item.name for item in message.outputs),
        _read_count(parameters, "priority"),
        timeout_us / US_PER_S if timeout_us else None,
        _read_key(parameters),
    )


def _read_key(parameters: Mapping[str, Any]) -> str:
    value = parameters.get("key", "")
    if isinstance(value, str):
        return value
    msg = "parameter key must be a text"
    raise RequestFormatError(msg)


def _read_parameters(parameters: Any) -> dict[str, Any]:
    found = {}
    for key, value in parameters.items():
        choice = value.WhichOneof("parameter_choice")
        found[key] = None if choice is None else getattr(value, choice)
    return found


def _read_count(parameters: Mapping[str, Any], key: str) -> int:
    value = parameters.get(key, 0)
    if type(value) is int and value >= 0:
        return value
    msg = f"parameter {key} must be a whole number from 0 on"
    raise RequestFormatError(msg)


def _read_inputs(message: Any) -> dict[str, Array]:
    raw = message.raw_input_contents
    if not message.inputs:
        msg = "the request needs inputs"
        raise RequestFormatError(msg)
    if raw and len(raw) != len(message.inputs):
        msg = f"{len(raw)} raw contents for {len(message.inputs)} inputs: all are raw, or none"
        raise RequestFormatError(msg)
    inputs: dict[str, Array] = {}
    for number, item in enumerate(message.inputs):
        if item.name in inputs:
            msg = "an input is given twice"
            raise RequestFormatError(msg)
        datatype = parse_datatype(item.name, item.datatype)
        shape = parse_shape(item.name, list(item.shape))
        if raw:
            body = raw[number]
            inputs[item.name] = read_binary(item.name, datatype, shape, body, 0, len(body))
        else:
            inputs[item.name] = _read_typed(item, datatype, shape)
    return inputs


def _read_typed(item: Any, datatype: Datatype, shape: tuple[int, ...]) -> Array:
    field = _FIELDS.get(datatype)
    if field is None:
        msg = f"input {item.name!r}: {datatype} has no typed contents; send its bytes"
        raise RequestFormatError(msg)
    values = list(getattr(item.contents, field))
    if datatype is Datatype.BYTES:
        try:
            values = [value.decode() for value in values]
        except UnicodeDecodeError as exc:
            msg = f"input {item.name!r}: an element of BYTES is no UTF-8"
            raise RequestFormatError(msg) from exc
    return read_json(item.name, datatype, shape, values)


def read_classes(message: Any) -> dict[str, int]:
    """Return how many classes are asked of which outputs, where they are.

    Raises:
        RequestFormatError: a number of classes is none.
    """
    found = {}
    for item in message.outputs:
        classes = _read_count(_read_parameters(item.parameters), "classification")
        if classes:
            found[item.name] = classes
    return found


def build_answer(
    message: Any, response: TensorResponse, classes: Mapping[str, int], info: ModelInfo | None
) -> Any:
    """Return the `ModelInferResponse` to a request.

    Args:
        message: the request's.
        response: of the engine.
        classes: wanted of outputs, by name.
        info: the model; needed where there are classes.
    """
    answer = service_pb2.ModelInferResponse(
        model_name=response.model, model_version=response.version, id=message.id
    )
    for name, found in response.outputs.items():
        array = found
        if name in classes and info is not None:
            array = rank(found, classes[name], info, name)
        answer.outputs.add(name=name, datatype=get_datatype(array).value, shape=array.shape)
        answer.raw_output_contents.append(bytes(write_binary(array)))
    return answer


# --- descriptions ---------------------------------------------------------------------------


def build_metadata(info: ModelInfo) -> Any:
    """Return a model's `ModelMetadataResponse`."""
    return service_pb2.ModelMetadataResponse(
        name=info.name,
        versions=info.versions,
        platform=info.platform,
        inputs=[_build_tensor(spec) for spec in info.inputs],
        outputs=[_build_tensor(spec) for spec in info.outputs],
    )


def _build_tensor(spec: TensorSpec) -> Any:
    return service_pb2.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype.value, shape=spec.shape
    )


def build_config(info: ModelInfo) -> Any:
    """Return a model's `ModelConfigResponse`; what is Edgeward's own has no field there."""
    config = json_format.ParseDict(
        dict(info.config), model_config_pb2.ModelConfig(), ignore_unknown_fields=True
    )
    return service_pb2.ModelConfigResponse(config=config)


def build_index(entries: list[IndexEntry]) -> Any:
    """Return a `RepositoryIndexResponse`."""
    answer = service_pb2.RepositoryIndexResponse()
    for entry in entries:
        answer.models.add(
            name=entry.name, version=entry.version, state=entry.status.value, reason=entry.reason
        )
    return answer


def build_statistics(stats: list[ModelStats]) -> Any:
    """Return a `ModelStatisticsResponse`."""
    answer = service_pb2.ModelStatisticsResponse()
    for item in stats:
        model = answer.model_stats.add(
            name=item.name,
            version=item.version,
            last_inference=item.last_inference_ms,
            inference_count=item.inference_count,
            execution_count=item.execution_count,
        )
        for field in model.inference_stats.DESCRIPTOR.fields:
            _put(getattr(model.inference_stats, field.name), getattr(item, field.name))
        for batch in item.batches:
            _put_batch(model.batch_stats.add(batch_size=batch.batch_size), batch)
    return answer


def _put_batch(target: Any, batch: BatchStats) -> None:
    _put(target.compute_input, batch.compute_input)
    _put(target.compute_infer, batch.compute_infer)
    _put(target.compute_output, batch.compute_output)


def _put(target: Any, duration: Duration) -> None:
    target.count, target.ns = duration.count, duration.ns
