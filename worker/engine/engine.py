"""Running requests: from a bundle of jobs of one model to one outcome each.

Owns what this process has of each model version (its batcher, its costs, its counters), the
grouping of a bundle's jobs, and the boundary at which every error becomes part of an outcome.
Knows nothing of Celery, HTTP or the ledger.

Invariants: as many outcomes as requests, in their order, whatever happens; a request
that fails, or is stopped, does so alone; a value is JSON-ready and holds neither NaN
nor infinity.
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, TypeVar

import numpy as np

from agent.errors import AgentError
from agent.manifest import read_manifest
from platforms.errors import PlatformError, TensorError
from platforms.runtimes.base import Array
from platforms.runtimes.registry import get_runtime
from platforms.spec import PlatformSpec
from platforms.threads import compute_sizes
from worker.engine.artifact_cache import ArtifactCache
from worker.engine.batcher import Batcher, BatchOptions, Outputs, run_stacked
from worker.engine.control import InferError, RunControl
from worker.engine.costs import (
    ROWS_MAX,
    CostCurve,
    CostPolicy,
    get_objective,
    identify_costs,
    load_curve,
    measure_costs,
)
from worker.engine.memory import MemoryBudget
from worker.engine.sessions import (
    LoadedModel,
    ModelKey,
    Prefer,
    SessionCache,
    import_runtime,
    load_model,
)
from worker.engine.stats import FailReason, RunTimes, StatsCounter
from worker.errors import NanOutputError, OutputError, StepError, WorkerError
from worker.processing.step import JobInput
from worker.processing.tensor import TensorOutput

INTERNAL_ERROR = "internal_error"
"""The code of whatever no layer declared; its traceback is in the worker's log only."""

# Of all models together; one that is idle needs none.
_BATCH_THREADS_MAX = 64

_log = logging.getLogger(__name__)

_ENCODE = TensorOutput()

_MODEL_FAULTS = frozenset({NanOutputError.code, OutputError.code})
"""A run that came back with what no client has asked for."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One job's part of a bundle."""

    job_id: str
    input: JobInput
    params: Mapping[str, Any] = field(default_factory=dict)
    """What the job asks of the postprocessing, such as `{"top_k": 3}`."""


@dataclass(slots=True)
class InferOutcome:
    """What became of one request: a value or an error."""

    job_id: str
    value: Any = None
    error: InferError | None = None
    pre_ms: float = 0.0
    infer_ms: float = 0.0
    """Of the whole run that the request was part of."""
    infer_share_ms: float = 0.0
    """Its part of that run, where all parts are equal."""
    post_ms: float = 0.0
    batch_rows: int = 0
    """Rows in that run, this request's own included; 0 where it never ran."""
    model: str = ""
    version: str = ""
    artifact: str = ""
    """File name of the artifact that ran."""

    @property
    def ok(self) -> bool:
        """Say whether there is a value."""
        return self.error is None


@dataclass(slots=True)
class _Pending:
    """A request on its way through one call of `Engine.infer`."""

    request: InferRequest
    outcome: InferOutcome
    inputs: dict[str, Array]
    rows: int
    """Length of axis 0, which is 1 for a model without a batch axis."""
    is_even: bool
    """All inputs have that many rows."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a process keeps of a model version, whether it is loaded just now or not."""

    key: ModelKey
    batcher: Batcher
    costs: CostCurve | None
    """None where it was not measured."""


def plan_options(instances: int, costs: CostCurve | None, *, is_batchable: bool) -> BatchOptions:
    """Return the engine's own choice for a model, before its configuration is asked. Pure."""
    return BatchOptions(
        instances=instances,
        max_rows=costs.chosen_rows if costs is not None else ROWS_MAX,
        is_batchable=is_batchable,
    )


Observe = Callable[[Mapping[str, Array], Mapping[str, Array]], None]
"""Sees inputs and outputs of one request that was answered; quick, raises nothing."""

