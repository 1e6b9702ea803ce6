"""SavedModel and TFLite → ONNX by tf2onnx, which brings TensorFlow.

Options: `opset` (18), `inputs` and `outputs` (names in order, in place of the source's).

Source: tf2onnx 1.17 `python -m tf2onnx.convert --help`. Tried by hand with
TensorFlow 2.21, not in our tests: it is an extra of 1.6 GB.
"""

import re
import sys

import onnx

from converters.errors import HopFailedError, OperatorError
from converters.routes.tools.command import run_command
from converters.routes.tools.onnx_specs import read_specs, rename
from converters.routes.tools.telling import tell
from converters.task import Facts, ModelFormat, Task
from platforms.artifact import Precision

_OPSET = 18
_IR_VERSION_HIGHEST = 10
_MISSING = re.compile(r"Tensorflow op \[([^:\]]+): (\w+)\] is not supported")


def convert(task: Task) -> Facts:
    """Write an ONNX file.

    Raises:
        OperatorError: tf2onnx has no form of an operator.
        HopFailedError: it failed, or the tensors are not those that are wanted.
    """
    switch = "--tflite" if task.source.format is ModelFormat.TFLITE else "--saved-model"
    opset = str(task.options.get("opset", _OPSET))
    task.report(0.1, "converting")
    printed = run_command(
        "tf2onnx",
        [
            *(sys.executable, "-m", "tf2onnx.convert", switch, str(task.source.path)),
            *("--output", str(task.target), "--opset", opset),
        ],
        task.scratch,
    )
    found = _MISSING.search(printed)
    if found is not None:
        msg = f"tf2onnx has no form of {found[2]} (node {found[1]})"
        raise OperatorError(msg, found[2], found[1])
    if not task.target.exists():
        msg = "tf2onnx ended well and wrote nothing"
        raise HopFailedError(msg)
    model = onnx.load(task.target)
    model.ir_version = min(model.ir_version, _IR_VERSION_HIGHEST)
    rename(model, task.options.get("inputs") or [], task.options.get("outputs") or [])
    onnx.save(model, task.target)
    inputs, outputs, operators = read_specs(task.target)
    packages = ["tensorflow-cpu", "tensorflow", "tf2onnx", "onnx"]
    return tell(inputs, outputs, operators, Precision.FP32, packages)
