"""Uvicorn's HTTP/1.1 protocol with four things it leaves out.

An answer's head and body go in one write, which saves a system call, and the client a wake-up; a
request's line and headers are bounded, which Uvicorn keeps in memory however long they are; and
bytes that are no HTTP at all get the API's JSON; a request that is there as a whole may be answered
on a short way (`worker.rest.shortcut`). Written against Uvicorn 0.54's
`HttpToolsProtocol`: a test breaks if an update drops one of the methods.
"""

from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from worker.rest.errors import encode_error

HEAD_BYTES = 65536
"""Of a request's line and headers, give or take what one read of the socket returns."""


_CONTINUE = b"HTTP/1.1 100"
_JOINED_BYTES = 65536
"""A longer body is written by itself: a copy would cost more than a system call."""


class _JoinedWrites:
    """A connection's transport for one answer, whose head is held back until its body comes."""

    __slots__ = ("_head", "_is_begun", "_transport")

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._head = b""
        self._is_begun = False

    def write(self, data: bytes) -> None:
        head, self._head = self._head, b""
        if head:
            if len(data) > _JOINED_BYTES:
                self._transport.write(head)
                self._transport.write(data)
            else:
                self._transport.write(head + data)
        elif not (self._is_begun or data.startswith(_CONTINUE)):
            self._is_begun = True
            self._head = data
        else:
            self._transport.write(data)

    def close(self) -> None:
        if self._head:
            self.write(b"")
        self._transport.close()

    def is_closing(self) -> bool:
        return bool(self._transport.is_closing())


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_in_head = True
        self._head_bytes = 0
        self._answered_at = 0.0
        """When the short way was taken last, of the loop's clock."""
        shortcut = getattr(self.app, "answer_at_once", None)
        self._shortcut: Callable[[bytes], bytes | None] | None = shortcut
        if self.config.access_log:
            self._shortcut = None

    def data_received(self, data: bytes) -> None:
        """Take bytes in, and hang up on one whose head has no end."""
        if self._shortcut is not None and self._is_idle():
            answer = self._shortcut(data)
            if answer is not None:
                self._answer_at_once(answer)
                return
        # Before the rest: what follows the end of one request in the same bytes is not counted,
        # or the end of a large body would be.
        self._head_bytes += len(data)
        super().data_received(data)
        is_too_long = self._is_in_head and self._head_bytes > HEAD_BYTES
        if is_too_long and not self.transport.is_closing():
            self._refuse(431, "the request's headers are too long")

    def _is_idle(self) -> bool:
        """Say whether nothing of a request is there, nor of an answer that is under way."""
        cycle: Any = self.cycle
        return (
            self._head_bytes == 0
            and self._is_in_head
            and (cycle is None or cycle.response_complete)
            and not self.flow.write_paused
            and not self.transport.is_closing()
        )

    def _answer_at_once(self, answer: bytes) -> None:
        self.transport.write(answer)
        self.server_state.total_requests += 1
        self._answered_at = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._expect_more(self.timeout_keep_alive)

    def _expect_more(self, wait_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(wait_s, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; the short way sets no timer anew for each request."""
        rest_s = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if rest_s > 0:
            self._expect_more(rest_s)
        else:
            super().timeout_keep_alive_handler()

    def on_headers_complete(self) -> None:
        """Start the request."""
        self._is_in_head = False
        super().on_headers_complete()
        if self.scope["method"] != "HEAD":
            # To HEAD there is no body that would release the head.
            self.cycle.transport = _JoinedWrites(self.transport)  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        """Expect the next head."""
        super().on_message_complete()
        self._is_in_head = True
        self._head_bytes = 0

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP, unless an answer is under way on this connection."""
        cycle: Any = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.close()
            return
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        body = encode_error(message)
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head % len(body) + body)
        self.transport.close()
