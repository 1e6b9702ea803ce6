"""The API on its sockets: who may ask, what breaks, what is too much, how it ends."""

import gzip
import http.client
import json
import re
import socket
import ssl
import struct
import subprocess
import threading
import zlib
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from agent.sections import HttpSettings
from tests.harness.v2_models import Box, serve_models
from tests.harness.waiting import require_binary, wait_until
from worker.errors import HttpUnavailableError
from worker.rest.server import HttpServer

HEAD_LENGTH = "Inference-Header-Content-Length"
X: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
BODY = json.dumps({"inputs": [X]}).encode()
INFER = "/v2/models/scores/infer"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with serve_models(
        tmp_path_factory.mktemp("http"), body_bytes=100_000, body_timeout_s=1.0
    ) as box:
        yield box


def serve_again(box: Box, **settings: Any) -> HttpServer:
    """Start another server over the same models."""
    server = HttpServer(HttpSettings(**{"port": 0, **settings}), box.service)
    server.start()
    return server


def ask(
    port: int | None,
    method: str = "POST",
    path: str = INFER,
    body: bytes | None = BODY,
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes, http.client.HTTPMessage]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers


def read_error(body: bytes) -> str:
    return str(json.loads(body)["error"])


def talk(port: int | None, data: bytes, *, end: bool = False) -> bytes:
    """Send bytes as they are, and return everything that comes until the server hangs up.

    A server that refuses may hang up while the client is still sending; then nothing comes.
    """
    with closing(socket.create_connection(("127.0.0.1", port or 0), timeout=30)) as connection:
        parts = []
        try:
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)


# --- routes ---------------------------------------------------------------------------------


def test_every_error_has_the_protocol_s_body(box: Box) -> None:
    cases = [
        ("GET", "/nope", 404),
        ("GET", "/v2/models/nope", 404),
        ("GET", INFER, 405),
        ("DELETE", "/v2/models/scores", 405),
        ("POST", "/v2/health/live", 405),
        ("GET", "/v2/trace/setting", 501),
        ("POST", "/v2/repository/index", 400),
    ]
    for method, path, expected in cases:
        status, body, headers = ask(box.server.port, method, path, b"[1]")
        assert (status, headers["content-type"]) == (expected, "application/json"), path
        assert read_error(body), path


def test_flat_and_nested_json_are_the_same(box: Box) -> None:
    for data in ([1, 2, 3, 4], [[1, 2, 3, 4]], [[1], [2], [3], [4]]):
        body = json.dumps({"inputs": [{**X, "data": data}]}).encode()
        status, found, _ = ask(box.server.port, body=body)
        assert status == 200
        assert json.loads(found)["outputs"][0]["data"] == [1, 2, 3, 4]


def test_raw_request_is_the_tensor_alone(box: Box) -> None:
    values = np.arange(4, dtype=np.float32)
    status, body, headers = ask(box.server.port, body=values.tobytes(), headers={HEAD_LENGTH: "0"})
    assert status == 200
    tail = body[int(headers[HEAD_LENGTH]) :]
    np.testing.assert_array_equal(np.frombuffer(tail, np.float32), values)
    status, body, _ = ask(
        box.server.port, path="/v2/models/identity_bytes/infer", body=b"text",
        headers={HEAD_LENGTH: "0"},
    )  # fmt: skip
    assert (status, body[-4:]) == (200, b"text")
    status, body, _ = ask(
        box.server.port, path="/v2/models/simple/infer", body=b"", headers={HEAD_LENGTH: "0"}
    )
    assert (status, "one input" in read_error(body)) == (400, True)


def test_predict_answers_labels(box: Box) -> None:
    path = "/v1/models/scores/predict"
    body = json.dumps({"inputs": [{**X, "data": [0, 0.5, 1, 0]}], "params": {"top_k": 1}})
    status, found, _ = ask(
        box.server.port, path=path, body=body.encode(), headers={"Content-Type": "application/json"}
    )
    assert status == 200, found
    best = [{"label": "fox", "index": 2, "score": 1.0}]
    assert json.loads(found) == {"model": "scores", "version": "1", "output": best}
    for given, expected in ((b"", 400), (b"not an image", 400)):
        assert ask(box.server.port, path=path, body=given)[0] == expected
    assert ask(box.server.port, path="/v1/models/nope/predict", body=b"x")[0] == 404


def test_documents_are_served(box: Box) -> None:
    status, body, _ = ask(box.server.port, "GET", "/openapi.json", None)
    assert (status, "/v2/models/{model}/infer" in json.loads(body)["paths"]) == (200, True)
    status, page, _ = ask(box.server.port, "GET", "/docs", None)
    assert status == 200
    # All that the page needs is on this box.
    needed = re.findall(r'(?:src|href)="([^"]+)"', page.decode())
    assert len(needed) >= 2
    for path in needed:
        assert path.startswith("/static"), path
        assert ask(box.server.port, "GET", path, None)[0] == 200, path
    assert ask(box.server.port, "GET", "/v2/", None)[0] == 200


