"""Every call of Triton's Python HTTP clients, unmodified, against a worker's API.

One suite for both: the blocking client (gevent) and the asyncio one.
"""

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as blocking
import tritonclient.http.aio as asynchronous
from tritonclient.utils import InferenceServerException

from platforms.artifact import Datatype
from platforms.runtimes.base import DTYPES
from tests.harness.v2_models import LABELS, ONNX_TYPES, Box, serve_models
from tests.harness.waiting import wait_until

# geventhttpclient leaves sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

SIMPLE = np.arange(16, dtype=np.int32)[None]


class AioClient:
    """The asyncio client, called one call at a time."""

    def __init__(self, url: str) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._open(url))

    async def _open(self, url: str) -> Any:
        return asynchronous.InferenceServerClient(url)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            return self._runner.run(getattr(self._client, name)(*args, **options))

        return call

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with serve_models(tmp_path_factory.mktemp("v2")) as box:
        yield box
    gc.collect()


@pytest.fixture(params=["blocking", "aio"])
def client(request: pytest.FixtureRequest, box: Box) -> Iterator[Any]:
    made = blocking.InferenceServerClient if request.param == "blocking" else AioClient
    client = made(box.url)
    yield client
    client.close()


def put(name: str, array: Any, *, binary: bool = True, datatype: str = "") -> Any:
    found = datatype or blocking.np_to_triton_dtype(array.dtype)
    tensor = blocking.InferInput(name, list(array.shape), found)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def put_simple(rows: int = 1, *, binary: bool = True) -> list[Any]:
    array = np.repeat(SIMPLE, rows, axis=0)
    return [put("INPUT0", array, binary=binary), put("INPUT1", array, binary=binary)]


def want(name: str, **options: Any) -> Any:
    return blocking.InferRequestedOutput(name, **options)


def make_values(datatype: Datatype) -> Any:
    dtype = DTYPES[datatype]
    if datatype is Datatype.BYTES:
        return np.array([["", "ä€"], ["x" * 300, "0"]], np.object_)
    if datatype is Datatype.BOOL:
        return np.array([[True, False], [False, True]])
    if dtype.kind == "f":
        limits = np.finfo(dtype)
        return np.array([[limits.max, limits.min], [0.1, -0.0]], dtype)
    limit = np.iinfo(dtype)
    return np.array([[limit.min, limit.max], [0, 1]], dtype)


# --- health and descriptions ----------------------------------------------------------------


def test_health_calls_say_yes_and_no(client: Any) -> None:
    assert client.is_server_live() is True
    assert client.is_server_ready() is True
    assert client.is_model_ready("simple") is True
    assert client.is_model_ready("simple", "1") is True
    assert client.is_model_ready("simple", "9") is False
    assert client.is_model_ready("nope") is False


def test_server_and_model_describe_themselves(client: Any) -> None:
    server = client.get_server_metadata()
    assert server["name"] == "edgeward"
    assert "binary_tensor_data" in server["extensions"]
    model = client.get_model_metadata("simple", "1")
    assert model["versions"] == ["1"]
    assert model["inputs"][1] == {"name": "INPUT1", "datatype": "INT32", "shape": [-1, 16]}
    config = client.get_model_config("simple")
    assert config["input"][0]["data_type"] == "TYPE_INT32"
    assert config["input"][0]["dims"] == [16]
    assert config["max_batch_size"] >= 1


def test_statistics_count_rows_and_requests(client: Any) -> None:
    def read() -> Any:
        (found,) = client.get_inference_statistics("simple", "1")["model_stats"]
        return found

    before = read()
    client.infer("simple", put_simple(3))
    after = read()
    assert after["inference_count"] - before["inference_count"] == 3
    success = after["inference_stats"]["success"]
    assert success["count"] - before["inference_stats"]["success"]["count"] == 1
    assert success["ns"] > 0
    names = {one["name"] for one in client.get_inference_statistics()["model_stats"]}
    assert "simple" in names


