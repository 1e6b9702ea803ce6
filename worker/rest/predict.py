"""`predict`: an image or tensors in, labels out, by the model's own processing.

Owns the way of one input through `worker.engine.engine.Engine`, which the queue's jobs go too, so
both answer alike.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from agent.repository import ModelRepository
from platforms.errors import TensorError
from worker.engine.control import InferError
from worker.engine.engine import Engine, InferOutcome, InferRequest
from worker.errors import BadImageError, PreprocessError, WorkerError
from worker.processing.step import JobInput
from worker.rest.errors import INTERNAL

_BAD_INPUT = {PreprocessError.code, BadImageError.code, TensorError.code}
# Of predictions at a time; the batcher decides how many of them really run.
_THREADS_MAX = 16


class PredictionError(WorkerError):
    """A prediction failed; carries what the engine said of it."""

    code = "prediction_failed"

    def __init__(self, error: InferError) -> None:
        super().__init__(error.message)
        self.error = error

    @property
    def status(self) -> int:
        """HTTP status of the error, whose class is not known any more."""
        if self.error.code in _BAD_INPUT:
            return 400
        return 503 if self.error.retryable else INTERNAL


class Predictor(Protocol):
    """Runs a model with the processing that its manifest names."""

    async def predict(
        self, model: str, version: str | None, given: JobInput, params: Mapping[str, Any]
    ) -> Any:
        """Return what the model's postprocessing makes of an input, JSON-ready.

        Raises:
            AgentError: there is no such model or version.
            PredictionError: the input does not fit, or the run failed.
        """
        ...


class EnginePredictor:
    """A `Predictor` over the engine that the queue's jobs run on.

    Args:
        engine: returns it; called with the first request, not before.
        repository: the models.
    """

    def __init__(self, engine: Callable[[], Engine], repository: ModelRepository) -> None:
        self._engine = engine
        self._repository = repository
        self._pool = ThreadPoolExecutor(_THREADS_MAX, thread_name_prefix="edgeward-predict")

    async def predict(
        self, model: str, version: str | None, given: JobInput, params: Mapping[str, Any]
    ) -> Any:
        """Return what the model's postprocessing makes of an input; runs in a thread."""
        loop = asyncio.get_running_loop()
        outcome = await loop.run_in_executor(self._pool, self._run, model, version, given, params)
        if outcome.error is not None:
            raise PredictionError(outcome.error)
        return {"model": model, "version": outcome.version, "output": outcome.value}

    def _run(
        self, model: str, version: str | None, given: JobInput, params: Mapping[str, Any]
    ) -> InferOutcome:
        if version is None:
            folder = self._repository.get_folder(model)
        else:
            folder = self._repository.get_version(model, version).folder
        request = InferRequest("http", given, params)
        (outcome,) = self._engine().infer(folder, [request])
        outcome.version = folder.name
        return outcome
