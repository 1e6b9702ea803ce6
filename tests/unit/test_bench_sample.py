"""Inputs made by chance, and arrays that travel in files."""

from pathlib import Path

import numpy as np
import pytest

from platforms.artifact import Datatype, TensorSpec
from platforms.errors import TensorError
from platforms.measuring.sample import load_arrays, make_random_inputs, repeat_rows, save_arrays
from platforms.runtimes.base import DTYPES


@pytest.mark.parametrize("datatype", [*DTYPES])
def test_every_datatype_has_random_values_that_come_again(datatype: Datatype) -> None:
    specs = (TensorSpec("x", datatype, (-1, 3)),)
    first, second = make_random_inputs(specs, 4)["x"], make_random_inputs(specs, 4)["x"]
    assert (first.shape, first.dtype) == ((4, 3), DTYPES[datatype])
    assert np.array_equal(first, second)


def test_whole_numbers_stay_within_a_small_vocabulary() -> None:
    found = make_random_inputs((TensorSpec("x", Datatype.INT64, (-1, 1000)),), 1)["x"]
    assert 0 <= found.min() <= found.max() <= 100


def test_free_axes_get_the_given_lengths_and_fixed_ones_stay() -> None:
    specs = (TensorSpec("x", Datatype.FP32, (-1, 3, -1, -1)),)
    assert make_random_inputs(specs, 2)["x"].shape == (2, 3, 1, 1)
    assert make_random_inputs(specs, 2, shapes={"x": (3, 8, 9)})["x"].shape == (2, 3, 8, 9)
    with pytest.raises(TensorError, match=r"takes \[-1, 3, -1, -1\]"):
        make_random_inputs(specs, 2, shapes={"x": (4, 8, 9)})


def test_shape_of_no_input_is_refused() -> None:
    with pytest.raises(TensorError, match="no input y"):
        make_random_inputs((TensorSpec("x", Datatype.FP32, (-1,)),), 1, shapes={"y": (3,)})


def test_fixed_batch_is_kept() -> None:
    specs = (TensorSpec("x", Datatype.FP32, (1, 3)),)
    assert make_random_inputs(specs, 5)["x"].shape == (1, 3)


def test_bf16_has_no_numbers_here() -> None:
    with pytest.raises(TensorError, match="BF16"):
        make_random_inputs((TensorSpec("x", Datatype.BF16, (1,)),), 1)


def test_rows_repeat_in_order() -> None:
    rows = repeat_rows({"x": np.array([[1], [2], [3]])}, 5)["x"]
    assert rows.ravel().tolist() == [1, 2, 3, 1, 2]


def test_arrays_survive_a_file_whatever_they_are_called(tmp_path: Path) -> None:
    arrays = {
        "file": np.arange(6, dtype=np.float16).reshape(2, 3),
        "names": np.array([["ä", "b"]], object),
        "a/0": np.array(True),
    }
    save_arrays(tmp_path / "x.npz", arrays)
    found = load_arrays(tmp_path / "x.npz")
    assert [*found] == [*arrays]
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