def test_repository_is_listed_and_models_come_and_go(client: Any) -> None:
    index = {one["name"]: one for one in client.get_model_repository_index()}
    assert index["mlp"]["state"] == "READY"
    client.unload_model("mlp")
    assert client.is_model_ready("mlp") is False
    with pytest.raises(InferenceServerException, match="unloaded") as caught:
        client.infer("mlp", [put("x", np.ones((1, 64), np.float32))])
    assert caught.value.status() == "503"
    index = {one["name"]: one for one in client.get_model_repository_index()}
    assert index["mlp"]["state"] == "UNAVAILABLE"
    client.load_model("mlp")
    assert client.is_model_ready("mlp") is True
    client.unload_model("nope")


# --- inference ------------------------------------------------------------------------------


# The client itself sends and reads FP16 as binary only.
FORMS = [
    (datatype, binary_in, binary_out)
    for datatype in ONNX_TYPES
    for binary_in in (True, False)
    for binary_out in (True, False)
    if datatype is not Datatype.FP16 or (binary_in and binary_out)
]


@pytest.mark.parametrize(("datatype", "binary_in", "binary_out"), FORMS)
def test_every_datatype_comes_back_as_it_was_sent(
    client: Any, datatype: Datatype, binary_in: bool, binary_out: bool
) -> None:
    values = make_values(datatype)
    given = put("INPUT0", values, binary=binary_in, datatype=datatype.value)
    answer = client.infer(
        f"identity_{datatype.value.lower()}",
        [given],
        outputs=[want("OUTPUT0", binary_data=binary_out)],
    )
    found = answer.as_numpy("OUTPUT0")
    if datatype is Datatype.BYTES:
        read = [item.decode() if isinstance(item, bytes) else item for item in found.ravel()]
        assert read == values.ravel().tolist()
    else:
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)
    described = answer.get_output("OUTPUT0")
    assert ("data" in described) is not binary_out


def test_two_inputs_give_two_outputs_and_one_alone_if_asked(client: Any) -> None:
    answer = client.infer("simple", put_simple(), model_version="1")
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), SIMPLE * 2)
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT1"), SIMPLE * 0)
    alone = client.infer("simple", put_simple(), outputs=[want("OUTPUT1")])
    assert alone.as_numpy("OUTPUT0") is None
    mixed = client.infer(
        "simple",
        [put_simple()[0], put_simple(binary=False)[1]],
        outputs=[want("OUTPUT0", binary_data=False), want("OUTPUT1", binary_data=True)],
    )
    np.testing.assert_array_equal(mixed.as_numpy("OUTPUT0"), SIMPLE * 2)
    np.testing.assert_array_equal(mixed.as_numpy("OUTPUT1"), SIMPLE * 0)


def test_id_is_echoed_only_when_sent(client: Any) -> None:
    assert client.infer("simple", put_simple(), request_id='a "b"').get_response()["id"] == 'a "b"'
    assert "id" not in client.infer("simple", put_simple()).get_response()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("rows", [1, 4000])
def test_bodies_are_compressed_both_ways(client: Any, algorithm: str, rows: int) -> None:
    answer = client.infer(
        "simple",
        put_simple(rows),
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), np.repeat(SIMPLE, rows, axis=0) * 2)


@pytest.mark.parametrize("binary", [True, False])
def test_best_classes_come_with_their_labels(client: Any, binary: bool) -> None:
    scores = np.array([[0.1, 0.9, 0.3, 0.5], [4, 3, 2, 1]], np.float32)
    asked = [want("y", class_count=2, binary_data=binary)]
    found = client.infer("scores", [put("x", scores)], outputs=asked).as_numpy("y")
    texts = [item.decode() if isinstance(item, bytes) else item for item in found.ravel()]
    assert found.shape == (2, 2)
    assert texts[:2] == [f"0.900000:1:{LABELS[1]}", f"0.500000:3:{LABELS[3]}"]
    assert texts[2:] == [f"4.000000:0:{LABELS[0]}", f"3.000000:1:{LABELS[1]}"]


def test_more_classes_than_there_are_give_all(client: Any) -> None:
    scores = np.zeros((1, 4), np.float32)
    answer = client.infer("scores", [put("x", scores)], outputs=[want("y", class_count=99)])
    assert answer.as_numpy("y").shape == (1, 4)


