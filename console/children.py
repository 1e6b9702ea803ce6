"""Keep the processes of one box alive: the supervisor behind `edgeward up`.

Owns the life of its child processes: order, readiness, restarts with back-off, logs, the
ordered stop. Knows nothing of what they are. On a box with systemd the units do this work.

Invariants:
- One thread per child spawns it, waits for it and reaps it. The kernel's parent-death
  signal is bound to the thread that forked, so that thread has to outlive the child.
- A child is reaped under the lock, and signals are sent under the same lock: a process id
  is never signalled after the kernel may have given it to another process.
- Each child leads a session of its own, so that Ctrl-C in the terminal reaches the
  supervisor only, and so that what a child leaves behind can be killed as its group.
- No child outlives a supervisor that was killed (Linux; see `platforms.tether`). A process
  that a *child* started is covered by the ordered stop only.

    stopped ──start_child──► running ──exit──► waiting ──back-off──► running
       ▲                        │                 │
       └───────stop_child───────┴─────────────────┘
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from console.errors import ChildStartError

_log = logging.getLogger(__name__)

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 10.0
"""At most this long until the next try: a broker that came back is used within 10 s."""
STEADY_AFTER_S = 30.0
"""A child that lived this long is healthy again, and its next restart is quick."""
STOP_GRACE_S = 10.0
"""From SIGTERM to SIGKILL; the protocol's grace for a running job is as long."""
ROTATE_OVER_BYTES = 5 * 1024 * 1024
_READY_POLL_S = 0.05
_LOG_TAIL_LINES = 15
_TETHER = Path(__file__).parents[1] / "platforms" / "tether.py"


def _always_ready() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run, and how to see that it serves."""

    name: str
    """Also the name of its log file."""
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the supervisor's own environment."""
    ready: Callable[[], bool] = _always_ready
    """Asked about every 50 ms; has to return within a second or so and never raise."""
    ready_timeout_s: float = 20.0


@dataclass(frozen=True, slots=True)
class ChildState:
    """A child at one moment."""

    name: str
    pid: int | None
    """None while it is stopped or waits for its next start."""
    restarts: int
    """Starts after an end that nobody asked for."""
    since_at: datetime
    """When it was started, or when it ended."""


def restart_delay_s(quick_ends: int) -> float:
    """Tell how long to wait after this many short lives in a row, from 1 up."""
    # The exponent is bounded, because 2.0**1024 overflows after some hours of crashing.
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(quick_ends - 1, 16))


