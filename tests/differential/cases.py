"""Raw requests of the V2 protocol, well-formed and broken, that are played to us and to Triton.

Owns the requests and what is looked at in their answers. The models are those of
`tests.harness.v2_models`: one identity per datatype, `simple` (sum and difference), `scores`
(labels).
"""

import gzip
import http.client
import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HEAD_LENGTH = "Inference-Header-Content-Length"
_X = np.arange(16, dtype=np.int32)


@dataclass(frozen=True)
class Case:
    """One request."""

    name: str
    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What is compared of an answer."""

    status: int
    """0: the connection was closed without an answer."""
    kind: str
    """`json`, `binary` (JSON with tensors behind it), `empty`, `other` or `none`."""
    encoding: str | None
    shape: Any
    """The JSON's keys with the types of their values; of a list its items'."""
    values: Any
    """Outputs by name: datatype, shape, data; None where there are none."""

    def to_json(self) -> dict[str, Any]:
        """Return it as a recording has it."""
        return {
            "status": self.status,
            "kind": self.kind,
            "encoding": self.encoding,
            "shape": self.shape,
            "values": self.values,
        }


def play(port: int, case: Case) -> Seen:
    """Send one request on a connection of its own, and look at the answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.putrequest(case.method, case.path, skip_accept_encoding=True)
        for name, value in case.headers.items():
            connection.putheader(name, value)
        if case.method == "POST":
            connection.putheader("Content-Length", str(len(case.body)))
        try:
            connection.endheaders(case.body or None)
            answer = connection.getresponse()
            return _look(answer, answer.read())
        except (http.client.HTTPException, OSError):
            return Seen(0, "none", None, None, None)


def _look(answer: http.client.HTTPResponse, body: bytes) -> Seen:
    encoding = answer.headers.get("Content-Encoding")
    if encoding == "gzip":
        body = gzip.decompress(body)
    elif encoding == "deflate":
        body = zlib.decompress(body)
    if not body:
        return Seen(answer.status, "empty", encoding, None, None)
    length = answer.headers.get(HEAD_LENGTH)
    try:
        document = json.loads(body[: int(length)] if length else body)
    except ValueError:
        return Seen(answer.status, "other", encoding, None, None)
    kind = "binary" if length else "json"
    values = _read_outputs(document, body[int(length) :] if length else b"")
    return Seen(answer.status, kind, encoding, _describe(document), values)


def _describe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _describe(item) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [_describe(value[0])] if value else []
    return "number" if isinstance(value, int | float) else type(value).__name__


def _read_outputs(document: Any, tail: bytes) -> Any:
    if not isinstance(document, dict) or "outputs" not in document or "model_name" not in document:
        return None
    found, place = {}, 0
    for item in document["outputs"]:
        size = item.get("parameters", {}).get("binary_data_size")
        data = item.get("data")
        if size is not None:
            data = tail[place : place + size].hex()
            place += size
        found[item["name"]] = [item["datatype"], item["shape"], data]
    return found


# --- requests -------------------------------------------------------------------------------


def build_document(*inputs: dict[str, Any], **more: Any) -> bytes:
    """Return the JSON of a request."""
    return json.dumps({"inputs": list(inputs), **more}).encode()


def build_input(name: str, datatype: str, shape: list[int], data: Any = None) -> dict[str, Any]:
    """Return one input of a request."""
    found: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    return found if data is None else {**found, "data": data}


A = build_input("INPUT0", "INT32", [1, 16], _X.tolist())
B = build_input("INPUT1", "INT32", [1, 16], [1] * 16)
SIMPLE = "/v2/models/simple/infer"


def build_cases() -> list[Case]:
    """Return all requests; their names are unique."""
    return [
        *_list_descriptions(),
        *_list_simple(),
        *_list_binary(),
        *_list_datatypes(),
        *_list_broken_json(),
        *_list_broken_tensors(),
        *_list_repository(),
    ]


