"""Running requests: from a bundle of jobs of one model to one outcome each.

Owns the stacking of requests into batches, the taking apart of the answers, and the
boundary at which every error becomes part of an outcome. Knows nothing of Celery,
HTTP or the ledger.

Invariants: as many outcomes as requests, in their order, whatever happens; a request
that fails fails alone; a value is JSON-ready and holds neither NaN nor infinity.
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
from platforms.runtimes.base import Array
from platforms.runtimes.stop import current
from platforms.spec import PlatformSpec
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


@dataclass(frozen=True, slots=True)
class InferError:
    """Why a request has no value."""

    code: str
    message: str
    retryable: bool


@dataclass(slots=True)
class InferOutcome:
    """What became of one request: a value or an error."""

    job_id: str
    value: Any = None
    error: InferError | None = None
    pre_ms: float = 0.0
    infer_ms: float = 0.0
    """Of the whole run that the request was part of."""
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

    def infer(self, folder: Path, requests: Sequence[InferRequest]) -> list[InferOutcome]:
        """Run `requests` on the model version in `folder`; one outcome each, in order.

        Blocks while the model loads and runs. Thread-safe. Raises nothing: every error,
        a failing load included, is in the outcomes.
        """
        outcomes = [InferOutcome(request.job_id) for request in requests]
        model = _attempt(str(folder), lambda: self.load(folder))
        if isinstance(model, InferError):
            for outcome in outcomes:
                outcome.error = model
            return outcomes
        pending = _prepare(model, requests, outcomes)
        for group in _group(model, pending):
            _run_group(model, group)
        return outcomes


def _prepare(
    model: LoadedModel, requests: Sequence[InferRequest], outcomes: Sequence[InferOutcome]
) -> list[_Pending]:
    """Preprocess each request; those that fail have their error and go no further."""
    pending = []
    for request, outcome in zip(requests, outcomes, strict=True):
        outcome.model, outcome.version = model.name, model.version
        outcome.artifact = model.artifact.file
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


def _run_group(model: LoadedModel, group: Sequence[_Pending]) -> None:
    started = time.perf_counter()
    stacked = _attempt(group[0].request.job_id, _run_stacked, model, group)
    infer_ms = 1000 * (time.perf_counter() - started)
    if isinstance(stacked, InferError):
        if len(group) > 1:
            # Only the guilty one may fail: each gets a run of its own.
            for item in group:
                _run_group(model, [item])
        else:
            group[0].outcome.error = stacked
            group[0].outcome.infer_ms = infer_ms
        return
    batch_rows = sum(item.rows for item in group)
    is_clean = model.is_built_in and _is_finite(stacked)
    start = 0
    for item in group:
        outputs = stacked
        if len(group) > 1:
            outputs = {k: v[start : start + item.rows] for k, v in stacked.items()}
            start += item.rows
        item.outcome.infer_ms, item.outcome.batch_rows = infer_ms, batch_rows
        _finish(model, item, outputs, is_clean)


def _run_stacked(model: LoadedModel, group: Sequence[_Pending]) -> dict[str, Array]:
    """Run a group as one batch, and check that as many rows come back as went in.

    Raises:
        RunStoppedError: the work was stopped before.
    """
    token = current.get()
    if token is not None:
        token.check()
    if len(group) == 1:
        return model.session.run(group[0].inputs)
    names = group[0].inputs
    outputs = model.session.run(
        {name: np.concatenate([item.inputs[name] for item in group]) for name in names}
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
