"""The parent's hold on one measuring child.

Owns the child process from start to end: nothing that happens inside it reaches the caller
but an answer or a `MeasuringError`, and it never outlives the `with` block, nor (on Linux)
a parent that was killed.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil

from platforms.errors import MeasuringError

_TETHER = Path(__file__).parents[1] / "tether.py"
_MODULE = "platforms.measuring.child"
_LAST_WORDS_BYTES = 4096
_END_LIMIT_S = 5.0
_WATCH_S = 0.05

ANSWER_LIMIT_S = 600.0
"""For one answer beyond the time that was asked for: a large model from an SD card, compiled."""


class Measurer:
    """A child process that has loaded one model file.

    Use as a context manager; its end ends the child.

    Args:
        answer_limit_s: for one answer beyond the time that was asked for.
        memory_limit_mb: the child is ended where it takes more; None: no limit.
        interpreter: the Python of another environment, with NumPy, psutil and the runtime: the
            child then finds nothing of this one but `platforms`. None: this process's own.
        module: what the child runs; it speaks as `platforms.measuring.child` does.
    """

    def __init__(
        self,
        answer_limit_s: float = ANSWER_LIMIT_S,
        memory_limit_mb: float | None = None,
        *,
        interpreter: Path | None = None,
        module: str = _MODULE,
    ) -> None:
        self._stack = ExitStack()
        self._interpreter = interpreter
        self._module = module
        self._answer_limit_s = answer_limit_s
        self._memory_limit_mb = memory_limit_mb
        self._excess_mb: float | None = None
        self._over = threading.Event()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._process = self._start(self._find_path())
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="measurer", daemon=True)
        self._reader.start()
        if memory_limit_mb is not None:
            threading.Thread(target=self._watch, name="memory", daemon=True).start()

    def _watch(self) -> None:
        """End the child where it takes more memory than it may."""
        limit_mb = self._memory_limit_mb or 0.0
        with suppress(psutil.Error):
            child = psutil.Process(self._process.pid)
            while not self._over.wait(_WATCH_S):
                taken_mb = child.memory_info().rss / 10**6
                if taken_mb > limit_mb:
                    self._excess_mb = taken_mb
                    child.kill()
                    return

    def _find_path(self) -> list[str]:
        """Return where the child finds modules."""
        package = Path(__file__).parents[1]
        if self._interpreter is None:
            # What this process finds.
            return [*filter(None, sys.path), str(package.parent)]
        # Beside an installed `platforms` lie libraries that are not meant for the other Python.
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeward-path-"))
        (Path(folder) / package.name).symlink_to(package, target_is_directory=True)
        return [folder]

    def _start(self, path: list[str]) -> "subprocess.Popen[str]":
        tether = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid())]
        python = sys.executable if self._interpreter is None else str(self._interpreter)
        return subprocess.Popen(
            # -P keeps the working directory off its path.
            [*tether, python, "-P", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            text=True,
            encoding="utf-8",
            # Ctrl-C is for the parent, which then ends the child.
            start_new_session=True,
        )

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(
        self,
        request: dict[str, Any],
        seconds: float = 0.0,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Args:
            request: as `platforms.measuring.child` takes it.
            seconds: how long the work itself takes.
            on_progress: called with what the child reports on the way.

        Raises:
            MeasuringError: the child refused, died, or gave no answer in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise MeasuringError(self._describe_end()) from exc
        while True:
            answer = self._receive(seconds + self._answer_limit_s)
            if "progress" not in answer:
                break
            if on_progress is not None:
                on_progress(answer["progress"])
        if "error" in answer:
            error = answer["error"]
            raise MeasuringError(f"{error['message']} [{error['code']}]", error["code"])
        return answer

    def _receive(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            msg = f"no answer within {limit_s:g} s: the runtime hangs"
            raise MeasuringError(msg) from None
        if line is None:
            raise MeasuringError(self._describe_end())
        found: dict[str, Any] = json.loads(line)
        return found

    def _describe_end(self) -> str:
        """Say how the child died, with its last words."""
        try:
            code = self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            return "its process closed the pipe and did not end"
        if self._excess_mb is not None:
            limit_mb = self._memory_limit_mb or 0.0
            return f"it took {self._excess_mb:.0f} MB of memory, over the limit of {limit_mb:.0f}"
        if code < 0:
            names = {known.value: known.name for known in signal.Signals}
            how = f"its process died with {names.get(-code, f'signal {-code}')}"
        else:
            how = f"its process ended with {code}"
        return f"{how} ({self._read_last_words()})"

    def _read_last_words(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _LAST_WORDS_BYTES))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing on stderr"

    def close(self) -> None:
        """End the child now; harmless when repeated."""
        self._over.set()
        if self._process.poll() is None:
            # The whole group: what the runtime has started goes with it.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(_END_LIMIT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                _close_quietly(pipe)
        self._errors.close()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _close_quietly(pipe: IO[str]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        # A request that the dead child never read.
        return
