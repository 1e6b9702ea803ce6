"""Real handwritten digits for the demo, as picture files.

Owns the split of scikit-learn's digits (1,797 pictures of 8×8 pixels, UCI's "Optical
Recognition of Handwritten Digits", CC BY 4.0) into what the demo's model was trained
on and what it has never seen; samples come from the latter only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from agent.errors import ModelNotFoundError

SIDE = 8
HELD_OUT_SHARE = 0.25
SPLIT_SEED = 7

_LEVELS = 16
_ENLARGED_SIDE = 64
"""So that a person can see something; reduced again by the step `image`, without loss."""


@dataclass(frozen=True)
class DigitSplit:
    """Pictures as `uint8[N, 8, 8]`, white on black, and what they show as `int64[N]`."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    held_out_images: NDArray[np.uint8]
    held_out_labels: NDArray[np.int64]


@dataclass(frozen=True)
class DigitSample:
    """A picture file and the digit that it shows."""

    path: Path
    label: int


def load_digit_split() -> DigitSplit:
    """Return scikit-learn's digits, split by digit; the same split every time.

    Raises:
        ModelNotFoundError: scikit-learn is not installed; names the extra.
    """
    datasets, model_selection = _import_scikit_learn()
    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / _LEVELS)).astype(np.uint8)
    parts = model_selection.train_test_split(
        images,
        digits.target,
        test_size=HELD_OUT_SHARE,
        random_state=SPLIT_SEED,
        stratify=digits.target,
    )
    train_images, held_out_images, train_labels, held_out_labels = parts
    return DigitSplit(train_images, train_labels, held_out_images, held_out_labels)


def write_digit_samples(folder: Path, count: int) -> list[DigitSample]:
    """Write the first `count` held-out digits to `folder` as PNG of 64×64 pixels.

    There are 450; a larger count begins again from the first.

    Raises:
        ModelNotFoundError: scikit-learn is not installed; names the extra.
    """
    split = load_digit_split()
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(count):
        index = number % len(split.held_out_labels)
        label = int(split.held_out_labels[index])
        path = folder / f"digit-{number:04d}-shows-{label}.png"
        enlarged = Image.fromarray(split.held_out_images[index]).resize(
            (_ENLARGED_SIDE, _ENLARGED_SIDE), Image.Resampling.NEAREST
        )
        enlarged.save(path)
        samples.append(DigitSample(path, label))
    return samples


def _import_scikit_learn() -> tuple[Any, Any]:
    try:
        from sklearn import datasets, model_selection
    except ImportError as exc:
        msg = "the demo's digits need scikit-learn: pip install 'edgeward[demo]'"
        raise ModelNotFoundError(msg) from exc
    return datasets, model_selection
