"""The gRPC server of a worker's process: its calls, its address, a thread of its own.

Owns which status an error has, who may ask, and the bounds. Triton's own definition of the service
comes with its client (`tritonclient[grpc]`), so that none is compiled here; the price is 20 MB of
packages, which only boxes with this extra pay.

Invariants: `start` returns when requests are taken, or raises and leaves nothing behind; `stop`
finishes what is under way within `http.stop_timeout_s`; a client that cancels takes its request
out of the engine's queue; no message of an internal error leaves the process.

Source of the status codes: Triton's `src/grpc/grpc_utils.h`.
"""

import asyncio
import hmac
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from agent.errors import AgentError
from agent.sections import HttpSettings
from platforms.errors import PlatformError
from worker.engine.service import Service
from worker.errors import HttpUnavailableError, WorkerError
from worker.rest.errors import find_status
from worker.rest.management import EXTENSIONS, SERVER_NAME, read_version
from worker.rest.server import read_token
from worker.rpc.messages import (
    build_answer,
    build_config,
    build_index,
    build_metadata,
    build_statistics,
    read_classes,
    read_request,
)

_START_S = 30.0
_OWN = (AgentError, PlatformError, WorkerError)
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_LIVE = "/inference.GRPCInferenceService/ServerLive"
_NOT_OFFERED = (
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
)

Call = Callable[[Any, Any], Awaitable[Any]]

_log = logging.getLogger(__name__)


def _guard(call: Callable[["Servicer", Any], Awaitable[Any]]) -> Any:
    """Return a call whose errors have the status of their kind."""

    async def answer(self: "Servicer", request: Any, context: Any) -> Any:
        try:
            return await call(self, request)
        except Exception as exc:  # noqa: BLE001 - the gRPC boundary of style.md
            await context.abort(*_word(exc))

    answer.__doc__ = call.__doc__
    return answer


def _word(exc: Exception) -> tuple[grpc.StatusCode, str]:
    status = find_status(exc)
    if isinstance(exc, _OWN):
        return _CODES.get(status, grpc.StatusCode.INTERNAL), str(exc)
    _log.error("internal_error in a gRPC call", exc_info=exc)
    return grpc.StatusCode.INTERNAL, "internal error; the worker's log has the traceback"


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers the protocol's calls from a service."""

    # ruff: noqa: N802 - the names are the protocol's.

    def __init__(self, service: Service) -> None:
        self._service = service

    @_guard
    async def ServerLive(self, _request: Any) -> Any:
        """Say that the server is there."""
        return service_pb2.ServerLiveResponse(live=True)

    @_guard
    async def ServerReady(self, _request: Any) -> Any:
        """Say whether requests are taken."""
        return service_pb2.ServerReadyResponse(ready=self._service.is_ready())

    @_guard
    async def ModelReady(self, request: Any) -> Any:
        """Say whether a model would take a request."""
        is_ready = self._service.is_model_ready(request.name, request.version or None)
        return service_pb2.ModelReadyResponse(ready=is_ready)

    @_guard
    async def ServerMetadata(self, _request: Any) -> Any:
        """Describe the server."""
        return service_pb2.ServerMetadataResponse(
            name=SERVER_NAME, version=read_version(), extensions=EXTENSIONS
        )

    @_guard
    async def ModelMetadata(self, request: Any) -> Any:
        """Describe a model's tensors."""
        return build_metadata(await self._service.get_info(request.name, request.version or None))

    @_guard
    async def ModelConfig(self, request: Any) -> Any:
        """Describe how a model is served."""
        return build_config(await self._service.get_info(request.name, request.version or None))

    @_guard
    async def ModelStatistics(self, request: Any) -> Any:
        """Return what the models have done."""
        name, version = request.name or None, request.version or None
        return build_statistics(await asyncio.to_thread(self._service.get_stats, name, version))

    @_guard
    async def RepositoryIndex(self, request: Any) -> Any:
        """List the models."""
        found = await asyncio.to_thread(self._service.list_index, is_ready=request.ready)
        return build_index(found)

    @_guard
    async def RepositoryModelLoad(self, request: Any) -> Any:
        """Take requests for a model, and load it."""
        await self._service.load(request.model_name)
        return service_pb2.RepositoryModelLoadResponse()

    @_guard
    async def RepositoryModelUnload(self, request: Any) -> Any:
        """Take no more requests for a model."""
        await self._service.unload(request.model_name)
        return service_pb2.RepositoryModelUnloadResponse()

    @_guard
    async def ModelInfer(self, request: Any) -> Any:
        """Run a model."""
        return await self._infer(request)

    async def ModelStreamInfer(self, requests: Any, _context: Any) -> AsyncIterator[Any]:
        """Run a model for each request of a stream, in order; an error ends its request alone."""
        async for request in requests:
            try:
                answer = await self._infer(request)
            except Exception as exc:  # noqa: BLE001 - the gRPC boundary of style.md
                yield service_pb2.ModelStreamInferResponse(error_message=_word(exc)[1])
            else:
                yield service_pb2.ModelStreamInferResponse(infer_response=answer)

    async def _infer(self, message: Any) -> Any:
        try:
            request, classes = read_request(message), read_classes(message)
        except WorkerError:
            # Where the model is unknown, that comes first.
            name, version = message.model_name, message.model_version or None
            await asyncio.to_thread(self._service.get_stats, name, version)
            raise
        response = self._service.infer_inline(request)
        if response is None:
            response = await self._service.infer(request)
        info = None
        if classes:
            info = await self._service.get_info(request.model, response.version)
        return build_answer(message, response, classes, info)