def _list_descriptions() -> Iterator[Case]:
    paths = {
        "live": "/v2/health/live",
        "ready": "/v2/health/ready",
        "server": "/v2",
        "model": "/v2/models/simple",
        "model version": "/v2/models/simple/versions/1",
        "model ready": "/v2/models/simple/ready",
        "model version ready": "/v2/models/simple/versions/1/ready",
        "config": "/v2/models/simple/config",
        "config version": "/v2/models/simple/versions/1/config",
        "stats": "/v2/models/simple/stats",
        "stats version": "/v2/models/simple/versions/1/stats",
        "stats of all": "/v2/models/stats",
        "unknown model": "/v2/models/nope",
        "unknown version": "/v2/models/simple/versions/9",
        "version that is no number": "/v2/models/simple/versions/one",
        "unknown model ready": "/v2/models/nope/ready",
        "unknown model config": "/v2/models/nope/config",
        "unknown model stats": "/v2/models/nope/stats",
        "unknown path": "/v2/nothing",
        "unknown model path": "/v2/models/simple/nothing",
        "root": "/",
        "infer by GET": SIMPLE,
    }
    for name, path in paths.items():
        yield Case(f"GET {name}", "GET", path)
    for name in ("live", "server", "model", "config"):
        yield Case(f"POST {name}", "POST", paths[name], b"{}")


def _list_simple() -> Iterator[Case]:
    def post(name: str, body: bytes, path: str = SIMPLE, **headers: str) -> Case:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return Case(name, "POST", path, body, named)

    plain = build_document(A, B)
    nested = build_document({**A, "data": [_X.tolist()]}, B)
    two = build_document(
        build_input("INPUT0", "INT32", [2, 16], [*_X.tolist(), *_X.tolist()]),
        build_input("INPUT1", "INT32", [2, 16], [1] * 32),
    )
    yield post("json", plain)
    yield post("json, version", plain, "/v2/models/simple/versions/1/infer")
    yield post("json, nested data", nested)
    yield post("json, two rows", two)
    yield post("json, inputs the other way round", build_document(B, A))
    yield post("json, content type", plain, Content_Type="application/json")
    yield post("json, content type of text", plain, Content_Type="text/plain")
    yield post("json, id", build_document(A, B, id="seven"))
    yield post("json, empty id", build_document(A, B, id=""))
    yield post("json, unknown key", build_document(A, B, nothing=1))
    yield post("json, parameters", build_document(A, B, parameters={"mine": 1, "other": "x"}))
    yield post("json, priority", build_document(A, B, parameters={"priority": 1}))
    yield post("json, timeout", build_document(A, B, parameters={"timeout": 10_000_000}))
    yield post("json, one output", build_document(A, B, outputs=[{"name": "OUTPUT1"}]))
    yield post("json, no outputs named", build_document(A, B, outputs=[]))
    both = [{"name": "OUTPUT1"}, {"name": "OUTPUT0"}]
    yield post("json, outputs the other way round", build_document(A, B, outputs=both))
    yield post("json, unknown output", build_document(A, B, outputs=[{"name": "Z"}]))
    yield post("gzip", gzip.compress(plain), Content_Encoding="gzip")
    yield post("deflate", zlib.compress(plain), Content_Encoding="deflate")
    yield post("gzip accepted", plain, Accept_Encoding="gzip")
    yield post("deflate accepted", plain, Accept_Encoding="deflate")
    yield post("br accepted", plain, Accept_Encoding="br")
    yield post("damaged gzip", gzip.compress(plain)[:-9], Content_Encoding="gzip")
    yield post("no gzip at all", plain, Content_Encoding="gzip")
    yield post("unknown encoding", plain, Content_Encoding="br")
    yield post("unknown model infer", plain, "/v2/models/nope/infer")
    yield post("unknown version infer", plain, "/v2/models/simple/versions/9/infer")
    scores = build_input("x", "FP32", [1, 4], [0.1, 0.9, 0.3, 0.2])
    classes = [{"name": "y", "parameters": {"classification": 2}}]
    yield post("classes", build_document(scores, outputs=classes), "/v2/models/scores/infer")
    many = [{"name": "y", "parameters": {"classification": 99}}]
    yield post("too many classes", build_document(scores, outputs=many), "/v2/models/scores/infer")
    for key, value in (("sequence_id", 5), ("sequence_start", True), ("sequence_end", True)):
        yield post(f"parameter {key}", build_document(A, B, parameters={key: value}))
    shared = {"shared_memory_region": "r", "shared_memory_byte_size": 64}
    without = {key: value for key, value in A.items() if key != "data"}
    yield post("shared memory", build_document({**without, "parameters": shared}, B))


