"""torch → LiteRT by litert-torch.

Owns the batch of 1 (litert-torch 0.10 fails on a free one; the runtime runs such a file row by
row) and the tensors' names: litert-torch calls them `args_0` and `output_0`, and the file's
signature is rewritten to the manifest's. 64-bit whole numbers become 32-bit.

Options: as in `torch_source`.
"""

import re

from converters.errors import OperatorError
from converters.routes.tools.litert_names import name_signature, read_specs
from converters.routes.tools.telling import compare_types, tell
from converters.routes.tools.torch_program import describe_rows, export_rows
from converters.routes.tools.torch_source import load_torch
from converters.task import Facts, Task

_AT = re.compile(r"While executing %(\S+) : .*?target=(?:torch\.ops\.)?([\w.]+)\]")
"""What torch.fx adds to an exception that a node's translation raised."""
_ERRORS = (RuntimeError, TypeError, ValueError, AssertionError)


def convert(task: Task) -> Facts:
    """Write a `.tflite` file.

    Raises:
        OperatorError: litert-torch cannot convert an operator.
    """
    task.report(0.0, "reading the model")
    model = load_torch(task)
    rows = model.make_rows(1)
    module = export_rows(model, 1)
    task.report(0.2, "converting")
    import litert_torch

    try:
        made = litert_torch.convert(module, rows)
    except _ERRORS as exc:
        found = _AT.search(str(exc))
        if found is None:
            raise
        msg = f"litert-torch cannot convert {found[2]} (node {found[1]}): {_get_first_line(exc)}"
        raise OperatorError(msg, found[2], found[1]) from exc
    raw = task.scratch / "unnamed.tflite"
    made.export(str(raw))
    task.report(0.9, "naming the tensors")
    inputs, outputs = describe_rows(model, 1)
    name_signature(
        raw, task.target, [spec.name for spec in inputs], [spec.name for spec in outputs]
    )
    found_inputs, found_outputs, operators = read_specs(task.target)
    notes = compare_types([*inputs, *outputs], [*found_inputs, *found_outputs])
    if model.is_batch_free:
        notes.append("the batch is 1: the runtime runs row by row")
    return tell(
        found_inputs,
        found_outputs,
        operators,
        model.find_precision(),
        ["torch", "litert-torch", "litert-converter"],
        notes,
    )


def _get_first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
