"""torch → TorchScript by tracing.

TorchScript keeps neither shapes nor output names; the manifest's apply by order. Tracing fixes
what the Python code computes from shapes, so the trace is run with other numbers of rows.
"""

import warnings
from collections import Counter
from typing import Any

import torch

from converters.errors import HopFailedError
from converters.routes.tools.telling import tell
from converters.routes.tools.torch_program import export_program
from converters.routes.tools.torch_source import TorchModel, flatten, load_torch
from converters.task import Facts, Task

_ROWS = (1, 3)


def convert(task: Task) -> Facts:
    """Write a TorchScript file; options as in `torch_source`.

    Raises:
        HopFailedError: the trace works for the example's number of rows only.
    """
    task.report(0.0, "reading the model")
    model = load_torch(task)
    made = export_program(model)
    rows = model.example if made.is_batch_free else model.make_rows(1)
    task.report(0.4, "tracing")
    traced = trace(model.module, rows)
    if made.is_batch_free:
        _verify_rows(model, traced)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(traced, str(task.target))
    operators = Counter(node.kind() for node in traced.inlined_graph.nodes())
    notes = [*made.notes, "torch.jit is deprecated in torch 2.13: prefer pt2"]
    counted = {name: count for name, count in operators.items() if name.startswith("aten::")}
    return tell(made.inputs, made.outputs, counted, model.find_precision(), ["torch"], notes)


def trace(module: Any, example: tuple[torch.Tensor, ...]) -> Any:
    """Return a traced module; a ScriptModule as it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    with warnings.catch_warnings(), torch.inference_mode():
        # That it is deprecated, and each place where a shape becomes a constant.
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, example, check_trace=False)  # type: ignore[no-untyped-call]


def _verify_rows(model: TorchModel, traced: Any) -> None:
    for count in _ROWS:
        rows = model.make_rows(count)
        try:
            with torch.inference_mode():
                found = flatten(traced(*rows))[0]
        except RuntimeError as exc:
            msg = f"tracing fixes the batch: the trace fails on {count} rows; make a pt2 instead"
            raise HopFailedError(msg) from exc
        wanted = model.run(rows)
        if [value.shape for value in found] != [value.shape for value in wanted]:
            msg = f"tracing fixes the batch: {count} rows give another shape; make a pt2 instead"
            raise HopFailedError(msg)