# --- what breaks ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["-1", "+5", "1_0", "0x10", "9" * 30, "", "²", "nan"])
def test_header_length_that_is_no_number_is_a_400(box: Box, value: str) -> None:
    status, body, _ = ask(box.server.port, headers={HEAD_LENGTH: value})
    assert (status, HEAD_LENGTH in read_error(body)) == (400, True)


@pytest.mark.parametrize("off", [-1, 1, 10**6])
def test_header_length_that_is_wrong_is_a_400(box: Box, off: int) -> None:
    described = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
    head = json.dumps({"inputs": [{**described, "parameters": {"binary_data_size": 16}}]}).encode()
    body = head + bytes(16)
    assert ask(box.server.port, body=body, headers={HEAD_LENGTH: str(len(head))})[0] == 200
    status, found, _ = ask(box.server.port, body=body, headers={HEAD_LENGTH: str(len(head) + off)})
    assert (status, bool(read_error(found))) == (400, True)


@pytest.mark.parametrize("size", [0, 15, 17, 2**63, -1, 16.0, "16", True, [16]])
def test_tensor_size_that_is_wrong_is_a_400(box: Box, size: Any) -> None:
    described = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
    head = json.dumps({"inputs": [{**described, "parameters": {"binary_data_size": size}}]})
    body = head.encode() + bytes(16)
    status, found, _ = ask(box.server.port, body=body, headers={HEAD_LENGTH: str(len(head))})
    assert (status, bool(read_error(found))) == (400, True)


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [2**31, 2**31]},
        {"shape": [10**30]},
        {"shape": [-1, 4]},
        {"shape": [1, 4.0]},
        {"shape": "14"},
        {"shape": [0, 2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1], "data": []},
        {"shape": [1] * 40, "data": [1]},
        {"data": [1, 2, 3]},
        {"data": [1, 2, 3, "4"]},
        {"data": [1, 2, 3, None]},
        {"data": [1, 2, 3, True]},
        {"data": [1, 2, 3, {}]},
        {"data": [[1, 2], 3, 4]},
        {"data": [1, 2, 3, 1e39]},
        {"data": [1, 2, 3, 10**400]},
        {"data": {"a": 1}},
        {"data": None},
        {"datatype": "INT32", "data": [1, 2, 3, 4.5]},
        {"datatype": "INT8", "data": [1, 2, 3, 400]},
        {"datatype": "UINT8", "data": [1, 2, 3, -1]},
        {"datatype": "UINT64", "data": [1, 2, 3, 2**64]},
        {"datatype": "BOOL", "data": [1, 2, 3, 4]},
        {"datatype": "BYTES", "data": [1, 2, 3, 4]},
        {"datatype": "float32"},
        {"datatype": 3},
        {"name": 3},
        {"parameters": []},
    ],
    ids=str,
)
def test_tensor_that_is_no_tensor_is_a_400(box: Box, changed: dict[str, Any]) -> None:
    body = json.dumps({"inputs": [{**X, **changed}]}).encode()
    status, found, _ = ask(box.server.port, body=body)
    assert (status, bool(read_error(found))) == (400, True)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"inputs":[]}',
        b'{"inputs":{}}',
        b'{"inputs":[NaN]}',
        b"[" * 30000 + b"]" * 30000,
        b'{"a":NaN,"b":' + b"[" * 20000 + b"]" * 20000 + b"}",
        b"\xff\xfe",
        BODY.replace(b"}]", b"}],\"outputs\":3"),
        BODY[:-1] + b',"id":7}',
        BODY[:-1] + b',"parameters":{"timeout":-1}}',
        BODY[:-1] + b',"parameters":{"priority":1e300}}',
        BODY[:-1] + b',"outputs":[{"name":"y","parameters":{"classification":-1}}]}',
    ],
    ids=lambda body: str(body[:40]),
)  # fmt: skip
def test_json_that_is_no_request_is_a_400(box: Box, body: bytes) -> None:
    status, found, _ = ask(box.server.port, body=body)
    assert (status, bool(read_error(found))) == (400, True)


def test_bytes_elements_that_reach_too_far_are_a_400(box: Box) -> None:
    described = {"name": "INPUT0", "datatype": "BYTES", "shape": [1, 1]}
    path = "/v2/models/identity_bytes/infer"
    for tail in (b"\xff\xff\xff\xffabc", b"\x01", b"\x02\x00\x00\x00\xff\xfe", b""):
        parameters = {"binary_data_size": len(tail)}
        head = json.dumps({"inputs": [{**described, "parameters": parameters}]}).encode()
        status, found, _ = ask(
            box.server.port, path=path, body=head + tail, headers={HEAD_LENGTH: str(len(head))}
        )
        assert (status, bool(read_error(found))) == (400, True), tail


