"""Every route but inference and health: metadata, statistics, the repository, predict, metrics.

Owns how the engine's descriptions become the protocol's JSON, and the OpenAPI document of the
whole API. FastAPI, as none of these is asked for often.

Invariants: an error's body is `{"error": …}` for whatever reason, also FastAPI's own; a body is
read raw, as Triton's client sends no Content-Type.

Source: https://github.com/triton-inference-server/server/tree/main/docs/protocol
(`extension_model_repository.md`, `extension_statistics.md`, `extension_model_configuration.md`).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from agent.errors import AgentError
from platforms.artifact import TensorSpec
from platforms.errors import PlatformError
from worker.engine.service import (
    BatchStats,
    Duration,
    IndexEntry,
    ModelInfo,
    ModelStats,
    Service,
)
from worker.errors import ModelUnavailableError, WorkerError
from worker.processing.step import JobInput
from worker.rest.codec import parse_json
from worker.rest.errors import RequestFormatError, UnsupportedRequestError, find_status
from worker.rest.openapi import build_openapi
from worker.rest.predict import PredictionError, Predictor

SERVER_NAME = "edgeward"
EXTENSIONS = (
    "classification",
    "model_repository",
    "model_configuration",
    "schedule_policy",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NOT_OFFERED = ("systemsharedmemory", "cudasharedmemory", "trace", "logging")
_METHODS = ["GET", "POST"]


@dataclass(frozen=True)
class Extras:
    """What the management API has beside the service; each may be missing."""

    predictor: Predictor | None = None
    render_metrics: Callable[[], bytes] | None = None
    """Returns Prometheus' text; may block."""


def build_management(service: Service, extras: Extras | None = None) -> FastAPI:
    """Return the application of the management routes."""
    extras = extras or Extras()
    # The documents' own pages stand on /docs; redoc would be a second one of the same.
    # With its script and style on this box: there may be no Internet.
    app = FastAPIOffline(title="Edgeward", version=read_version(), redoc_url=None)
    app.openapi = lambda: build_openapi(read_version())  # type: ignore[method-assign]
    _add_descriptions(app, service)
    _add_repository(app, service)
    _add_refusals(app)
    if extras.predictor is not None:
        _add_predict(app, service, extras.predictor)
    if extras.render_metrics is not None:
        _add_metrics(app, extras.render_metrics)
    _add_errors(app)
    return app


def read_version() -> str:
    """Return Edgeward's version, `0` where it is not installed."""
    try:
        return metadata.version("edgeward")
    except metadata.PackageNotFoundError:
        return "0"


# --- errors ---------------------------------------------------------------------------------


def _fail(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def _add_errors(app: FastAPI) -> None:
    async def on_http(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return JSONResponse({"error": str(exc.detail)}, exc.status_code, exc.headers)

    async def on_bad_value(_: Request, exc: Exception) -> Response:
        return _fail(400, str(exc))

    async def on_own(_: Request, exc: Exception) -> Response:
        return _fail(exc.status if isinstance(exc, PredictionError) else find_status(exc), str(exc))

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_bad_value)
    for kind in (AgentError, PlatformError, WorkerError):
        app.add_exception_handler(kind, on_own)


def _add_refusals(app: FastAPI) -> None:
    async def refuse(request: Request) -> Response:
        return _fail(501, f"{request.url.path} is not supported")

    for name in _NOT_OFFERED:
        app.add_api_route(f"/v2/{name}{{rest:path}}", refuse, methods=_METHODS)
    app.add_api_route("/v2/models/{model}/trace{rest:path}", refuse, methods=_METHODS)


# --- descriptions ---------------------------------------------------------------------------


def _add_descriptions(app: FastAPI, service: Service) -> None:
    @app.get("/v2")
    @app.get("/v2/", include_in_schema=False)
    async def describe_server() -> Response:
        return _reply(
            {"name": SERVER_NAME, "version": read_version(), "extensions": list(EXTENSIONS)}
        )

    async def describe_model(model: str, version: str | None = None) -> Response:
        return _reply(build_metadata(await service.get_info(model, version)))

    async def describe_config(model: str, version: str | None = None) -> Response:
        return _reply(dict((await service.get_info(model, version)).config))

    async def describe_stats(model: str | None = None, version: str | None = None) -> Response:
        # Off the event loop: it reads folders.
        stats = await asyncio.to_thread(service.get_stats, model, version)
        return _reply({"model_stats": [build_stats(one) for one in stats]})

    # Before the model's own path, which would take `stats` for a model.
    app.get("/v2/models/stats")(describe_stats)
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.get(prefix)(describe_model)
        app.get(f"{prefix}/config")(describe_config)
        app.get(f"{prefix}/stats")(describe_stats)


def _reply(document: Any) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")


def build_metadata(info: ModelInfo) -> dict[str, Any]:
    """Return a model's metadata as the protocol has it."""
    return {
        "name": info.name,
        "versions": list(info.versions),
        "platform": info.platform,
        "inputs": [_build_tensor(spec) for spec in info.inputs],
        "outputs": [_build_tensor(spec) for spec in info.outputs],
    }


def _build_tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype.value, "shape": list(spec.shape)}


