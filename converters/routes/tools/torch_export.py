"""torch → `.pt2`, an exported program that loads without the model's Python code.

Tensors have the program's own names; the manifest's apply by their order.
"""

import torch

from converters.routes.tools.telling import tell
from converters.routes.tools.torch_program import export_program
from converters.routes.tools.torch_source import load_torch
from converters.task import Facts, Task


def convert(task: Task) -> Facts:
    """Write an exported program; options as in `torch_source`."""
    task.report(0.0, "reading the model")
    model = load_torch(task)
    task.report(0.3, "exporting")
    made = export_program(model)
    with task.target.open("wb") as file:
        torch.export.save(made.program, file)
    return tell(
        made.inputs, made.outputs, made.operators, model.find_precision(), ["torch"], made.notes
    )
