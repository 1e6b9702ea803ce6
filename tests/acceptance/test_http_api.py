"""`edgeward up --http-port`: two models, Triton's own client, an image, metrics, a port in use."""

import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.nets import write_mlp_version
from console.models.train_digits import FOLDER as DIGITS
from tests.harness.commands import UpProcess
from tests.harness.known_box import seed_platform
from tests.harness.waiting import free_port, wait_until


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[UpProcess]:
    data_dir = tmp_path_factory.mktemp("http") / "box"
    seed_platform(data_dir)
    cache = {"EDGEWARD_WORKER__RESPONSE_CACHE_MB": "4"}
    up = UpProcess(data_dir, "http-box", "--http-port", str(port), **cache)
    yield up
    up.stop()


@pytest.fixture(scope="module")
def client(up: UpProcess, port: int) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client


@pytest.fixture(scope="module")
def models(up: UpProcess, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Add a folder with a manifest and a bare ONNX file, while the box runs."""
    up.ask("models", "add", "digits", DIGITS)
    bare = write_mlp_version(tmp_path_factory.mktemp("mlp") / "version")
    up.ask("models", "add", "mlp", bare)


def read(port: int, path: str, data: bytes | None = None, **headers: str) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        body: bytes = answer.read()
        return body


def refuse(port: int, path: str, data: bytes | None = None) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        read(port, path, data)
    with caught.value as answer:
        message: str = json.load(answer)["error"]
        return answer.code, message


def write_digit(folder: Path) -> Path:
    digit = load_digits().images[0]
    picture = folder / "digit.png"
    Image.fromarray((255 - digit * 15.9).astype(np.uint8)).save(picture)
    return picture


def test_up_says_where_the_api_is(up: UpProcess, port: int, client: Any) -> None:
    wait_until(lambda: f"http://127.0.0.1:{port}" in up.read_log(), 30, "it says where")
    assert "does not answer" not in up.read_log()
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["name"] == "edgeward"


@pytest.mark.usefixtures("models")
def test_model_added_to_a_running_box_answers_tritons_client(client: Any) -> None:
    states = {one["name"]: one["state"] for one in client.get_model_repository_index()}
    assert states == {"digits": "READY", "mlp": "READY"}
    x = np.random.default_rng(0).random((3, 64), np.float32)
    given = triton.InferInput("x", [3, 64], "FP32")
    given.set_data_from_numpy(x)
    found = client.infer("mlp", [given]).as_numpy("y")
    assert found.shape == (3, 10)
    rows = []
    for row in x:
        one = triton.InferInput("x", [1, 64], "FP32")
        one.set_data_from_numpy(row[None])
        rows.append(client.infer("mlp", [one]).as_numpy("y"))
    np.testing.assert_allclose(found, np.concatenate(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("models")
def test_configuration_of_a_bare_file_is_completed_and_its_costs_are_measured(
    client: Any,
) -> None:
    config = client.get_model_config("mlp")
    assert config["max_batch_size"] > 1
    assert [(one["name"], one["dims"]) for one in config["input"]] == [("x", [64])]
    batching = config["edgeward"]["batching"]
    assert batching["points"][0][0] == 1
    assert batching["max_rows"] >= 1
    assert batching["reason"]


@pytest.mark.usefixtures("models")
def test_costs_are_explained_as_the_worker_measured_them(
    up: UpProcess, client: Any, tmp_path: Path
) -> None:
    batching = client.get_model_config("mlp")["edgeward"]["batching"]
    picture = tmp_path / "costs.svg"
    found = up.ask("explain", "model", "mlp", "--load", "--plot", picture)
    assert found["batching"]["points"] == batching["points"]
    assert found["batching"]["reason"]
    assert found["loaded"]["runtime"] == "ort"
    assert found["loaded"]["findings"] == []
    assert found["serving"]["response_cache"] is False
    assert "Rows in a run" in picture.read_text()
    text = up.run("explain", "model", "mlp").stdout
    assert "largest batch made" in text


@pytest.mark.usefixtures("models")
def test_image_is_answered_with_labels(up: UpProcess, port: int, tmp_path: Path) -> None:
    picture = write_digit(tmp_path)
    job = up.ask("submit", "digits", "--input", picture, "--wait", 30)
    body = picture.read_bytes()
    answer = json.loads(
        read(port, "/v1/models/digits/predict", body, **{"Content-Type": "image/png"})
    )
    # One engine, one answer, whichever way the picture came.
    assert answer["output"] == job["jobs"][0]["result"]["output"]


@pytest.mark.usefixtures("models")
def test_metrics_count_requests_under_tritons_names(client: Any, port: int) -> None:
    x = triton.InferInput("x", [2, 64], "FP32")
    x.set_data_from_numpy(np.zeros((2, 64), np.float32))

    def count(name: str) -> float:
        text = read(port, "/metrics").decode()
        found = re.search(rf'^{name}{{model="mlp",version="1"}} (\S+)$', text, re.M)
        return float(found[1]) if found else 0.0

    before = count("nv_inference_count")
    client.infer("mlp", [x])
    assert count("nv_inference_count") - before == 2
    assert count("edgeward_model_memory_bytes") > 0
    assert b"edgeward_response_cache_bytes" in read(port, "/metrics")


@pytest.mark.usefixtures("models")
def test_bad_request_is_named_and_costs_nothing(client: Any, port: int) -> None:
    assert refuse(port, "/v2/models/mlp/infer", b"{")[0] == 400
    assert refuse(port, "/v2/models/nope")[0] == 404
    assert client.is_server_ready()


def test_port_in_use_costs_the_api_and_nothing_else(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.listen(0)
        port = taken.getsockname()[1]
        data_dir = tmp_path / "box"
        seed_platform(data_dir)
        up = UpProcess(data_dir, "port-box", "--http-port", str(port))
        try:
            log = data_dir / "log" / "worker.log"
            wait_until(lambda: "http_unavailable" in log.read_text(), 30, "the worker says so")
            assert "is in use" in log.read_text()
            wait_until(lambda: "does not answer" in up.read_log(), 30, "so does `up`")
            up.ask("models", "add", "digits", DIGITS)
            picture = write_digit(tmp_path)
            assert up.ask("submit", "digits", "--input", picture, "--wait", 30)["jobs"]
        finally:
            up.stop()
