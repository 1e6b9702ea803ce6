"""What a torch source itself answers: the reference that every artifact is judged by.

Options: as in `torch_source`; `rows`, an `.npz` with an array per input, axis 0 the rows; and
`output_names`. Writes an `.npz` with an array per output.
"""

from pathlib import Path

import numpy as np
import torch

from converters.errors import SourceError
from converters.routes.tools.torch_source import load_torch
from converters.task import Facts, Task
from platforms.measuring.sample import load_arrays, save_arrays

_BATCH = 8


def answer(task: Task) -> Facts:
    """Run the source on all rows.

    Raises:
        SourceError: it does not take them.
    """
    model = load_torch(task)
    arrays = load_arrays(Path(task.options["rows"]))
    missing = [name for name in model.input_names if name not in arrays]
    if missing:
        msg = f"the rows have no {', '.join(missing)}; the model takes {model.input_names}"
        raise SourceError(msg)
    total = len(arrays[model.input_names[0]])
    step = _BATCH if model.is_batch_free else len(model.example[0])
    parts: list[list[np.ndarray]] = []
    for start in range(0, total, step):
        task.report(start / total, f"row {start} of {total}")
        rows = tuple(
            torch.from_numpy(np.ascontiguousarray(arrays[name][start : start + step]))
            for name in model.input_names
        )
        try:
            parts.append([value.numpy() for value in model.run(rows)])
        except (RuntimeError, ValueError, TypeError, IndexError) as exc:
            msg = f"the source does not take the golden inputs: {exc}"
            raise SourceError(msg) from exc
    names = list(task.options["output_names"])
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    save_arrays(task.target, dict(zip(names, joined, strict=True)))
    return {"rows": total}
