"""Distillation: a small net learns from a large one's answers, also on rows nobody labelled.

Owns the comparison that makes it honest: the same student, from the same first weights, is also
trained plainly on the labels alone, and both figures are told. With few labels distillation wins
by far, with all of them it may lose (ours, digits: docs/conversion.md), and the better is kept.

Runs in the process of a hop; torch is imported at the top.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from converters.compression.toolchain import (
    get_choice,
    open_session,
    read_options,
    read_versions,
)
from converters.compression.training import (
    UNLABELLED,
    Schedule,
    Trained,
    TrainingData,
    answer,
    build_module,
    fit,
    load_data,
    measure_accuracy,
    save_program,
)
from converters.errors import RecipeError, TrainingError
from converters.task import Facts, ModelFile, ModelFormat, Report, Task

_RUNTIMES = {
    ModelFormat.ONNX: "ort",
    ModelFormat.TFLITE: "litert",
    ModelFormat.OPENVINO: "openvino",
}
_SUM_TOLERANCE = 1e-3

OPTIONS: dict[str, Any] = {
    "data": "",
    "teacher": "",
    "teacher_format": ModelFormat.ONNX.value,
    "teacher_name": "",
    "teacher_weights": "",
    "temperature": 4.0,
    "label_share": 0.3,
    "keep": "best",
    "epochs": 30,
    "rate": 2e-3,
    "patience": 8,
    "time_limit_s": 600.0,
    "seed": Schedule.seed,
}


@dataclass(frozen=True)
class Mixture:
    """How the two teachers of a student, the net and the labels, are weighed."""

    temperature: float = 4.0
    """Softens the teacher's scores, so that second-best classes teach, too (Hinton, Vinyals and
    Dean, arXiv:1503.02531, section 2)."""
    label_share: float = 0.3
    """Weight of the labels' loss on rows that have one; the rest is the teacher's."""


@dataclass
class Outcome:
    """What came of a distillation."""

    student: nn.Module
    """The better of the two, or the one asked for."""
    kept: str
    """`distilled` or `plain`."""
    facts: dict[str, Any] = field(default_factory=dict)


def distill(
    teacher_scores: Tensor,
    teacher_held: Tensor,
    student: nn.Module,
    data: TrainingData,
    schedule: Schedule | None = None,
    mixture: Mixture | None = None,
    keep: str = "best",
    report: Report = lambda share, doing: None,
) -> Outcome:
    """Train a student twice, with and without its teacher, and tell both.

    Args:
        teacher_scores: of `data.x`, `float32[N, C]`, before softmax.
        teacher_held: of `data.held_x`.
        student: untrained or not; left as it is.
        data: rows; labels where there are any.
        schedule: limits of each of the two trainings.
        mixture: weights of teacher and labels.
        keep: `best` by the held-out rows, `distilled` or `plain`.
        report: told of progress.

    Raises:
        TrainingError: student and teacher have different classes, or training fails.
    """
    schedule, mixture = schedule or Schedule(), mixture or Mixture()
    _check_classes(student, data, teacher_scores)
    judge = _build_judge(data, teacher_held)
    distilled = copy.deepcopy(student)
    loss = _build_loss(teacher_scores, data.y, mixture)
    half = 0.5 if len(data.labelled) else 1.0
    trained = fit(
        distilled, data.x, loss, judge, schedule, lambda s, d: report(s * half, f"distilled, {d}")
    )
    nets: dict[str, nn.Module] = {"distilled": distilled}
    facts: dict[str, Any] = {"distilled": _tell(distilled, trained, data, teacher_held)}
    if len(data.labelled):
        plain = copy.deepcopy(student)
        trained = _train_plainly(plain, data, judge, schedule, report)
        nets["plain"], facts["plain"] = plain, _tell(plain, trained, data, teacher_held)
    kept = _choose(facts, keep)
    facts |= {
        "kept": kept,
        "rows": len(data.x),
        "labelled_rows": len(data.labelled),
        "held_out_rows": len(data.held_x),
        "teacher_accuracy": _measure_teacher(teacher_held, data.held_y),
        "seed": schedule.seed,
    }
    return Outcome(nets[kept], kept, facts)


def _check_classes(student: nn.Module, data: TrainingData, teacher_scores: Tensor) -> None:
    scores = answer(student, data.x[:2])
    if scores.shape[1] != teacher_scores.shape[1]:
        msg = f"the student has {scores.shape[1]} classes, the teacher {teacher_scores.shape[1]}"
        raise TrainingError(msg)
    known = data.y[data.y != UNLABELLED] if data.y is not None else torch.empty(0)
    if len(known) and not 0 <= int(known.min()) <= int(known.max()) < scores.shape[1]:
        msg = f"a label is {int(known.min())} or {int(known.max())}, of {scores.shape[1]} classes"
        raise TrainingError(msg)


def _build_loss(
    teacher_scores: Tensor, y: Tensor | None, mixture: Mixture
) -> Callable[[Tensor, Tensor], Tensor]:
    heat = mixture.temperature
    soft = functional.softmax(teacher_scores / heat, dim=1)

    def compute(scores: Tensor, rows: Tensor) -> Tensor:
        mine = functional.log_softmax(scores / heat, dim=1)
        # By the square of the heat, so that its gradients stay as large as the labels'.
        from_teacher = functional.kl_div(mine, soft[rows], reduction="batchmean") * heat**2
        if y is None or not bool((y[rows] != UNLABELLED).any()):
            return from_teacher
        from_labels = functional.cross_entropy(scores, y[rows], ignore_index=UNLABELLED)
        return (1 - mixture.label_share) * from_teacher + mixture.label_share * from_labels

    return compute


def _train_plainly(
    plain: nn.Module,
    data: TrainingData,
    judge: Callable[[nn.Module], float],
    schedule: Schedule,
    report: Report,
) -> Trained:
    # Over and over, so that it makes as many steps in an epoch as the distilled one.
    labelled = data.labelled.repeat(-(-len(data.x) // len(data.labelled)))[: len(data.x)]
    labels = data.y[labelled] if data.y is not None else labelled

    def compute(scores: Tensor, rows: Tensor) -> Tensor:
        return functional.cross_entropy(scores, labels[rows])

    return fit(
        plain,
        data.x[labelled],
        compute,
        judge,
        schedule,
        lambda share, doing: report(0.5 + share * 0.5, f"plain, {doing}"),
    )


def _build_judge(data: TrainingData, teacher_held: Tensor) -> Callable[[nn.Module], float]:
    """Judge by the labels held out; without any, by agreement with the teacher."""
    if data.held_y is None or not bool((data.held_y != UNLABELLED).any()):
        return lambda net: _measure_agreement(net, data, teacher_held)
    held_y = data.held_y
    return lambda net: measure_accuracy(net, data.held_x, held_y)


def _measure_agreement(net: nn.Module, data: TrainingData, teacher_held: Tensor) -> float:
    return float((answer(net, data.held_x).argmax(1) == teacher_held.argmax(1)).float().mean())


def _measure_teacher(teacher_held: Tensor, held_y: Tensor | None) -> float | None:
    if held_y is None or not bool((held_y != UNLABELLED).any()):
        return None
    known = held_y != UNLABELLED
    return round(float((teacher_held.argmax(1) == held_y)[known].float().mean()), 4)


def _tell(
    net: nn.Module, trained: Trained, data: TrainingData, teacher_held: Tensor
) -> dict[str, Any]:
    has_labels = data.held_y is not None and bool((data.held_y != UNLABELLED).any())
    accuracy = trained.score if has_labels else None
    return {
        "accuracy": None if accuracy is None else round(accuracy, 4),
        "agreement": round(_measure_agreement(net, data, teacher_held), 4),
        "epochs": trained.epochs,
        "best_epoch": trained.best_epoch,
        "why_ended": trained.why_ended,
    }


def _choose(facts: dict[str, Any], keep: str) -> str:
    if "plain" not in facts:
        return "distilled"
    if keep != "best":
        return keep
    plain, distilled = facts["plain"], facts["distilled"]
    key = "accuracy" if plain["accuracy"] is not None else "agreement"
    return "plain" if plain[key] > distilled[key] else "distilled"


def run(task: Task) -> Facts:
    """Distill into the student that the task's source builds; write it as `.pt2`.

    Options: `data` (see `training.load_data`), needed; `teacher` (a file), needed, of
    `teacher_format` onnx, tflite, openvino, or callable (`teacher_name` the function) or
    state_dict (`teacher` the Python file, `teacher_weights` the weights); `temperature`,
    `label_share`: see `Mixture`; `keep`: `best`, `distilled` or `plain`; `epochs`, `rate`,
    `patience`, `time_limit_s`, `seed`: see `training.Schedule`.

    Raises:
        RecipeError: an option does not fit.
        TrainingError: the data or one of the nets does not.
        PlatformError: the teacher's file cannot be run.
    """
    options = read_options(task, OPTIONS)
    get_choice(options, "keep", ("best", "distilled", "plain"))
    for name in ("data", "teacher"):
        if not options[name]:
            msg = f"distillation needs the option {name}"
            raise RecipeError(msg)
    data = load_data(Path(options["data"]), options["seed"])
    torch.manual_seed(options["seed"])
    student = build_module(task.source)
    task.report(0.0, "asking the teacher")
    outcome = distill(
        ask_teacher(options, data.x),
        ask_teacher(options, data.held_x),
        student,
        data,
        Schedule(
            options["epochs"],
            options["rate"],
            options["patience"],
            options["time_limit_s"],
            options["seed"],
        ),
        Mixture(options["temperature"], options["label_share"]),
        options["keep"],
        task.report,
    )
    save_program(outcome.student, data.x, task.target)
    return {
        "recipe": "torch_distilled",
        "is_no_op": False,
        "no_op_reason": None,
        "parameters": sum(p.numel() for p in outcome.student.parameters()),
        "size_bytes": task.target.stat().st_size,
        "tools": read_versions("torch"),
        **outcome.facts,
    }


def ask_teacher(options: dict[str, Any], x: Tensor) -> Tensor:
    """Return a teacher's scores for rows, whatever format it is in; probabilities as logarithms.

    Raises:
        RecipeError: its format is none that can be asked.
        TrainingError, PlatformError: it cannot run on these rows.
    """
    try:
        kind = ModelFormat(options["teacher_format"])
    except ValueError as exc:
        msg = f"there is no format {options['teacher_format']!r}"
        raise RecipeError(msg) from exc
    path, name = Path(options["teacher"]), options["teacher_name"] or None
    if kind is ModelFormat.CALLABLE:
        return _to_logits(answer(build_module(ModelFile(path, kind, name=name)), x))
    if kind is ModelFormat.STATE_DICT:
        weights = Path(options["teacher_weights"])
        return _to_logits(
            answer(build_module(ModelFile(weights, kind, name=name, builder=path)), x)
        )
    if kind not in _RUNTIMES:
        msg = f"a teacher is a callable, state_dict, onnx, tflite or openvino, not {kind.value}"
        raise RecipeError(msg)
    return _to_logits(_ask_runtime(path, _RUNTIMES[kind], x))


def _ask_runtime(path: Path, runtime: str, x: Tensor) -> Tensor:
    session = open_session(path, runtime)
    try:
        spec = session.inputs[0]
        step = len(x) if spec.has_free_batch else spec.shape[0]
        # Filled up to whole batches where the batch is fixed.
        rows = np.resize(x.numpy(), (-(-len(x) // step) * step, *x.shape[1:]))
        parts = [
            session.run({spec.name: rows[start : start + step]})[session.outputs[0].name]
            for start in range(0, len(rows), step)
        ]
    finally:
        session.close()
    return torch.from_numpy(np.concatenate(parts)[: len(x)].astype(np.float32))


def _to_logits(scores: Tensor) -> Tensor:
    is_share = bool((scores >= 0).all()) and bool(
        ((scores.sum(1) - 1).abs() < _SUM_TOLERANCE).all()
    )
    return scores.clamp_min(1e-7).log() if is_share else scores
