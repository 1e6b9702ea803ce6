"""A short training loop over a user's data, for nets that were pruned or are to be distilled.

Owns the data contract, the loop and the building of a torch module from a user's file. Runs in the
process of a hop: torch is imported at the top, and the user's code runs here.

Invariants: the same data, seed and number of epochs train the same net on the same machine; what
is judged by was not trained on; the best state seen is the one that is kept.
"""

import copy
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from converters.errors import TrainingError
from converters.task import ModelFile, ModelFormat, Report

UNLABELLED = -1
SEED = 20_260
HELD_OUT_SHARE = 0.2
_MIN_ROWS = 10
_ORIGIN = "EDGEWARD_SOURCE_FOLDER"
"""The original's folder, as `converters.routes.hop` tells it: the file itself is a copy."""
_BATCH = 64


@dataclass(frozen=True)
class TrainingData:
    """Rows to train with, apart from those to judge by."""

    x: Tensor
    """`[N, …]`, as the net takes it."""
    y: Tensor | None
    """Classes `int64[N]`, −1 where a row has no label; None: no row has."""
    held_x: Tensor
    held_y: Tensor | None

    @property
    def labelled(self) -> Tensor:
        """Which rows have a label, as indices."""
        if self.y is None:
            return torch.empty(0, dtype=torch.int64)
        return torch.nonzero(self.y != UNLABELLED).flatten()


@dataclass(frozen=True)
class Schedule:
    """How long a loop may train, and how fast."""

    epochs: int = 20
    rate: float = 1e-3
    patience: int = 5
    """Epochs without a better score on the held-out rows after which it ends; 0: never."""
    time_limit_s: float = 600.0
    """No epoch begins after so long; makes the result depend on the machine's speed."""
    seed: int = SEED


@dataclass(frozen=True)
class Trained:
    """How a loop went; the net holds its best state."""

    score: float
    """Of the best state on the held-out rows: higher is better."""
    best_epoch: int
    epochs: int
    why_ended: str


def load_data(path: Path, seed: int = SEED) -> TrainingData:
    """Read an `.npz` with `x`, and optionally `y`; a fifth of the rows is held out by `seed`.

    `y` holds whole numbers, −1 for a row without a label; rows are held out of the labelled ones
    where there are any, so that accuracy can be told. `held_x` and `held_y`, where the file has
    them, are held out instead, and all other rows are trained on.

    Raises:
        TrainingError: the file is not that.
    """
    arrays = _read_arrays(path)
    x, y = arrays["x"], arrays.get("y")
    _check_labels(path, x, y)
    if "held_x" in arrays:
        held_x, held_y = arrays["held_x"], arrays.get("held_y")
        _check_labels(path, held_x, held_y)
        return _make_data(x, y, held_x, held_y)
    candidates = np.arange(len(x)) if y is None else np.nonzero(y != UNLABELLED)[0]
    if not len(candidates):
        candidates, y = np.arange(len(x)), None
    order = np.random.default_rng(seed).permutation(candidates)
    held = order[: max(1, int(len(order) * HELD_OUT_SHARE))]
    kept = np.setdiff1d(np.arange(len(x)), held)
    return _make_data(
        x[kept], None if y is None else y[kept], x[held], None if y is None else y[held]
    )


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as exc:
        msg = f"{path} is no .npz of plain arrays: {exc}"
        raise TrainingError(msg) from exc
    if "x" not in arrays or arrays["x"].ndim < 2 or len(arrays["x"]) < _MIN_ROWS:
        msg = f"{path} needs an array x of at least {_MIN_ROWS} rows, axis 0; it has {[*arrays]}"
        raise TrainingError(msg)
    return arrays


def _check_labels(path: Path, x: NDArray[Any], y: NDArray[Any] | None) -> None:
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        msg = f"{path}: x holds NaN or infinity"
        raise TrainingError(msg)
    if y is not None and (y.dtype.kind not in "iu" or y.shape != (len(x),)):
        msg = f"{path}: y must be whole numbers [{len(x)}], one a row, not {y.dtype}{[*y.shape]}"
        raise TrainingError(msg)


def _make_data(
    x: NDArray[Any], y: NDArray[Any] | None, held_x: NDArray[Any], held_y: NDArray[Any] | None
) -> TrainingData:
    def convert(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(
            array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64)
        )

    return TrainingData(
        convert(x),
        None if y is None else convert(y),
        convert(held_x),
        None if held_y is None else convert(held_y),
    )


