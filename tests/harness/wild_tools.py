"""Conversion tools that behave as the worst of the real ones do; each runs in a hop's child.

What a tool is to do is in its option `do`, so that one entry serves every test.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from converters.errors import OperatorError
from converters.routes.registry import ToolEntry
from converters.task import Facts, ModelFormat, Task

_SLEEP = "import time; time.sleep(3600)"


def make_entry(**changes: Any) -> ToolEntry:
    """Return the wild tool's declaration."""
    given: dict[str, Any] = {
        "name": "wild",
        "sources": (ModelFormat.ONNX, ModelFormat.SAVED_MODEL),
        "target": ModelFormat.TFLITE,
        "entry": "tests.harness.wild_tools:convert",
        **changes,
    }
    return ToolEntry(**given)


def convert(task: Task) -> Facts:
    print(f"wild: {task.options['do']}")
    _ACTIONS[task.options["do"]](task)
    return {"did": task.options["do"], "source": str(task.source.path)}


def list_files(task: Task) -> Facts:
    """Tell what the source's folder holds."""
    task.target.write_bytes(b"told")
    folder = task.source.path
    files = (path for path in folder.rglob("*") if path.is_file())
    return {"files": sorted(path.relative_to(folder).as_posix() for path in files)}


def _calm(task: Task) -> None:
    task.report(0.5, "half of it")
    print("to standard output")
    print("to standard error", file=sys.stderr)
    task.target.write_bytes(task.source.path.read_bytes())
    task.target.with_suffix(".bin").write_bytes(b"beside")


def _overwrite(task: Task) -> None:
    _calm(task)
    task.source.path.write_bytes(b"optimized")


def _change_original(task: Task) -> None:
    _calm(task)
    Path(task.options["original"]).write_bytes(b"another")


def _start_child(task: Task, *, in_own_session: bool) -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", _SLEEP], start_new_session=in_own_session)
    task.report(0.1, str(child.pid))


def _hang(task: Task) -> None:
    _start_child(task, in_own_session=False)
    _start_child(task, in_own_session=True)
    threading.Event().wait()


def _eat(task: Task) -> None:
    eaten = []
    while True:
        eaten.append(bytes([1]) * 50_000_000)


def _eat_in_child(task: Task) -> None:
    code = "eaten = []\nwhile True: eaten.append(bytes([1]) * 50_000_000)"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


def _leave_nothing(task: Task) -> None:
    """Return as if all were well."""


def _leave_empty(task: Task) -> None:
    task.target.touch()


def _leave_empty_folder(task: Task) -> None:
    (task.target / "inner").mkdir(parents=True)
    (task.target / "inner" / "empty").touch()


def _leave_link(task: Task) -> None:
    task.target.symlink_to("/etc/hostname")


def _exit_well(task: Task) -> None:
    _calm(task)
    sys.stdout.flush()
    os._exit(0)


def _die(task: Task) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash(task: Task) -> None:
    sys.stderr.write("converter: internal check failed\n")
    sys.stderr.flush()
    os.abort()


def _raise(task: Task) -> None:
    msg = "a tensor of rank 7"
    raise RuntimeError(msg)


def _talk(task: Task) -> None:
    for number in range(20_000):
        print(f"line {number:06} of too many")
    _calm(task)


def _refuse_operator(task: Task) -> None:
    msg = "Nosuch has no form in TFLite"
    raise OperatorError(msg, "Nosuch", "/net/4/Nosuch")


def _read_input(task: Task) -> None:
    assert sys.stdin.read() == ""
    _calm(task)


def _tell_surroundings(task: Task) -> None:
    _calm(task)
    task.target.write_text(f"{os.nice(0)} {os.environ['TMPDIR']}", encoding="utf-8")


_ACTIONS = {
    "calm": _calm,
    "overwrite": _overwrite,
    "change_original": _change_original,
    "hang": _hang,
    "eat": _eat,
    "eat_in_child": _eat_in_child,
    "leave_nothing": _leave_nothing,
    "leave_empty": _leave_empty,
    "leave_empty_folder": _leave_empty_folder,
    "leave_link": _leave_link,
    "exit_well": _exit_well,
    "die": _die,
    "crash": _crash,
    "raise": _raise,
    "talk": _talk,
    "refuse_operator": _refuse_operator,
    "read_input": _read_input,
    "tell_surroundings": _tell_surroundings,
}
