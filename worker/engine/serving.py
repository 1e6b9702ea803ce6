"""Answering requests at once: which version, is it loaded, and by which way it runs.

Owns the way from a model's name to a loaded version: the repository is the truth, looked at
again at most every `WATCH_S`, so that `edgeward models add` on a running box is enough. Owns also
who has been unloaded, and what did not load and why. Batching is the batcher's, loading the
engine's, the wire format the front end's.

A request takes one of three ways: a tiny model runs where it is asked for (`infer_inline`), as a
thread would cost more than the run; another goes to its batcher; and one whose model is not
loaded waits for that first, together with all others that want it.

Invariants: the event loop never waits for a load or a run; under steady requests a model that
changes its active version answers from the old one until the new one is loaded, and never fails a
request for it; queue jobs and requests share one copy of each version, and its instances.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any, Protocol
from weakref import ref

from agent.errors import AgentError, VersionNotFoundError
from agent.repository import ModelRepository, ModelVersion
from agent.traffic import Traffic
from platforms.artifact import TensorSpec
from platforms.errors import PlatformError, TensorError
from platforms.runtimes.base import Array
from worker.engine.batcher import Outputs
from worker.engine.configured import describe, read_version_choice
from worker.engine.costs import ROWS_MAX
from worker.engine.engine import Engine, ServedModel
from worker.engine.modelconfig.serving import VersionChoice
from worker.engine.routing import TrafficRouter
from worker.engine.service import (
    INLINE_S,
    IndexEntry,
    ModelInfo,
    ModelStats,
    ModelStatus,
    TensorRequest,
    TensorResponse,
)
from worker.engine.sessions import LoadedModel, ModelKey
from worker.engine.shadow import Shadow
from worker.engine.stats import FailReason, RunTimes, StatsCounter
from worker.errors import (
    ModelConfigError,
    ModelUnavailableError,
    RequestRejectedError,
    RequestTimeoutError,
    WorkerError,
)
from worker.processing.classify import TopK

WATCH_S = 0.5
"""How long the repository's last word is taken for its present one."""

HANDOFF_MS = 0.1
"""What giving a run to a thread costs: a model whose single row takes less runs inline.
Source: engine.md."""

# With requests this close together the old version answers until the new one is loaded; after a
# longer pause the switch may be long past, and the first request waits for the new one.
_STEADY_S = 5.0
# A version that does not load is tried again after so long, and not for each request.
_RETRY_S = 5.0
_LOADS_AT_A_TIME = 2
# Requests between their two looks; those that nobody awaited are forgotten.
_CHOSEN_MAX = 4096

_PLATFORMS = {"ort": "onnxruntime_onnx", "torchscript": "pytorch_libtorch"}
"""Triton's word for a runtime of ours, where it is not the same."""

_FAILURES = (PlatformError, WorkerError, AgentError)
# Another version would do no better.
_NOBODYS_FAULTS = (TensorError, RequestRejectedError, RequestTimeoutError)

_log = logging.getLogger(__name__)


class ResponseCacheLike(Protocol):
    """A cache of answers; thread-safe, and quick enough for an event loop."""

    def find(self, key: bytes) -> Mapping[str, Array] | None:
        """Return the outputs kept under `key`, if they are there."""
        ...

    def insert(self, key: bytes, owner: str, outputs: Mapping[str, Array]) -> bool:
        """Keep outputs, or not; say which."""
        ...

    def drop(self, owner: str) -> int:
        """Remove all that `owner`, a version's folder, has in it; say how many."""
        ...


MakeKey = Callable[[str, str, Iterable[str], Mapping[str, Array]], bytes]
"""From the model, its artifact's sha256, the wanted outputs and the inputs to a cache's key."""


@dataclass(slots=True)
class _Route:
    """What a name and a version mean just now."""

    key: ModelKey
    checked: float
    """When the repository said so last, monotonic."""
    served: ServedModel | None = None
    model: "ref[LoadedModel] | None" = None
    """What was found loaded; weak, as this must not keep an evicted model in memory."""
    generation: int = -1
    """Of the session cache when that was found."""


