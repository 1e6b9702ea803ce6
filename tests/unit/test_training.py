"""The training loop's data contract and its limits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.compression.training import Schedule, fit, load_data
from converters.errors import TrainingError

X = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
Y = np.arange(40) % 2


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_a_fifth_of_the_labelled_rows_is_held_out_by_the_seed(tmp_path: Path) -> None:
    y = Y.copy()
    y[20:] = -1
    path = write(tmp_path / "a.npz", x=X, y=y)
    first, again, other = load_data(path), load_data(path), load_data(path, seed=2)

    assert (len(first.x), len(first.held_x), len(first.labelled)) == (36, 4, 16)
    assert first.held_y is not None
    assert bool((first.held_y != -1).all())
    assert torch.equal(first.held_x, again.held_x)
    assert not torch.equal(first.held_x, other.held_x)


def test_rows_held_out_by_the_user_are_taken_as_they_are(tmp_path: Path) -> None:
    found = load_data(write(tmp_path / "a.npz", x=X, y=Y, held_x=X[:5], held_y=Y[:5]))
    assert (len(found.x), len(found.held_x)) == (40, 5)


def test_rows_without_any_label_need_none(tmp_path: Path) -> None:
    for arrays in ({"x": X}, {"x": X, "y": np.full(40, -1)}):
        found = load_data(write(tmp_path / "a.npz", **arrays))
        assert (len(found.x), len(found.held_x), len(found.labelled)) == (32, 8, 0)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": X}, "needs an array x"),
        ({"x": X[:5]}, "at least 10 rows"),
        ({"x": X[:, 0]}, "needs an array x"),
        ({"x": np.full((20, 3), np.nan, np.float32)}, "NaN"),
        ({"x": X, "y": Y[:5]}, "whole numbers"),
        ({"x": X, "y": Y.astype(np.float32)}, "whole numbers"),
        ({"x": np.array([{}] * 20, dtype=object)}, "plain arrays"),
    ],
)
def test_data_of_another_form_is_refused(
    tmp_path: Path, arrays: dict[str, Any], words: str
) -> None:
    with pytest.raises(TrainingError, match=words):
        load_data(write(tmp_path / "a.npz", **arrays))


def train_line(judged: list[float], **limits: Any) -> tuple[torch.nn.Linear, Any]:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    scores = iter(judged)
    trained = fit(
        net,
        torch.from_numpy(X),
        lambda found, rows: found.square().mean(),
        lambda net: next(scores),
        Schedule(**limits),
    )
    return net, trained


def test_the_best_state_is_kept_and_not_the_last() -> None:
    net, trained = train_line([0.0, 0.9, 0.2, 0.1], epochs=3)
    best, _ = train_line([0.0, 0.9], epochs=1)
    assert (trained.best_epoch, trained.score, trained.epochs) == (1, 0.9, 3)
    assert torch.equal(net.weight, best.weight)


def test_the_state_before_training_is_kept_where_nothing_is_better() -> None:
    torch.manual_seed(0)
    untrained = torch.nn.Linear(3, 2)
    net, trained = train_line([0.9, 0.2, 0.1, 0.1], epochs=9, patience=3)
    assert (trained.best_epoch, trained.epochs) == (0, 3)
    assert trained.why_ended == "no better score in 3 epochs"
    assert torch.equal(net.weight, untrained.weight)


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    with pytest.raises(TrainingError, match="a smaller rate"):
        fit(
            torch.nn.Linear(3, 2),
            torch.from_numpy(X),
            lambda found, rows: found.sum() * torch.nan,
            lambda net: 0.0,
            Schedule(epochs=1),
        )


def test_no_rows_are_refused() -> None:
    with pytest.raises(TrainingError, match="no row"):
        fit(
            torch.nn.Linear(3, 2),
            torch.zeros(0, 3),
            lambda found, rows: found.sum(),
            lambda net: 0.0,
            Schedule(),
        )