def _frame(
    inputs: list[tuple[dict[str, Any], bytes]], *, length: int | None = None, **more: Any
) -> tuple[bytes, dict[str, str]]:
    described = [
        {**item, "parameters": {"binary_data_size": len(tail)}} if tail else item
        for item, tail in inputs
    ]
    head = build_document(*described, **more)
    body = head + b"".join(tail for _, tail in inputs)
    return body, {HEAD_LENGTH: str(len(head) if length is None else length)}


def _list_binary() -> Iterator[Case]:
    a, b = (build_input(f"INPUT{n}", "INT32", [1, 16]) for n in (0, 1))
    raw, ones = _X.tobytes(), np.ones(16, np.int32).tobytes()
    out: dict[str, Any] = {"parameters": {"binary_data_output": True}}
    framed = {
        "binary in": _frame([(a, raw), (b, ones)]),
        "binary in and out": _frame([(a, raw), (b, ones)], **out),
        "binary and json in": _frame([(a, raw), (B, b"")]),
        "one output binary": _frame(
            [(a, raw), (b, ones)],
            outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": True}}, {"name": "OUTPUT1"}],
        ),
        "all outputs binary but one": _frame(
            [(a, raw), (b, ones)],
            outputs=[
                {"name": "OUTPUT0", "parameters": {"binary_data": False}},
                {"name": "OUTPUT1"},
            ],
            **out,
        ),
        "tail too short": _frame([(a, raw), (b, ones[:-4])]),
        "tail too long": _frame([(a, raw), (b, ones + b"1234")]),
        "tail of another size than its shape": _frame([(a, raw[:32]), (b, ones)]),
        "head length too short": _frame([(a, raw), (b, ones)], length=5),
        "head length over the body": _frame([(a, raw), (b, ones)], length=9999),
        "head length negative": _frame([(a, raw), (b, ones)], length=-1),
    }
    for name, (body, headers) in framed.items():
        yield Case(name, "POST", SIMPLE, body, headers)
    body, headers = framed["binary in"]
    yield Case("rest behind the tails", "POST", SIMPLE, body + b"rest", headers)
    yield Case("tails cut off", "POST", SIMPLE, body[:-20], headers)
    yield Case("head length no number", "POST", SIMPLE, body, {HEAD_LENGTH: "many"})
    yield Case("binary without head length", "POST", SIMPLE, body)
    packed = {**headers, "Content-Encoding": "gzip"}
    yield Case("binary, gzip", "POST", SIMPLE, gzip.compress(body), packed)
    path = "/v2/models/scores/infer"
    floats = np.arange(4, dtype=np.float32).tobytes()
    yield Case("raw", "POST", path, floats, {HEAD_LENGTH: "0"})
    yield Case("raw, wrong size", "POST", path, floats[:-2], {HEAD_LENGTH: "0"})
    yield Case("raw, two inputs", "POST", SIMPLE, raw, {HEAD_LENGTH: "0"})


_SAMPLES: dict[str, tuple[list[Any], bytes]] = {
    "BOOL": ([True, False], b"\x01\x00"),
    "UINT8": ([0, 255], np.array([0, 255], np.uint8).tobytes()),
    "UINT16": ([0, 65535], np.array([0, 65535], np.uint16).tobytes()),
    "UINT32": ([0, 2**32 - 1], np.array([0, 2**32 - 1], np.uint32).tobytes()),
    "UINT64": ([0, 2**63], np.array([0, 2**63], np.uint64).tobytes()),
    "INT8": ([-128, 127], np.array([-128, 127], np.int8).tobytes()),
    "INT16": ([-5, 7], np.array([-5, 7], np.int16).tobytes()),
    "INT32": ([-5, 7], np.array([-5, 7], np.int32).tobytes()),
    "INT64": ([-(2**62), 7], np.array([-(2**62), 7], np.int64).tobytes()),
    "FP16": ([0.5, -2], np.array([0.5, -2], np.float16).tobytes()),
    "FP32": ([0.5, -2], np.array([0.5, -2], np.float32).tobytes()),
    "FP64": ([0.5, -2], np.array([0.5, -2], np.float64).tobytes()),
    "BYTES": (["one", "zwö"], b"".join(struct.pack("<I", len(t)) + t for t in (b"one", b"2"))),
}


def _list_datatypes() -> Iterator[Case]:
    for datatype, (values, raw) in _SAMPLES.items():
        path = f"/v2/models/identity_{datatype.lower()}/infer"
        item = build_input("INPUT0", datatype, [1, 2])
        text = build_document({**item, "data": values})
        yield Case(f"{datatype} json", "POST", path, text)
        body, headers = _frame([(item, raw)], parameters={"binary_data_output": True})
        yield Case(f"{datatype} binary", "POST", path, body, headers)
        wrong = build_document({**item, "data": [[], {}]})
        yield Case(f"{datatype} json, no values", "POST", path, wrong)


