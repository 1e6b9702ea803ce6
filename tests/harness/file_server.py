"""A real web server for a release repository, which can also misbehave as servers do.

Serves the files below a folder with ranges, keeps count of what it sent, and does what
its `Behaviour` says. `python -m tests.harness.file_server FOLDER` serves a folder until
it is stopped: a small server for a demonstration.
"""

import argparse
import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_PIECE = 16 << 10


@dataclass
class Behaviour:
    """What the server does apart from serving; each for the paths that `applies_to` takes."""

    applies_to: Callable[[str], bool] = lambda path: path.startswith("/blobs/")
    cuts: Iterator[int] | None = None
    """Of each answer: after how many bytes of the body its connection is cut."""
    hold_after: int | None = None
    """After so many bytes in all, the server sends nothing until `release` is called."""
    ignores_range: bool = False
    is_endless: bool = False
    """The body has no length and goes on for ever."""
    redirect_to: str | None = None
    status: int | None = None
    failures: int = 0
    """So many requests are answered with 503 first."""
    more_bytes: int = 0
    """The file seems so much longer (shorter where negative), headers and body alike."""
    has_length: bool = True
    encoding: str | None = None
    content_range: str | None = None
    """Said instead of the true one."""
    replace: Callable[[bytes], bytes] = lambda data: data
    """What is served instead of a file's content."""


@dataclass
class Asked:
    """One request."""

    path: str
    range: str | None
    headers: dict[str, str] = field(default_factory=dict)


class FileServer:
    """Serves a folder on a free port of this machine while it is entered."""

    def __init__(
        self,
        folder: Path,
        behaviour: Behaviour | None = None,
        port: int = 0,
        certificate: Path | None = None,
    ) -> None:
        self.folder = folder
        self.behaviour = behaviour or Behaviour()
        self.asked: list[Asked] = []
        self.sent_bytes = 0
        """Of bodies, in all."""
        self.has_room = threading.Event()
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.owner = self
        self._scheme = "http"
        if certificate is not None:
            # One file with the key and the certificate.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._scheme = "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def address(self) -> str:
        """Where the folder is served."""
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}"

    def count_asked(self, start: str) -> int:
        """Return how many requests were for a path that begins so."""
        return sum(asked.path.startswith(start) for asked in self.asked)

    def release(self) -> None:
        """Let answers go on that are held."""
        self.has_room.set()

    def __enter__(self) -> "FileServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A client that was killed leaves its connection open for a while.
    block_on_close = False
    owner: FileServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients are killed, and hang up in the middle."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 30

    def do_GET(self) -> None:
        owner = self.server.owner
        with owner.lock:
            owner.asked.append(Asked(self.path, self.headers.get("Range"), dict(self.headers)))
        behaviour = owner.behaviour
        if not behaviour.applies_to(self.path):
            behaviour = Behaviour()
        if self._refuse(behaviour):
            return
        file = owner.folder / self.path.lstrip("/")
        if ".." in self.path or not file.is_file():
            self._send_status(404)
            return
        data = behaviour.replace(file.read_bytes())
        if behaviour.more_bytes > 0:
            data += bytes(behaviour.more_bytes)
        elif behaviour.more_bytes < 0:
            data = data[: behaviour.more_bytes]
        with contextlib.suppress(OSError):
            self._answer(data, behaviour)

    def _refuse(self, behaviour: Behaviour) -> bool:
        if behaviour.failures > 0:
            behaviour.failures -= 1
            self._send_status(503)
        elif behaviour.redirect_to is not None:
            self._send_status(302, {"Location": behaviour.redirect_to})
        elif behaviour.status is not None:
            self._send_status(behaviour.status)
        else:
            return False
        return True

    def _send_status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, data: bytes, behaviour: Behaviour) -> None:
        start, end, size = 0, len(data), len(data)
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        is_part = match is not None and not behaviour.ignores_range
        if match is not None and is_part:
            start = int(match[1])
            end = min(size, int(match[2]) + 1) if match[2] else size
            if start >= size:
                self._send_status(416, {"Content-Range": f"bytes */{size}"})
                return
        self.send_response(206 if is_part else 200)
        if is_part:
            true = f"bytes {start}-{end - 1}/{size}"
            self.send_header("Content-Range", behaviour.content_range or true)
        if behaviour.encoding is not None:
            self.send_header("Content-Encoding", behaviour.encoding)
        if behaviour.has_length and not behaviour.is_endless:
            self.send_header("Content-Length", str(end - start))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self._send_body(data[start:end], behaviour)

    def _send_body(self, body: bytes, behaviour: Behaviour) -> None:
        cut = next(behaviour.cuts, None) if behaviour.cuts is not None else None
        at = 0
        while at < len(body):
            end = min(len(body), at + _PIECE, len(body) if cut is None else cut)
            if end == at:
                self._cut()
                return
            self._send(body[at:end], behaviour)
            at = end
        while behaviour.is_endless:
            self._send(bytes(_PIECE), behaviour)

    def _send(self, piece: bytes, behaviour: Behaviour) -> None:
        owner = self.server.owner
        hold = behaviour.hold_after
        if hold is not None and owner.sent_bytes >= hold:
            owner.has_room.wait(30)
        # Before it is sent: whoever has received it finds it counted.
        with owner.lock:
            owner.sent_bytes += len(piece)
        self.wfile.write(piece)

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base's name)
        """Say nothing: what was asked is in `asked`."""


def main() -> None:
    """Serve a folder until it is stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8088)
    options = parser.parse_args()
    with FileServer(options.folder, port=options.port) as server:
        print(f"{server.address} serves {options.folder}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