def test_not_finite_numbers_travel_both_ways(client: Any) -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 1]], np.float32)
    for binary in (True, False):
        answer = client.infer(
            "identity_fp32",
            [put("INPUT0", values, binary=binary)],
            outputs=[want("OUTPUT0", binary_data=binary)],
        )
        np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), values)


def test_parameters_of_the_client_are_taken(client: Any) -> None:
    answer = client.infer(
        "simple", put_simple(), priority=1, timeout=10_000_000, parameters={"own": "value"}
    )
    assert answer.as_numpy("OUTPUT0") is not None


# --- errors ---------------------------------------------------------------------------------


def refuse(client: Any, model: str, inputs: list[Any], **options: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, inputs, **options)
    return caught.value.status(), caught.value.message()


def test_what_does_not_fit_is_a_400_that_says_why(client: Any) -> None:
    wrong_type = put("INPUT0", SIMPLE.astype(np.float32))
    wrong_shape = put("INPUT0", SIMPLE[:, :3])
    unknown = put("nope", SIMPLE)
    (first, second) = put_simple()
    for inputs in ([wrong_type, second], [wrong_shape, second], [unknown, second], [first]):
        status, message = refuse(client, "simple", inputs)
        assert status == "400"
        assert "INPUT" in message
    status, message = refuse(client, "simple", put_simple(), outputs=[want("nope")])
    assert (status, "nope" in message) == ("400", True)
    twice = [first, first]
    assert refuse(client, "simple", twice)[0] == "400"


def test_unknown_models_are_a_404(client: Any) -> None:
    assert refuse(client, "nope", put_simple())[0] == "404"
    assert refuse(client, "simple", put_simple(), model_version="9")[0] == "404"
    for call in (client.get_model_metadata, client.get_model_config):
        with pytest.raises(InferenceServerException) as caught:
            call("nope")
        assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException) as caught:
        client.load_model("nope")
    assert caught.value.status() == "404"


def test_what_is_not_offered_is_a_501_by_name(client: Any) -> None:
    status, message = refuse(client, "simple", put_simple(), sequence_id=5, sequence_start=True)
    assert (status, "sequence" in message) == ("501", True)
    shared = blocking.InferInput("INPUT0", [1, 16], "INT32")
    shared.set_shared_memory("region", 64)
    assert refuse(client, "simple", [shared, put_simple()[1]])[0] == "501"
    calls = (
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.get_trace_settings,
        client.get_log_settings,
        lambda: client.register_system_shared_memory("a", "/a", 64),
        lambda: client.update_log_settings({"log_info": True}),
        lambda: client.load_model("simple", config="{}"),
    )
    for call in calls:
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == "501"


def test_bfloat16_is_refused_by_name(client: Any) -> None:
    tensor = put("INPUT0", np.ones((1, 2), np.float16))
    # Without ml_dtypes the client makes none itself.
    tensor._datatype = "BF16"
    status, message = refuse(client, "identity_fp32", [tensor])
    assert (status, "BF16" in message) == ("400", True)


# --- what only one of the clients can do -----------------------------------------------------


def test_blocking_client_asks_many_times_at_once(box: Box) -> None:
    with blocking.InferenceServerClient(box.url, concurrency=8) as client:
        asked = [client.async_infer("simple", put_simple(rows)) for rows in range(1, 40)]
        sizes = [len(one.get_result().as_numpy("OUTPUT0")) for one in asked]
    assert sizes == list(range(1, 40))


def test_cancelled_request_leaves_the_queue(box: Box) -> None:
    endless = put("x", np.array([2**62]))
    before = box.service.get_stats("endless")[0].failures.get("CANCELED", 0)

    def read_waiting() -> int:
        return box.service.get_stats("endless")[0].pending

    async def ask_and_leave() -> None:
        async with asynchronous.InferenceServerClient(box.url) as client:
            # Two run, and never end; each of those may have waited for a moment, a third one stays.
            tasks = [asyncio.ensure_future(client.infer("endless", [endless])) for _ in range(6)]
            await asyncio.to_thread(wait_until, lambda: read_waiting() > 2, 30, "requests wait")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(ask_and_leave())
    wait_until(lambda: not read_waiting(), 30, "no request waits")
    assert box.service.get_stats("endless")[0].failures["CANCELED"] > before
