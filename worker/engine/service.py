"""What a front end asks of the engine: raw tensors in, raw tensors out.

The contract between whoever serves (HTTP, gRPC, a benchmark) and whoever runs models;
nothing here runs anything. The vocabulary is that of the Open Inference Protocol.

Invariants: arrays are of the element types of `platforms.runtimes.base.DTYPES`, C-ordered,
axis 0 the batch where the model has one; nothing blocks an event loop for longer than
`INLINE_S` except what says that it blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from platforms.artifact import TensorSpec
from platforms.runtimes.base import Array

INLINE_S = 0.0002
"""A run that takes less than this may be done where it is asked for, without a thread."""


class ModelStatus(StrEnum):
    """Whether requests for a model version are taken; Triton's words."""

    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"
    LOADING = "LOADING"


@dataclass(frozen=True, slots=True)
class TensorRequest:
    """One inference request."""

    model: str
    inputs: Mapping[str, Array]
    version: str | None = None
    """A version's number as text; None lets the engine choose (the active one, or a split)."""
    outputs: tuple[str, ...] = ()
    """Wanted outputs by name; empty means all."""
    priority: int = 0
    """1 is the most urgent; 0 stands for the model's default."""
    timeout_s: float | None = None
    """Longest wait in the queue; None: the model's default."""
    key: str = ""
    """What a split of traffic goes by: equal keys get the same version."""


@dataclass(frozen=True, slots=True)
class TensorResponse:
    """What a request got."""

    model: str
    version: str
    outputs: Mapping[str, Array]
    """In the model's order; only the wanted ones."""
    is_cached: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model version as clients see it."""

    name: str
    version: str
    versions: tuple[str, ...]
    """All versions of this model that are taken, ascending."""
    platform: str
    """Triton's word for what runs it, such as `onnxruntime_onnx`."""
    inputs: tuple[TensorSpec, ...]
    """Shapes with the batch axis in front, −1 where free."""
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    """0 where the model has no batch axis."""
    config: Mapping[str, Any]
    """Triton's ModelConfig as JSON, every default in it."""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the classes of an output, by its name; for `classification`."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A line of the repository's index."""

    name: str
    version: str
    status: ModelStatus
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class BatchStats:
    """Runs of one batch size."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


@dataclass(frozen=True, slots=True)
class ModelStats:
    """What a model version has done since its process began."""

    name: str
    version: str
    last_inference_ms: int = 0
    """Wall clock, ms since 1970; 0: never."""
    inference_count: int = 0
    """Rows."""
    execution_count: int = 0
    """Runs."""
    success: Duration = Duration()
    fail: Duration = Duration()
    queue: Duration = Duration()
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    cache_hit: Duration = Duration()
    cache_miss: Duration = Duration()
    batches: tuple[BatchStats, ...] = ()
    pending: int = 0
    """Requests that wait now."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Failed requests by reason: REJECTED, CANCELED, BACKEND, OTHER."""


class Service(Protocol):
    """An engine that serves the models of a repository; all methods are thread-safe.

    Every method that takes a model raises `ModelNotFoundError` or `VersionNotFoundError`
    (`agent.errors`) where there is none, and `worker.errors.ModelUnavailableError` where it has
    been unloaded or does not load.
    """

    def is_ready(self) -> bool:
        """Say whether requests are taken."""
        ...

    def is_model_ready(self, model: str, version: str | None = None) -> bool:
        """Say whether a model version would take a request; False for an unknown one."""
        ...

    def infer_inline(self, request: TensorRequest) -> TensorResponse | None:
        """Answer within `INLINE_S` on the caller's thread, or return None: then call `infer`.

        Raises:
            As `infer`.
        """
        ...

    async def infer(self, request: TensorRequest) -> TensorResponse:
        """Answer a request, batched with others where that pays.

        Cancelling the awaiting task takes the request out of the queue.

        Raises:
            TensorError: names, datatypes or shapes are not the model's.
            RequestRejectedError: too many wait for this model.
            RequestTimeoutError: it waited too long.
            PlatformError, WorkerError: the run failed.
        """
        ...

    async def get_info(self, model: str, version: str | None = None) -> ModelInfo:
        """Describe a model version; loads it where it is not loaded."""
        ...

    def list_index(self, *, is_ready: bool = False) -> list[IndexEntry]:
        """Return every model version, or those that take requests."""
        ...

    async def load(self, model: str) -> None:
        """Take requests for a model (again), and load its active version now."""
        ...

    async def unload(self, model: str) -> None:
        """Take no more requests for a model and free its memory; unknown models are no error."""
        ...

    def get_stats(self, model: str | None = None, version: str | None = None) -> list[ModelStats]:
        """Return what the models have done."""
        ...