def test_bytes_that_are_no_http_get_a_json_400(box: Box) -> None:
    answer = talk(box.server.port, b"HELLO\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert read_error(answer.partition(b"\r\n\r\n")[2])
    assert ask(box.server.port)[0] == 200


def test_headers_without_end_are_refused(box: Box) -> None:
    answer = talk(box.server.port, b"GET /v2 HTTP/1.1\r\nA: " + b"a" * 2_000_000)
    # Nothing but a reset, where the client was still sending.
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
    assert ask(box.server.port)[0] == 200


def test_chunked_bodies_are_taken(box: Box) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:]))
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n".encode()
    answer = talk(
        box.server.port, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_requests_in_a_row_on_one_connection_are_answered_in_order(box: Box) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(BODY)}\r\n"
    last = head + "Connection: close\r\n\r\n"
    sent = ((head + "\r\n").encode() + BODY) * 3 + last.encode() + BODY
    assert talk(box.server.port, sent).count(b"HTTP/1.1 200 ") == 4


def test_body_that_is_cut_off_costs_nothing(box: Box) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    with closing(socket.create_connection(("127.0.0.1", box.server.port or 0))) as connection:
        connection.sendall(head + BODY[:10])
    assert ask(box.server.port)[0] == 200


def test_body_that_does_not_come_is_a_408(box: Box) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    assert talk(box.server.port, head + BODY[:10]).startswith(b"HTTP/1.1 408 ")


# --- what is too much -------------------------------------------------------------------------


def test_large_bodies_are_a_413_however_they_come(box: Box) -> None:
    large = b" " * 100_001
    assert ask(box.server.port, body=large)[0] == 413
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(large), large)
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    assert talk(box.server.port, head + chunked).startswith(b"HTTP/1.1 413 ")
    bomb = gzip.compress(b" " * 10_000_000)
    assert ask(box.server.port, body=bomb, headers={"Content-Encoding": "gzip"})[0] == 413
    huge = {"Content-Length": "9" * 17}
    assert ask(box.server.port, body=b"", headers=huge)[0] == 413


def test_damaged_compression_is_a_400_and_unknown_one_a_501(box: Box) -> None:
    packed = gzip.compress(BODY)
    for body in (packed[:-9], packed + b"x", b"plain"):
        status, found, _ = ask(box.server.port, body=body, headers={"Content-Encoding": "gzip"})
        assert (status, bool(read_error(found))) == (400, True)
    assert ask(box.server.port, body=BODY, headers={"Content-Encoding": "br"})[0] == 501
    deflated = zlib.compress(BODY)
    assert ask(box.server.port, body=deflated, headers={"Content-Encoding": "deflate"})[0] == 200


def test_too_many_bytes_and_requests_are_a_503(box: Box) -> None:
    server = serve_again(box, held_bytes=1024, requests=1)
    try:
        assert ask(server.port, body=b" " * 2000)[0] == 503
        assert ask(server.port)[0] == 200
        head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n".encode()
        with closing(socket.create_connection(("127.0.0.1", server.port or 0))) as connection:
            connection.sendall(head)
            wait_until(lambda: ask(server.port)[0] == 503, 10, "one request is under way")
        wait_until(lambda: ask(server.port)[0] == 200, 10, "it is over")
    finally:
        server.stop()


# --- who may ask ------------------------------------------------------------------------------


