"""Memory of this process: what models take of it, giving it back, and runs that do not fit.

Owns the measure (resident memory, in MB of 10⁶ bytes), the budget's figures, the return of
freed memory to the kernel, and the halving of batches that ran out of memory. Never decides
which model goes: that is `SessionCache`'s.

Invariants: a `RowLimit` only ever falls; `run_within` answers with as many rows as went in,
in their order, or raises; the process outlives a run that got no memory.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from threading import Lock

import numpy as np
import psutil

from platforms.errors import PlatformError
from platforms.heap import release_freed
from platforms.runtimes.base import Array, RunStop, Session
from worker.errors import OutOfMemoryError, OutputError

_MB = 10**6

# onnxruntime's arena and operators, C++'s std::bad_alloc, PyTorch, CUDA.
_OUT_OF_MEMORY = re.compile(
    r"bad_?alloc|failed to allocate memory|cannot allocate memory|can't allocate memory"
    r"|not enough memory|out of memory",
    re.IGNORECASE,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """What a loaded model takes."""

    mb: float
    measured_at: datetime
    is_measured: bool
    """False: other models loaded at the same time, so that it is the size of its files."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """How much the models of this process may take, all together."""

    mb: float
    is_strict: bool = True
    """False: nobody asked for this figure, and it yields while the machine has room."""
    read_available_mb: Callable[[], float] = lambda: psutil.virtual_memory().available / _MB
    """Memory that may still be taken, of the machine or the tightest cgroup."""

    @classmethod
    def from_setting(cls, memory_mb: int | None, box_mb: float) -> "MemoryBudget":
        """Return the budget of `worker.memory_mb`; by default half of the box's `box_mb`."""
        if memory_mb is not None:
            return cls(memory_mb)
        return cls(box_mb / 2, is_strict=False)


def read_process_mb() -> float:
    """Return the resident memory of this process in MB.

    Resident, not private: the libraries that it shares with others are mapped before the first
    model, so that the differences agree, and `smaps_rollup` is wrong in sandboxed kernels (seen:
    more private than resident memory) and absent outside Linux.
    """
    return float(psutil.Process().memory_info().rss) / _MB


class ReleaseAtEnd:
    """Gives freed memory back when the last reference to it goes.

    A model keeps one behind its session, which is then freed already.
    """

    def __del__(self) -> None:
        """Trim once, in the thread that let go last."""
        if not sys.is_finalizing():
            release_freed()


class RowLimit:
    """How many rows of a model version have fitted into memory; for all of its threads."""

    def __init__(self) -> None:
        """Start without a limit."""
        self.rows: int | None = None
        """None: no run has run out of memory."""
        self._lock = Lock()

    def lower(self, rows: int) -> None:
        """Remember that more than `rows` do not fit."""
        with self._lock:
            self.rows = max(1, rows if self.rows is None else min(self.rows, rows))


def is_out_of_memory(exc: BaseException) -> bool:
    """Say whether an error, or what it came from, is a lack of memory."""
    current: BaseException | None = exc
    while current is not None:
        if isinstance(current, MemoryError) or _OUT_OF_MEMORY.search(str(current)):
            return True
        current = current.__cause__
    return False


def run_within(
    session: Session,
    inputs: Mapping[str, Array],
    limit: RowLimit,
    stop: RunStop | None = None,
    *,
    check_finite: bool = True,
) -> dict[str, Array]:
    """Run a batch, in pieces where it does not fit into memory; remember what did not.

    Only for models whose rows are independent (`LoadedModel.is_batchable`), or one row.

    Args:
        session: of the model.
        inputs: by name, all of the same number of rows on axis 0.
        limit: of the model version; lowered by half at each lack of memory.
        stop: as `Session.run`.
        check_finite: as `Session.run`.

    Raises:
        OutOfMemoryError: not even one row fits.
        OutputError: a piece came back with another number of rows.
        PlatformError: as `Session.run`.
    """
    rows = min((array.shape[0] if array.ndim else 1 for array in inputs.values()), default=1)
    done: list[dict[str, Array]] = []
    start = 0
    while start < rows:
        size = min(rows - start, limit.rows or rows)
        is_whole = size == rows
        piece = inputs if is_whole else {k: v[start : start + size] for k, v in inputs.items()}
        answer = _try_run(session, piece, stop, check_finite)
        if answer is None:
            _give_way(size, limit)
            continue
        if is_whole:
            return answer
        if any(array.shape[:1] != (size,) for array in answer.values()):
            msg = f"{size} rows went in, and another number came back"
            raise OutputError(msg)
        done.append(answer)
        start += size
    return {name: np.concatenate([part[name] for part in done]) for name in done[0]}


def _try_run(
    session: Session, inputs: Mapping[str, Array], stop: RunStop | None, check_finite: bool
) -> dict[str, Array] | None:
    """Return the outputs, or None where memory ran out."""
    with contextlib.suppress(MemoryError):
        try:
            return session.run(inputs, stop, check_finite=check_finite)
        except PlatformError as exc:
            if not is_out_of_memory(exc):
                raise
    return None


def _give_way(rows: int, limit: RowLimit) -> None:
    release_freed()
    if rows <= 1:
        limit.lower(1)
        msg = (
            "there is not enough memory to run the model on a single row: free memory, raise the "
            "worker's memory limit, or use a smaller model"
        )
        raise OutOfMemoryError(msg)
    limit.lower(rows // 2)
    _log.warning("%d rows do not fit into memory; at most %d from now on", rows, limit.rows)
