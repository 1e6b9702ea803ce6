"""The ASGI application: inference and health by hand, everything else by FastAPI.

Owns who may ask (token, origin), how much may be under way at a time, the reading of bodies, and
that each error is the protocol's `{"error": …}`. FastAPI's routing and validation would cost two
thirds of a small request, so `…/infer` and the health calls never meet it.

A request for inference: path → bounds → body (bounded, decompressed) → codec → the engine, where
possible on the event loop itself → codec. A client that goes away takes its request along.

Invariants: a request that is refused has cost no run; what a request holds is counted while it is
here and not longer; no message of an internal error leaves the process.
"""

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from agent.errors import AgentError
from platforms.errors import PlatformError
from worker.engine.service import Service, TensorRequest, TensorResponse
from worker.errors import WorkerError
from worker.rest.codec import Answer, Call, encode_answer, parse_call, parse_raw_call
from worker.rest.compression import COMPRESS_FROM_BYTES, choose_encoding, compress, decompress
from worker.rest.errors import (
    INTERNAL,
    BodyTooLargeError,
    RequestFormatError,
    ServerBusyError,
    encode_error,
    find_status,
)
from worker.rest.paths import Target, parse_target
from worker.rest.shortcut import build_shortcut

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

HEAD_LENGTH = b"inference-header-content-length"
LIVE = "/v2/health/live"
# Work on a body of so many bytes goes to a thread: it takes longer than a hand-over.
_THREAD_FROM_BYTES = 65536
_DIGITS_MAX = 18
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
_CLOSE = (b"connection", b"close")
_OWN = (AgentError, PlatformError, WorkerError)

_log = logging.getLogger(__name__)


class _Gone(Exception):  # noqa: N818 - not an error: the client has gone away
    """The client closed its connection before it had an answer."""


class _Slow(Exception):  # noqa: N818 - an answer of its own, 408
    """The client did not send its body in time."""


@dataclass(frozen=True)
class Bounds:
    """What the application takes at a time."""

    body_bytes: int = 64 << 20
    """Of one body, as sent and decompressed."""
    requests: int = 512
    held_bytes: int = 256 << 20
    """Of all bodies that are being worked on."""
    body_timeout_s: float = 30.0
    """Longest pause in the sending of a body."""


