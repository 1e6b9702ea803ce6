"""The best classes of an output, as the protocol's classification extension words them.

Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md
"""

from typing import Any

import numpy as np

from platforms.runtimes.base import Array
from worker.engine.service import ModelInfo
from worker.rest.errors import RequestFormatError


def rank(scores: Array, classes: int, info: ModelInfo, name: str) -> Array:
    """Return `score:index[:label]` of the best classes, best first.

    Args:
        scores: numbers [N, …] with N the batch, or [...] where the model has none; all axes
            behind the batch together are the classes.
        classes: how many are wanted; fewer where there are fewer.
        info: the model, for its labels.
        name: of the output.

    Returns:
        object[N, k], or object[k] where the model has no batch.

    Raises:
        RequestFormatError: the output is of BYTES.
    """
    if scores.dtype.kind == "O":
        msg = f"output {name!r} is of BYTES: classification needs numbers"
        raise RequestFormatError(msg)
    count = len(scores) if info.max_batch_size and scores.ndim else 1
    rows = scores.reshape(count, scores.size // count if count else 0)
    labels = info.labels.get(name, ())
    k = min(classes, rows.shape[1])
    words = np.empty((len(rows), k), np.object_)
    for number, row in enumerate(rows):
        keys = row.astype(np.float64) if row.dtype.kind in "fb" else row.astype(object)
        best = np.argsort(-keys, kind="stable")[:k]
        for place, index in enumerate(best.tolist()):
            words[number, place] = _word(row[index].item(), index, labels)
    return words if info.max_batch_size else words[0]


def _word(score: Any, index: int, labels: tuple[str, ...]) -> str:
    # Six digits behind the point, as C++'s to_string writes them.
    text = f"{score:.6f}" if isinstance(score, float) else str(int(score))
    return f"{text}:{index}:{labels[index]}" if index < len(labels) else f"{text}:{index}"
