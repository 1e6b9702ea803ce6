"""The short way: a whole binary request in one read of the socket, answered in the same call.

Owns which requests may take it, and their answer's bytes. A small model's run costs 10 µs; the
parsing of the same dozen headers, the scope, the task and the messages of ASGI cost ten times
that. A client sends the same head with each request, byte for byte: it is parsed once, strictly
(by httptools, as on the long way), and what it means is kept by its bytes.

Invariants: whatever is out of the ordinary goes the long way and has cost nothing: any header
that asks for something, a body that is not there as a whole, JSON data, a model that is not run
inline, a request that is not one; both ways answer alike.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import httptools

from agent.errors import AgentError
from platforms.errors import PlatformError
from worker.engine.service import Service
from worker.errors import WorkerError
from worker.rest.codec import encode_answer, parse_call
from worker.rest.compression import COMPRESS_FROM_BYTES, choose_encoding, compress
from worker.rest.errors import RequestFormatError, encode_error, find_status
from worker.rest.paths import Target, parse_target

_log = logging.getLogger(__name__)

HEAD_BYTES_MAX = 2048
BODY_BYTES_MAX = 65536
"""A larger one is worth the long way, and may come in several reads."""
_HEADS_KEPT = 256
_END = b"\r\n\r\n"
_BEGIN = b"POST /v2/models/"
_IGNORED = {b"host", b"user-agent", b"accept", b"content-type", b"content-length", b"connection"}
_HEAD_LENGTH, _ACCEPTED = b"inference-header-content-length", b"accept-encoding"
_REASONS = {400: b"Bad Request", 404: b"Not Found", 500: b"Internal Server Error"}


class Head(NamedTuple):
    """What a request's line and headers say, where nothing in them is out of the ordinary."""

    target: Target
    body_bytes: int
    json_bytes: int
    encoding: str | None
    """That the client would like its answer in."""


class _Reader:
    """Collects what httptools finds in a head."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.is_repeated = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self.is_repeated |= name in self.headers
        self.headers[name] = value


@lru_cache(_HEADS_KEPT)
def parse_head(text: bytes) -> Head | None:
    """Return what a head means, its empty line included; None: it goes the long way."""
    reader = _Reader()
    parser = httptools.HttpRequestParser(reader)
    try:
        parser.feed_data(text)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    headers = reader.headers
    is_plain = headers.keys() <= _IGNORED | {_HEAD_LENGTH, _ACCEPTED} and not reader.is_repeated
    is_kept = parser.get_http_version() == "1.1" and parser.should_keep_alive()
    target = parse_target(reader.url)
    lengths = [headers.get(name, b"") for name in (b"content-length", _HEAD_LENGTH)]
    is_sized = all(length.isdigit() and len(length) < 7 for length in lengths)
    if not (is_plain and is_kept and is_sized) or target is None or target.action != "infer":
        return None
    body_bytes, json_bytes = map(int, lengths)
    if not 0 < json_bytes <= body_bytes <= BODY_BYTES_MAX:
        return None
    accepted = headers.get(_ACCEPTED)
    return Head(target, body_bytes, json_bytes, choose_encoding(accepted) if accepted else None)


def build_shortcut(service: Service, body_bytes_max: int) -> Callable[[bytes], bytes | None]:
    """Return a function from the bytes of a read to those of the answer.

    It returns None where the bytes have to go the long way.

    Args:
        service: answers.
        body_bytes_max: largest body that may be taken.
    """

    def answer(data: bytes) -> bytes | None:
        if not data.startswith(_BEGIN):
            return None
        end = data.find(_END, 0, HEAD_BYTES_MAX) + len(_END)
        head = parse_head(data[:end]) if end >= len(_END) else None
        if head is None or len(data) - end != head.body_bytes or head.body_bytes > body_bytes_max:
            return None
        return _answer(service, head, data[end:])

    return answer


def _answer(service: Service, head: Head, body: bytes) -> bytes | None:
    target = head.target
    try:
        call = parse_call(target.model, target.version, body, head.json_bytes)
        if call.head.is_classifying or any(item.size is None for item in call.head.inputs):
            return None
        response = service.infer_inline(call.request)
    except (RequestFormatError, AgentError):
        # Whether the model is known comes first, which takes looks at the disk.
        return None
    except (PlatformError, WorkerError) as exc:
        return _build_error(exc)
    except Exception:  # noqa: BLE001 - the HTTP boundary of style.md
        _log.exception("internal_error on the short way; the long one tries again")
        return None
    if response is None:
        return None
    found = encode_answer(call, response)
    content, encoded = found.body, b""
    if head.encoding is not None and len(content) >= COMPRESS_FROM_BYTES:
        content = compress(content, head.encoding)
        encoded = b"content-encoding: %s\r\n" % head.encoding.encode()
    if found.head_bytes is None:
        kind = b"application/json\r\n"
    else:
        kind = (
            b"application/octet-stream\r\ninference-header-content-length: %d\r\n"
            % found.head_bytes
        )
    head_text = b"HTTP/1.1 200 OK\r\ncontent-type: %s%scontent-length: %d\r\n\r\n"
    return head_text % (kind, encoded, len(content)) + content


def _build_error(exc: PlatformError | WorkerError) -> bytes | None:
    reason = _REASONS.get(find_status(exc))
    if reason is None:
        # Such as 503, where a model has been unloaded: nothing has run, the long way says it.
        return None
    body = encode_error(str(exc))
    text = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return text % (find_status(exc), reason, len(body)) + body