def test_token_is_asked_for_everywhere_but_at_live(box: Box, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    server = serve_again(box, token_file=tmp_path / "token")
    try:
        for path in ("/v2", "/openapi.json", "/nope", "/v2/health/ready"):
            status, body, headers = ask(server.port, "GET", path, None)
            assert (status, headers["www-authenticate"]) == (401, "Bearer"), path
            assert read_error(body)
        assert ask(server.port, "GET", "/v2/health/live", None)[0] == 200
        for given in ("s3cret", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "Bearer é"):
            assert ask(server.port, headers={"Authorization": given})[0] == 401, given
        for given in ("Bearer s3cret", "bearer s3cret"):
            assert ask(server.port, headers={"Authorization": given})[0] == 200, given
    finally:
        server.stop()


def test_pages_of_other_origins_are_refused(box: Box) -> None:
    port = box.server.port
    own = f"http://127.0.0.1:{port}"
    rebound = {"Origin": f"http://evil.example:{port}", "Host": f"evil.example:{port}"}
    assert ask(port, headers={"Origin": own})[0] == 200
    assert ask(port, headers={"Origin": "https://evil.example"})[0] == 403
    assert ask(port, headers=rebound)[0] == 403
    assert ask(port, headers={"Origin": "null"})[0] == 403


def test_named_origins_are_let_in(box: Box) -> None:
    server = serve_again(box, cors_origins=["https://shop.example"], token="t")
    try:
        asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
        status, _, headers = ask(server.port, "OPTIONS", headers=asked, body=None)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://shop.example")
        given = {"Origin": "https://shop.example", "Authorization": "Bearer t"}
        status, _, headers = ask(server.port, headers=given)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://shop.example")
        assert ask(server.port, headers={**given, "Origin": "https://evil.example"})[0] == 403
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("given", "is_allowed"),
    [
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "token": "t"}, False),
        ({"host": "0.0.0.0", "cert_file": "a", "key_file": "b"}, False),
        ({"host": "0.0.0.0", "token": "t", "cert_file": "a", "key_file": "b"}, True),
        ({"host": "0.0.0.0", "allow_plain": True}, True),
        ({"host": "0.0.0.0", "port": None}, True),
        ({"host": "127.0.0.2"}, True),
        ({"host": "::1"}, True),
        ({"token": ""}, False),
        ({"cert_file": "a"}, False),
    ],
    ids=str,
)
def test_open_address_needs_token_and_tls(given: dict[str, Any], is_allowed: bool) -> None:
    settings = {"port": 8000, **given}
    if is_allowed:
        HttpSettings(**settings)
    else:
        with pytest.raises(ValidationError):
            HttpSettings(**settings)


# --- sockets, start and end -------------------------------------------------------------------


def test_tls_is_spoken_with_a_certificate(box: Box, tmp_path: Path) -> None:
    openssl = require_binary("openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        capture_output=True,
        timeout=60,
    )
    assert made.returncode == 0, made.stderr
    server = serve_again(box, cert_file=cert, key_file=key)
    try:
        context = ssl.create_default_context(cafile=str(cert))
        with closing(
            http.client.HTTPSConnection("127.0.0.1", server.port, timeout=30, context=context)
        ) as connection:
            connection.request("POST", INFER, BODY)
            assert connection.getresponse().read()
    finally:
        server.stop()


def test_certificate_that_is_none_is_refused(box: Box, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    bad = tmp_path / "cert.pem"
    with pytest.raises(HttpUnavailableError, match="cert_file"):
        serve_again(box, cert_file=bad, key_file=bad)
    with pytest.raises(HttpUnavailableError, match="token_file"):
        serve_again(box, token_file=tmp_path / "none")


def test_unix_socket_needs_no_token_and_takes_a_dead_ones_place(box: Box, tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))
    server = serve_again(box, port=None, socket=path, token="t")
    try:
        assert path.stat().st_mode & 0o777 == 0o660
        with closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        with pytest.raises(HttpUnavailableError, match="in use"):
            serve_again(box, port=None, socket=path)
    finally:
        server.stop()
    assert not path.exists()


def test_port_in_use_is_named(box: Box) -> None:
    with pytest.raises(HttpUnavailableError, match=f"{box.server.port} is in use"):
        serve_again(box, port=box.server.port)
    assert ask(box.server.port)[0] == 200


def test_stop_finishes_what_is_under_way_and_frees_the_port(box: Box) -> None:
    server = serve_again(box)
    body_half = len(BODY) // 2
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    with closing(socket.create_connection(("127.0.0.1", server.port or 0))) as connection:
        connection.sendall(head + BODY[:body_half])
        wait_until(lambda: ask(server.port)[0] == 200, 10, "the server runs")
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        connection.sendall(BODY[body_half:])
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    stopping.join(30)
    assert not stopping.is_alive()
    server.stop()
    again = serve_again(box, port=server.port)
    again.stop()


def test_images_are_read_by_the_model_s_own_steps(box: Box) -> None:
    png = BytesIO()
    Image.new("L", (8, 8)).save(png, "PNG")
    status, body, _ = ask(
        box.server.port,
        path="/v1/models/scores/predict",
        body=png.getvalue(),
        headers={"Content-Type": "image/png"},
    )
    # This model takes tensors: the error is the step's, not the server's.
    assert (status, bool(read_error(body))) == (400, True)


def test_length_prefix_is_little_endian(box: Box) -> None:
    tail = struct.pack("<I", 3) + b"abc"
    described = {"name": "INPUT0", "datatype": "BYTES", "shape": [1, 1]}
    head = json.dumps(
        {"inputs": [{**described, "parameters": {"binary_data_size": len(tail)}}]}
    ).encode()
    status, body, _ = ask(
        box.server.port,
        path="/v2/models/identity_bytes/infer",
        body=head + tail,
        headers={HEAD_LENGTH: str(len(head))},
    )
    assert status == 200
    assert json.loads(body)["outputs"][0]["data"] == ["abc"]
