"""Broken and half-broken inference requests, many of them: never a 500, never a crash.

Starts from good requests of every kind and changes them: bytes flipped, cut, doubled, numbers made
huge or negative, values of other types, headers that lie, bodies packed or claimed to be packed.
Each is given to the ASGI application over the real engine; every tenth to the server's socket with
its HTTP broken as well. Seeded: a failure names the input's number.

    python -m tests.fuzz_v2 --inputs 100000 [--seed 1]
"""

import argparse
import asyncio
import gzip
import json
import random
import socket
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from platforms.artifact import Datatype
from platforms.runtimes.base import DTYPES
from tests.harness.v2_models import ONNX_TYPES, Box, serve_models
from worker.rest.application import Application, Bounds, Load
from worker.rest.management import build_management

HEAD_LENGTH = "inference-header-content-length"
EXPECTED = {200, 400, 404, 405, 413, 501, 503}
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**40, 1.5, -0.0, 1e308, float("nan")),
    *("", "x", "é\u0000", "FP32", "BYTES", "BF16", "INPUT0", "OUTPUT0", "a" * 5000),
    *([], [[]], [1], ["a"], [None], [[1], 2], {}, {"a": 1}, {"binary_data_size": 4}),
)


@dataclass
class Request:
    """One request, good or not."""

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def make_good(random_: random.Random) -> tuple[str, dict[str, Any], bytes]:
    """Return a path, the JSON and the tails of a good request."""
    datatype = random_.choice(list(ONNX_TYPES))
    shape = [random_.randint(1, 3), random_.randint(1, 4)]
    count = shape[0] * shape[1]
    dtype = DTYPES[datatype]
    if datatype is Datatype.BYTES:
        texts = ["".join(random_.choices("aé0", k=random_.randint(0, 5))) for _ in range(count)]
        parts = [text.encode() for text in texts]
        tail = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
        data: list[Any] = texts
    else:
        values = np.frombuffer(random_.randbytes(count), np.int8)
        array = values > 0 if dtype.kind == "b" else np.abs(values // 2).astype(dtype)
        tail, data = array.tobytes(), array.tolist()
    tensor: dict[str, Any] = {"name": "INPUT0", "datatype": datatype.value, "shape": shape}
    document: dict[str, Any] = {"inputs": [tensor]}
    if random_.random() < 0.5:
        tensor["parameters"] = {"binary_data_size": len(tail)}
    else:
        tensor["data"] = data
        tail = b""
    if random_.random() < 0.5:
        document["parameters"] = {"binary_data_output": random_.random() < 0.5}
    if random_.random() < 0.3:
        asked = {"classification": 2} if datatype is not Datatype.BYTES else {"binary_data": True}
        document["outputs"] = [{"name": "OUTPUT0", "parameters": asked}]
    if random_.random() < 0.3:
        document["id"] = "7"
    return f"/v2/models/identity_{datatype.value.lower()}/infer", document, tail


def change_json(value: Any, random_: random.Random) -> Any:
    """Return a document with one value somewhere in it replaced, removed or doubled."""
    if isinstance(value, dict) and value and random_.random() < 0.85:
        key = random_.choice(list(value))
        if random_.random() < 0.1:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: change_json(value[key], random_)}
    if isinstance(value, list) and value and random_.random() < 0.7:
        place = random_.randrange(len(value))
        if random_.random() < 0.15:
            return [*value, *value[:1]]
        return [*value[:place], change_json(value[place], random_), *value[place + 1 :]]
    return random_.choice(_ODD)


def change_bytes(data: bytes, random_: random.Random) -> bytes:
    """Return bytes with some of them changed, dropped, doubled or put in."""
    changed = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        place = random_.randint(0, len(changed))
        kind = random_.randrange(4)
        if kind == 0 and changed:
            changed[place % len(changed)] = random_.randrange(256)
        elif kind == 1:
            del changed[place : place + random_.randint(1, 20)]
        elif kind == 2:
            changed[place:place] = changed[place : place + random_.randint(1, 20)]
        else:
            changed[place:place] = random_.randbytes(random_.randint(1, 8))
    return bytes(changed)


def _lie_about_length(request: Request, random_: random.Random) -> None:
    odd = (0, 1, -1, 2**40, len(request.body), len(request.body) + 1, "x", "", "1e3", "٣")
    request.headers[HEAD_LENGTH] = str(random_.choice(odd))


