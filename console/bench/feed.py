"""Where the input rows come from: a golden set, a folder, or nothing but chance.

Owns the choice and its wording, since what a comparison is worth depends on its inputs. A
model's own preprocessing turns files into tensors, as for a job.

Invariants: the order is that of the file names; chance is seeded, so two runs see the same.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agent.manifest import Manifest
from console.bench.target import Target
from console.errors import InputFileError
from platforms.artifact import TensorSpec
from platforms.errors import TensorError
from platforms.measuring.sample import SEED, Shapes, make_random_inputs
from platforms.runtimes.base import Array
from worker.errors import WorkerError
from worker.processing.registry import build_preprocessor
from worker.processing.step import JobInput

GOLDEN_FOLDER = "golden"
"""Files of a manifest below this folder are its golden inputs."""

_PICTURE_SIDE, _PICTURE_PATCHES = 224, 9
_FILE_BYTES = 8192


@dataclass(frozen=True)
class Item:
    """One input, as it lies there."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Feed:
    """The inputs of a measurement."""

    items: tuple[Item, ...]
    """Empty where tensors are made by chance."""
    count: int
    description: str
    warning: str = ""
    """What the inputs are not good for; empty where they are real."""


def choose_feed(targets: Sequence[Target], wanted: str | None, count: int) -> Feed:
    """Choose the inputs for one model, or for two that are compared.

    Args:
        targets: the first one with a golden set, or with a preprocessing step, counts.
        wanted: `golden`, a folder, or None for the golden set where there is one, else chance.
        count: of inputs, at most.

    Raises:
        InputFileError: there is no golden set or folder, or it is empty.
    """
    if wanted not in (None, GOLDEN_FOLDER):
        return _read_folder(Path(wanted), count)
    for target in targets:
        files = [] if target.manifest is None else sorted(target.manifest.files)
        golden = [name for name in files if name.startswith(f"{GOLDEN_FOLDER}/")][:count]
        if golden:
            items = tuple(Item(name, (target.folder / name).read_bytes()) for name in golden)
            return Feed(items, len(items), f"{len(items)} golden inputs of {target.label}")
    if wanted is not None:
        msg = f"there is no golden set: the manifest lists no file below {GOLDEN_FOLDER}/"
        raise InputFileError(msg)
    return _make_feed(targets, count)


def _read_folder(folder: Path, count: int) -> Feed:
    if not folder.is_dir():
        msg = f"{folder} is no folder of inputs"
        raise InputFileError(msg)
    files = sorted(item for item in folder.iterdir() if item.is_file() and item.name[0] != ".")
    if not files:
        msg = f"{folder} holds no file"
        raise InputFileError(msg)
    items = tuple(Item(item.name, item.read_bytes()) for item in files[:count])
    return Feed(items, len(items), f"{len(items)} inputs of {folder.name}/")


def _make_feed(targets: Sequence[Target], count: int) -> Feed:
    steps = [target.manifest.preprocess.name for target in targets if target.manifest is not None]
    rng = np.random.default_rng(SEED)
    if "image" in steps:
        items, what = [_make_picture(rng) for _ in range(count)], "made-up pictures"
    elif "byte_window" in steps:
        items, what = [rng.bytes(_FILE_BYTES) for _ in range(count)], "files of random bytes"
    else:
        items, what = [], "random tensors"
    return Feed(
        tuple(Item(f"{number}", data) for number, data in enumerate(items)),
        count,
        f"{count} {what}",
        f"the inputs are {what}: speed is right, but how alike two models are shows on real "
        "inputs only; agreement by chance proves nothing, disagreement may be harmless",
    )


def _make_picture(rng: np.random.Generator) -> bytes:
    """Return a PNG of soft patches of colour, whose statistics are nearer to a photo than noise."""
    patches = rng.integers(0, 256, (_PICTURE_PATCHES, _PICTURE_PATCHES, 3), dtype=np.uint8)
    side = (_PICTURE_SIDE, _PICTURE_SIDE)
    file = io.BytesIO()
    Image.fromarray(patches).resize(side, Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def iterate_inputs(
    feed: Feed, target: Target, specs: Sequence[TensorSpec], shapes: Shapes | None = None
) -> Iterator[dict[str, Array]]:
    """Yield the tensors of each input for one model.

    Args:
        feed: the inputs.
        target: its manifest's preprocessing counts, where it has one.
        specs: the model's inputs as its runtime reports them, for chance and bare files.
        shapes: for chance: lengths of free axes.

    Raises:
        InputFileError: a file does not become the model's tensors.
    """
    if not feed.items:
        try:
            for number in range(feed.count):
                yield make_random_inputs(specs, 1, SEED + number, shapes)
        except TensorError as exc:
            raise InputFileError(str(exc)) from exc
        return
    manifest = target.manifest
    step = None if manifest is None else build_preprocessor(manifest, target.folder)
    for item in feed.items:
        if item.name.endswith(".npz"):
            yield _read_npz(item)
            continue
        if step is None:
            yield {specs[0].name: _read_npy(item, target)}
            continue
        try:
            yield step(_read_item(item))
        except WorkerError as exc:
            msg = f"{item.name} is no input for {target.label}: {exc}"
            raise InputFileError(msg) from exc


def _read_item(item: Item) -> JobInput:
    if not item.name.endswith(".json"):
        return JobInput(data=item.data)
    try:
        document: Any = json.loads(item.data)
    except ValueError as exc:
        msg = f"{item.name} is no JSON: {exc}"
        raise InputFileError(msg) from exc
    found = document.get("tensors", document.get("inputs")) if isinstance(document, dict) else None
    return JobInput(tensors=found)


def _read_npz(item: Item) -> dict[str, Array]:
    try:
        with np.load(io.BytesIO(item.data), allow_pickle=False) as found:
            return dict(found)
    except (ValueError, OSError, KeyError) as exc:
        msg = f"{item.name} is no file of arrays: {exc}"
        raise InputFileError(msg) from exc


def _read_npy(item: Item, target: Target) -> Array:
    try:
        found: Array = np.load(io.BytesIO(item.data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as exc:
        msg = (
            f"{item.name}: {target.label} is a bare file that says nothing of preprocessing; "
            "give .npy or .npz files, or a model with a manifest"
        )
        raise InputFileError(msg) from exc
    return found


def has_own_preprocessing(manifest: Manifest | None) -> bool:
    """Say whether a model makes its tensors from files, rather than taking tensors."""
    return manifest is not None and manifest.preprocess.name != "tensor"


def stack_inputs(inputs: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Return the rows of several inputs on axis 0, or the first where they do not fit."""
    first = inputs[0]
    signature = {name: (array.dtype, array.shape[1:]) for name, array in first.items()}
    alike = [
        item
        for item in inputs
        if {name: (array.dtype, array.shape[1:]) for name, array in item.items()} == signature
    ]
    if any(not array.ndim for array in first.values()):
        return dict(first)
    return {name: np.concatenate([item[name] for item in alike]) for name in first}