def _open_log(path: Path) -> int:
    """Open for appending, after moving aside a log that has grown too large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > ROTATE_OVER_BYTES:
        path.replace(path.with_name(f"{path.name}.1"))
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


def _read_tail(path: Path) -> str:
    """Return the last lines of a log, or what stands for them."""
    if not path.exists():
        return "(no output)"
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 8192))
        lines = log.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:]) or "(no output)"


def _await_exit(process: subprocess.Popen[bytes]) -> None:
    """Block until the process has ended, without reaping it where the system can do that."""
    # macOS has waitid from Python 3.13 on; there the short race over the id is accepted.
    if hasattr(os, "waitid"):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    else:
        process.wait()


class _Child:
    """One child and the thread that keeps it; everything mutable is guarded by `_changed`."""

    def __init__(self, spec: ChildSpec, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self._changed = threading.Condition()
        self._keeper: threading.Thread | None = None
        """The thread that keeps it running; None where it is meant to be stopped."""
        self._process: subprocess.Popen[bytes] | None = None
        self._since_at = datetime.now(UTC)
        self._ends = 0
        self._quick_ends = 0
        self._restarts = 0

    def state(self) -> ChildState:
        with self._changed:
            pid = self._process.pid if self._process else None
            return ChildState(self.spec.name, pid, self._restarts, self._since_at)

    def start(self) -> None:
        """Start and wait until ready; does nothing to a child that is already kept.

        Raises:
            ChildStartError: it ended or was not ready in time; it is stopped again.
        """
        with self._changed:
            if self._keeper is not None:
                return
            ends_before, self._quick_ends = self._ends, 0
            name = f"keep-{self.spec.name}"
            self._keeper = keeper = threading.Thread(target=self._keep, name=name, daemon=True)
            keeper.start()
        try:
            self._await_ready(keeper, ends_before)
        except BaseException:
            self.stop()
            raise

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Send SIGTERM, then SIGKILL after the grace; blocks until the child is gone."""
        with self._changed:
            keeper, self._keeper = self._keeper, None
            self._changed.notify_all()
            process = self._process
            if process is not None:
                os.kill(process.pid, signal.SIGTERM)
                self._changed.wait_for(lambda: self._process is not process, timeout=grace_s)
            if process is not None and self._process is process:
                _log.warning("%s ignored SIGTERM for %g s: killed", self.spec.name, grace_s)
                os.killpg(process.pid, signal.SIGKILL)
        if keeper is not None:
            keeper.join()

    def _await_ready(self, keeper: threading.Thread, ends_before: int) -> None:
        deadline = time.monotonic() + self.spec.ready_timeout_s
        while not (self._is_up() and self.spec.ready()):
            with self._changed:
                if self._ends > ends_before:
                    raise ChildStartError(self._failure("ended before it was ready"))
                if self._keeper is not keeper:
                    raise ChildStartError(self._failure("was stopped before it was ready"))
                if time.monotonic() >= deadline:
                    waited = f"was not ready within {self.spec.ready_timeout_s:g} s"
                    raise ChildStartError(self._failure(waited))
                self._changed.wait(_READY_POLL_S)

    def _is_up(self) -> bool:
        with self._changed:
            return self._process is not None

    def _failure(self, what: str) -> str:
        tail = _read_tail(self.log_path)
        return f"{self.spec.name} {what}; the end of {self.log_path}:\n{tail}"

    def _is_dismissed(self) -> bool:
        """Tell whether the calling keeper has been told to end."""
        return self._keeper is not threading.current_thread()

    def _keep(self) -> None:
        """Spawn, wait, reap, back off, until this keeper is dismissed."""
        while True:
            process = self._spawn()
            started_s = time.monotonic()
            if process is not None:
                _await_exit(process)
            with self._changed:
                self._reap(process, lived_s=time.monotonic() - started_s)
                delay_s = restart_delay_s(self._quick_ends)
                if self._changed.wait_for(self._is_dismissed, timeout=delay_s):
                    return
                self._restarts += 1

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """Start the process; None where the system refused a new one."""
        tether = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid())]
        with self._changed:
            # A stop that is still under way belongs to the keeper before this one.
            self._changed.wait_for(lambda: self._process is None)
            if self._is_dismissed():
                return None
            try:
                log = _open_log(self.log_path)
                try:
                    self._process = subprocess.Popen(
                        [*tether, *self.spec.argv],
                        env={**os.environ, **self.spec.env},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                finally:
                    os.close(log)
            except OSError:
                _log.exception("cannot start %s; trying again", self.spec.name)
                return None
            self._since_at = datetime.now(UTC)
            self._changed.notify_all()
            return self._process

    def _reap(self, process: subprocess.Popen[bytes] | None, lived_s: float) -> None:
        if process is not None:
            # Not reaped yet, the leader still reserves the group's id. A group that is empty
            # but for it answers EPERM on macOS.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not self._is_dismissed():
                _log.warning(
                    "%s ended after %.1f s with %d; restarting",
                    self.spec.name,
                    lived_s,
                    process.returncode,
                )
        self._process = None
        self._ends += 1
        self._quick_ends = 1 if lived_s >= STEADY_AFTER_S else self._quick_ends + 1
        self._since_at = datetime.now(UTC)
        self._changed.notify_all()


class Children:
    """The child processes of one box, in the order in which they are added.

    Thread-safe, except that `run_until_stopped` has to be called from the main thread. As
    a context manager it stops them on the way out.
    """

    def __init__(self, log_dir: Path) -> None:
        """Take the folder of the logs; it is created when the first child starts."""
        self._log_dir = log_dir
        self._children: dict[str, _Child] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def add(self, spec: ChildSpec) -> None:
        """Register a child without starting it.

        Raises:
            ValueError: there is one of this name already.
        """
        if spec.name in self._children:
            raise ValueError(f"a child named {spec.name} exists already: choose another name")
        self._children[spec.name] = _Child(spec, self._log_dir / f"{spec.name}.log")

    def start(self) -> None:
        """Start all in order, each once the one before it is ready; blocks until then.

        Raises:
            ChildStartError: one did not get ready; those before it are stopped again.
        """
        try:
            for child in self._children.values():
                child.start()
        except BaseException:
            self.stop()
            raise

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Stop all in reverse order; blocks up to `grace_s` for each."""
        for child in reversed(self._children.values()):
            child.stop(grace_s)

    def start_child(self, name: str) -> None:
        """Start one child and wait until it is ready.

        Raises:
            KeyError: no child has this name.
            ChildStartError: it did not get ready.
        """
        self._children[name].start()

    def stop_child(self, name: str, grace_s: float = STOP_GRACE_S) -> None:
        """Stop one child, which stays stopped.

        Raises:
            KeyError: no child has this name.
        """
        self._children[name].stop(grace_s)

    def restart(self, name: str) -> None:
        """Stop one child and start it again; this does not count as a restart of its own.

        Raises:
            KeyError: no child has this name.
            ChildStartError: it did not get ready.
        """
        self.stop_child(name)
        self.start_child(name)

    def state(self) -> list[ChildState]:
        """Return what each child is doing, in order."""
        return [child.state() for child in self._children.values()]

    def run_until_stopped(self) -> None:
        """Block until SIGINT or SIGTERM, then stop all in reverse order.

        Raises:
            ValueError: this is not the main thread.
        """
        with _stop_signals() as wakeup_fd:
            os.read(wakeup_fd, 1)
            self.stop()


@contextmanager
def _stop_signals() -> Iterator[int]:
    """Yield a descriptor that becomes readable when the process is asked to stop."""
    # A pipe, not an Event: `Event.set` in a handler can meet the lock that `Event.wait` of
    # the same thread holds.
    reader, writer = os.pipe()
    previous = {
        number: signal.signal(number, lambda *_: os.write(writer, b"."))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield reader
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
