"""The short way of small binary requests: taken where it may be, and answering as the long one."""

import json
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.v2_models import Box, serve_models
from tests.harness.waiting import wait_until
from worker.engine.service import TensorRequest
from worker.rest.shortcut import build_shortcut

PATH = "/v2/models/mlp/infer"
X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with pytest.MonkeyPatch.context() as patch:
        # However busy this machine is: the model counts as a quick one.
        patch.setattr("worker.engine.serving.HANDOFF_MS", 1000.0)
        patch.setattr("worker.engine.serving.INLINE_S", 1.0)
        yield from serve_quick(tmp_path_factory.mktemp("v2"))


def serve_quick(folder: Path) -> Iterator[Box]:
    with serve_models(folder, keep_alive_s=1) as box:
        # Only a model that is loaded and known to be quick is run inline.
        with socket.create_connection(("127.0.0.1", box.server.port or 0)) as connection:
            ask(connection, build_request(), parts=2)
        request = TensorRequest("mlp", {"x": X})
        wait_until(lambda: box.service.infer_inline(request) is not None, 30, "it is run inline")
        yield box


@pytest.fixture
def connection(box: Box) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", box.server.port or 0), timeout=20) as connection:
        yield connection


@pytest.fixture(scope="module")
def shortcut(box: Box) -> Callable[[bytes], bytes | None]:
    return build_shortcut(box.service, 1 << 20)


def build_request(
    path: str = PATH, x: Any = X, method: str = "POST", more: str = "", **document: Any
) -> bytes:
    parameters = {"binary_data_size": x.nbytes}
    item = {"name": "x", "datatype": "FP32", "shape": x.shape, "parameters": parameters}
    whole = {"inputs": [item], "parameters": {"binary_data_output": True}, **document}
    head = json.dumps(whole).encode()
    body = head + x.tobytes()
    text = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        f"Inference-Header-Content-Length: {len(head)}\r\n{more}\r\n"
    )
    whole_request: bytes = text.encode() + body
    return whole_request


def read_answer(connection: socket.socket) -> tuple[bytes, dict[bytes, bytes], bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        assert part, data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    line, *lines = head.split(b"\r\n")
    headers = dict(item.lower().split(b": ", 1) for item in lines)
    while len(body) < int(headers[b"content-length"]):
        body += connection.recv(65536)
    return line, headers, body


def ask(
    connection: socket.socket, request: bytes, parts: int = 1
) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """Send a request in one piece, or with a pause in it, which takes it the long way."""
    if parts == 1:
        connection.sendall(request)
        return read_answer(connection)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(request[:40])
    # Its answer shows that the server has read the first part: it came before.
    with socket.create_connection(connection.getpeername()) as other:
        other.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        read_answer(other)
    connection.sendall(request[40:])
    return read_answer(connection)


@pytest.mark.parametrize(
    "request_bytes",
    [
        build_request(),
        build_request(id="seven"),
        build_request(outputs=[{"name": "y", "parameters": {"binary_data": False}}]),
        build_request(more="Accept-Encoding: gzip, br\r\n", x=np.tile(X, (40, 1))),
        build_request("/v2/models/mlp/versions/1/infer"),
        build_request(x=X[:, :7]),
        build_request("/v2/models/nope/infer"),
        build_request(outputs=[{"name": "z"}]),
        build_request(more="Origin: http://elsewhere.example\r\n"),
        build_request(method="PUT"),
    ],
    ids=[
        "plain",
        "id",
        "json out",
        "compressed",
        "version",
        "shape",
        "no model",
        "no output",
        "origin",
        "PUT",
    ],
)
def test_both_ways_answer_alike(connection: socket.socket, request_bytes: bytes) -> None:
    assert ask(connection, request_bytes) == ask(connection, request_bytes, parts=2)


def test_whole_binary_request_takes_the_short_way(
    shortcut: Callable[[bytes], bytes | None],
) -> None:
    answer = shortcut(build_request())
    assert answer is not None
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    refused = shortcut(build_request(x=X[:, :7]))
    assert refused is not None
    assert refused.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "request_bytes",
    [
        build_request()[:-1],
        build_request() + b"G",
        build_request() * 2,
        build_request(more="Origin: http://127.0.0.1\r\n"),
        build_request(more="Authorization: Bearer x\r\n"),
        build_request(more="Connection: close\r\n"),
        build_request(more="Expect: 100-continue\r\n"),
        build_request(more="Content-Encoding: gzip\r\n"),
        build_request(more="Transfer-Encoding: chunked\r\n"),
        build_request(more="Content-Length: 5\r\n"),
        build_request(more="X-Padding: " + "x" * 3000 + "\r\n"),
        build_request().replace(b"HTTP/1.1", b"HTTP/1.0"),
        build_request(parameters={"sequence_id": 3}),
        build_request("/v2/models/nope/infer"),
        build_request("/v2/models/identity_fp32/infer"),
        b"POST /v2/models/mlp/infer HTTP/1.1\r\n\r\n",
        b"POST /v2/models/\r\n\r\n",
        b"",
    ],
)
def test_whatever_is_out_of_the_ordinary_goes_the_long_way(
    shortcut: Callable[[bytes], bytes | None], request_bytes: bytes
) -> None:
    assert shortcut(request_bytes) is None


def test_requests_one_behind_the_other_are_all_answered(connection: socket.socket) -> None:
    alone = ask(connection, build_request())
    connection.sendall(build_request() * 3)
    rest = b""
    while rest.count(b"HTTP/1.1 200") < 3 or not rest.endswith(alone[2]):
        part = connection.recv(65536)
        assert part
        rest += part
    assert rest.count(alone[2]) == 3


def test_idle_connection_is_closed_some_time_after_its_last_request(
    connection: socket.socket,
) -> None:
    for _ in range(3):
        assert ask(connection, build_request())[0].endswith(b"200 OK")
    assert connection.recv(1) == b""


def test_server_with_a_token_looks_at_each_request(tmp_path: Path) -> None:
    with (
        serve_models(tmp_path, token="secret") as box,
        socket.create_connection(("127.0.0.1", box.server.port or 0)) as connection,
    ):
        for _ in range(2):
            assert ask(connection, build_request())[0].endswith(b"401 Unauthorized")
        more = "Authorization: Bearer secret\r\n"
        assert ask(connection, build_request(more=more))[0].endswith(b"200 OK")
        assert ask(connection, build_request())[0].endswith(b"401 Unauthorized")


def test_damaged_requests_are_answered_or_go_the_long_way(
    shortcut: Callable[[bytes], bytes | None],
) -> None:
    draw = random.Random(5)
    whole = build_request()
    for _ in range(5_000):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(data))
            match draw.randrange(3):
                case 0:
                    data[place] = draw.randrange(256)
                case 1:
                    del data[place : place + draw.randint(1, 9)]
                case _:
                    data[place:place] = draw.randbytes(draw.randint(1, 9))
        answer = shortcut(bytes(data))
        assert answer is None or answer[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 400")
