"""ONNX → LiteRT by onnx2tf, which lives in an environment of its own.

Owns the copy that onnx2tf may overwrite (it does, in place), the choice of its float32 file, the
names and the layout (the ONNX file's), and the batch: one that is free and does not work is made 1.

Its packages are pinned exactly and need Python 3.12, so that they share no environment with ours:
the variable `EDGEWARD_ONNX2TF_PYTHON`, or the option `python`, names that environment's
interpreter.

Source: onnx2tf 2.6.9, `onnx2tf --help`; that it overwrites its input is our measurement.
"""

import os
import re
import shutil
from pathlib import Path

import onnx

from converters.errors import HopFailedError, OperatorError
from converters.routes.registry import ONNX2TF_VARIABLE, PYTHON_OPTION
from converters.routes.tools.command import run_command
from converters.routes.tools.litert_names import (
    fix_batch,
    has_working_batch,
    name_signature,
    read_specs,
)
from converters.routes.tools.telling import tell
from converters.task import Facts, Task
from platforms.artifact import Precision

_MISSING = re.compile(r"ERROR:\s*(?:The )?(\w+) OP is not (?:yet )?(?:implemented|supported)", re.I)


def convert(task: Task) -> Facts:
    """Write a `.tflite` file in the ONNX file's layout, the batch free where that works.

    Raises:
        OperatorError: onnx2tf has no form of an operator.
        HopFailedError: it failed, or left no float32 file.
    """
    inputs, outputs = _read_names(task.source.path)
    task.report(0.1, "converting")
    _convert(task, inputs)
    name_signature(_find_float(task.scratch / "made"), task.target, inputs, outputs)
    notes = []
    if not has_working_batch(task.target):
        fix_batch(task.target)
        notes.append("the batch is 1: the runtime runs row by row")
    specs_in, specs_out, operators = read_specs(task.target)
    return tell(specs_in, specs_out, operators, Precision.FP32, ["ai-edge-litert"], notes)


def _convert(task: Task, inputs: list[str]) -> None:
    copy, made = task.scratch / "model.onnx", task.scratch / "made"
    shutil.copyfile(task.source.path, copy)
    for part in task.source.path.parent.iterdir():
        if part != task.source.path:
            shutil.copyfile(part, task.scratch / part.name)
    python = str(task.options.get(PYTHON_OPTION) or os.environ[ONNX2TF_VARIABLE])
    # -coion: the ONNX file's names; -kat: the ONNX file's layout, where NHWC is the default.
    command = [python, "-m", "onnx2tf", "-i", str(copy), "-o", str(made), "-n", "-coion"]
    try:
        run_command("onnx2tf", [*command, "-kat", *inputs], task.scratch, is_isolated=True)
    except HopFailedError as exc:
        found = _MISSING.search(str(exc))
        if found is None:
            raise
        msg = f"onnx2tf has no form of {found[1]}"
        raise OperatorError(msg, found[1]) from exc


def _find_float(folder: Path) -> Path:
    found = sorted(folder.glob("*_float32.tflite"))
    if not found:
        msg = "onnx2tf ended well and left no float32 file"
        raise HopFailedError(msg)
    return found[0]


def _read_names(path: Path) -> tuple[list[str], list[str]]:
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in weights]
    return inputs, [value.name for value in graph.output]
