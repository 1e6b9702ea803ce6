"""The HTTP server of a worker's process: sockets, TLS, a thread of its own, a clean end.

Owns the addresses. The event loop runs in a thread beside the worker's own; one application answers
on all of them, and one without a token on the Unix socket, whose file's permissions say who may.

Invariants: `start` returns when requests are taken, or raises and leaves nothing behind; `stop`
takes no new requests, finishes those under way within `http.stop_timeout_s`, and returns.
"""

import asyncio
import errno
import logging
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import uvicorn

from agent.sections import HttpSettings
from worker.engine.service import Service
from worker.errors import HttpUnavailableError
from worker.rest.application import App, Application, Bounds, Load
from worker.rest.management import Extras, build_management
from worker.rest.protocol import BoundedProtocol

_TICK_S = 1.0
_START_S = 30.0
_BACKLOG = 1024
_SOCKET_MODE = 0o660

_log = logging.getLogger(__name__)


class _Listener(uvicorn.Server):
    """Uvicorn's server without its ten wake-ups a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._ending.wait()

    def end(self) -> None:
        self.should_exit = True
        self._ending.set()


class HttpServer:
    """Serves a service's models over HTTP.

    Args:
        settings: addresses, bounds and who may ask; a port or a socket must be set.
        service: answers.
        extras: predict and metrics, where there are any.
    """

    def __init__(
        self, settings: HttpSettings, service: Service, extras: Extras | None = None
    ) -> None:
        self._settings = settings
        self._service = service
        self._extras = extras
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: list[_Listener] = []
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self.port: int | None = None
        """The TCP port that it is bound to."""

    def start(self) -> None:
        """Bind, and serve in a thread.

        Raises:
            HttpUnavailableError: an address cannot be bound, a certificate or token not be read.
        """
        configs = self._build()
        self._thread = threading.Thread(
            target=self._serve, args=(configs,), name="edgeward-http", daemon=True
        )
        self._thread.start()
        if not self._started.wait(_START_S) or self._failure is not None:
            for _, bound in configs:
                bound.close()
            msg = f"the HTTP server did not start: {self._failure or 'no answer from its thread'}"
            raise HttpUnavailableError(msg) from self._failure
        _log.info("HTTP API on %s", ", ".join(self._name_addresses()))

    def stop(self) -> None:
        """Finish the requests under way, and end; harmless when repeated."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None or not thread.is_alive():
            return
        for listener in self._listeners:
            # The loop may end between the look and the call.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(listener.end)
        thread.join(self._settings.stop_timeout_s + _START_S)
        if self._settings.socket is not None:
            self._settings.socket.unlink(missing_ok=True)

    def _name_addresses(self) -> list[str]:
        settings = self._settings
        scheme = "https" if settings.cert_file else "http"
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        names = [] if self.port is None else [f"{scheme}://{host}:{self.port}"]
        return names if settings.socket is None else [*names, str(settings.socket)]

    # --- what is bound --------------------------------------------------------------------------

    def _build(self) -> list[tuple[uvicorn.Config, socket.socket]]:
        settings = self._settings
        token = read_token(settings)
        load = Load(
            Bounds(
                settings.body_bytes, settings.requests, settings.held_bytes, settings.body_timeout_s
            )
        )
        management = build_management(self._service, self._extras)
        bound: list[tuple[uvicorn.Config, socket.socket]] = []
        try:
            if settings.port is not None:
                listening = bind_port(settings.host, settings.port)
                self.port = listening.getsockname()[1]
                app = self._build_app(management, load, token)
                bound.append(
                    (self._configure(app, is_tls=settings.cert_file is not None), listening)
                )
            if settings.socket is not None:
                listening = bind_socket(settings.socket)
                app = self._build_app(management, load, None)
                bound.append((self._configure(app, is_tls=False), listening))
            for config, _ in bound:
                _load(config)
        except HttpUnavailableError:
            for _, listening in bound:
                listening.close()
            raise
        return bound

    def _build_app(self, management: Any, load: Load, token: str | None) -> App:
        origins = self._settings.cors_origins
        app: App = Application(self._service, management, load, token, origins)
        if not origins:
            return app
        from starlette.middleware.cors import CORSMiddleware

        exposed = ["Inference-Header-Content-Length"]
        return CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=exposed,
        )

    def _configure(self, app: App, *, is_tls: bool) -> uvicorn.Config:
        settings = self._settings
        return uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            # Its warnings are of single bad requests: a flood of those would fill the log.
            log_level="info" if settings.access_log else "error",
            access_log=settings.access_log,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=int(settings.keep_alive_s),
            timeout_graceful_shutdown=int(settings.stop_timeout_s) or 1,
            ssl_certfile=settings.cert_file if is_tls else None,
            ssl_keyfile=settings.key_file if is_tls else None,
        )

    # --- the thread -----------------------------------------------------------------------------

    def _serve(self, configs: list[tuple[uvicorn.Config, socket.socket]]) -> None:
        try:
            with asyncio.Runner(loop_factory=_find_loop_factory()) as runner:
                runner.run(self._run(configs))
        except Exception as exc:  # noqa: BLE001 - the thread's boundary: nobody above would see it
            _log.exception("the HTTP server ended")
            self._failure = exc
            self._started.set()

    async def _run(self, configs: list[tuple[uvicorn.Config, socket.socket]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listeners = [_Listener(config) for config, _ in configs]
        serving = [
            asyncio.ensure_future(listener.serve([bound]))
            for listener, (_, bound) in zip(self._listeners, configs, strict=True)
        ]
        waiting = asyncio.ensure_future(self._announce())
        await asyncio.gather(*serving)
        waiting.cancel()

    async def _announce(self) -> None:
        while not all(listener.started for listener in self._listeners):
            await asyncio.sleep(0.005)
        self._started.set()


def _find_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's where it is installed; asyncio's own is about a third slower here."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _load(config: uvicorn.Config) -> None:
    try:
        config.load()
    except (OSError, ssl.SSLError) as exc:
        msg = f"http.cert_file and http.key_file cannot be used: {exc}"
        raise HttpUnavailableError(msg) from exc


def bind_port(host: str, port: int) -> socket.socket:
    """Return a socket bound to a TCP address.

    Raises:
        HttpUnavailableError: it is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        # Here, not in the event loop: of two that start at once only this tells the second one.
        listening.listen(_BACKLOG)
    except OSError as exc:
        listening.close()
        why = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be bound: {exc.strerror}"
        msg = f"{host}:{port} {why}; choose another http.host or http.port"
        raise HttpUnavailableError(msg) from exc
    return listening


def bind_socket(path: Path) -> socket.socket:
    """Return a socket bound to a path, which group members may use; a dead one's place is taken.

    Raises:
        HttpUnavailableError: another server answers there, or the path cannot be used.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _free_socket(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        listening.bind(str(path))
        path.chmod(_SOCKET_MODE)
        listening.listen(_BACKLOG)
    except (OSError, HttpUnavailableError) as exc:
        listening.close()
        if isinstance(exc, HttpUnavailableError):
            raise
        msg = f"http.socket {path} cannot be bound: {exc.strerror or exc}"
        raise HttpUnavailableError(msg) from exc
    return listening


def _free_socket(path: Path) -> None:
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            # Its server died without removing it.
            path.unlink(missing_ok=True)
            return
    msg = f"http.socket {path} is in use by another server"
    raise HttpUnavailableError(msg)


def read_token(settings: HttpSettings) -> str | None:
    """Return the bearer token from its setting or its file.

    Raises:
        HttpUnavailableError: the file cannot be read, or holds none.
    """
    if settings.token_file is None:
        return settings.token.get_secret_value() if settings.token else None
    try:
        token = settings.token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        msg = f"http.token_file {settings.token_file} cannot be read: {exc}"
        raise HttpUnavailableError(msg) from exc
    if not token:
        msg = f"http.token_file {settings.token_file} is empty"
        raise HttpUnavailableError(msg)
    return token
