"""The parent's hold on the process that runs one tool.

Owns that process from start to end, with everything it starts: nothing in it reaches the caller
but its facts, its progress or an error of `converters.errors`; it ends with the `with` block
and, on Linux, with a parent that was killed.

Limits are looked at every 0.1 s over the whole tree of processes, so a tool that takes memory
quickly may be over its limit by what it takes in that time. Memory is the sum of resident sets,
which counts what processes share more than once: it errs on the side of ending a tool.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any, Self

import psutil

from converters.errors import (
    ConversionCanceledError,
    ConversionError,
    HopError,
    HopFailedError,
    HopMemoryError,
    HopTimeoutError,
)
from converters.task import Facts, Report

_ROOT = Path(__file__).parents[2]
_TETHER = _ROOT / "platforms" / "tether.py"
_MODULE = "converters.routes.child"
_LOOK_EVERY_S = 0.1
_END_LIMIT_S = 10.0
"""For a process to end that has answered, or was killed."""
_LOG_BYTES = 64 * 1024
_LAST_LINES = 6
_MB = 10**6

_SAFE_TORCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Makes `torch.load` refuse pickled code also where a library asks it not to."""


@dataclass(frozen=True)
class Limits:
    """What one step may take of the machine."""

    time_s: float = 1800.0
    memory_mb: float = 8000.0
    """Resident memory of all its processes, in 10⁶ bytes."""


