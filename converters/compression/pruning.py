"""Pruning: whole channels taken out of a torch net, and a short training to make up for it.

Owns the choice of what may not be pruned, the check that the net still is one, and the honest
count: operations and parameters before and after. Runs in the process of a hop; torch is imported
at the top, torch-pruning (extra `compress`) inside.

Structured pruning makes a smaller net. Masks, as `torch.nn.utils.prune` sets, put zeros into one of
the same size and speed: offered for studies, and always told to be a no-op.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune as masks

from converters.compression.toolchain import (
    TOOL_FAULTS,
    get_choice,
    import_library,
    read_options,
    read_versions,
)
from converters.compression.training import (
    UNLABELLED,
    Schedule,
    TrainingData,
    answer,
    build_module,
    fit,
    load_data,
    measure_accuracy,
    save_program,
)
from converters.errors import CompressionError, RecipeError, TrainingError
from converters.task import Facts, Task

EXTRA = "compress"
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

OPTIONS: dict[str, Any] = {
    "data": "",
    "method": "channels",
    "ratio": 0.5,
    "round_to": 8,
    "epochs": 10,
    "rate": 1e-3,
    "patience": 4,
    "time_limit_s": 600.0,
    "seed": Schedule.seed,
}


def run(task: Task) -> Facts:
    """Prune the net that the task's source builds, train it shortly, write it as `.pt2`.

    Options: `data` (see `training.load_data`), needed; rows without labels are taught by the net
    as it was. `method`: `channels`, or `masks`, which changes neither size nor speed; `ratio` of
    channels (or weights) to take out; `round_to`: channels left are a multiple of it, which kernels
    run faster on; `epochs` (0: none), `rate`, `patience`, `time_limit_s`, `seed`: see
    `training.Schedule`.

    Raises:
        RecipeError: an option does not fit.
        TrainingError: the data does not, or training fails.
        CompressionError: the net cannot be pruned, as one with attention written by hand.
        ToolMissingError: torch-pruning is not installed.
    """
    options = read_options(task, OPTIONS)
    method = get_choice(options, "method", ("channels", "masks"))
    if not 0 < options["ratio"] < 1:
        msg = f"option ratio is between 0 and 1, not {options['ratio']:g}"
        raise RecipeError(msg)
    if not options["data"]:
        msg = "pruning needs the option data"
        raise RecipeError(msg)
    data = load_data(Path(options["data"]), options["seed"])
    net = build_module(task.source)
    before = answer(net, data.x)
    example = data.x[:1]
    counted = count_work(net, example)
    task.report(0.1, f"pruning {method}")
    pruned = (
        prune_channels(net, example, options["ratio"], options["round_to"])
        if method == "channels"
        else prune_weights(net, options["ratio"])
    )
    judge = _build_judge(data, answer(net, data.held_x))
    facts = {"score_before": judge(net), "score_pruned": judge(pruned)}
    facts |= _fine_tune(pruned, before, data, judge, options, task)
    save_program(pruned, data.x, task.target)
    return _tell(task, method, counted, count_work(pruned, example), facts, data)


def count_work(net: nn.Module, example: Tensor) -> dict[str, int]:
    """Return what one row costs: `macs`, multiplications with addition, and `parameters`.

    Raises:
        ToolMissingError: torch-pruning is not installed.
    """
    library = import_library("torch_pruning", EXTRA)
    macs, parameters = library.utils.count_ops_and_params(copy.deepcopy(net), example)
    return {"macs": int(macs), "parameters": int(parameters)}


def prune_channels(net: nn.Module, example: Tensor, ratio: float, round_to: int) -> nn.Module:
    """Return a smaller copy: the channels of least weight taken out, and what hangs on them.

    The layer that gives the answer keeps its channels.

    Raises:
        CompressionError: torch-pruning cannot follow the net, or what is left does not run.
        ToolMissingError: it is not installed.
    """
    library = import_library("torch_pruning", EXTRA)
    made = copy.deepcopy(net)
    wanted = answer(made, example.repeat(2, *[1] * (example.ndim - 1))).shape
    last = _find_last_layer(made, example)
    advice = (
        "nets whose code counts channels, such as attention written by hand, cannot be pruned so: "
        "distill into a smaller one instead"
    )
    try:
        pruner = library.pruner.BasePruner(
            made,
            example,
            importance=library.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[last],
            round_to=round_to or None,
        )
        pruner.step()
        found = answer(made, example.repeat(2, *[1] * (example.ndim - 1))).shape
    except (*TOOL_FAULTS, TrainingError) as exc:
        msg = f"the net does not run with fewer channels: {exc}; {advice}"
        raise CompressionError(msg) from exc
    if found != wanted:
        msg = f"with fewer channels the net gives {[*found]} instead of {[*wanted]}; {advice}"
        raise CompressionError(msg)
    return made


def _find_last_layer(net: nn.Module, example: Tensor) -> nn.Module:
    """Return the layer with weights that ran last.

    Raises:
        CompressionError: there is none.
    """
    seen: list[nn.Module] = []
    layers = [layer for layer in net.modules() if isinstance(layer, _LAYERS)]
    hooks = [
        layer.register_forward_hook(lambda layer, given, gave: seen.append(layer))
        for layer in layers
    ]
    try:
        answer(net, example)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        msg = "the net has no convolution and no linear layer to prune"
        raise CompressionError(msg)
    return seen[-1]


def prune_weights(net: nn.Module, ratio: float) -> nn.Module:
    """Return a copy whose smallest weights are 0. It is as large and as slow as before.

    Raises:
        CompressionError: there are no weights to prune.
    """
    made = copy.deepcopy(net)
    weights = [(layer, "weight") for layer in made.modules() if isinstance(layer, _LAYERS)]
    if not weights:
        msg = "the net has no convolution and no linear layer to prune"
        raise CompressionError(msg)
    masks.global_unstructured(weights, pruning_method=masks.L1Unstructured, amount=ratio)
    return made


def _finish_masks(net: nn.Module) -> None:
    """Turn masks into the zeros that they stand for."""
    for layer in net.modules():
        if isinstance(layer, _LAYERS) and masks.is_pruned(layer):
            # Any: torch leaves it untyped.
            finish: Any = masks.remove
            finish(layer, "weight")


def _build_judge(data: TrainingData, held_before: Tensor) -> Callable[[nn.Module], float]:
    """Judge by the labels held out; without any, by agreement with the net as it was."""
    if data.held_y is not None and bool((data.held_y != UNLABELLED).any()):
        held_y = data.held_y
        return lambda net: measure_accuracy(net, data.held_x, held_y)
    best = held_before.argmax(1)
    return lambda net: float((answer(net, data.held_x).argmax(1) == best).float().mean())


def _fine_tune(
    net: nn.Module,
    before: Tensor,
    data: TrainingData,
    judge: Callable[[nn.Module], float],
    options: dict[str, Any],
    task: Task,
) -> dict[str, Any]:
    """Train on the labels where rows have one, on the old net's answers where not."""
    y = (
        before.argmax(1)
        if data.y is None
        else torch.where(data.y == UNLABELLED, before.argmax(1), data.y)
    )

    def compute(scores: Tensor, rows: Tensor) -> Tensor:
        return functional.cross_entropy(scores, y[rows])

    trained = fit(
        net,
        data.x,
        compute,
        judge,
        Schedule(
            options["epochs"],
            options["rate"],
            options["patience"],
            options["time_limit_s"],
            options["seed"],
        ),
        lambda share, doing: task.report(0.2 + 0.7 * share, doing),
    )
    _finish_masks(net)
    return {
        "score_after": trained.score,
        "epochs": trained.epochs,
        "why_ended": trained.why_ended,
    }


def _tell(
    task: Task,
    method: str,
    before: dict[str, int],
    after: dict[str, int],
    facts: dict[str, Any],
    data: TrainingData,
) -> Facts:
    no_op = None
    if method == "masks":
        no_op = "masks only put zeros into the weights: size and speed are what they were"
    elif after["macs"] >= before["macs"]:
        no_op = "no channel could be taken out: operations and parameters are what they were"
    has_labels = data.held_y is not None and bool((data.held_y != UNLABELLED).any())
    scores = {
        key: round(value, 4) if isinstance(value, float) else value for key, value in facts.items()
    }
    return {
        "recipe": "torch_pruned" if method == "channels" else "torch_masked",
        "is_no_op": no_op is not None,
        "no_op_reason": no_op,
        "macs_before": before["macs"],
        "macs": after["macs"],
        "parameters_before": before["parameters"],
        "parameters": after["parameters"],
        "score_is": "accuracy" if has_labels else "agreement",
        "size_bytes": task.target.stat().st_size,
        "tools": read_versions("torch", "torch-pruning"),
        **scores,
    }