Configure = Callable[[LoadedModel, BatchOptions], BatchOptions]
WarmUp = Callable[[LoadedModel], None]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of `Engine.infer` whose model is loaded."""

    model: LoadedModel
    batcher: Batcher
    control: RunControl
    priority: int
    observe: Observe | None


class Engine:
    """Runs model versions of this box; one per process, shared by its threads."""

    def __init__(
        self,
        spec: PlatformSpec,
        instances: int = 1,
        *,
        costs: CostPolicy | None = None,
        configure: Configure | None = None,
        warm_up: WarmUp | None = None,
        budget: MemoryBudget | None = None,
        pinned: Collection[str] = (),
        artifacts: ArtifactCache | None = None,
        prove: Callable[[], PlatformSpec] | None = None,
        prefer: Prefer | None = None,
    ) -> None:
        """Describe the box.

        Args:
            spec: what selection and the number of threads go by.
            instances: how many inferences of one model should be able to run at the same time;
                they share the cores.
            costs: how models are measured when they load; None: not at all.
            configure: given a model and what the engine would do with it, says what it should.
            warm_up: runs a model that has just been loaded; where that fails, so does the load.
            budget: memory for all models together; None: without bounds.
            pinned: models that are never evicted.
            artifacts: what runtimes prepared of models; None: nothing is kept.
            prove: returns the box with its runtimes proven, before the first model loads; None:
                those of `spec` are.
            prefer: says which artifact of a version was measured to be best; None: the
                publisher's order stands.
        """
        self._spec = spec
        self._threads, self._instances = compute_sizes(spec.cores, instances)
        self._costs = costs
        self._configure = configure
        self._warm_up = warm_up
        self._prove = prove
        self._prefer = prefer
        self._proving = Lock()
        self._artifacts = artifacts
        self.cache = SessionCache(budget, pinned, self._is_busy)
        self._served: dict[ModelKey, ServedModel] = {}
        self._stats: dict[tuple[str, str], StatsCounter] = {}
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(_BATCH_THREADS_MAX, thread_name_prefix="edgeward-infer")

    def load(self, folder: Path) -> LoadedModel:
        """Return the model version in `folder`, loading it on first use.

        Raises:
            AgentError, PlatformError, WorkerError: as `load_model`.
        """
        return self.load_key(ModelKey.from_folder(folder))

    def load_key(self, key: ModelKey) -> LoadedModel:
        """Return the model version of `key`, loading and measuring it on first use; blocks.

        Raises:
            AgentError, PlatformError, WorkerError: as `load_model`.
        """
        if self.cache.find(key) is None:
            # A library's own memory is no model's: the first one would be charged with it.
            import_runtime(key.folder, self._prove_spec(), self._prefer)
        return self.cache.load(key, lambda: self._load(key))

    def _prove_spec(self) -> PlatformSpec:
        with self._proving:
            if self._prove is not None:
                self._spec = self._prove()
                self._prove = None
        return self._spec

    def _is_busy(self, key: ModelKey) -> bool:
        served = self._served.get(key)
        return served is not None and bool(served.batcher.busy or served.batcher.pending)

    def _load(self, key: ModelKey) -> LoadedModel:
        model = load_model(
            key.folder, self._spec, self._threads, self._artifacts, self._instances, self._prefer
        )
        if self._warm_up is not None:
            self._warm_up(model)
        if key not in self._served:
            self._keep_served(key, model, self._measure(model))
        return model

    def _measure(self, model: LoadedModel) -> CostCurve | None:
        if self._costs is None:
            return None
        name = f"{model.name} {model.version}"
        objective = get_objective(read_manifest(model.folder).objective)
        policy = replace(self._costs, objective=objective)
        version = get_runtime(model.runtime).version()
        identity = replace(
            identify_costs(model.artifact, model.runtime, version, self._threads, self._spec),
            provider=model.provider,
            is_batchable=model.is_batchable,
        )

        def measure() -> CostCurve:
            return measure_costs(model.session, policy, is_batchable=model.is_batchable)

        try:
            costs = load_curve(policy, identity, measure)
        except PlatformError as exc:
            _log.info(
                "%s %s cannot be measured on made-up input: %s", model.name, model.version, exc
            )
            return None
        _log.info("%s: %s", name, costs.reason)
        return costs

    def _build_served(
        self, key: ModelKey, model: LoadedModel, costs: CostCurve | None
    ) -> ServedModel:
        name = (key.name, key.version)
        stats = self._stats.setdefault(name, StatsCounter(*name))
        options = plan_options(self._instances, costs, is_batchable=model.is_batchable)
        if self._configure is not None:
            options = self._configure(model, options)
        return ServedModel(key, Batcher(options, self._pool, stats), costs)

    def get_stats(self, key: ModelKey) -> StatsCounter:
        """Return the counters of a version, loaded or not."""
        name = (key.name, key.version)
        with self._lock:
            return self._stats.setdefault(name, StatsCounter(*name))

    def get_served(self, key: ModelKey, model: LoadedModel) -> ServedModel:
        """Return what there is of a version that is loaded; it outlives the loaded model."""
        return self._served.get(key) or self._keep_served(key, model, None)

    def _keep_served(
        self, key: ModelKey, model: LoadedModel, costs: CostCurve | None
    ) -> ServedModel:
        with self._lock:
            # Kept when the model is unloaded: requests may be in it, and costs do not change.
            served = self._served.get(key)
            if served is None:
                served = self._served[key] = self._build_served(key, model, costs)
            return served

    def list_served(self) -> list[ServedModel]:
        """Return every version that has been loaded since the process began."""
        with self._lock:
            return list(self._served.values())

    def list_stats(self) -> list[StatsCounter]:
        """Return the counters of every version that has been loaded since the process began."""
        with self._lock:
            return list(self._stats.values())

    def unload(self, folder: Path) -> bool:
        """Forget the version in `folder`; say whether it was loaded."""
        return self.cache.unload(ModelKey.from_folder(folder))

    def infer(
        self,
        folder: Path,
        requests: Sequence[InferRequest],
        control: RunControl | None = None,
        priority: int = 0,
        observe: Observe | None = None,
    ) -> list[InferOutcome]:
        """Run `requests` on the model version in `folder`; one outcome each, in order.

        Blocks while the model loads, while others run it, and while it runs. Thread-safe.
        Raises nothing: every error, a failing load included, is in the outcomes; so is why
        `control` stopped a job. What is at work at the end stays so in `control`.

        Args:
            folder: of the version; links are followed.
            requests: of any number.
            control: to see and stop them by.
            priority: of their runs, among all who want the model; 0 stands for the default.
            observe: sees every request that the model has answered.
        """
        control = control or RunControl()
        control.enter((request.job_id for request in requests), is_loading=True)
        outcomes = [InferOutcome(request.job_id) for request in requests]
        key = ModelKey.from_folder(folder)
        call = _attempt(str(folder), self._open, key, (control, priority, observe))
        if isinstance(call, InferError):
            for outcome in outcomes:
                outcome.error = call
            return outcomes
        pending = _prepare(call.model, requests, outcomes, control)
        for group in _group(call.model, pending):
            for batch in _cut(group, call.batcher.max_rows):
                _run_group(call, batch)
        return outcomes

    def _open(self, key: ModelKey, of: tuple[RunControl, int, Observe | None]) -> _Call:
        model = self.load_key(key)
        return _Call(model, self.get_served(key, model).batcher, *of)


def _prepare(
    model: LoadedModel,
    requests: Sequence[InferRequest],
    outcomes: Sequence[InferOutcome],
    control: RunControl,
) -> list[_Pending]:
    """Preprocess each request; those that fail have their error and go no further."""
    pending = []
    for request, outcome in zip(requests, outcomes, strict=True):
        outcome.model, outcome.version = model.name, model.version
        outcome.artifact = model.artifact.file
        outcome.error = control.find_stop(request.job_id)
        if outcome.error is not None:
            continue
        control.enter_alone(request.job_id)
        started = time.perf_counter()
        inputs = _attempt(request.job_id, _preprocess, model, request.input)
        outcome.pre_ms = 1000 * (time.perf_counter() - started)
        if isinstance(inputs, InferError):
            outcome.error = inputs
        else:
            lengths = {array.shape[:1] for array in inputs.values()}
            first = next(iter(inputs.values()))
            rows = first.shape[0] if first.ndim else 1
            pending.append(_Pending(request, outcome, inputs, rows, is_even=len(lengths) == 1))
    return pending


def _preprocess(model: LoadedModel, given: JobInput) -> dict[str, Array]:
    # A user's own step may return anything.
    inputs: Any = model.preprocess(given)
    if not isinstance(inputs, dict) or not inputs or not _are_arrays(inputs.values()):
        msg = "the preprocessing step did not return arrays by name: it has a defect"
        raise StepError(msg)
    return inputs


def _are_arrays(values: Iterable[object]) -> bool:
    return all(isinstance(value, np.ndarray) for value in values)


def _group(model: LoadedModel, pending: Sequence[_Pending]) -> list[list[_Pending]]:
    """Put together what may be stacked: equal shapes but for axis 0, equal row counts."""
    if not model.is_batchable:
        return [[item] for item in pending]
    groups: dict[Any, list[_Pending]] = defaultdict(list)
    for item in pending:
        arrays = item.inputs.items()
        signature = tuple((name, array.shape[1:], array.dtype) for name, array in arrays)
        # Inputs that disagree about the batch are the model's to refuse, alone.
        groups[signature if item.is_even else id(item)].append(item)
    return list(groups.values())


def _cut(group: Sequence[_Pending], max_rows: int) -> Iterable[Sequence[_Pending]]:
    """Cut a group into batches of at most so many rows; a larger request is one by itself."""
    start = rows = 0
    for end, item in enumerate(group):
        if end > start and rows + item.rows > max_rows:
            yield group[start:end]
            start, rows = end, 0
        rows += item.rows
    if group[start:]:
        yield group[start:]


def _run_group(call: _Call, group: Sequence[_Pending]) -> None:
    group = _drop_stopped(group, call.control)
    if not group:
        return
    started = time.perf_counter()
    ran = _attempt(group[0].request.job_id, _run_in_turn, call, group)
    if isinstance(ran, InferError):
        _share_time(group, 1000 * (time.perf_counter() - started))
        _run_rest(call, group, ran)
        return
    answers, times = ran
    _share_time(group, (times.input_ns + times.infer_ns + times.output_ns) / 1e6)
    is_clean = call.model.is_built_in and all(_is_finite(outputs) for outputs in answers)
    for item, outputs in zip(group, answers, strict=True):
        item.outcome.batch_rows = times.batch_rows
        if not call.model.is_built_in:
            # A user's own step may crash or hang on one of them; ours are a few NumPy calls.
            call.control.enter_alone(item.request.job_id)
        _finish(call, item, outputs, is_clean)
        if call.observe is not None and item.outcome.error is None:
            call.observe(item.inputs, outputs)


def _share_time(group: Sequence[_Pending], infer_ms: float) -> None:
    for item in group:
        item.outcome.infer_ms, item.outcome.infer_share_ms = infer_ms, infer_ms / len(group)


def _run_in_turn(call: _Call, group: Sequence[_Pending]) -> tuple[list[Outputs], RunTimes]:
    """Run a group as one batch on an instance of its own, as soon as there is one."""
    ids = [item.request.job_id for item in group]
    began = time.perf_counter_ns()
    if not call.batcher.try_acquire():
        # Whoever waits for others is not at fault for standing still, nor for a crash.
        call.control.enter(ids, is_loading=True)
        call.batcher.wait(call.priority, call.control.begin())
    waited_ns = time.perf_counter_ns() - began
    thread = get_ident()
    call.batcher.running[thread] = time.monotonic()
    try:
        call.control.enter(ids)
        is_countable = call.model.is_batchable and all(item.is_even for item in group)
        answers, times = run_stacked(
            call.model.session,
            [item.inputs for item in group],
            [item.rows for item in group] if is_countable else None,
            call.batcher.max_rows,
            call.control.begin(),
            check_finite=True,
            limit=call.batcher.row_limit,
        )
    finally:
        call.batcher.running.pop(thread, None)
        call.batcher.release()
    total_ns = (time.perf_counter_ns() - began) * len(group)
    rows = sum(item.rows for item in group)
    if not is_countable:
        times = times._replace(batch_rows=rows)
    call.batcher.stats.add_run(
        rows, len(group), times, total_ns=total_ns, queue_ns=waited_ns * len(group)
    )
    return answers, times


def _drop_stopped(group: Sequence[_Pending], control: RunControl) -> Sequence[_Pending]:
    """Give those who must stop their reason, and return the others."""
    for item in group:
        item.outcome.error = control.find_stop(item.request.job_id)
    return [item for item in group if item.outcome.error is None]


def _run_rest(call: _Call, group: Sequence[_Pending], error: InferError) -> None:
    """Run again whoever is not to blame for a run that failed or was stopped."""
    left = _drop_stopped(group, call.control)
    if len(left) < len(group):
        _run_group(call, left)
    elif len(group) > 1:
        # Only the guilty one may fail: each gets a run of its own.
        for item in group:
            _run_group(call, [item])
    else:
        group[0].outcome.error = error
        spent_ns = int(1e6 * group[0].outcome.infer_ms)
        reason = FailReason.OTHER if error.code == TensorError.code else FailReason.BACKEND
        call.batcher.stats.add_failure(reason, spent_ns)


def _finish(call: _Call, item: _Pending, outputs: Mapping[str, Array], is_clean: bool) -> None:
    started = time.perf_counter()
    value = _attempt(
        item.request.job_id, _postprocess, call.model, outputs, item.request.params, is_clean
    )
    item.outcome.post_ms = 1000 * (time.perf_counter() - started)
    if isinstance(value, InferError):
        item.outcome.error = value
        if value.code in _MODEL_FAULTS:
            call.batcher.stats.add_failure(FailReason.BACKEND)
    else:
        item.outcome.value = value


def _postprocess(
    model: LoadedModel, outputs: Mapping[str, Array], params: Mapping[str, Any], is_clean: bool
) -> Any:
    if not is_clean:
        _refuse_nan(outputs)
    value: Any = outputs
    for step in model.postprocess:
        value = step(outputs, value, params)
    if isinstance(value, Mapping) and any(isinstance(v, np.ndarray) for v in value.values()):
        value = _ENCODE(outputs, value, params)
    if not is_clean:
        _verify_json(value)
    return value


def _is_finite(outputs: Mapping[str, Array]) -> bool:
    return all(
        array.dtype.kind != "f" or bool(np.isfinite(array).all()) for array in outputs.values()
    )


def _refuse_nan(outputs: Mapping[str, Array]) -> None:
    """Refuse NaN from the model; infinity may be meant (a mask) and is the steps' matter."""
    for name, array in outputs.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            msg = f"the model answered with NaN in {name}"
            raise NanOutputError(msg)


def _verify_json(value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as exc:
        msg = f"the result holds NaN or an infinite number ({exc})"
        raise NanOutputError(msg) from exc
    except (TypeError, RecursionError) as exc:
        msg = f"the last postprocessing step left something that is no JSON: {exc}"
        raise OutputError(msg) from exc


def _attempt(job_id: str, call: Callable[..., Result], *arguments: Any) -> Result | InferError:
    """Call, and turn whatever is raised into an error for the outcome."""
    try:
        return call(*arguments)
    except (PlatformError, WorkerError, AgentError) as exc:
        return InferError(exc.code, str(exc), exc.retryable)
    except Exception:  # noqa: BLE001 (logged below)
        # The engine's one broad except: a defect of ours, or of a user's own step, must cost
        # its job and neither the bundle nor the worker.
        _log.exception("job %s failed with an undeclared error", job_id)
        message = "an undeclared error: the worker's log has its traceback"
        return InferError(INTERNAL_ERROR, message, retryable=False)