class _Log:
    """The end of what a tool prints, of bounded size."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._left_out = 0

    def add(self, data: bytes) -> None:
        self._kept += data
        excess = len(self._kept) - _LOG_BYTES
        if excess > 0:
            del self._kept[:excess]
            self._left_out += excess

    def read(self) -> str:
        text = self._kept.decode(errors="replace").strip()
        return f"[{self._left_out} bytes left out]\n{text}" if self._left_out else text


class ToolProcess:
    """One run of one tool.

    Args:
        name: of the tool, for messages.
        request: as `converters.routes.child` takes it.
        folder: where the tool's temporary files go; whoever made it removes it.
        limits: what it may take.
        variables: of its environment, beside those of this process.
    """

    def __init__(
        self,
        name: str,
        request: Mapping[str, Any],
        folder: Path,
        limits: Limits,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._name = name
        self._limits = limits
        self._log = _Log()
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._deadline = time.monotonic() + limits.time_s
        self._look_at = 0.0
        self._is_over = False
        self._seen: dict[int, psutil.Process] = {}
        self._process = _start(folder, variables)
        self._readers = [
            threading.Thread(target=work, name=f"hop {label}", daemon=True)
            for label, work in (("answers", self._read_answers), ("log", self._read_log))
        ]
        for reader in self._readers:
            reader.start()
        self._send(request)
        self.peak_mb = 0.0
        """Most memory that was seen, of the whole tree."""

    def _send(self, request: Mapping[str, Any]) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        # A process that died before it read: `wait` says how.
        with suppress(BrokenPipeError):
            pipe.write(json.dumps(request).encode() + b"\n")
            pipe.close()

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._messages.put(json.loads(line))
        self._messages.put(None)

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        while data := os.read(self._process.stderr.fileno(), 1 << 16):
            self._log.add(data)

    @property
    def log(self) -> str:
        """Return the end of what the tool has printed so far."""
        return self._log.read()

    def wait(self, report: Report, is_canceled: Callable[[], bool]) -> Facts:
        """Wait for the tool's facts; blocks until then or until a limit is reached.

        Args:
            report: called with the tool's progress, from this thread.
            is_canceled: asked about ten times a second.

        Raises:
            ConversionCanceledError: `is_canceled` said so.
            HopTimeoutError, HopMemoryError: a limit was reached.
            HopFailedError: the process ended without facts.
            ConversionError: whatever the tool itself refused with.
        """
        while True:
            message = self._receive(is_canceled)
            if "progress" in message:
                report(*message["progress"])
            elif "error" in message:
                self._end()
                raise _rebuild(message["error"], self.log)
            else:
                facts: Facts = message["facts"]
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_END_LIMIT_S)
                self._end()
                return facts

    def _receive(self, is_canceled: Callable[[], bool]) -> dict[str, Any]:
        while True:
            if time.monotonic() >= self._look_at:
                self._look(is_canceled)
                self._look_at = time.monotonic() + _LOOK_EVERY_S
            has_ended = self._process.poll() is not None
            try:
                message = self._messages.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                # What it has forked may hold the pipe open after its death.
                if has_ended:
                    raise self._fail() from None
                continue
            if message is None:
                raise self._fail()
            return message

    def _look(self, is_canceled: Callable[[], bool]) -> None:
        """Raise where the tool is to end now."""
        if is_canceled():
            msg = f"{self._name} was canceled"
            raise ConversionCanceledError(msg)
        if time.monotonic() >= self._deadline:
            msg = (
                f"{self._name} was ended after {self._limits.time_s:g} s, its limit: it hangs, or "
                "the model needs a longer one"
            )
            raise HopTimeoutError(msg, self.log)
        taken_mb = self._measure_memory()
        self.peak_mb = max(self.peak_mb, taken_mb)
        if taken_mb > self._limits.memory_mb:
            msg = (
                f"{self._name} was ended when it had taken {taken_mb:.0f} MB of memory, over its "
                f"limit of {self._limits.memory_mb:.0f} MB"
            )
            raise HopMemoryError(msg, self.log)

    def _measure_memory(self) -> float:
        self._look_for_processes()
        taken = 0
        for process in self._seen.values():
            with suppress(psutil.Error):
                taken += process.memory_info().rss
        return taken / _MB

    def _look_for_processes(self) -> None:
        """Keep sight of everything the tool has started, also of what its parent has left."""
        with suppress(psutil.Error):
            root = psutil.Process(self._process.pid)
            for process in (root, *root.children(recursive=True)):
                self._seen.setdefault(process.pid, process)

    def _fail(self) -> HopFailedError:
        """Say how the process ended, with its last lines."""
        try:
            code = self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            how = "closed its pipe and went on"
        else:
            how = _describe_end(code)
        self._end()
        lines = [line for line in self.log.splitlines() if line.strip()][-_LAST_LINES:]
        words = "\n".join(lines) or "it printed nothing"
        return HopFailedError(f"{self._name} {how}: {words}", self.log)

    def _end(self) -> None:
        """Kill what is left: the process's group, and what has left that group."""
        if self._is_over:
            return
        self._is_over = True
        self._look_for_processes()
        # The group is there as long as any process is in it, also after the first one's end.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in self._seen.values():
            with suppress(psutil.Error):
                process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(_END_LIMIT_S)

    def close(self) -> None:
        """End everything now; harmless when repeated."""
        self._end()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                _close_quietly(pipe)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _start(folder: Path, variables: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    # The child finds what this process finds; -P keeps the working directory off its path.
    path = [*filter(None, sys.path), str(_ROOT)]
    tether = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid())]
    return subprocess.Popen(
        [*tether, sys.executable, "-P", "-m", _MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            # What a tool that is killed leaves behind goes with the folder.
            "TMPDIR": str(folder),
            _SAFE_TORCH: "1",
            **variables,
        },
        # Ctrl-C is for the parent, which then ends the child; and a group of its own.
        start_new_session=True,
    )


def _describe_end(code: int) -> str:
    if code >= 0:
        return f"ended with {code} and without an answer"
    names = {known.value: known.name for known in signal.Signals}
    hint = " (perhaps by the kernel, out of memory)" if code == -signal.SIGKILL else ""
    return f"died with {names.get(-code, f'signal {-code}')}{hint}"


def _rebuild(error: Mapping[str, str], log: str) -> ConversionError:
    """Return the error that the child described, of its class and with its attributes."""
    kind = _find_kinds(ConversionError).get(error["code"], HopFailedError)
    found = kind(error["message"])
    for name in error.keys() - {"code", "message"}:
        setattr(found, name, error[name])
    if isinstance(found, HopError):
        found.log = log
    return found


def _find_kinds(root: type[ConversionError]) -> dict[str, type[ConversionError]]:
    kinds = {root.code: root}
    for kind in root.__subclasses__():
        kinds |= _find_kinds(kind)
    return kinds


def _close_quietly(pipe: IO[bytes]) -> None:
    with suppress(BrokenPipeError):
        pipe.close()
