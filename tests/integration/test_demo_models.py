"""The demo's models are what they say, and magika answers as Google's own package."""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from magika import Magika
from PIL import Image

from agent.errors import ModelNotFoundError
from agent.manifest import read_manifest, verify_files
from console.models.magika import write_magika_version
from console.models.samples import load_digit_split, write_digit_samples
from console.models.train_digits import FOLDER, MIN_ACCURACY, MIN_AGREEMENT, measure
from platforms.spec import PlatformSpec
from tests.integration.test_engine import spec as spec
from worker.engine.engine import Engine, InferRequest
from worker.processing.step import JobInput

PER_KIND = 2
STACKED_ATOL = 0.01
"""onnxruntime 1.32 itself answers up to 0.0055 apart for one row alone and in a batch of 98."""
SITE = Path(np.__file__).parent.parent


def find_files() -> list[Path]:
    """Return two installed files of each suffix, smallest paths first."""
    by_kind: dict[str, list[Path]] = defaultdict(list)
    for package in ("numpy", "skimage", "sklearn", "onnx", "onnxruntime", "scipy", "pip"):
        for path in sorted((SITE / package).rglob("*.*")):
            if path.is_file() and 64 <= path.stat().st_size < 4_000_000:
                by_kind[path.suffix].append(path)
    return [path for kind in sorted(by_kind) for path in by_kind[kind][:PER_KIND]]


def test_magika_answers_as_its_own_package_on_files_of_many_kinds(
    spec: PlatformSpec, tmp_path: Path
) -> None:
    folder = tmp_path / "magika" / "1"
    write_magika_version(folder)
    theirs = Magika()
    paths = find_files()
    requests = [InferRequest(path.name, JobInput(data=path.read_bytes())) for path in paths]
    engine = Engine(spec)
    stacked = engine.infer(folder, requests)
    compared = 0
    for path, request, together in zip(paths, requests, stacked, strict=True):
        prediction = theirs.identify_path(path).prediction
        if prediction.dl.label == "undefined":
            continue
        compared += 1
        (alone,) = engine.infer(folder, [request])
        assert alone.value[0]["label"] == prediction.dl.label, path
        assert alone.value[0]["score"] == pytest.approx(prediction.score, abs=1e-6)
        assert together.value[0]["label"] == prediction.dl.label, path
        assert together.value[0]["score"] == pytest.approx(prediction.score, abs=STACKED_ATOL)
    assert compared >= 30
    assert len({path.suffix for path in paths}) >= 10


def test_magika_version_is_whole_and_describes_itself(tmp_path: Path) -> None:
    written = write_magika_version(tmp_path / "magika" / "1")
    manifest = read_manifest(tmp_path / "magika" / "1")
    verify_files(manifest, tmp_path / "magika" / "1")
    assert manifest == written
    assert manifest.inputs[0].shape == (-1, 2048)
    assert manifest.outputs[0].shape == (-1, 214)


def test_missing_magika_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "magika")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2])])
    with pytest.raises(ModelNotFoundError, match=r"edgeward\[demo\]"):
        write_magika_version(tmp_path)


def test_committed_digits_files_give_the_recorded_accuracy() -> None:
    measures = measure(load_digit_split(), FOLDER)
    assert measures.accuracy >= MIN_ACCURACY
    assert measures.agreement >= MIN_AGREEMENT
    assert measures.describe() in read_manifest(FOLDER).description
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000


def test_samples_are_held_out_pictures_that_reduce_to_the_originals(tmp_path: Path) -> None:
    samples = write_digit_samples(tmp_path, 12)
    held_out = load_digit_split()
    assert len({one.path for one in samples}) == 12
    for sample, pixels, label in zip(
        samples, held_out.held_out_images, held_out.held_out_labels, strict=False
    ):
        with Image.open(sample.path) as picture:
            reduced = picture.resize((8, 8), Image.Resampling.BOX)
        assert np.array_equal(np.asarray(reduced), pixels)
        assert sample.label == label


def test_training_and_held_out_pictures_share_none() -> None:
    split = load_digit_split()
    train = {image.tobytes() for image in split.train_images}
    assert len(split.train_labels) + len(split.held_out_labels) == 1797
    assert not any(image.tobytes() in train for image in split.held_out_images)


def test_missing_scikit_learn_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModelNotFoundError, match=r"edgeward\[demo\]"):
        write_digit_samples(tmp_path, 1)