class Load:
    """What is under way just now; of the event loop's thread only.

    Looks after slow bodies too: one look at all of them now and then costs less than a timer for
    each, as nearly every body is there before it is asked for.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.requests = 0
        self.bytes = 0
        self._reading: dict[_Body, float] = {}
        """Bodies whose client is to send something, and since when."""
        self._is_watching = False

    def begin_reading(self, body: "_Body") -> None:
        """Expect the client to send something within `body_timeout_s`."""
        self._reading[body] = time.monotonic()
        if not self._is_watching:
            self._is_watching = True
            self._watch_later()

    def end_reading(self, body: "_Body") -> None:
        """Expect no more of this client."""
        del self._reading[body]

    def _watch_later(self) -> None:
        wait_s = min(1.0, self.bounds.body_timeout_s / 4)
        asyncio.get_running_loop().call_later(wait_s, self._watch)

    def _watch(self) -> None:
        oldest = time.monotonic() - self.bounds.body_timeout_s
        for body in [body for body, since in self._reading.items() if since < oldest]:
            body.give_up()
        self._is_watching = bool(self._reading)
        if self._is_watching:
            self._watch_later()

    def take(self, size: int) -> None:
        """Count bytes of a body in.

        Raises:
            ServerBusyError: there are too many already; these are not counted.
        """
        if self.bytes + size > self.bounds.held_bytes:
            msg = "too many bytes of requests are under way: try again"
            raise ServerBusyError(msg)
        self.bytes += size


class Application:
    """The ASGI application of the worker's HTTP API.

    Args:
        service: answers.
        management: serves every other path; gets the whole body at once.
        load: what is under way, shared between the applications of a process.
        token: what `Authorization: Bearer` must say; None: nothing.
        origins: web origins whose pages may ask, beside this server's own pages.
    """

    def __init__(
        self,
        service: Service,
        management: App,
        load: Load,
        token: str | None = None,
        origins: Iterable[str] = (),
    ) -> None:
        self._service = service
        self._management = management
        self._load = load
        self._authorization = None if token is None else b"Bearer " + token.encode()
        self._origins = frozenset(origins)
        self.answer_at_once: Callable[[bytes], bytes | None] | None = None
        """From the bytes of a read to those of an answer; None where each request is looked at."""
        if token is None:
            self.answer_at_once = build_shortcut(service, load.bounds.body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        load = self._load
        if self._authorization is not None or b"origin" in headers:
            refusal = self._find_refusal(scope, headers)
            if refusal is not None:
                await _send_error(send, *refusal)
                return
        if load.requests >= load.bounds.requests:
            await _send_error(send, 503, "too many requests are under way: try again")
            return
        load.requests += 1
        body = _Body(load, receive, headers)
        try:
            await self._answer(scope, headers, body, send)
        except _Gone:
            _log.debug("the client of %s went away", scope["path"])
        except _Slow:
            await _send_error(send, 408, "the body did not come in time", [_CLOSE])
        except BodyTooLargeError as exc:
            # What is left of the body would be read for nothing.
            await _send_error(send, find_status(exc), str(exc), [_CLOSE])
        except _OWN as exc:
            await _send_error(send, find_status(exc), str(exc))
        except Exception:  # noqa: BLE001 - the HTTP boundary of style.md
            _log.exception("internal_error in %s %s", scope["method"], scope["path"])
            await _send_error(send, INTERNAL, "internal error; the worker's log has the traceback")
        finally:
            load.requests -= 1
            body.release()

    # --- who may ask --------------------------------------------------------------------------

    def _find_refusal(
        self, scope: Scope, headers: dict[bytes, bytes]
    ) -> tuple[int, str, Headers] | None:
        origin = headers.get(b"origin")
        if origin is not None and not self._is_own_page(scope, headers, origin):
            return 403, "this web page's origin is not in http.cors_origins", []
        if self._authorization is None or scope["path"] == LIVE:
            return None
        given = headers.get(b"authorization", b"")
        # The scheme is case-insensitive (RFC 9110).
        if given[:7].lower() == b"bearer ":
            given = b"Bearer " + given[7:].strip()
        if hmac.compare_digest(given, self._authorization):
            return None
        return 401, "a token is needed: Authorization: Bearer …", [(b"www-authenticate", b"Bearer")]

    def _is_own_page(self, scope: Scope, headers: dict[bytes, bytes], origin: bytes) -> bool:
        text = origin.decode("latin-1")
        if text in self._origins or "*" in self._origins:
            return True
        host = headers.get(b"host", b"").decode("latin-1")
        return text == f"{scope['scheme']}://{host}" and _is_address(host)

    # --- the fast way -------------------------------------------------------------------------

    async def _answer(
        self, scope: Scope, headers: dict[bytes, bytes], body: "_Body", send: Send
    ) -> None:
        method = scope["method"]
        target = parse_target(scope.get("raw_path") or scope["path"].encode())
        if target is None:
            await self._manage(scope, headers, body, send)
        elif target.action == "infer" and method == "POST":
            await self._infer(target, headers, body, send)
        elif target.action == "ready" and method == "GET":
            await self._tell_ready(target, send)
        else:
            allowed = b"POST" if target.action == "infer" else b"GET"
            message = f"{method} is not allowed here; {allowed.decode()} is"
            await _send_error(send, 405, message, [(b"allow", allowed)])

    async def _tell_ready(self, target: Target, send: Send) -> None:
        if target.model:
            is_ready = self._service.is_model_ready(target.model, target.version)
        else:
            is_ready = target.version == "live" or self._service.is_ready()
        if is_ready:
            await _send(send, 200, [], b"")
            return
        await self._find_model(target)
        await _send_error(send, 503, "not ready")

    async def _find_model(self, target: Target) -> None:
        """Check that there is such a model and version, whether it takes requests or not.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none.
        """
        if target.model:
            # Off the event loop: it reads folders.
            await asyncio.to_thread(self._service.get_stats, target.model, target.version)

    async def _infer(
        self, target: Target, headers: dict[bytes, bytes], body: "_Body", send: Send
    ) -> None:
        content = await body.read()
        try:
            call = await self._parse(target, headers, content)
        except RequestFormatError:
            # Where the model is unknown, that comes first.
            await self._find_model(target)
            raise
        response = self._service.infer_inline(call.request)
        if response is None:
            response = await self._wait(call.request, body)
        info = None
        if call.head.is_classifying:
            info = await self._service.get_info(call.request.model, response.version)
        answer = encode_answer(call, response, info)
        await _send_answer(send, headers, answer)

    async def _parse(self, target: Target, headers: dict[bytes, bytes], content: bytes) -> Call:
        head_bytes = parse_head_length(headers.get(HEAD_LENGTH))
        if head_bytes == 0:
            info = await self._service.get_info(target.model, target.version)
            return parse_raw_call(info, target.version, content)
        return parse_call(target.model, target.version, content, head_bytes)

    async def _wait(self, request: TensorRequest, body: "_Body") -> TensorResponse:
        """Ask the engine, and the client whether it is still there.

        Raises:
            _Gone: it is not; the request has left the engine's queue.
        """
        running = asyncio.ensure_future(self._service.infer(request))
        leaving = asyncio.ensure_future(body.wait_for_end())
        try:
            await asyncio.wait((running, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not running.done():
                running.cancel()
        if running.done():
            return running.result()
        with suppress(asyncio.CancelledError, *_OWN):
            await running
        raise _Gone

    # --- the other way ------------------------------------------------------------------------

    async def _manage(
        self, scope: Scope, headers: dict[bytes, bytes], body: "_Body", send: Send
    ) -> None:
        content = await body.read()
        is_given = False

        async def receive() -> Message:
            nonlocal is_given
            if is_given:
                await body.wait_for_end()
                return {"type": "http.disconnect"}
            is_given = True
            return {"type": "http.request", "body": content, "more_body": False}

        await self._management(scope, receive, send)


class _Body:
    """One request's body: read once, within bounds."""

    def __init__(self, load: Load, receive: Receive, headers: dict[bytes, bytes]) -> None:
        self._load = load
        self._receive = receive
        self._headers = headers
        self._held = 0
        self._task: asyncio.Task[Any] | None = None
        self._is_given_up = False

    def release(self) -> None:
        """Count its bytes out."""
        self._load.bytes -= self._held
        self._held = 0

    def _hold(self, size: int) -> None:
        self._load.take(size)
        self._held += size

    async def read(self) -> bytes:
        """Return the whole body, decompressed.

        Raises:
            BodyTooLargeError, ServerBusyError, RequestFormatError: as the bounds say.
            _Gone: the client closed its connection.
            _Slow: the client paused for too long.
        """
        limit = self._load.bounds.body_bytes
        announced = self._headers.get(b"content-length")
        if announced is not None and _parse_number(announced, "Content-Length") > limit:
            msg = f"the body has {announced.decode()} bytes; {limit} are allowed"
            raise BodyTooLargeError(msg)
        message = await self._take()
        content: bytes = message["body"]
        if len(content) > limit:
            msg = f"the body has more than {limit} bytes"
            raise BodyTooLargeError(msg)
        self._hold(len(content))
        if message.get("more_body"):
            content = await self._read_on(content, limit)
        encoding = self._headers.get(b"content-encoding")
        if encoding is None:
            return content
        return await self._decompress(content, encoding.decode("latin-1"), limit)

    def give_up(self) -> None:
        """End the reading, as the client is too slow."""
        if self._task is not None:
            self._is_given_up = True
            self._task.cancel()

    async def _take(self) -> Message:
        self._task = task = asyncio.current_task()
        self._load.begin_reading(self)
        try:
            message = await self._receive()
        except asyncio.CancelledError as exc:
            if self._is_given_up and task is not None and not task.uncancel():
                raise _Slow from exc
            raise
        finally:
            self._load.end_reading(self)
        if message["type"] == "http.disconnect":
            raise _Gone
        return message

    async def _read_on(self, first: bytes, limit: int) -> bytes:
        content = bytearray(first)
        has_more = True
        while has_more:
            message = await self._take()
            part: bytes = message["body"]
            if len(content) + len(part) > limit:
                msg = f"the body has more than {limit} bytes"
                raise BodyTooLargeError(msg)
            self._hold(len(part))
            content += part
            has_more = message.get("more_body", False)
        return bytes(content)

    async def _decompress(self, content: bytes, encoding: str, limit: int) -> bytes:
        if len(content) < _THREAD_FROM_BYTES // 16:
            found = decompress(content, encoding, limit)
        else:
            found = await asyncio.to_thread(decompress, content, encoding, limit)
        self._hold(len(found))
        return found

    async def wait_for_end(self) -> None:
        """Return when the client has gone away."""
        message = await self._receive()
        while message["type"] != "http.disconnect":
            message = await self._receive()