def _list_broken_json() -> Iterator[Case]:
    bodies: dict[str, bytes] = {
        "no body": b"",
        "no json": b"hello",
        "half json": build_document(A, B)[:-7],
        "array": b"[]",
        "number": b"7",
        "null": b"null",
        "empty object": b"{}",
        "rest behind json": build_document(A, B) + b"}",
        "inputs null": b'{"inputs": null}',
        "inputs an object": b'{"inputs": {}}',
        "no inputs": b'{"inputs": []}',
        "input a number": b'{"inputs": [1]}',
        "outputs a number": build_document(A, B, outputs=1),
        "output a number": build_document(A, B, outputs=[1]),
        "output without a name": build_document(A, B, outputs=[{}]),
        "parameters a list": build_document(A, B, parameters=[]),
        "id a number": build_document(A, B, id=7),
        "priority a text": build_document(A, B, parameters={"priority": "high"}),
        "priority negative": build_document(A, B, parameters={"priority": -1}),
        "timeout negative": build_document(A, B, parameters={"timeout": -1}),
        "binary output a text": build_document(A, B, parameters={"binary_data_output": "yes"}),
        "deep": b'{"inputs": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        "not utf-8": build_document(A, B, id="x").replace(b'"x"', b'"\xff"'),
    }
    for name, body in bodies.items():
        yield Case(f"broken: {name}", "POST", SIMPLE, body)


def _list_broken_tensors() -> Iterator[Case]:
    def change(**changes: Any) -> dict[str, Any]:
        changed = {**A, **changes}
        return {key: value for key, value in changed.items() if value is not ...}

    inputs: dict[str, list[dict[str, Any]]] = {
        "one input missing": [A],
        "one input too many": [A, B, change(name="INPUT2")],
        "one input twice": [A, A],
        "unknown input": [change(name="Z"), B],
        "no name": [change(name=...), B],
        "name a number": [change(name=1), B],
        "no datatype": [change(datatype=...), B],
        "unknown datatype": [change(datatype="INT33"), B],
        "another datatype": [change(datatype="FP32"), B],
        "no shape": [change(shape=...), B],
        "shape a number": [change(shape=16), B],
        "shape of texts": [change(shape=["1", "16"]), B],
        "shape negative": [change(shape=[-1, 16]), B],
        "shape of another rank": [change(shape=[16]), B],
        "shape of another width": [change(shape=[1, 15], data=[1] * 15), B],
        "shape zero": [change(shape=[0, 16], data=[]), B],
        "shape huge": [change(shape=[2**31, 2**31]), B],
        "batches differ": [change(shape=[2, 16], data=[1] * 32), B],
        "no data": [change(data=...), B],
        "data null": [change(data=None), B],
        "data a number": [change(data=1), B],
        "data too short": [change(data=[1] * 15), B],
        "data too long": [change(data=[1] * 17), B],
        "data texts": [change(data=["1"] * 16), B],
        "data fractions": [change(data=[0.5] * 16), B],
        "data too large": [change(data=[2**40] * 16), B],
        "data true": [change(data=[True] * 16), B],
        "data null inside": [change(data=[None] * 16), B],
    }
    for name, items in inputs.items():
        yield Case(f"broken: {name}", "POST", SIMPLE, build_document(*items))


def _list_repository() -> Iterator[Case]:
    def post(name: str, path: str, body: bytes = b"") -> Case:
        return Case(f"repository: {name}", "POST", f"/v2/repository/{path}", body)

    yield post("index", "index")
    yield post("index, ready", "index", b'{"ready": true}')
    yield post("index, empty object", "index", b"{}")
    yield post("index, no json", "index", b"{")
    yield post("index, ready a text", "index", b'{"ready": "yes"}')
    yield Case("repository: index by GET", "GET", "/v2/repository/index")
    yield post("load", "models/simple/load")
    yield post("load, empty object", "models/simple/load", b"{}")
    yield post("load, unknown model", "models/nope/load")
    yield post("unload, unknown model", "models/nope/unload")
    yield post("unload", "models/identity_int8/unload")
    yield post("unload, dependents", "models/identity_int16/unload", b'{"parameters": {}}')
