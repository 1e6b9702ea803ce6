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

_MISSING = re.compile(r"Lowering not found: (\S+)")
_NODE = re.compile(r"While executing %(\S+)")


def convert(task: Task) -> Facts:
    """Write a `.tflite` file.

    Raises:
        OperatorError: litert-torch has no lowering of an operator.
    """
    task.report(0.0, "reading the model")
    model = load_torch(task)
    rows = model.make_rows(1)
    module = export_rows(model, 1)
    task.report(0.2, "converting")
    import litert_torch

    try:
        made = litert_torch.convert(module, rows)
    except RuntimeError as exc:
        found = _MISSING.search(str(exc))
        if found is None:
            raise
        node = _NODE.search(str(exc))
        msg = f"litert-torch has no lowering of {found[1]}"
        raise OperatorError(msg, found[1], node[1] if node else "") from exc
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