def _refuse(name: str) -> Call:
    async def answer(_self: Any, _request: Any, context: Any = None) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not supported")

    return answer


for _name in _NOT_OFFERED:
    setattr(Servicer, _name, _refuse(_name))


class _TokenCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets nobody in without the token, but the question whether the server is alive."""

    def __init__(self, token: str) -> None:
        self._wanted = f"Bearer {token}".encode()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Return the handler of a call, or one that refuses it."""
        given = dict(details.invocation_metadata).get("authorization", "")
        text = given if isinstance(given, bytes) else given.encode()
        if details.method == _LIVE or hmac.compare_digest(text, self._wanted):
            return await continuation(details)

        async def refuse(_request: Any, context: Any) -> Any:
            message = "a token is needed: metadata authorization: Bearer …"
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

        return grpc.unary_unary_rpc_method_handler(refuse)


class GrpcServer:
    """Serves a service's models over gRPC on `http.grpc_port`.

    Args:
        settings: address, bounds and who may ask, those of HTTP.
        service: answers.
    """

    def __init__(self, settings: HttpSettings, service: Service) -> None:
        self._settings = settings
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self.port: int | None = None
        """The TCP port that it is bound to."""

    def start(self) -> None:
        """Bind, and serve in a thread.

        Raises:
            HttpUnavailableError: the address cannot be bound, a certificate or token not be read.
        """
        token = read_token(self._settings)
        self._thread = threading.Thread(
            target=self._serve, args=(token,), name="edgeward-grpc", daemon=True
        )
        self._thread.start()
        if not self._started.wait(_START_S) or self._failure is not None:
            why = self._failure or "no answer from its thread"
            msg = f"the gRPC server did not start: {why}; choose another http.grpc_port"
            raise HttpUnavailableError(msg) from self._failure
        _log.info("gRPC API on %s:%s", self._settings.host, self.port)

    def stop(self) -> None:
        """Finish the requests under way, and end; harmless when repeated."""
        loop, ending, thread = self._loop, self._ending, self._thread
        if loop is None or ending is None or thread is None or not thread.is_alive():
            return
        loop.call_soon_threadsafe(ending.set)
        thread.join(self._settings.stop_timeout_s + _START_S)

    def _serve(self, token: str | None) -> None:
        try:
            asyncio.run(self._run(token))
        except Exception as exc:  # noqa: BLE001 - the thread's boundary: nobody above would see it
            if self._started.is_set():
                _log.exception("the gRPC server ended")
            self._failure = exc
            self._started.set()

    async def _run(self, token: str | None) -> None:
        settings = self._settings
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server(
            interceptors=[] if token is None else [_TokenCheck(token)],
            maximum_concurrent_rpcs=settings.requests,
            compression=None,
            options=[
                ("grpc.max_receive_message_length", settings.body_bytes),
                ("grpc.max_send_message_length", -1),
                # Of two that start at once the second one is told.
                ("grpc.so_reuseport", 0),
            ],
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(self._service), server)
        self.port = self._bind(server)
        await server.start()
        self._started.set()
        await self._ending.wait()
        await server.stop(settings.stop_timeout_s)

    def _bind(self, server: Any) -> int:
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.grpc_port}"
        if settings.cert_file is None or settings.key_file is None:
            return int(server.add_insecure_port(address))
        pair = (settings.key_file.read_bytes(), settings.cert_file.read_bytes())
        return int(server.add_secure_port(address, grpc.ssl_server_credentials([pair])))
