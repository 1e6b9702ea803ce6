"""Running requests: from a bundle of jobs of one model to one outcome each.

Owns the stacking of requests into batches, the taking apart of the answers, and the
boundary at which every error becomes part of an outcome. Knows nothing of Celery,
HTTP or the ledger.

Invariants: as many outcomes as requests, in their order, whatever happens; a request
that fails, or is stopped, does so alone; a value is JSON-ready and holds neither NaN
nor infinity.
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from agent.errors import AgentError
from platforms.errors import PlatformError
from platforms.runtimes.base import Array, RunStop
from platforms.spec import PlatformSpec
from worker.engine.control import InferError, RunControl
from worker.engine.sessions import LoadedModel, ModelKey, SessionCache, load_model
from worker.engine.threads import compute_threads
from worker.errors import NanOutputError, OutputError, StepError, WorkerError
from worker.processing.step import JobInput
from worker.processing.tensor import TensorOutput

INTERNAL_ERROR = "internal_error"
"""The code of whatever no layer declared; its traceback is in the worker's log only."""

_log = logging.getLogger(__name__)

_ENCODE = TensorOutput()

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


class Engine:
    """Runs model versions of this box; one per process, shared by its threads."""

    def __init__(self, spec: PlatformSpec, instances: int = 1) -> None:
        """Describe the box.

        Args:
            spec: what selection and the number of threads go by.
            instances: how many inferences run at the same time, which share the cores.
        """
        self._spec = spec
        self._threads = compute_threads(spec.cores, instances)
        self.cache = SessionCache()

    def load(self, folder: Path) -> LoadedModel:
        """Return the model version in `folder`, loading it on first use.

        Raises:
            AgentError, PlatformError, WorkerError: as `load_model`.
        """
        key = ModelKey.from_folder(folder)
        return self.cache.load(key, lambda: load_model(key.folder, self._spec, self._threads))

    def unload(self, folder: Path) -> bool:
        """Forget the version in `folder`; say whether it was loaded."""
        return self.cache.unload(ModelKey.from_folder(folder))

    def infer(
        self, folder: Path, requests: Sequence[InferRequest], control: RunControl | None = None
    ) -> list[InferOutcome]:
        """Run `requests` on the model version in `folder`; one outcome each, in order.

        Blocks while the model loads and runs. Thread-safe. Raises nothing: every error,
        a failing load included, is in the outcomes; so is why `control` stopped a job.
        What is at work at the end stays so in `control`.
        """
        control = control or RunControl()
        control.enter((request.job_id for request in requests), is_loading=True)
        outcomes = [InferOutcome(request.job_id) for request in requests]
        model = _attempt(str(folder), lambda: self.load(folder))
        if isinstance(model, InferError):
            for outcome in outcomes:
                outcome.error = model
            return outcomes
        pending = _prepare(model, requests, outcomes, control)
        for group in _group(model, pending):
            _run_group(model, group, control)
        return outcomes


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
        control.enter((request.job_id,))
        started = time.perf_counter()
        inputs = _attempt(request.job_id, _preprocess, model, request.input)
        outcome.pre_ms = 1000 * (time.perf_counter() - started)
        if isinstance(inputs, InferError):
            outcome.error = inputs
        else:
            first = next(iter(inputs.values()))
            pending.append(_Pending(request, outcome, inputs, first.shape[0] if first.ndim else 1))
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
        same_rows = len({array.shape[:1] for _, array in arrays}) == 1
        signature = tuple((name, array.shape[1:], array.dtype) for name, array in arrays)
        # Inputs that disagree about the batch are the model's to refuse, alone.
        groups[signature if same_rows else id(item)].append(item)
    return list(groups.values())


def _run_group(model: LoadedModel, group: Sequence[_Pending], control: RunControl) -> None:
    group = _drop_stopped(group, control)
    if not group:
        return
    control.enter(item.request.job_id for item in group)
    started = time.perf_counter()
    stacked = _attempt(group[0].request.job_id, _run_stacked, model, group, control.begin())
    infer_ms = 1000 * (time.perf_counter() - started)
    for item in group:
        item.outcome.infer_ms, item.outcome.infer_share_ms = infer_ms, infer_ms / len(group)
    if isinstance(stacked, InferError):
        _run_rest(model, group, stacked, control)
        return
    batch_rows = sum(item.rows for item in group)
    is_clean = model.is_built_in and _is_finite(stacked)
    start = 0
    for item in group:
        outputs = stacked
        if len(group) > 1:
            outputs = {k: v[start : start + item.rows] for k, v in stacked.items()}
            start += item.rows
        item.outcome.batch_rows = batch_rows
        control.enter((item.request.job_id,))
        _finish(model, item, outputs, is_clean)


def _drop_stopped(group: Sequence[_Pending], control: RunControl) -> Sequence[_Pending]:
    """Give those who must stop their reason, and return the others."""
    for item in group:
        item.outcome.error = control.find_stop(item.request.job_id)
    return [item for item in group if item.outcome.error is None]


def _run_rest(
    model: LoadedModel, group: Sequence[_Pending], error: InferError, control: RunControl
) -> None:
    """Run again whoever is not to blame for a run that failed or was stopped."""
    left = _drop_stopped(group, control)
    if len(left) < len(group):
        _run_group(model, left, control)
    elif len(group) > 1:
        # Only the guilty one may fail: each gets a run of its own.
        for item in group:
            _run_group(model, [item], control)
    else:
        group[0].outcome.error = error


def _run_stacked(model: LoadedModel, group: Sequence[_Pending], stop: RunStop) -> dict[str, Array]:
    """Run a group as one batch, and check that as many rows come back as went in."""
    if len(group) == 1:
        return model.session.run(group[0].inputs, stop)
    names = group[0].inputs
    outputs = model.session.run(
        {name: np.concatenate([item.inputs[name] for item in group]) for name in names}, stop
    )
    rows = sum(item.rows for item in group)
    if any(array.shape[:1] != (rows,) for array in outputs.values()):
        msg = f"{rows} rows went in, and another number came back"
        raise OutputError(msg)
    return outputs


def _finish(
    model: LoadedModel, item: _Pending, outputs: Mapping[str, Array], is_clean: bool
) -> None:
    started = time.perf_counter()
    value = _attempt(
        item.request.job_id, _postprocess, model, outputs, item.request.params, is_clean
    )
    item.outcome.post_ms = 1000 * (time.perf_counter() - started)
    if isinstance(value, InferError):
        item.outcome.error = value
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
