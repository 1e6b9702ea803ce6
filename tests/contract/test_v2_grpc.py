"""Triton's own gRPC clients, unmodified, against the worker's gRPC API."""

import asyncio
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from pydantic import SecretStr
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from agent.sections import HttpSettings
from platforms.artifact import Datatype
from tests.contract.test_v2_clients import SIMPLE, make_values
from tests.harness.v2_models import LABELS, ONNX_TYPES, Box, serve_models
from tests.harness.waiting import wait_until
from worker.errors import HttpUnavailableError
from worker.rpc.server import GrpcServer


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with serve_models(tmp_path_factory.mktemp("v2")) as box:
        yield box


@pytest.fixture(scope="module")
def server(box: Box) -> Iterator[GrpcServer]:
    server = GrpcServer(HttpSettings(grpc_port=0), box.service)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(server: GrpcServer) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


def put(name: str, values: Any, datatype: str) -> Any:
    found = triton.InferInput(name, list(values.shape), datatype)
    found.set_data_from_numpy(values)
    return found


def put_simple(rows: int = 1) -> list[Any]:
    values = np.tile(SIMPLE, (rows, 1))
    return [put(f"INPUT{number}", values, "INT32") for number in (0, 1)]


def get_code(caught: Any) -> str:
    return str(caught.value.status()).removeprefix("StatusCode.")


def test_health_and_descriptions(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    assert client.is_model_ready("simple", "1")
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata().name == "edgeward"
    found = client.get_model_metadata("simple")
    assert [(one.name, one.datatype, list(one.shape)) for one in found.inputs] == [
        ("INPUT0", "INT32", [-1, 16]),
        ("INPUT1", "INT32", [-1, 16]),
    ]
    config = client.get_model_config("simple").config
    assert (config.name, config.max_batch_size) == ("simple", 32)
    assert [list(one.dims) for one in config.input] == [[16], [16]]


def test_repository_is_listed_and_models_come_and_go(client: Any) -> None:
    states = {one.name: one.state for one in client.get_model_repository_index().models}
    assert states["mlp"] == "READY"
    client.unload_model("mlp")
    assert not client.is_model_ready("mlp")
    with pytest.raises(InferenceServerException, match="unloaded") as caught:
        client.infer("mlp", [put("x", np.ones((1, 64), np.float32), "FP32")])
    assert get_code(caught) == "UNAVAILABLE"
    client.load_model("mlp")
    assert client.is_model_ready("mlp")


def test_statistics_count_rows_and_requests(client: Any) -> None:
    def read() -> Any:
        (found,) = client.get_inference_statistics("simple", "1").model_stats
        return found

    before = read()
    client.infer("simple", put_simple(3))
    after = read()
    assert after.inference_count - before.inference_count == 3
    assert after.inference_stats.success.count - before.inference_stats.success.count == 1


@pytest.mark.parametrize("datatype", ONNX_TYPES, ids=lambda one: one.value)
def test_every_datatype_comes_back_as_it_was_sent(client: Any, datatype: Datatype) -> None:
    values = make_values(datatype)
    given = put("INPUT0", values, datatype.value)
    found = client.infer(f"identity_{datatype.value.lower()}", [given]).as_numpy("OUTPUT0")
    if datatype is Datatype.BYTES:
        assert [item.decode() for item in found.ravel()] == values.ravel().tolist()
    else:
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)


TYPED = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT32": ("int_contents", [-5, 7]),
    "INT64": ("int64_contents", [-(2**62), 7]),
    "UINT16": ("uint_contents", [0, 65535]),
    "UINT64": ("uint64_contents", [0, 2**63]),
    "FP32": ("fp32_contents", [0.5, -2.0]),
    "FP64": ("fp64_contents", [0.5, -2.0]),
    "BYTES": ("bytes_contents", [b"one", b"two"]),
}


def send(server: GrpcServer, message: Any) -> Any:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            service_pb2.ModelInferRequest.SerializeToString,
            service_pb2.ModelInferResponse.FromString,
        )
        return call(message, timeout=20)


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents_are_read(server: GrpcServer, datatype: str) -> None:
    field, values = TYPED[datatype]
    message = service_pb2.ModelInferRequest(model_name=f"identity_{datatype.lower()}", id="seven")
    item = message.inputs.add(name="INPUT0", datatype=datatype, shape=[1, 2])
    getattr(item.contents, field).extend(values)
    answer = send(server, message)
    assert answer.id == "seven"
    if datatype == "BYTES":
        assert answer.raw_output_contents[0] == b"\x03\0\0\0one\x03\0\0\0two"
    else:
        wanted = np.array(values, triton.triton_to_np_dtype(datatype)).tobytes()
        assert answer.raw_output_contents[0] == wanted


