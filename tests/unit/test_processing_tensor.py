"""Tensors as Open Inference Protocol JSON and as `.npy`, in and out."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.manifest import ArtifactEntry, Manifest, TensorEntry
from platforms.artifact import ArtifactFormat, Datatype, Precision
from worker.errors import NanOutputError, OutputError, PreprocessError, StepParamsError
from worker.processing.step import JobInput
from worker.processing.tensor import build_tensor_input, build_tensor_output, read_npy

NOWHERE = Path("/nonexistent")


def declare(*inputs: tuple[str, Datatype, tuple[int, ...]]) -> Manifest:
    return Manifest(
        schema="edgeward.manifest/v1",
        name="m",
        version="1",
        inputs=tuple(TensorEntry(name=n, datatype=d, shape=s) for n, d, s in inputs),
        outputs=(TensorEntry(name="y", datatype=Datatype.FP32, shape=(-1,)),),
        artifacts=(
            ArtifactEntry(
                file="m.onnx",
                format=ArtifactFormat.ONNX,
                precision=Precision.FP32,
                sha256="0" * 64,
                size_bytes=1,
            ),
        ),
    )


def read(datatype: Datatype, shape: tuple[int, ...], tensor: Any) -> np.ndarray[Any, Any]:
    step = build_tensor_input({}, declare(("x", datatype, shape)), NOWHERE)
    return step(JobInput(tensors=[tensor]))["x"]


def tensor(datatype: str, shape: list[Any], data: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": shape, "data": data}


@pytest.mark.parametrize("data", [[1, 2.5, 3, 4, 5, 6], [[1, 2.5, 3], [4, 5, 6]]])
def test_flat_and_nested_data_are_the_same_tensor(data: list[Any]) -> None:
    found = read(Datatype.FP32, (-1, 3), tensor("FP32", [2, 3], data))
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 2.5, 3], [4, 5, 6]]


def test_deeply_nested_data_follows_the_shape() -> None:
    cube = np.arange(24).reshape(2, 3, 4)
    found = read(Datatype.INT64, (-1, 3, 4), tensor("INT64", [2, 3, 4], cube.tolist()))
    assert np.array_equal(found, cube)


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        (Datatype.BOOL, [True, False]),
        (Datatype.UINT8, [0, 255]),
        (Datatype.INT8, [-128, 127]),
        (Datatype.UINT16, [0, 65535]),
        (Datatype.INT32, [-(2**31), 2**31 - 1]),
        (Datatype.UINT64, [0, 2**64 - 1]),
        (Datatype.INT64, [-(2**63), 2**63 - 1]),
        (Datatype.FP16, [-65504.0, 65504.0]),
        (Datatype.FP64, [-1.7976931348623157e308, 5e-324]),
        (Datatype.BYTES, ["", "ü"]),
    ],
)
def test_limits_of_each_datatype_come_through_exactly(datatype: Datatype, values: Any) -> None:
    assert read(datatype, (2,), tensor(datatype.value, [2], values)).tolist() == values


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        (Datatype.UINT8, [0, 256]),
        (Datatype.UINT8, [-1, 0]),
        (Datatype.INT64, [0, 2**63]),
        (Datatype.INT32, [0, 1.0]),
        (Datatype.INT32, [0, True]),
        (Datatype.INT32, [0, "1"]),
        (Datatype.INT32, [0, None]),
        (Datatype.FP32, [0, float("nan")]),
        (Datatype.FP32, [0, float("inf")]),
        (Datatype.FP32, [0, 1e39]),
        (Datatype.FP32, [0, 10**400]),
        (Datatype.FP32, [0, True]),
        (Datatype.FP32, [0, "1"]),
        (Datatype.FP32, [0, [1]]),
        (Datatype.FP16, [0, 70000]),
        (Datatype.BOOL, [True, 1]),
        (Datatype.BYTES, ["a", 1]),
    ],
)
def test_value_that_the_datatype_cannot_hold_is_refused(datatype: Datatype, values: Any) -> None:
    with pytest.raises(PreprocessError):
        read(datatype, (2,), tensor(datatype.value, [2], values))


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {},
        "x",
        tensor("FP32", [1, 2], [1]),
        tensor("FP32", [1, 2], [1, 2, 3]),
        tensor("FP32", [1, 2], [[1, 2], [3, 4]]),
        tensor("FP32", [2, 2], [[1, 2], [3]]),
        tensor("FP32", [2, 2], [[1, 2], 3]),
        tensor("FP32", [1, 2], [[[1], [2]]]),
        tensor("FP32", [1, 2], 1),
        tensor("FP32", [0, 2], []),
        tensor("FP32", [-1, 2], [1, 2]),
        tensor("FP32", [True, 2], [1, 2]),
        tensor("FP32", [1.0, 2], [1, 2]),
        tensor("FP32", ["1", 2], [1, 2]),
        tensor("FP32", [2], [1, 2]),
        tensor("FP32", [1, 3], [1, 2, 3]),
        tensor("FP32", [10**18, 2], [1, 2]),
        tensor("FP64", [1, 2], [1, 2]),
        {**tensor("FP32", [1, 2], [1, 2]), "name": "z"},
        {**tensor("FP32", [1, 2], [1, 2]), "name": ["x"]},
        {**tensor("FP32", [1, 2], [1, 2]), "shape": None},
        {**tensor("FP32", [1, 2], [1, 2]), "extra": 1},
    ],
)
def test_tensor_that_is_not_what_it_says_is_refused(bad: Any) -> None:
    with pytest.raises(PreprocessError):
        read(Datatype.FP32, (-1, 2), bad)


def test_every_input_must_come_exactly_once() -> None:
    both = declare(("a", Datatype.FP32, (1,)), ("b", Datatype.FP32, (1,)))
    step = build_tensor_input({}, both, NOWHERE)
    a, b = ({"name": n, "datatype": "FP32", "shape": [1], "data": [1]} for n in "ab")
    assert step(JobInput(tensors=[b, a])).keys() == {"a", "b"}
    with pytest.raises(PreprocessError, match="also takes b"):
        step(JobInput(tensors=[a]))
    with pytest.raises(PreprocessError, match="comes twice"):
        step(JobInput(tensors=[a, b, a]))
    with pytest.raises(PreprocessError, match="holds one tensor"):
        step(JobInput(data=b""))


def test_job_without_any_input_is_refused() -> None:
    step = build_tensor_input({}, declare(("x", Datatype.FP32, (1,))), NOWHERE)
    with pytest.raises(PreprocessError, match="neither"):
        step(JobInput())


def test_parameter_and_datatype_without_json_form_are_refused_when_the_model_loads() -> None:
    with pytest.raises(StepParamsError, match="size"):
        build_tensor_input({"size": 1}, declare(("x", Datatype.FP32, (1,))), NOWHERE)
    with pytest.raises(StepParamsError, match="BF16"):
        build_tensor_input({}, declare(("x", Datatype.BF16, (1,))), NOWHERE)


def save_npy(array: np.ndarray[Any, Any], version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<i8", "|u1", "|b1", "<f2"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (1, 2, 3)])
def test_npy_reads_as_numpy_wrote_it(
    dtype: str, version: tuple[int, int], shape: tuple[int, ...]
) -> None:
    array = np.arange(1, 1 + int(np.prod(shape))).reshape(shape).astype(dtype)
    for order in ("C", "F"):
        found = read_npy(save_npy(np.array(array, order=order), version))
        assert found.dtype.isnative
        assert np.array_equal(found, array)
        assert found.flags.c_contiguous


def test_npy_of_the_model_s_type_and_shape_is_taken() -> None:
    step = build_tensor_input({}, declare(("x", Datatype.FP32, (-1, 2))), NOWHERE)
    found = step(JobInput(data=save_npy(np.ones((3, 2), np.float32))))
    assert found["x"].shape == (3, 2)


@pytest.mark.parametrize(
    "array",
    [
        np.ones((3, 2)),
        np.ones((3, 3), np.float32),
        np.ones((0, 2), np.float32),
        np.full((1, 2), np.nan, np.float32),
        np.array([["a", "b"]]),
        np.zeros((1, 2), dtype=[("a", "<f4")]),
    ],
)
def test_npy_of_another_type_shape_or_with_nan_is_refused(array: np.ndarray[Any, Any]) -> None:
    step = build_tensor_input({}, declare(("x", Datatype.FP32, (-1, 2))), NOWHERE)
    with pytest.raises(PreprocessError):
        step(JobInput(data=save_npy(array)))


def test_pickled_npy_is_refused_unread() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(PreprocessError):
        read_npy(buffer.getvalue())


def test_npy_whose_shape_the_bytes_do_not_fill_allocates_nothing_and_is_refused() -> None:
    whole = save_npy(np.ones((2, 2), np.float32))
    for bad in (whole[:-1], whole + b"\0", whole.replace(b"(2, 2)", b"(2, 99999999999999999)")):
        with pytest.raises(PreprocessError):
            read_npy(bad)


def test_outputs_are_written_as_the_protocol_says() -> None:
    step = build_tensor_output({}, declare(("x", Datatype.FP32, (1,))), NOWHERE)
    arrays: dict[str, Any] = {"y": np.array([[1.5, 2]], np.float32), "n": np.array([[3]], np.int64)}
    assert step(arrays, arrays, {}) == {
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.0]},
            {"name": "n", "datatype": "INT64", "shape": [1, 1], "data": [3]},
        ]
    }


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_output_that_json_cannot_carry_is_an_error(value: float) -> None:
    step = build_tensor_output({}, declare(("x", Datatype.FP32, (1,))), NOWHERE)
    arrays = {"y": np.array([value])}
    with pytest.raises(NanOutputError):
        step(arrays, arrays, {})
    with pytest.raises(OutputError):
        step(arrays, {"y": [1.0]}, {})
