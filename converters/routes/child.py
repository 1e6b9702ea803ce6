"""The child process in which one tool runs once.

Owns the child's side of two private pipes: standard input brings one request, one line of JSON;
a copy of standard output takes what the parent is told, a line of JSON each:

    {"progress": [share, doing]} …  then {"facts": {…}}  or  {"error": {"code", "message", …}}

What the tool prints, to standard output or error, goes to standard error, which the parent
keeps the end of. A tool sees an empty standard input. What a tool raises beside a
`ConversionError` ends the process with its traceback.

It runs at a low priority, and asks the kernel to take it first where memory runs out.
"""

import importlib
import json
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from converters.errors import ConversionError
from converters.routes.workspace import decode_model
from converters.task import Facts, Task, Tool

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_NICENESS = 10
_OOM_SCORE_FILE, _OOM_SCORE_HIGHEST = Path("/proc/self/oom_score_adj"), "1000"


class _Answers:
    """The way to the parent; tools may report from any thread."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(message) + "\n")
            self._file.flush()

    def report(self, share: float, doing: str) -> None:
        self.send({"progress": [min(1.0, max(0.0, share)), doing]})


def _run(request: Mapping[str, Any], answers: _Answers) -> Facts:
    module, _, function = request["entry"].partition(":")
    tool: Tool = getattr(importlib.import_module(module), function)
    return tool(
        Task(
            source=decode_model(request["source"]),
            target=Path(request["target"]),
            scratch=Path(request["scratch"]),
            options=request["options"],
            report=answers.report,
        )
    )


def _describe(error: ConversionError) -> dict[str, Any]:
    own = {key: value for key, value in vars(error).items() if isinstance(value, str)}
    return {"code": error.code, "message": str(error), **own}


def _give_way() -> None:
    """Let everything else on the box go first; where that is refused, go on."""
    with suppress(OSError):
        os.nice(_NICENESS)
    with suppress(OSError):
        _OOM_SCORE_FILE.write_text(_OOM_SCORE_HIGHEST, encoding="ascii")


def main() -> int:
    """Run the tool that the request names; return 0 where it did its work."""
    _give_way()
    with os.fdopen(os.dup(_STDOUT), "w", encoding="utf-8") as file:
        os.dup2(_STDERR, _STDOUT)
        answers = _Answers(file)
        request = json.loads(sys.stdin.readline())
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, _STDIN)
        os.close(empty)
        try:
            facts = _run(request, answers)
        except ConversionError as exc:
            answers.send({"error": _describe(exc)})
            return 1
        answers.send({"facts": dict(facts)})
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's farewell: libraries that hang or crash in it have done their work.
    os._exit(status)