def test_outputs_are_chosen_and_classes_named(client: Any) -> None:
    alone = client.infer("simple", put_simple(), outputs=[triton.InferRequestedOutput("OUTPUT1")])
    assert alone.as_numpy("OUTPUT0") is None
    assert alone.as_numpy("OUTPUT1").tolist() == [[0] * 16]
    scores = put("x", np.array([[0.1, 0.9, 0.3, 0.2]], np.float32), "FP32")
    wanted = [triton.InferRequestedOutput("y", class_count=2)]
    found = client.infer("scores", [scores], outputs=wanted).as_numpy("y")
    assert [item.decode() for item in found[0]] == [
        f"0.900000:1:{LABELS[1]}",
        f"0.300000:2:{LABELS[2]}",
    ]


def test_errors_have_tritons_codes(client: Any) -> None:
    x = np.ones((1, 64), np.float32)
    cases: list[tuple[str, list[Any], dict[str, Any], str]] = [
        ("nope", put_simple(), {}, "NOT_FOUND"),
        ("simple", put_simple(), {"model_version": "9"}, "NOT_FOUND"),
        ("simple", [put("INPUT0", x, "FP32")], {}, "INVALID_ARGUMENT"),
        ("mlp", [put("x", x[:, :7], "FP32")], {}, "INVALID_ARGUMENT"),
        ("simple", put_simple(), {"sequence_id": 4}, "UNIMPLEMENTED"),
        (
            "simple",
            put_simple(),
            {"outputs": [triton.InferRequestedOutput("Z")]},
            "INVALID_ARGUMENT",
        ),
    ]
    for model, inputs, options, code in cases:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(model, inputs, **options)
        assert get_code(caught) == code, (model, options)
    with pytest.raises(InferenceServerException, match="SystemSharedMemoryStatus") as caught:
        client.get_system_shared_memory_status()
    assert get_code(caught) == "UNIMPLEMENTED"
    assert client.is_server_ready()


def test_bytes_that_do_not_fit_their_shape_are_refused(server: GrpcServer) -> None:
    message = service_pb2.ModelInferRequest(model_name="identity_fp32")
    message.inputs.add(name="INPUT0", datatype="FP32", shape=[1, 2])
    for contents in ([b"\0" * 7], [b"\0" * 8] * 2, []):
        del message.raw_input_contents[:]
        message.raw_input_contents.extend(contents)
        with pytest.raises(grpc.RpcError) as caught:
            send(server, message)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_stream_answers_each_request_in_order_and_an_error_ends_only_its_own(
    server: GrpcServer,
) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("simple", put_simple(), request_id="1")
        client.async_stream_infer("nope", put_simple(), request_id="2")
        client.async_stream_infer("simple", put_simple(), request_id="3")
        found = [answers.get(timeout=20) for _ in range(3)]
        client.stop_stream()
    assert [error is None for _, error in found] == [True, False, True]
    assert [result.get_response().id for result, error in found if error is None] == ["1", "3"]
    assert "nope" in str(found[1][1])


def test_aio_client_asks_many_at_once(server: GrpcServer) -> None:
    async def ask() -> list[Any]:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            return await asyncio.gather(*(client.infer("simple", put_simple()) for _ in range(20)))

    for answer in asyncio.run(ask()):
        np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), SIMPLE * 2)


def test_cancelled_request_leaves_the_queue(box: Box, server: GrpcServer) -> None:
    def count_pending() -> int:
        return sum(one.pending for one in box.service.get_stats("endless"))

    async def ask() -> None:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            given = [put("x", np.array([2**62]), "INT64")]
            runs = [asyncio.ensure_future(client.infer("endless", given)) for _ in range(6)]
            await asyncio.to_thread(wait_until, lambda: count_pending() > 2, 30, "some wait")
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)
        await asyncio.to_thread(wait_until, lambda: count_pending() == 0, 30, "none waits")

    asyncio.run(ask())


def test_token_is_asked_for(box: Box) -> None:
    server = GrpcServer(HttpSettings(grpc_port=0, token=SecretStr("secret")), box.service)
    server.start()
    try:
        with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            assert client.is_server_live()
            with pytest.raises(InferenceServerException) as caught:
                client.infer("simple", put_simple())
            assert get_code(caught) == "UNAUTHENTICATED"
            headers = {"authorization": "Bearer secret"}
            assert client.infer("simple", put_simple(), headers=headers)
    finally:
        server.stop()


def test_message_over_the_bound_is_refused(box: Box) -> None:
    server = GrpcServer(HttpSettings(grpc_port=0, body_bytes=1024), box.service)
    server.start()
    try:
        with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            with pytest.raises(InferenceServerException) as caught:
                client.infer("simple", put_simple(50))
            assert get_code(caught) == "RESOURCE_EXHAUSTED"
            assert client.infer("simple", put_simple())
    finally:
        server.stop()


def test_port_in_use_is_said(box: Box, server: GrpcServer, tmp_path: Path) -> None:
    second = GrpcServer(HttpSettings(grpc_port=server.port), box.service)
    with pytest.raises(HttpUnavailableError, match="grpc_port"):
        second.start()
