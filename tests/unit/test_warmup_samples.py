"""The tensors of warm-up runs and the labels of outputs, from real files."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.manifest import Manifest, compute_sha256, parse_manifest
from platforms.artifact import Datatype
from platforms.runtimes.base import DTYPES
from tests.unit.test_model_config import MANIFEST
from worker.engine.modelconfig.labels import read_labels
from worker.engine.modelconfig.samples import build_warmup
from worker.engine.modelconfig.serving import WarmupSample, WarmupSource, WarmupTensor
from worker.engine.modelconfig.text import parse_config
from worker.errors import ModelConfigError


def make_sample(tensor: WarmupTensor, rows: int = 2) -> WarmupSample:
    return WarmupSample("w", {"x": tensor}, rows)


@pytest.mark.parametrize("source", [WarmupSource.ZERO, WarmupSource.RANDOM])
@pytest.mark.parametrize("datatype", list(DTYPES))
def test_every_datatype_has_zeros_and_noise(
    datatype: Datatype, source: WarmupSource, tmp_path: Path
) -> None:
    sample = make_sample(WarmupTensor(datatype, (3, 4), source))
    found = build_warmup(sample, tmp_path, has_batch=True)["x"]
    assert found.shape == (2, 3, 4)
    assert found.dtype == DTYPES[datatype]
    if found.dtype.hasobject:
        assert all(isinstance(item, str) for item in found.flat)
    assert build_warmup(sample, tmp_path, has_batch=False)["x"].shape == (3, 4)


def test_a_file_holds_raw_numbers(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(struct.pack("<4f", 1, 2, 3, 4))
    sample = make_sample(WarmupTensor(Datatype.FP32, (2,), WarmupSource.FILE, "raw"))
    found = build_warmup(sample, tmp_path, has_batch=True)["x"]
    np.testing.assert_array_equal(found, np.array([[1, 2], [3, 4]], np.float32))


def test_a_file_holds_texts_with_their_lengths(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\x02\0\0\0ab\0\0\0\0")
    sample = make_sample(WarmupTensor(Datatype.BYTES, (1,), WarmupSource.FILE, "raw"))
    assert build_warmup(sample, tmp_path, has_batch=True)["x"].tolist() == [["ab"], [""]]


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        (Datatype.FP32, b"\0" * 12),
        (Datatype.FP32, b"\0" * 7),
        (Datatype.BYTES, b"\xff\0\0\0a"),
        (Datatype.BYTES, b"\0"),
        (Datatype.BYTES, b"\x01\0\0\0\xff\0\0\0\0"),
    ],
)
def test_a_file_of_another_size_is_an_error(
    datatype: Datatype, data: bytes, tmp_path: Path
) -> None:
    (tmp_path / "raw").write_bytes(data)
    sample = make_sample(WarmupTensor(datatype, (1,), WarmupSource.FILE, "raw"))
    with pytest.raises(ModelConfigError, match="no tensor of shape"):
        build_warmup(sample, tmp_path, has_batch=True)


def test_a_missing_file_and_a_type_without_arrays_are_errors(tmp_path: Path) -> None:
    for tensor in (
        WarmupTensor(Datatype.FP32, (1,), WarmupSource.FILE, "none"),
        WarmupTensor(Datatype.FP32, (1,), WarmupSource.FILE, "warmup/../../raw"),
        WarmupTensor(Datatype.BF16, (1,)),
    ):
        with pytest.raises(ModelConfigError):
            build_warmup(make_sample(tensor), tmp_path, has_batch=True)


def write_manifest_with(folder: Path, **changes: Any) -> Manifest:
    (folder / "labels.txt").write_text("zero\none\n")
    files = {"labels.txt": compute_sha256(folder / "labels.txt")}
    return parse_manifest(json.dumps(MANIFEST | {"files": files} | changes))


def test_labels_are_those_of_the_config(tmp_path: Path) -> None:
    manifest = write_manifest_with(tmp_path)
    config = parse_config('output { name: "y" label_filename: "labels.txt" }')
    assert read_labels(tmp_path, manifest, config) == {"y": ("zero", "one")}
    assert read_labels(tmp_path, manifest, None) == {}


def test_labels_are_else_those_of_the_manifests_step(tmp_path: Path) -> None:
    step = {"name": "top_k", "params": {"labels_file": "labels.txt"}}
    manifest = write_manifest_with(tmp_path, postprocess=[step])
    assert read_labels(tmp_path, manifest, None) == {"y": ("zero", "one")}


def test_a_label_file_that_the_manifest_does_not_list_is_not_read(tmp_path: Path) -> None:
    manifest = write_manifest_with(tmp_path)
    (tmp_path / "other.txt").write_text("secret")
    config = parse_config('output { name: "y" label_filename: "other.txt" }')
    with pytest.raises(ModelConfigError, match="not among the files"):
        read_labels(tmp_path, manifest, config)
