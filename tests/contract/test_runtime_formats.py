"""What one runtime promises beyond the suite of all: quantized edges, precision, safety."""

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from platforms.artifact import Datatype, TensorSpec
from platforms.errors import ModelLoadError, RuntimeMissingError, TensorError
from platforms.runtimes.base import PROOF_FOLDER, Declared, LoadOptions, read_proof_declaration
from platforms.runtimes.ort import OrtRuntime
from platforms.runtimes.registry import get_runtime
from platforms.runtimes.vino import OpenvinoSession

ONE_THREAD = LoadOptions(threads=1)
DECLARED = read_proof_declaration()
INT8_FILE = PROOF_FOLDER / "proof_int8.tflite"
X_SCALE, X_ZERO, Y_SCALE = 0.02, -3, 0.125


class Intruder:
    """Pickled, it writes a file when somebody unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def draw(rows: int) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 0.6, (rows, 1, 8, 8)).astype(np.float32)


def test_quantized_file_shows_its_own_types_unless_floats_are_declared() -> None:
    plain = get_runtime("litert").load(INT8_FILE, ONE_THREAD)
    assert plain.inputs == (TensorSpec("x", Datatype.INT8, (1, 1, 8, 8)),)
    assert plain.outputs == (TensorSpec("y", Datatype.INT8, (1, 10)),)
    floats = get_runtime("litert").load(INT8_FILE, ONE_THREAD, DECLARED)
    assert (floats.inputs, floats.outputs) == (DECLARED.inputs, DECLARED.outputs)


def test_quantized_edges_answer_as_the_float_model_on_the_rounded_input() -> None:
    x = draw(5)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 1e6, -1e6
    rounded = np.clip(np.rint(x / X_SCALE) + X_ZERO, -128, 127)
    reference = get_runtime("litert").load(PROOF_FOLDER / "proof.tflite", ONE_THREAD)
    right = reference.run({"x": ((rounded - X_ZERO) * X_SCALE).astype(np.float32)})["y"]
    found = get_runtime("litert").load(INT8_FILE, ONE_THREAD, DECLARED).run({"x": x})["y"]
    assert found.dtype == np.float32
    assert np.abs(found - right).max() <= Y_SCALE / 2 + 1e-4


def test_delegate_that_cannot_be_loaded_refuses_the_model(tmp_path: Path) -> None:
    options = LoadOptions(threads=1, delegates=(str(tmp_path / "libnone.so"),))
    with pytest.raises(ModelLoadError, match="libnone"):
        get_runtime("litert").load(PROOF_FOLDER / "proof.tflite", options)


def test_openvino_computes_in_float32() -> None:
    session = get_runtime("openvino").load(PROOF_FOLDER / "proof.onnx", ONE_THREAD)
    assert isinstance(session, OpenvinoSession)
    assert (session.precision, session.provider) == ("f32", "CPU")


def test_openvino_says_that_a_device_is_not_there() -> None:
    wanted = LoadOptions(threads=1, providers=("NPU", "CPU"))
    session = get_runtime("openvino").load(PROOF_FOLDER / "proof.onnx", wanted)
    assert session.findings == ("asked for NPU, running on CPU",)
    with pytest.raises(ModelLoadError, match="NPU"):
        get_runtime("openvino").load(
            PROOF_FOLDER / "proof.onnx", LoadOptions(threads=1, providers=("NPU",))
        )


def test_onnxruntime_says_which_provider_has_which_nodes() -> None:
    session = get_runtime("ort").load(PROOF_FOLDER / "proof.onnx", ONE_THREAD)
    assert session.assignment.keys() == {"CPUExecutionProvider"}
    assert session.assignment["CPUExecutionProvider"] >= 2
    assert session.findings == ()


def test_provider_that_is_not_there_is_a_finding() -> None:
    wanted = LoadOptions(threads=1, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    session = get_runtime("ort").load(PROOF_FOLDER / "proof.onnx", wanted)
    assert session.provider == "CPUExecutionProvider"
    assert "asked for CUDAExecutionProvider" in session.findings[0]


def test_plug_in_provider_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="acme"):
        OrtRuntime().register_plugin("acme", tmp_path / "libacme.so")


def test_torchscript_without_declared_tensors_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="does not describe its tensors"):
        get_runtime("torchscript").load(PROOF_FOLDER / "proof.torchscript", ONE_THREAD)


def test_exported_program_describes_itself() -> None:
    session = get_runtime("torchscript").load(PROOF_FOLDER / "proof.pt2", ONE_THREAD)
    assert session.inputs == DECLARED.inputs
    assert [spec.shape for spec in session.outputs] == [(-1, 10)]


@pytest.mark.parametrize("file", ["proof.torchscript", "proof.pt2"])
def test_torch_model_that_does_not_fit_its_declaration_is_refused(file: str) -> None:
    wrong = Declared(DECLARED.inputs, (TensorSpec("y", Datatype.INT64, (-1, 10)),))
    with pytest.raises(ModelLoadError):
        get_runtime("torchscript").load(PROOF_FOLDER / file, ONE_THREAD, wrong)


def test_pickled_models_are_refused_and_never_opened(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save(Intruder(mark), tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Intruder(mark)))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ModelLoadError, match="pickle"):
            get_runtime("torchscript").load(tmp_path / name, ONE_THREAD, DECLARED)
    assert not mark.exists()


def rewrite_archive(target: Path, changes: dict[str, bytes]) -> None:
    with (
        zipfile.ZipFile(PROOF_FOLDER / "proof.pt2") as source,
        zipfile.ZipFile(target, "w") as out,
    ):
        root = source.namelist()[0].partition("/")[0]
        kept = {name: source.read(name) for name in source.namelist()}
        added = {f"{root}/{name}": content for name, content in changes.items()}
        for name, content in {**kept, **added}.items():
            out.writestr(name, content)


def test_pickle_hidden_in_an_exported_program_is_not_run(tmp_path: Path) -> None:
    mark, hidden = tmp_path / "mark", tmp_path / "hidden.pt"
    torch.save(Intruder(mark), hidden)
    target = tmp_path / "model.pt2"
    rewrite_archive(target, {"data/sample_inputs/model.pt": hidden.read_bytes()})
    with pytest.raises(ModelLoadError):
        get_runtime("torchscript").load(target, ONE_THREAD, DECLARED)
    assert not mark.exists()


def test_exported_program_with_compiled_code_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "model.pt2"
    rewrite_archive(target, {"data/aotinductor/model/a.so": b"\x7fELF"})
    with pytest.raises(ModelLoadError, match="compiled code"):
        get_runtime("torchscript").load(target, ONE_THREAD, DECLARED)


def test_core_ml_says_that_it_needs_macos() -> None:
    runtime = get_runtime("coreml")
    if sys.platform == "darwin":
        assert runtime.providers()
        return
    with pytest.raises(RuntimeMissingError, match="macOS only"):
        runtime.version()


UNLOAD = """
import sys, psutil, numpy as np
from platforms.runtimes.base import LoadOptions, PROOF_FOLDER, read_proof_declaration
from platforms.runtimes.registry import get_runtime
runtime = get_runtime(sys.argv[1])
def cycle():
    s = runtime.load(PROOF_FOLDER / sys.argv[2], LoadOptions(threads=1), read_proof_declaration())
    s.run({"x": np.ones((1, 1, 8, 8), np.float32)})
    s.close()
for _ in range(20): cycle()
before = psutil.Process().memory_info().rss
for _ in range(60): cycle()
print((psutil.Process().memory_info().rss - before) / 60)
"""


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ort", "proof.onnx"),
        ("litert", "proof.tflite"),
        ("openvino", "proof.onnx"),
        ("torchscript", "proof.torchscript"),
    ],
)
def test_models_loaded_and_closed_leave_no_memory_behind(name: str, file: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNLOAD, name, file],
        cwd=PROOF_FOLDER.parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    # Bytes per load; a session that leaked would leave its interpreter, some 100 kB at least.
    assert float(ran.stdout.split()[-1]) < 100_000


def test_error_of_a_tensor_names_it() -> None:
    session = get_runtime("litert").load(PROOF_FOLDER / "proof.tflite", ONE_THREAD)
    with pytest.raises(TensorError, match="x"):
        session.run({"x": draw(1).astype(np.float64)})