def build_stats(stats: ModelStats) -> dict[str, Any]:
    """Return a model's statistics as the protocol has them."""
    names = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    caches = ("cache_hit", "cache_miss")
    return {
        "name": stats.name,
        "version": stats.version,
        "last_inference": stats.last_inference_ms,
        "inference_count": stats.inference_count,
        "execution_count": stats.execution_count,
        "inference_stats": {
            name: _build_duration(getattr(stats, name)) for name in (*names, *caches)
        },
        "response_stats": {},
        "batch_stats": [_build_batch(batch) for batch in stats.batches],
        "memory_usage": [],
    }


def _build_batch(batch: BatchStats) -> dict[str, Any]:
    return {
        "batch_size": batch.batch_size,
        "compute_input": _build_duration(batch.compute_input),
        "compute_infer": _build_duration(batch.compute_infer),
        "compute_output": _build_duration(batch.compute_output),
    }


def _build_duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}


# --- the repository -------------------------------------------------------------------------


def _add_repository(app: FastAPI, service: Service) -> None:
    @app.post("/v2/repository/index")
    async def list_index(request: Request) -> Response:
        is_ready = (await _read_document(request)).get("ready", False)
        if not isinstance(is_ready, bool):
            msg = "ready must be true or false"
            raise RequestFormatError(msg)
        entries = await asyncio.to_thread(service.list_index, is_ready=is_ready)
        return _reply([_build_entry(entry) for entry in entries])

    @app.post("/v2/repository/models/{model}/load")
    async def load(model: str, request: Request) -> Response:
        parameters = await _read_parameters(request)
        config = [key for key in parameters if key == "config" or key.startswith("file:")]
        if config:
            msg = f"{config[0]}: a model is loaded as it lies in the repository"
            raise UnsupportedRequestError(msg)
        await service.load(model)
        return Response()

    @app.post("/v2/repository/models/{model}/unload")
    async def unload(model: str, request: Request) -> Response:
        await _read_parameters(request)
        await service.unload(model)
        return Response()


async def _read_document(request: Request) -> dict[str, Any]:
    content = await request.body()
    return parse_json(content) if content.strip() else {}


async def _read_parameters(request: Request) -> dict[str, Any]:
    parameters = (await _read_document(request)).get("parameters", {})
    if not isinstance(parameters, dict):
        msg = "parameters must be an object"
        raise RequestFormatError(msg)
    return parameters


def _build_entry(entry: IndexEntry) -> dict[str, Any]:
    known = {"name": entry.name, "version": entry.version, "state": entry.status.value}
    return {**known, "reason": entry.reason} if entry.reason else known


# --- predict and metrics --------------------------------------------------------------------


def _add_predict(app: FastAPI, service: Service, predictor: Predictor) -> None:
    async def predict(model: str, request: Request, version: str | None = None) -> Response:
        # Raises where there is no such model or version, before the body's own faults count.
        await asyncio.to_thread(service.get_stats, model, version)
        given, params = await _read_input(request)
        if not service.is_model_ready(model):
            msg = f"model {model!r} takes no requests: it has been unloaded, or does not load"
            raise ModelUnavailableError(msg)
        return _reply(await predictor.predict(model, version, given, params))

    for prefix in ("/v1/models/{model}", "/v1/models/{model}/versions/{version}"):
        app.post(f"{prefix}/predict")(predict)


async def _read_input(request: Request) -> tuple[JobInput, dict[str, Any]]:
    """Return what is to be predicted: JSON with `inputs`, or the bytes of a file.

    Raises:
        RequestFormatError: there is nothing, or the JSON is of another form.
    """
    content = await request.body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        if not content:
            msg = "the request has no body: send an image's bytes, or JSON with inputs"
            raise RequestFormatError(msg)
        return JobInput(data=content), _read_query(request)
    document = parse_json(content)
    inputs, params = document.get("inputs"), document.get("params", {})
    if not isinstance(inputs, list) or not isinstance(params, dict):
        msg = "the request needs a list of inputs; params, where given, must be an object"
        raise RequestFormatError(msg)
    return JobInput(tensors=inputs), params


def _read_query(request: Request) -> dict[str, Any]:
    return {
        key: int(value) if value.isascii() and value.isdigit() and len(value) < 10 else value
        for key, value in request.query_params.items()
    }


def _add_metrics(app: FastAPI, render: Callable[[], bytes]) -> None:
    @app.get("/metrics", include_in_schema=False)
    def read_metrics() -> Response:
        return Response(render(), media_type=METRICS_TYPE)
