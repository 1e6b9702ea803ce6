"""Stopping an inference that runs, from another thread.

A `StopToken` belongs to one stretch of work. Whoever runs it puts it into
`current`; a runtime that can end a call from outside registers how, for as long
as the call lasts. A runtime that cannot does nothing here: then the work ends at
the next point where the token is asked, or its process has to.

Invariant: once `stop` was called, no call that registers afterwards begins.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

from platforms.errors import RunStoppedError


class StopToken:
    """Says whether a stretch of work is to end, and ends what it is in. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._is_stopped = False
        self._enders: list[Callable[[], None]] = []

    @property
    def is_stopped(self) -> bool:
        """Say whether the work is to end."""
        return self._is_stopped

    def stop(self) -> None:
        """End the work, as far as its runtime can be ended."""
        with self._lock:
            self._is_stopped = True
            enders = list(self._enders)
        for end in enders:
            end()

    def check(self) -> None:
        """Go on, or not.

        Raises:
            RunStoppedError: the work was stopped.
        """
        if self._is_stopped:
            msg = "the run was stopped"
            raise RunStoppedError(msg)

    @contextmanager
    def ended_by(self, end: Callable[[], None]) -> Iterator[None]:
        """Let `stop` call `end` while the block runs.

        Raises:
            RunStoppedError: it was stopped before.
        """
        with self._lock:
            self.check()
            self._enders.append(end)
        try:
            yield
        finally:
            with self._lock:
                self._enders.remove(end)


current: ContextVar[StopToken | None] = ContextVar("stop_token", default=None)
"""The token of the work that this thread does."""