# --- paths, headers and answers -------------------------------------------------------------


def parse_head_length(value: bytes | None) -> int | None:
    """Return the length of a body's JSON part, from its header.

    Raises:
        RequestFormatError: it is no whole number.
    """
    return None if value is None else _parse_number(value, "Inference-Header-Content-Length")


def _parse_number(value: bytes, name: str) -> int:
    # isdigit of bytes is ASCII only; int alone would take a sign, blanks and underscores.
    if value.isdigit() and len(value) <= _DIGITS_MAX:
        return int(value)
    msg = f"{name} is no whole number"
    raise RequestFormatError(msg)


@lru_cache(64)
def _is_address(host: str) -> bool:
    """Say whether a Host header names this machine by number, or is localhost.

    A name could be any web site's, pointed at this address (DNS rebinding).
    """
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _send(send: Send, status: int, headers: Headers, body: bytes) -> None:
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_error(
    send: Send, status: int, message: str, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    await _send(send, status, [_JSON, *headers], encode_error(message))


async def _send_answer(send: Send, headers: dict[bytes, bytes], answer: Answer) -> None:
    body = answer.body
    sent: Headers = [_JSON]
    if answer.head_bytes is not None:
        sent = [_BINARY, (HEAD_LENGTH, b"%d" % answer.head_bytes)]
    accepted = headers.get(b"accept-encoding")
    if accepted is not None and len(body) >= COMPRESS_FROM_BYTES:
        encoding = choose_encoding(accepted)
        if encoding is not None:
            is_long = len(body) >= _THREAD_FROM_BYTES
            body = (
                await asyncio.to_thread(compress, body, encoding)
                if is_long
                else compress(body, encoding)
            )
            sent.append((b"content-encoding", encoding.encode()))
    await _send(send, 200, sent, body)