def _pack(request: Request, random_: random.Random) -> None:
    kind = random_.choice(("gzip", "deflate", "br", "identity", "GZIP", "x"))
    request.headers["content-encoding"] = kind
    if random_.random() < 0.8:
        is_gzip = kind.lower() == "gzip"
        request.body = gzip.compress(request.body) if is_gzip else zlib.compress(request.body)
    if random_.random() < 0.5:
        request.body = change_bytes(request.body, random_)


def _change_path(request: Request, random_: random.Random) -> None:
    odd = ("/v2/models/%2e%2e/infer", "/v2/models//infer", "/v2/models/nope/infer", "/v2/%ff/infer")
    others = ("/v2/models/simple/versions/%00/infer", "/v2/models/scores/versions/-1/infer")
    request.path = random_.choice((*odd, *others, "/v2/models/simple/infer"))


def _change_body(request: Request, random_: random.Random) -> None:
    request.body = change_bytes(request.body, random_)


_CHANGES: tuple[Callable[[Request, random.Random], None], ...] = (
    *(_change_body, _change_body, _lie_about_length, _pack, _change_path),
)


def make_request(random_: random.Random) -> Request:
    """Return a request with no, one or several things wrong with it."""
    path, document, tail = make_good(random_)
    for _ in range(random_.choice((0, 1, 1, 1, 2, 3))):
        document = change_json(document, random_)
    head = json.dumps(document).encode()
    request = Request(path, head + tail)
    if tail or random_.random() < 0.2:
        request.headers[HEAD_LENGTH] = str(len(head))
    if random_.random() < 0.3:
        request.headers["accept-encoding"] = random_.choice(("gzip", "br, *;q=0.1", "deflate;q=x"))
    if random_.random() < 0.4:
        random_.choice(_CHANGES)(request, random_)
    return request


async def post(app: Any, request: Request) -> tuple[int, bytes]:
    """Give a request to the application; return the status and the body."""
    answer: dict[str, Any] = {"body": b""}

    async def receive() -> dict[str, Any]:
        if "given" in answer:
            await asyncio.Event().wait()
        answer["given"] = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Any) -> None:
        answer["status"] = message.get("status", answer.get("status"))
        answer["body"] += message.get("body", b"")

    headers = [(b"content-length", b"%d" % len(request.body))]
    headers += [(key.encode(), value.encode()) for key, value in request.headers.items()]
    raw = request.path.encode()
    scope = {"type": "http", "method": "POST", "path": request.path, "raw_path": raw}
    await app({**scope, "scheme": "http", "headers": headers, "query_string": b""}, receive, send)
    return int(answer["status"]), answer["body"]


def break_wire(port: int, request: Request, random_: random.Random) -> None:
    """Send a request over the socket, its HTTP broken too; whatever comes back is fine."""
    head = [f"POST {request.path} HTTP/1.1", "Host: a", "Connection: close"]
    head += [f"{key}: {value}" for key, value in request.headers.items()]
    head.append(f"Content-Length: {len(request.body)}")
    wire = "\r\n".join(head).encode() + b"\r\n\r\n" + request.body
    wire = change_bytes(wire, random_)
    with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as connection:
        try:
            connection.sendall(wire)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            return
    if answer.startswith(b"HTTP/1.1 500"):
        msg = f"a 500 for {wire!r}"
        raise AssertionError(msg)


def run(box: Box, inputs: int, seed: int) -> Counter[int]:
    """Play inputs; return how many got which status.

    Raises:
        AssertionError: one got a status or a body that no request should get.
    """
    load = Load(Bounds(body_bytes=1 << 20))
    app = Application(box.service, build_management(box.service), load)
    statuses: Counter[int] = Counter()

    async def play(number: int) -> None:
        request = make_request(random.Random(f"{seed}/{number}"))
        status, body = await post(app, request)
        statuses[status] += 1
        is_told = status == 200 or bool(json.loads(body).get("error"))
        assert status in EXPECTED, f"input {number}: {status} {body[:300]!r} for {request}"
        assert is_told, f"input {number}: {body[:300]!r} for {request}"

    async def play_all() -> None:
        for number in range(inputs):
            await play(number)
        assert (load.requests, load.bytes) == (0, 0), "something was not counted out"

    asyncio.run(play_all())
    for number in range(0, inputs, 10):
        random_ = random.Random(f"{seed}/{number}/wire")
        break_wire(box.server.port or 0, make_request(random_), random_)
    return statuses


def main() -> int:
    """Play as many as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, serve_models(Path(folder)) as box:
        statuses = run(box, given.inputs, given.seed)
    seconds = time.monotonic() - began
    print(f"{given.inputs} inputs in {seconds:.0f} s: {dict(sorted(statuses.items()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
