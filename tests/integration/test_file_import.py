"""A bare model is enough, whatever its format: with all files that belong to it, and it runs."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.manifest import read_manifest, verify_files
from agent.repository import ModelRepository
from console.errors import InputFileError
from console.file_import import find_format, write_file_version
from console.triton_import import find_versions, write_triton_version
from platforms.artifact import ArtifactFormat, Precision
from platforms.errors import ModelLoadError
from platforms.runtimes.base import PROOF_FOLDER, LoadOptions
from platforms.runtimes.proof import prove_runtime
from platforms.runtimes.registry import get_runtime
from tests.harness.known_box import describe_box
from tests.harness.saved_models import write_saved_model
from worker.engine.engine import Engine
from worker.engine.service import TensorRequest
from worker.engine.serving import EngineService

IR = "proof.xml"


def write(source: Path, folder: Path) -> Path:
    folder.mkdir()
    write_file_version(source, folder, "net", release="1.0.0", precision=Precision.FP32)
    verify_files(read_manifest(folder), folder)
    return folder


def serve(folder: Path, repository: Path, x: np.ndarray) -> np.ndarray:
    """Run a version folder as a worker with OpenVINO does."""
    models = ModelRepository(repository)
    models.add(folder)
    spec = replace(describe_box(), runtimes=(prove_runtime("openvino"),))
    service = EngineService(Engine(spec), models)
    try:
        return asyncio.run(service.infer(TensorRequest("net", {"x": x}))).outputs["y"]
    finally:
        service.close()


def test_saved_model_is_named_by_its_file_and_read_by_its_folder(tmp_path: Path) -> None:
    path = write_saved_model(tmp_path / "model.savedmodel", 3)
    session = get_runtime("openvino").load(path, LoadOptions(threads=1))
    assert [(spec.name, spec.shape) for spec in session.inputs] == [("x", (-1, 2))]
    x = np.array([[1, 2], [3, 4]], np.float32)
    assert session.run({"x": x})["y"].tolist() == [[3, 6], [9, 12]]
    path.write_bytes(b"no model")
    with pytest.raises(ModelLoadError, match=r"refuses saved_model\.pb"):
        get_runtime("openvino").load(path, LoadOptions(threads=1))


def test_saved_model_is_added_by_its_folder_with_all_its_files_and_served(tmp_path: Path) -> None:
    source = tmp_path / "scale.savedmodel"
    write_saved_model(source, 3)
    (source / "assets").mkdir()
    (source / "assets" / "words.txt").write_text("a\nb\n")
    folder = write(source, tmp_path / "version")
    manifest = read_manifest(folder)
    assert manifest.artifacts[0].file == "scale.savedmodel/saved_model.pb"
    assert manifest.artifacts[0].format is ArtifactFormat.SAVED_MODEL
    assert set(manifest.files) == {"scale.savedmodel/assets/words.txt"}
    x = np.array([[1, 2]], np.float32)
    assert serve(folder, tmp_path / "models", x).tolist() == [[3, 6]]


def test_saved_model_of_a_triton_folder_is_served(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    write_saved_model(source / "1" / "model.savedmodel", 3)
    (source / "config.pbtxt").write_text('platform: "tensorflow_savedmodel" max_batch_size: 4')
    (version,) = find_versions(source)
    folder = tmp_path / "version"
    folder.mkdir()
    write_triton_version(source, version, folder, "net", precision=Precision.FP32, has_gpu=False)
    x = np.array([[1, 2]], np.float32)
    assert serve(folder, tmp_path / "models", x).tolist() == [[3, 6]]


def test_openvino_s_weights_come_along_and_are_in_the_manifest(tmp_path: Path) -> None:
    for suffix in (".xml", ".bin"):
        shutil.copyfile((PROOF_FOLDER / IR).with_suffix(suffix), tmp_path / f"net{suffix}")
    folder = write(tmp_path / "net.xml", tmp_path / "version")
    manifest = read_manifest(folder)
    assert (manifest.artifacts[0].file, set(manifest.files)) == ("net.xml", {"net.bin"})
    x = np.zeros((1, 1, 8, 8), np.float32)
    assert serve(folder, tmp_path / "models", x).shape == (1, 10)
    (tmp_path / "net.bin").unlink()
    with pytest.raises(InputFileError, match=r"net\.bin is missing"):
        write(tmp_path / "net.xml", tmp_path / "another")


def test_tflite_file_that_is_a_link_is_added_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "net.tflite").symlink_to(PROOF_FOLDER / "proof.tflite")
    folder = write(tmp_path / "net.tflite", tmp_path / "version")
    assert read_manifest(folder).artifacts[0].file == "net.tflite"
    assert not (folder / "net.tflite").is_symlink()


def test_what_is_no_model_has_no_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    assert [find_format(tmp_path / name) for name in ("", "a.txt", "nothing.onnx")] == [None] * 3
    with pytest.raises(InputFileError, match="no model file"):
        write(tmp_path / "a.txt", tmp_path / "version")
