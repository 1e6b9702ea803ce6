"""What a person gives is recognised by its content, and traps are refused before any library."""

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from converters.errors import (
    OutsideDataError,
    OversizedTensorError,
    PickledModelError,
    SourceError,
)
from converters.routes.source import identify
from converters.routes.workspace import compute_digest, copy_model, list_parts
from converters.task import ModelFile, ModelFormat

ROOT = Path(__file__).parents[2]
PROOFS = ROOT / "platforms" / "runtimes" / "data"
NETS = ROOT / "tests" / "harness" / "torch_nets"
HUGE = 500_000_000


def write_onnx(folder: Path, *tensors: Any, sparse: tuple[Any, ...] = ()) -> Path:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([node], "g", [value], [out], [*tensors], sparse_initializer=[*sparse])
    path = folder / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def make_tensor(name: str, axes: list[int], data: bytes = b"") -> Any:
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, raw_data=data)
    tensor.dims.extend(axes)
    return tensor


def make_external(name: str, axes: list[int], **entries: str) -> Any:
    tensor = onnx.TensorProto(
        name=name, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
    )
    tensor.dims.extend(axes)
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def write_safetensors(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_torch_zip(path: Path, content: Any, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "m/data.pkl", content if isinstance(content, bytes) else pickle.dumps(content)
        )
        for name in names:
            archive.writestr(f"m/{name}", b"1")
    return path


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("proof.onnx", ModelFormat.ONNX),
        ("proof.tflite", ModelFormat.TFLITE),
        ("proof.pt2", ModelFormat.TORCH_EXPORT),
        ("proof.torchscript", ModelFormat.TORCHSCRIPT),
        ("proof.xml", ModelFormat.OPENVINO),
    ],
)
def test_format_is_told_by_the_content_and_not_by_the_suffix(
    tmp_path: Path, file: str, expected: ModelFormat
) -> None:
    suffix = ".xml" if expected is ModelFormat.OPENVINO else ".model"
    path = tmp_path / f"other{suffix}"
    path.write_bytes((PROOFS / file).read_bytes())

    assert identify(path) == ModelFile(path, expected)


def test_function_of_a_python_file_is_found_without_running_the_file(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("raise SystemExit\ndef build(): ...\n", encoding="utf-8")

    assert identify(f"{path}:build") == ModelFile(path, ModelFormat.CALLABLE, name="build")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("net.py", "name the function in it, .*net.py:NAME"),
        ("net.py:nosuch", "defines no 'nosuch'; its functions and classes are: Net, build, nn"),
        ("nosuch.py:build", "cannot be read: No such file"),
        ("broken.py:build", "is no Python"),
        ("nosuch.onnx", "there is no model at"),
        ("keras.h5", "HDF5 file .Keras.: export a SavedModel"),
        ("text.onnx", "is none of: TorchScript"),
        ("empty.onnx", "is none of: TorchScript"),
        ("folder", "is no SavedModel"),
        ("weights.safetensors", "holds weights and no model: give --builder"),
        ("damaged.zip", "is a damaged archive"),
        ("other.zip", "none of TorchScript"),
        ("native.pt2", "carries compiled code"),
    ],
)
def test_what_is_no_model_is_said_with_what_to_do(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net: ...\ndef build(): ...\n", encoding="utf-8"
    )
    (tmp_path / "broken.py").write_text("def (", encoding="utf-8")
    (tmp_path / "keras.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    (tmp_path / "text.onnx").write_text("hello, world\n", encoding="utf-8")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "folder").mkdir()
    write_safetensors(tmp_path / "weights.safetensors", {}, b"")
    (tmp_path / "damaged.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", b"a")
    with zipfile.ZipFile(tmp_path / "native.pt2", "w") as archive:
        archive.writestr("m/data/aotinductor/model.so", b"a")
    with pytest.raises(SourceError, match=said):
        identify(str(tmp_path / text))


class Evil:
    """Its pickle would call a function when it is opened."""

    def __reduce__(self) -> Any:
        return (print, ("opened",))


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_is_refused_and_never_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: int
) -> None:
    plain, zipped = tmp_path / "plain.pt", tmp_path / "zipped.pt"
    plain.write_bytes(pickle.dumps(Evil(), protocol))
    write_torch_zip(zipped, pickle.dumps({"w": Evil()}, protocol))

    with pytest.raises(PickledModelError, match="is a pickle, which would run code"):
        identify(plain)
    with pytest.raises(PickledModelError, match=r"is a pickle of \S*\.print.*--builder"):
        identify(zipped, f"{NETS}/mlp.py:build")
    assert "opened" not in capsys.readouterr().out