@dataclass(frozen=True, slots=True)
class _Way:
    """Which version answers a request; None stands for the active one."""

    version: str | None
    fallback: str | None


@dataclass(slots=True)
class _Found:
    """A loaded version, for the length of a request."""

    served: ServedModel
    model: LoadedModel

    @property
    def stats(self) -> StatsCounter:
        return self.served.batcher.stats


class EngineService:
    """Serves the models of a repository; implements `worker.engine.service.Service`.

    Args:
        engine: runs them, and the queue's jobs.
        repository: of which models there are, and which version is active.
        cache: of answers, of models whose options ask for it; None for none.
        make_key: of the cache.
        router: of who answers beside the active version; None: nobody does.
        shadow: sees copies for a candidate; None: none are made.
    """

    def __init__(
        self,
        engine: Engine,
        repository: ModelRepository,
        *,
        cache: ResponseCacheLike | None = None,
        make_key: MakeKey | None = None,
        router: TrafficRouter | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        self._engine = engine
        self._repository = repository
        self._cache = cache
        self._make_key = make_key
        self._router = router
        self._shadow = shadow
        self._routes: dict[tuple[str, str | None], _Route] = {}
        self._inline_rows: dict[ModelKey, int] = {}
        self._loads: dict[ModelKey, Future[LoadedModel]] = {}
        self._failures: dict[ModelKey, tuple[float, str]] = {}
        self._choices: dict[ModelKey, VersionChoice] = {}
        self._unloaded: set[str] = set()
        self._chosen: dict[int, _Way] = {}
        """By the request's id, from `infer_inline` to `infer`."""
        self._lock = Lock()
        self._loader = ThreadPoolExecutor(_LOADS_AT_A_TIME, thread_name_prefix="edgeward-load")
        self._is_closed = False

    def close(self) -> None:
        """Take no more requests; those that run finish."""
        self._is_closed = True
        self._loader.shutdown(wait=False, cancel_futures=True)

    # --- readiness ------------------------------------------------------------------------

    def is_ready(self) -> bool:
        """Say whether requests are taken."""
        return not self._is_closed

    def is_model_ready(self, model: str, version: str | None = None) -> bool:
        """Say whether a model version would take a request; False for an unknown one.

        One that is not loaded yet would: it loads when it is asked for.
        """
        try:
            key = self._resolve(model, version)
        except AgentError:
            return False
        if model in self._unloaded or self._is_closed:
            return False
        route = self._routes.get((model, version))
        # An old version may answer in place of the one that does not load.
        is_answered = route is not None and self._engine.cache.find(route.key) is not None
        return is_answered or self._find_failure(key) is None

    # --- inference ------------------------------------------------------------------------

    def infer_inline(self, request: TensorRequest) -> TensorResponse | None:
        """Answer within `INLINE_S` on the caller's thread, or return None: then call `infer`.

        Raises:
            As `infer`.
        """
        traffic = self._find_traffic(request)
        if traffic is None:
            return self._infer_inline(request, request.version)
        way = self._route(traffic, request)
        try:
            response = self._infer_inline(request, way.version)
        except _FAILURES as exc:
            if way.version == way.fallback or isinstance(exc, TensorError):
                raise
            return self._infer_inline(request, way.fallback)
        if response is not None:
            self._show_shadow(traffic, request, response)
        else:
            # `infer` follows, and must not choose again: that would be another version's turn.
            self._chosen[id(request)] = way
            if len(self._chosen) > _CHOSEN_MAX:
                self._chosen.clear()
        return response

    def _infer_inline(self, request: TensorRequest, version: str | None) -> TensorResponse | None:
        found = self._find(request.model, version)
        if found is None or self._is_cached(found):
            return None
        rows, batcher = _guess_rows(request.inputs), found.served.batcher
        limit = self._inline_rows.get(found.served.key, 0)
        if not 0 < rows <= limit or not batcher.try_acquire(is_idle=True):
            return None
        began = time.perf_counter_ns()
        thread = get_ident()
        batcher.running[thread] = time.monotonic()
        try:
            if request.outputs or len(request.inputs) > 1 or batcher.options.request_rows_max:
                _verify(found, request)
            outputs = found.model.session.run(request.inputs, check_finite=False)
        except (PlatformError, WorkerError) as exc:
            self._count_failure(found, exc, began)
            raise
        finally:
            batcher.running.pop(thread, None)
            batcher.release()
        spent_ns = time.perf_counter_ns() - began
        rows = rows if found.model.is_batchable else 1
        batcher.stats.add_run(rows, 1, RunTimes(0, spent_ns, 0, rows), total_ns=spent_ns)
        return _respond(found, request, outputs)

    async def infer(self, request: TensorRequest) -> TensorResponse:
        """Answer a request, batched with others where that pays.

        Cancelling the awaiting task takes the request out of the queue.

        Raises:
            AgentError: there is no such model or version.
            ModelUnavailableError: it has been unloaded, or does not load.
            TensorError: names, datatypes or shapes are not the model's.
            RequestRejectedError: too many wait for this model.
            RequestTimeoutError: it waited too long.
            PlatformError, WorkerError: the run failed.
        """
        traffic = self._find_traffic(request)
        if traffic is None:
            return await self._infer(request, request.version)
        way = self._chosen.pop(id(request), None) or self._route(traffic, request)
        try:
            response = await self._infer(request, way.version)
        except _FAILURES as exc:
            if way.version == way.fallback or isinstance(exc, _NOBODYS_FAULTS):
                raise
            # Whoever asked is no test subject: a version that works answers instead.
            return await self._infer(request, way.fallback)
        self._show_shadow(traffic, request, response)
        return response

    def _find_traffic(self, request: TensorRequest) -> Traffic | None:
        if self._router is None or request.version is not None:
            return None
        return self._router.find(request.model)

    def _route(self, traffic: Traffic, request: TensorRequest) -> _Way:
        """Return the version that answers, and the one that does where that fails."""
        router = self._router
        version = router.choose(traffic, request.model, request.key) if router else None
        if version is not None:
            # Nobody waits for a candidate to load: the active version is there.
            return _Way(version if self._is_at_hand(request.model, version) else None, None)
        return _Way(None, None if traffic.fallback is None else str(traffic.fallback))

    def _is_at_hand(self, model: str, version: str) -> bool:
        """Say whether a version is loaded; begins to load it where it is not."""
        if self._find(model, version) is not None:
            return True
        try:
            key = self._resolve(model, version)
        except AgentError as exc:
            _log.warning("the traffic of %s names version %s: %s", model, version, exc)
            return False
        self._routes[model, version] = _Route(key, time.monotonic())
        if self._find_failure(key) is None and self._engine.cache.find(key) is None:
            self._start_load(key)
        return False

    def _show_shadow(
        self, traffic: Traffic, request: TensorRequest, response: TensorResponse
    ) -> None:
        if self._shadow is not None and traffic.shadow is not None:
            self._shadow.offer(traffic, request.model, request.inputs, response.outputs)

    async def _infer(self, request: TensorRequest, version: str | None) -> TensorResponse:
        found = self._find(request.model, version)
        if found is None:
            found = await self._open(request.model, version)
        began = time.perf_counter_ns()
        try:
            rows = _verify(found, request)
        except TensorError as exc:
            self._count_failure(found, exc, began)
            raise
        if self._is_cached(found):
            return await self._infer_cached(found, request, rows, began)
        return _respond(found, request, await self._run(found, request, rows))

    async def _run(self, found: _Found, request: TensorRequest, rows: int) -> Outputs:
        return await found.served.batcher.infer(
            found.model.session,
            request.inputs,
            rows,
            priority=request.priority,
            timeout_s=request.timeout_s,
        )

    def _is_cached(self, found: _Found) -> bool:
        return self._cache is not None and found.served.batcher.options.is_cached

    async def _infer_cached(
        self, found: _Found, request: TensorRequest, rows: int, began: int
    ) -> TensorResponse:
        cache, make_key = self._cache, self._make_key
        if cache is None or make_key is None:
            return _respond(found, request, await self._run(found, request, rows))
        sha256 = found.model.artifact.sha256
        key = make_key(request.model, sha256, request.outputs, request.inputs)
        kept = cache.find(key)
        looked_ns = time.perf_counter_ns() - began
        if kept is not None:
            found.stats.add_cache_hit(time.perf_counter_ns() - began, looked_ns)
            return _respond(found, request, kept, is_cached=True)
        outputs = await self._run(found, request, rows)
        inserting = time.perf_counter_ns()
        response = _respond(found, request, outputs)
        cache.insert(key, str(found.served.key.folder), response.outputs)
        found.stats.add_cache_miss(looked_ns + time.perf_counter_ns() - inserting)
        return response

    def _count_failure(self, found: _Found, exc: Exception, began: int) -> None:
        reason = FailReason.OTHER if isinstance(exc, TensorError) else FailReason.BACKEND
        found.stats.add_failure(reason, time.perf_counter_ns() - began)

    # --- which version ----------------------------------------------------------------------

    def _find(self, name: str, version: str | None) -> _Found | None:
        """Return the version if it is known and loaded; a few microseconds, no wait.

        Raises:
            ModelUnavailableError: it has been unloaded.
        """
        if name in self._unloaded or self._is_closed:
            msg = f"model {name!r} has been unloaded: load it to use it again"
            raise ModelUnavailableError("shutting down" if self._is_closed else msg)
        route = self._routes.get((name, version))
        if route is None:
            return None
        if time.monotonic() - route.checked > WATCH_S:
            route = self._check(name, version, route)
            if route is None:
                return None
        cache = self._engine.cache
        if route.generation == cache.generation and route.model and route.served:
            known = route.model()
            if known is not None:
                return _Found(route.served, known)
        generation = cache.generation
        model = cache.find(route.key)
        if model is None:
            return None
        route.served = self._engine.get_served(route.key, model)
        route.model, route.generation = ref(model), generation
        return _Found(route.served, model)

    def _check(self, name: str, version: str | None, route: _Route) -> _Route | None:
        """Look again at what a name means: two or three looks at the disk."""
        now = time.monotonic()
        is_steady, route.checked = now - route.checked < _STEADY_S, now
        # The session cache is told now and then that the model is in use.
        route.generation = -1
        key = self._find_key(name, version, route)
        if key == route.key:
            return route
        if version is None and key is not None and is_steady and self._must_stay(route.key, key):
            return route
        self._routes.pop((name, version), None)
        self._forget(route.key)
        return None

    def _find_key(self, name: str, version: str | None, route: _Route) -> ModelKey | None:
        """Return what a name that has meant something means now; None: nothing any more."""
        try:
            folder = route.key.folder if version else self._repository.get_folder(name)
        except AgentError:
            return None
        key = ModelKey.from_folder(folder)
        return key if key.stamp else None

    def _must_stay(self, old: ModelKey, new: ModelKey) -> bool:
        """Say whether the old version goes on answering because the new one is not loaded yet."""
        find = self._engine.cache.find
        if find(new) is not None or find(old) is None:
            return False
        if self._find_failure(new) is None:
            self._start_load(new)
        return True

    def _forget(self, key: ModelKey) -> None:
        """Free a version that is no longer the active one; what runs on it finishes."""
        is_wanted = any(route.key == key for route in tuple(self._routes.values()))
        traffic = self._router.find(key.name) if self._router is not None else None
        if traffic is not None and key.version in {*map(str, traffic.keep)}:
            return
        if not is_wanted:
            self._free(key)
            self._inline_rows.pop(key, None)

    def _free(self, key: ModelKey) -> None:
        self._engine.cache.unload(key)
        if self._cache is not None:
            self._cache.drop(str(key.folder))

    def _resolve(self, name: str, version: str | None) -> ModelKey:
        """Ask the repository; blocks for some looks at the disk.

        Raises:
            AgentError: there is no such model or version.
        """
        if version is None:
            return ModelKey.from_folder(self._repository.get_folder(name))
        found = self._repository.get_version(name, version)
        if self._is_in_traffic(name, found.number):
            return ModelKey.from_folder(found.folder)
        if found.number not in self._choose_versions(self._repository.list_versions(name)):
            msg = f"model {name!r}: version {version} is not among those its version_policy serves"
            raise VersionNotFoundError(msg)
        return ModelKey.from_folder(found.folder)

    def _is_in_traffic(self, name: str, number: int) -> bool:
        """Say whether a version takes part in its model's traffic, whatever the policy serves."""
        traffic = self._router.find(name) if self._router is not None else None
        return traffic is not None and number in (*traffic.shares, traffic.fallback)

    def _choose_versions(self, versions: Sequence[ModelVersion]) -> set[int]:
        """Return the numbers that may be asked for: the active one, and what its policy says."""
        active = next((one for one in versions if one.is_active), None)
        choice = VersionChoice(None)
        if active is not None:
            key = ModelKey.from_folder(active.folder)
            choice = self._choices.get(key) or self._read_choice(key)
        found = {active.number} if active is not None else set()
        return found.union(choice.choose(one.number for one in versions))

    def _read_choice(self, key: ModelKey) -> VersionChoice:
        try:
            choice = read_version_choice(key.folder)
        except (AgentError, ModelConfigError) as exc:
            # It will not load either, and its other versions are not to suffer for that.
            _log.warning("%s: its version_policy cannot be read: %s", key.name, exc)
            choice = VersionChoice(None)
        self._choices[key] = choice
        return choice

    # --- loading --------------------------------------------------------------------------

    async def _open(self, name: str, version: str | None) -> _Found:
        """Resolve and load a version.

        Raises:
            AgentError: there is no such model or version.
            ModelUnavailableError: it does not load.
        """
        key = await asyncio.to_thread(self._resolve, name, version)
        why = self._find_failure(key)
        if why is not None:
            raise ModelUnavailableError(why)
        model = self._engine.cache.find(key)
        if model is None:
            # Shielded: others wait for the same load, and may go on doing so.
            model = await asyncio.shield(asyncio.wrap_future(self._start_load(key)))
        self._routes[name, version] = _Route(key, time.monotonic())
        served = self._engine.get_served(key, model)
        self._inline_rows[key] = _find_inline_rows(served, model)
        return _Found(served, model)

    def _start_load(self, key: ModelKey) -> "Future[LoadedModel]":
        """Load a version in the background, once however many ask."""
        with self._lock:
            future = self._loads.get(key)
            if future is None:
                future = self._loads[key] = self._loader.submit(self._load, key)
        return future

    def _load(self, key: ModelKey) -> LoadedModel:
        try:
            model = self._engine.load_key(key)
        except (AgentError, PlatformError, WorkerError) as exc:
            why = f"{key.name} version {key.version} does not load: {exc}"
            _log.warning("%s", why)
            self._failures[key] = (time.monotonic(), why)
            self._engine.get_stats(key).add_failure(FailReason.BACKEND)
            raise ModelUnavailableError(why) from exc
        finally:
            with self._lock:
                del self._loads[key]
        self._failures.pop(key, None)
        self._inline_rows[key] = _find_inline_rows(self._engine.get_served(key, model), model)
        if key.name in self._unloaded:
            self._engine.cache.unload(key)
        route = self._routes.get((key.name, None))
        if route is not None and route.key != key:
            # The next request looks again, and finds this one loaded.
            route.checked = 0.0
        return model

    def _find_failure(self, key: ModelKey) -> str | None:
        """Return why a version did not load a moment ago."""
        failed_at, why = self._failures.get(key, (0.0, None))
        return why if time.monotonic() - failed_at < _RETRY_S else None

    async def load(self, model: str) -> None:
        """Take requests for a model (again), and load its active version now.

        Raises:
            AgentError: there is no such model.
            ModelUnavailableError: it does not load.
        """
        key = await asyncio.to_thread(self._resolve, model, None)
        self._failures.pop(key, None)
        self._unloaded.discard(model)
        await self._open(model, None)

    async def unload(self, model: str) -> None:
        """Take no more requests for a model and free its memory; unknown models are no error."""
        if model not in await asyncio.to_thread(self._repository.list_models):
            return
        self._unloaded.add(model)
        for route in [route for route in tuple(self._routes) if route[0] == model]:
            self._routes.pop(route, None)
        for served in self._engine.list_served():
            if served.key.name == model:
                self._free(served.key)

    # --- descriptions ---------------------------------------------------------------------

    async def get_info(self, model: str, version: str | None = None) -> ModelInfo:
        """Describe a model version; loads it where it is not loaded.

        Raises:
            AgentError: there is no such model or version.
            ModelUnavailableError: it has been unloaded, or does not load.
        """
        found = self._find(model, version) or await self._open(model, version)
        versions = await asyncio.to_thread(self._list_taken, model)
        loaded = found.model
        config = build_config(model, found.served, loaded)
        return ModelInfo(
            name=model,
            version=found.served.key.version,
            versions=versions,
            platform=_PLATFORMS.get(loaded.runtime, loaded.runtime),
            inputs=loaded.session.inputs,
            outputs=loaded.session.outputs,
            max_batch_size=int(config["max_batch_size"]),
            config=config,
            labels=_find_labels(loaded),
        )

    def _list_taken(self, name: str) -> tuple[str, ...]:
        taken = self._choose_versions(self._repository.list_versions(name))
        return tuple(str(number) for number in sorted(taken))

    def list_index(self, *, is_ready: bool = False) -> list[IndexEntry]:
        """Return every model version, or those that take requests; reads the manifests."""
        entries = []
        for name in self._repository.list_models():
            try:
                versions = self._repository.list_versions(name)
                taken = self._choose_versions(versions)
            except AgentError:
                # Removed since it was listed.
                continue
            for version in versions:
                if version.number not in taken:
                    continue
                entry = self._describe(name, ModelKey.from_folder(version.folder))
                if not is_ready or entry.status is ModelStatus.READY:
                    entries.append(entry)
        return entries

    def _describe(self, name: str, key: ModelKey) -> IndexEntry:
        if name in self._unloaded:
            return IndexEntry(name, key.version, ModelStatus.UNAVAILABLE, "unloaded")
        _, why = self._failures.get(key, (0.0, None))
        if why is not None:
            return IndexEntry(name, key.version, ModelStatus.UNAVAILABLE, why)
        if key in self._loads:
            return IndexEntry(name, key.version, ModelStatus.LOADING)
        return IndexEntry(name, key.version, ModelStatus.READY)

    def get_stats(self, model: str | None = None, version: str | None = None) -> list[ModelStats]:
        """Return what the models have done; all zero for a version that was never asked for.

        Raises:
            AgentError: there is no such model or version.
        """
        pending: defaultdict[StatsCounter, int] = defaultdict(int)
        for served in self._engine.list_served():
            pending[served.batcher.stats] += served.batcher.pending
        wanted = self._list_names(model, version)
        counters = {(one.name, one.version): one for one in self._engine.list_stats()}
        if model is None:
            wanted = sorted(counters)
        found = [counters.get(name) or StatsCounter(*name) for name in wanted]
        return [one.read(pending.get(one, 0)) for one in found]

    def _list_names(self, model: str | None, version: str | None) -> list[tuple[str, str]]:
        if model is None:
            return []
        if version is not None:
            return [(model, str(self._repository.get_version(model, version).number))]
        return [(model, str(one.number)) for one in self._repository.list_versions(model)]


# --- requests -----------------------------------------------------------------------------


def _guess_rows(inputs: Mapping[str, Array]) -> int:
    """Return the rows of a request that may yet turn out to fit no model; 0 where it has none."""
    for array in inputs.values():
        return array.shape[0] if array.ndim else 1
    return 0


def _verify(found: _Found, request: TensorRequest) -> int:
    """Check a request against its model, and return its rows.

    NaN and infinity pass: the protocol carries them, and Triton hands them on.

    Raises:
        TensorError: they do not fit.
    """
    session = found.model.session
    session.verify(request.inputs, check_finite=False)
    if request.outputs:
        known = {spec.name for spec in session.outputs}
        unknown = [name for name in request.outputs if name not in known]
        if unknown:
            msg = f"the model has no output {unknown[0]!r}; it has {', '.join(sorted(known))}"
            raise TensorError(msg)
    if not found.model.is_batchable:
        return 1
    lengths = {array.shape[0] for array in request.inputs.values()}
    if len(lengths) > 1:
        msg = f"the inputs have batches of {', '.join(map(str, sorted(lengths)))} rows: not equal"
        raise TensorError(msg)
    rows, limit = int(lengths.pop()), found.served.batcher.options.request_rows_max
    if limit is not None and rows > limit:
        msg = f"a request may have {limit} rows, not {rows}"
        raise TensorError(msg)
    return rows


def _respond(
    found: _Found,
    request: TensorRequest,
    outputs: Mapping[str, Array],
    *,
    is_cached: bool = False,
) -> TensorResponse:
    if request.outputs:
        outputs = {name: array for name, array in outputs.items() if name in request.outputs}
    return TensorResponse(request.model, found.served.key.version, outputs, is_cached)


def _find_inline_rows(served: ServedModel, model: LoadedModel) -> int:
    """Return how many rows may run on an event loop; 0 where the cost is not known to be small."""
    costs = served.costs
    is_fixed = all(-1 not in spec.shape[1:] for spec in model.session.inputs)
    if costs is None or not is_fixed or costs.points[0].latency_ms >= HANDOFF_MS:
        return 0
    if not model.is_batchable:
        # Its first axis is no batch, but may well be free.
        firsts = [spec.shape[0] for spec in model.session.inputs if spec.shape]
        return max(firsts, default=1) if -1 not in firsts else 0
    limit_ms = INLINE_S * 1000
    return max(point.rows for point in costs.points if point.latency_ms <= limit_ms)


# --- descriptions -------------------------------------------------------------------------


def _max_batch_size(served: ServedModel) -> int:
    options = served.batcher.options
    return (options.request_rows_max or ROWS_MAX) if options.is_batchable else 0


def _find_labels(model: LoadedModel) -> dict[str, tuple[str, ...]]:
    labels: dict[str, tuple[str, ...]] = {}
    for step in model.postprocess:
        if isinstance(step, TopK):
            labels |= step.labels
    return labels


def build_config(name: str, served: ServedModel, model: LoadedModel) -> dict[str, Any]:
    """Return a model's configuration as JSON, Triton's and our own part.

    The one place that says how a model is configured.
    """
    config = describe(name, model) or _build_small_config(name, served, model)
    return {
        **config,
        "edgeward": {"batching": _build_batching(served), "runtime": _build_runtime(model)},
    }


def _build_small_config(name: str, served: ServedModel, model: LoadedModel) -> dict[str, Any]:
    """Return what is known without protobuf."""
    options = served.batcher.options
    return {
        "name": name,
        "platform": _PLATFORMS.get(model.runtime, model.runtime),
        "version_policy": {"all": {}},
        "max_batch_size": _max_batch_size(served),
        "input": _build_tensors(model.session.inputs, model),
        "output": _build_tensors(model.session.outputs, model),
        "instance_group": [{"name": f"{name}_0", "count": options.instances, "kind": "KIND_CPU"}],
    }


def _build_tensors(specs: Iterable[TensorSpec], model: LoadedModel) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "data_type": "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}",
            "dims": list(spec.shape[1:] if model.is_batchable else spec.shape),
        }
        for spec in specs
    ]


def _build_runtime(model: LoadedModel) -> dict[str, Any]:
    session = model.session
    return {
        "name": model.runtime,
        "provider": model.provider,
        "assignment": dict(session.assignment),
        "findings": list(session.findings),
    }


def _build_batching(served: ServedModel) -> dict[str, Any]:
    rows = served.batcher.max_rows
    if served.costs is None:
        return {"points": [], "max_rows": rows, "reason": "not measured"}
    return {**served.costs.to_json(), "max_rows": rows}