def build_module(model: ModelFile) -> nn.Module:
    """Return the torch module of a user's function, with the weights beside it where given.

    Runs the user's file. Weights are read as tensors only, never unpickled.

    Raises:
        TrainingError: there is no such function, it fails, or the weights are not its net's.
    """
    file = model.builder if model.format is ModelFormat.STATE_DICT else model.path
    if file is None or model.name is None or model.format not in _BUILDABLE:
        msg = f"training takes FILE.py:NAME, not a {model.format.value} file"
        raise TrainingError(msg)
    spec = importlib.util.spec_from_file_location("edgeward_user_model", file)
    if spec is None or spec.loader is None:
        msg = f"{file} is no Python file"
        raise TrainingError(msg)
    module = importlib.util.module_from_spec(spec)
    origin = os.environ.get(_ORIGIN)
    if origin and origin not in sys.path:
        # Last: what lies beside the original hides no installed package.
        sys.path.append(origin)
    # Where dataclasses and pickle look a class's module up.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        built = getattr(module, model.name)()
        # With it may come example inputs, which training has no need of.
        net = built[0] if isinstance(built, tuple) else built
        if model.format is ModelFormat.STATE_DICT:
            net.load_state_dict(_read_weights(model.path))
    except Exception as exc:
        # The user's own code may raise anything.
        msg = f"{file.name}:{model.name} cannot be built: {type(exc).__name__}: {exc}"
        raise TrainingError(msg) from exc
    if not isinstance(net, nn.Module):
        msg = f"{file.name}:{model.name} gives a {type(net).__name__}, not a torch module"
        raise TrainingError(msg)
    return net.eval()


_BUILDABLE = (ModelFormat.CALLABLE, ModelFormat.STATE_DICT)


def _read_weights(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def answer(net: nn.Module, x: Tensor) -> Tensor:
    """Return the scores `float32[N, C]` of a net, without gradients.

    Raises:
        TrainingError: it cannot run on these rows, or gives something else.
    """
    net.eval()
    with torch.no_grad():
        try:
            parts = [net(x[start : start + _BATCH]) for start in range(0, len(x), _BATCH)]
        except (RuntimeError, TypeError, ValueError, IndexError) as exc:
            msg = f"the net cannot run on rows of shape {[*x.shape[1:]]}: {exc}"
            raise TrainingError(msg) from exc
    if not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
        msg = "the net must give one tensor of scores, [N, classes]"
        raise TrainingError(msg)
    return torch.cat(parts)


def measure_accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of rows whose best class is the label; rows without one do not count."""
    known = y != UNLABELLED
    if not bool(known.any()):
        return math.nan
    return float((answer(net, x).argmax(1) == y)[known].float().mean())


Loss = Callable[[Tensor, Tensor], Tensor]
"""Of the scores for a batch and the indices of its rows: a number to make small."""


def fit(
    net: nn.Module,
    x: Tensor,
    loss: Loss,
    judge: Callable[[nn.Module], float],
    schedule: Schedule,
    report: Report = lambda share, doing: None,
    clock: Callable[[], float] = time.monotonic,
) -> Trained:
    """Train a net in place by Adam; it ends in its best state.

    Args:
        net: trained in place.
        x: rows to train on.
        loss: what is made small.
        judge: what decides which state is best; the state before training counts, too.
        schedule: limits.
        report: told after each epoch.
        clock: seconds.

    Raises:
        TrainingError: the loss is no number, or the rows are none.
    """
    if not len(x):
        msg = "there is no row to train on"
        raise TrainingError(msg)
    torch.manual_seed(schedule.seed)
    generator = torch.Generator().manual_seed(schedule.seed)
    optimizer = torch.optim.Adam(net.parameters(), schedule.rate)
    end_at = clock() + schedule.time_limit_s
    best, best_state, best_epoch = judge(net), copy.deepcopy(net.state_dict()), 0
    epoch, why = 0, "all epochs were trained"
    for epoch in range(1, schedule.epochs + 1):
        _train_epoch(net, x, loss, optimizer, generator)
        score = judge(net)
        report(epoch / schedule.epochs, f"epoch {epoch}: {score:.4f}")
        if score > best:
            best, best_state, best_epoch = score, copy.deepcopy(net.state_dict()), epoch
        if schedule.patience and epoch - best_epoch >= schedule.patience:
            why = f"no better score in {schedule.patience} epochs"
            break
        if clock() >= end_at:
            why = "the time was over"
            break
    net.load_state_dict(best_state)
    net.eval()
    return Trained(best, best_epoch, epoch, why)


def _train_epoch(
    net: nn.Module,
    x: Tensor,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    net.train()
    order = torch.randperm(len(x), generator=generator)
    for start in range(0, len(x), _BATCH):
        rows = order[start : start + _BATCH]
        # Batch normalization knows no variance of one row.
        if len(rows) < 2:
            continue
        optimizer.zero_grad()
        value = loss(net(x[rows]), rows)
        if not bool(torch.isfinite(value)):
            msg = "the loss became infinite or no number: a smaller rate may help"
            raise TrainingError(msg)
        torch.autograd.backward(value)
        optimizer.step()
    net.eval()


def save_program(net: nn.Module, example: Tensor, path: Path) -> None:
    """Write a net as `.pt2`, its batch free, for the converters that follow.

    Raises:
        TrainingError: torch cannot export it.
    """
    try:
        program = torch.export.export(
            net.eval(), (example[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        for node in program.graph.nodes:
            # They name the machine's folders.
            node.meta.pop("stack_trace", None)
        torch.export.save(program, path)
    except (RuntimeError, TypeError, ValueError, AssertionError) as exc:
        msg = f"the trained net cannot be exported: {type(exc).__name__}: {exc}"
        raise TrainingError(msg) from exc