def test_weights_of_torch_alone_are_no_pickle_to_fear(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "w.pt"
    torch.save(torch.nn.Linear(2, 2).half().state_dict(), path)

    assert identify(path, f"{NETS}/mlp.py:build") == ModelFile(
        path, ModelFormat.STATE_DICT, name="build", builder=NETS / "mlp.py"
    )


@pytest.mark.parametrize("location", ["../outside.bin", "link.bin", "/etc/hostname"])
def test_onnx_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(8))
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    path = write_onnx(folder, make_external("w", [2], location=location))
    with pytest.raises(OutsideDataError, match="outside its own folder"):
        identify(path)


def test_two_gigabytes_in_a_kilobyte_of_onnx_are_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path, make_tensor("w", [HUGE], bytes(64)))

    assert path.stat().st_size < 1000
    with pytest.raises(OversizedTensorError, match="'w' with 2000 MB and holds 64 bytes"):
        identify(path)


def test_huge_tensor_is_found_in_a_branch_of_a_node(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [],
        "then",
        [],
        [helper.make_tensor_value_info("w", TensorProto.FLOAT, [HUGE])],
        [make_tensor("w", [HUGE])],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph([node], "g", [], [])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(OversizedTensorError):
        identify(path)


def test_sparse_tensor_that_stands_for_gigabytes_is_refused(tmp_path: Path) -> None:
    sparse = onnx.SparseTensorProto(values=make_tensor("w", [1], bytes(4)))
    sparse.dims.extend([HUGE])
    path = write_onnx(tmp_path, sparse=(sparse,))
    with pytest.raises(OversizedTensorError, match="stands for 2000 MB"):
        identify(path)


@pytest.mark.parametrize(
    "entries", [{"length": str(4 * HUGE)}, {"length": "8", "offset": "-1"}, {"offset": "100"}]
)
def test_external_data_beyond_its_file_is_refused(tmp_path: Path, entries: dict[str, str]) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    path = write_onnx(tmp_path, make_external("w", [HUGE], location="w.bin", **entries))
    with pytest.raises(OversizedTensorError):
        identify(path)


def test_file_of_holes_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(4 * HUGE)
    path = write_onnx(tmp_path, make_external("w", [HUGE], location="w.bin"))
    with pytest.raises(OversizedTensorError, match="has 2000 MB, of which 0 bytes are on disk"):
        identify(path)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4]}, "with 2000000000 bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4 * HUGE]}, "with 4 bytes at 0"),
        ({"dtype": "F32", "shape": [1]}, "damaged header"),
    ],
)
def test_safetensors_that_declare_what_they_do_not_hold_are_refused(
    tmp_path: Path, entry: dict[str, Any], said: str
) -> None:
    path = write_safetensors(tmp_path / "w.safetensors", {"w": entry}, bytes(4))
    with pytest.raises(SourceError, match=said):
        identify(path, f"{NETS}/mlp.py:build")


def test_safetensors_with_an_endless_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(OversizedTensorError, match="header of 1099511627776 bytes"):
        identify(path, f"{NETS}/mlp.py:build")


def test_archive_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data/0", bytes(100_000_000))
    with pytest.raises(OversizedTensorError, match="unpacks to 100 MB"):
        identify(path)


def test_honest_weights_of_every_kind_pass(tmp_path: Path) -> None:
    big = np.zeros(2_000_000, np.float32)
    (tmp_path / "w.bin").write_bytes(big.tobytes())
    whole = helper.make_tensor("ints", TensorProto.INT64, [3_000_000], [1] * 3_000_000)
    path = write_onnx(
        tmp_path,
        make_external("far", [2_000_000], location="w.bin"),
        make_tensor("near", [2_000_000], big.tobytes()),
        whole,
    )

    assert identify(path).format is ModelFormat.ONNX


def test_copy_of_a_model_has_all_its_parts_and_the_same_digest(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "w.bin").write_bytes(bytes(8))
    (given / "unrelated.txt").write_text("not of the model", encoding="utf-8")
    model = identify(write_onnx(given, make_external("w", [2], location="w.bin")))

    copy = copy_model(model, tmp_path / "copy")

    assert sorted(list_parts(copy)) == ["m.onnx", "w.bin"]
    assert not (tmp_path / "copy" / "unrelated.txt").exists()
    assert compute_digest(copy) == compute_digest(model)
    (tmp_path / "copy" / "w.bin").write_bytes(b"12345678")
    assert compute_digest(copy) != compute_digest(model)
