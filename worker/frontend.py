"""The HTTP front end of a worker's process: service, response cache, metrics, server.

Owns what stands between the settings and `worker.rest`, and the start and the end of it. The
queue's lanes never depend on it: an address that is taken, or a package that is missing, is a
line in the log and no reason to take no jobs.

Invariants: nothing is imported, and no thread started, where the settings ask for no HTTP; the
engine is the one that the queue's jobs run on.
"""

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from agent.config import Settings
from agent.repository import ModelRepository
from worker.engine.costs import CostPolicy
from worker.engine.responses import ResponseCache, compute_key
from worker.engine.serving import EngineService
from worker.errors import HttpUnavailableError, WorkerError

if TYPE_CHECKING:
    from worker.engine.engine import Engine
    from worker.engine.routing import TrafficRouter
    from worker.engine.shadow import Shadow
    from worker.rest.server import HttpServer
    from worker.rpc.server import GrpcServer

_MB = 10**6

log = logging.getLogger(__name__)


def is_wanted(settings: Settings) -> bool:
    """Say whether the settings ask for an HTTP API."""
    http = settings.http
    return not (http.port is None and http.socket is None and http.grpc_port is None)


def build_costs(settings: Settings) -> CostPolicy | None:
    """Return how models are measured when they load; not at all where only jobs ask for them.

    A job comes with others in a bundle, whose length is known. The curve is for requests, of
    which nobody knows whether another one follows.
    """
    if not is_wanted(settings):
        return None
    return CostPolicy(folder=settings.costs_dir)


class Frontend:
    """Serves the engine's models over HTTP.

    Args:
        settings: of the box.
        engine: returns the engine; called in a thread, as building it takes a moment.
        router: of who answers beside the active version.
        shadow: sees copies for a candidate.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Callable[[], "Engine"],
        router: "TrafficRouter | None" = None,
        shadow: "Shadow | None" = None,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._router = router
        self._shadow = shadow
        self._service: EngineService | None = None
        self._servers: list[HttpServer | GrpcServer] = []
        self._lock = threading.Lock()
        self._is_ended = False

    def start(self) -> None:
        """Begin to serve in the background; what goes wrong is logged."""
        if is_wanted(self._settings):
            threading.Thread(target=self._start, name="http-start", daemon=True).start()

    def stop(self) -> None:
        """Finish the requests under way, and take no more; harmless when repeated."""
        with self._lock:
            self._is_ended = True
            servers, service = self._servers, self._service
        for server in servers:
            server.stop()
        if service is not None:
            service.close()

    def _start(self) -> None:
        try:
            self._serve()
        except WorkerError as exc:
            log.warning("no HTTP or gRPC API (%s): %s; jobs are taken all the same", exc.code, exc)
        except Exception:
            log.exception("no HTTP API (internal_error); jobs are taken all the same")

    def _serve(self) -> None:
        try:
            from worker.metrics import EngineCollector, ShadowCollector, build_registry, render
            from worker.rest.management import Extras
            from worker.rest.predict import EnginePredictor
            from worker.rest.server import HttpServer
        except ImportError as exc:
            msg = f"{exc.name} is not installed: pip install 'edgeward[serve]'"
            raise HttpUnavailableError(msg) from exc
        settings, engine = self._settings, self._engine()
        repository = ModelRepository(settings.models_dir)
        cache = build_cache(settings)
        service = EngineService(
            engine,
            repository,
            cache=cache,
            make_key=compute_key,
            router=self._router,
            shadow=self._shadow,
        )
        registry = build_registry(service)
        registry.register(EngineCollector(engine, cache))
        if self._shadow is not None:
            registry.register(ShadowCollector(self._shadow))
        extras = Extras(
            EnginePredictor(lambda: engine, repository), render_metrics=lambda: render(registry)
        )
        server = HttpServer(settings.http, service, extras)
        with self._lock:
            if self._is_ended:
                return
            self._service = service
            if settings.http.port is not None or settings.http.socket is not None:
                server.start()
                self._servers.append(server)
            if settings.http.grpc_port is not None:
                self._servers.append(self._start_grpc(service))

    def _start_grpc(self, service: EngineService) -> "GrpcServer":
        try:
            from worker.rpc.server import GrpcServer
        except ImportError as exc:
            msg = f"{exc.name} is not installed: pip install 'edgeward[serve-grpc]'"
            raise HttpUnavailableError(msg) from exc
        server = GrpcServer(self._settings.http, service)
        server.start()
        return server


def build_cache(settings: Settings) -> ResponseCache | None:
    """Return the cache of answers that the settings ask for; None for none."""
    worker = settings.worker
    if not worker.response_cache_mb:
        return None
    return ResponseCache(worker.response_cache_mb * _MB, worker.response_cache_ttl_s)
