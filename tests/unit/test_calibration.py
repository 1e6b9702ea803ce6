"""Calibration data: what is read, what is chosen, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from converters.compression.calibration import (
    CalibrationSet,
    adapt,
    load_calibration,
    make_golden,
    read_calibration,
)
from converters.errors import CalibrationError
from platforms.artifact import Datatype, TensorSpec
from platforms.runtimes.base import Array

X = TensorSpec("x", Datatype.FP32, (-1, 4))
PICTURE = TensorSpec("x", Datatype.FP32, (-1, 1, 2, 2))


def write_npz(path: Path, **arrays: Array) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def numbered(rows: int) -> Array:
    return np.repeat(np.arange(rows, dtype=np.float32)[:, None], 4, axis=1)


def read_pixels(data: bytes) -> dict[str, Array]:
    if not data.startswith(b"\x89PNG"):
        msg = "no picture"
        raise CalibrationError(msg)
    import io

    pixels = np.asarray(Image.open(io.BytesIO(data)), np.float32)
    return {"x": pixels.reshape(1, 1, 2, 2)}


def write_pictures(folder: Path, count: int) -> None:
    for number in range(count):
        target = folder / f"class{number % 2}" / f"{number:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), number).save(target)


def test_npz_gives_as_many_samples_as_asked_for_and_says_so(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", x=numbered(50))
    found = load_calibration(path, [X], samples=20)
    assert found.inputs["x"].shape == (20, 4)
    facts = {"source": "npz", "found": 50, "used": 20, "chosen": "at random", "seed": 20_260}
    assert found.facts == facts


def test_the_same_seed_chooses_the_same_samples_and_another_seed_others(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", x=numbered(50))
    first, again = (load_calibration(path, [X], samples=20).inputs["x"] for _ in range(2))
    other = load_calibration(path, [X], samples=20, seed=1).inputs["x"]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(np.unique(first[:, 0])) == 20


def test_all_samples_are_used_where_there_are_fewer_than_asked_for(tmp_path: Path) -> None:
    found = load_calibration(write_npz(tmp_path / "a.npz", x=numbered(9)), [X])
    assert (found.samples, found.facts["chosen"]) == (9, "all")


def test_arrays_of_other_names_are_taken_in_order(tmp_path: Path) -> None:
    specs = [
        TensorSpec("serving_a:0", Datatype.FP32, (1, 4)),
        TensorSpec("b", Datatype.INT64, (1,)),
    ]
    path = write_npz(tmp_path / "a.npz", first=numbered(9), second=np.arange(9))
    found = load_calibration(path, specs)
    assert set(found.inputs) == {"serving_a:0", "b"}
    assert found.inputs["b"].dtype == np.int64


def test_doubles_are_taken_as_floats_and_integers_are_not_made_of_floats(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", x=numbered(9).astype(np.float64))
    assert load_calibration(path, [X]).inputs["x"].dtype == np.float32
    with pytest.raises(CalibrationError, match="takes INT64"):
        load_calibration(path, [TensorSpec("x", Datatype.INT64, (-1, 4))])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": numbered(9)[:, :3]}, r"\[3\] do not fit"),
        ({"x": numbered(7)}, "7 usable samples, at least 8"),
        ({"x": np.full((9, 4), np.nan, np.float32)}, "NaN"),
        ({"x": numbered(0)}, "without samples"),
        ({}, "none at all"),
        ({"x": np.float32(1)}, "without samples"),
        ({"x": numbered(9), "y": numbered(9)}, None),
        ({"a": numbered(9), "b": numbered(9)}, "the model takes x"),
    ],
)
def test_npz_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, arrays: dict[str, Array], words: str | None
) -> None:
    path = write_npz(tmp_path / "a.npz", **arrays)
    if words is None:
        assert set(load_calibration(path, [X]).inputs) == {"x"}
        return
    with pytest.raises(CalibrationError, match=words):
        load_calibration(path, [X])


def test_pickled_arrays_and_other_files_are_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CalibrationError, match="plain arrays"):
        load_calibration(path, [X])
    for name in ("a.csv", "gone.npz", "gone.jsonl"):
        with pytest.raises(CalibrationError):
            load_calibration(tmp_path / name, [X])


def test_inputs_of_different_lengths_are_refused(tmp_path: Path) -> None:
    specs = [X, TensorSpec("y", Datatype.FP32, (-1, 4))]
    path = write_npz(tmp_path / "a.npz", x=numbered(9), y=numbered(10))
    with pytest.raises(CalibrationError, match=r"\[9, 10\] samples"):
        load_calibration(path, specs)


def test_pictures_of_all_sub_folders_go_through_the_models_own_step(tmp_path: Path) -> None:
    write_pictures(tmp_path, 12)
    found = load_calibration(tmp_path, [PICTURE], read_pixels, samples=10)
    assert found.inputs["x"].shape == (10, 1, 2, 2)
    assert found.facts["found"] == 12
    # A sorted folder would give one class first.
    assert len({int(value) % 2 for value in found.inputs["x"][:5, 0, 0, 0]}) == 2


def test_pictures_that_cannot_be_read_are_replaced_by_others_and_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, 10)
    (tmp_path / "torn.jpg").write_bytes(b"torn")
    found = load_calibration(tmp_path, [PICTURE], read_pixels)
    assert (found.samples, found.facts["unreadable"]) == (10, 1)
    assert found.facts["such_as"] == ["torn.jpg: no picture"]


def test_folder_of_nothing_but_torn_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no pictures"):
        load_calibration(tmp_path, [PICTURE], read_pixels)
    (tmp_path / "torn.jpg").write_bytes(b"torn")
    with pytest.raises(CalibrationError, match="none of 1 pictures"):
        load_calibration(tmp_path, [PICTURE], read_pixels)
    with pytest.raises(CalibrationError, match="preprocessing step"):
        load_calibration(tmp_path, [PICTURE])


def test_json_lines_give_one_sample_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"x": [float(number)] * 4}) for number in range(30)]
    path.write_text("\n".join([*lines[:10], "", *lines[10:]]) + "\n", encoding="utf-8")
    found = load_calibration(path, [X], samples=20)
    assert found.inputs["x"].shape == (20, 4)
    assert len(np.unique(found.inputs["x"][:, 0])) == 20


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "sample 1 is no object"),
        ("[1]", "sample 1 is no object"),
        ('{"y": [1]}', "sample 1 is no object"),
        ('{"x": ["a"]}', "sample 1 is no object"),
        ('{"x": [1, 2, 3]}', "do not fit"),
        ("", "is empty"),
    ],
)
def test_bad_json_lines_are_refused_with_the_sample(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([line] * 9), encoding="utf-8")
    with pytest.raises(CalibrationError, match=words):
        load_calibration(path, [X])


def test_json_lines_of_different_shapes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": [1, 2, 3, 4]}\n{"x": [1]}\n' * 5, encoding="utf-8")
    with pytest.raises(CalibrationError, match="different shapes"):
        load_calibration(path, [X])


def test_saved_set_is_read_back_and_checked_against_another_models_inputs(tmp_path: Path) -> None:
    found = load_calibration(write_npz(tmp_path / "a.npz", x=numbered(9)), [X])
    path = found.save(tmp_path / "set.npz")
    other = TensorSpec("args_0", Datatype.FP32, (1, 4))
    again = read_calibration(path, [other])
    assert np.array_equal(again.inputs["args_0"], found.inputs["x"])
    with pytest.raises(CalibrationError, match="do not fit"):
        read_calibration(path, [TensorSpec("x", Datatype.FP32, (-1, 5))])
    with pytest.raises(CalibrationError, match="no calibration file"):
        read_calibration(tmp_path / "gone.npz", [X])


def test_feeds_are_single_samples_or_as_many_as_a_fixed_batch_holds() -> None:
    found = CalibrationSet({"x": numbered(10)}, {})
    shapes = {
        batch: [feed["x"].shape for feed in adapt(found, [spec]).iter_feeds([spec])]
        for batch in (-1, 1, 4)
        for spec in [TensorSpec("x", Datatype.FP32, (batch, 4))]
    }
    assert shapes == {-1: [(1, 4)] * 10, 1: [(1, 4)] * 10, 4: [(4, 4)] * 2}


def test_an_input_without_a_batch_axis_gets_one_value_a_run() -> None:
    specs = [X, TensorSpec("rate", Datatype.INT64, ())]
    found = adapt(CalibrationSet({"x": numbered(9), "rate": np.full(9, 16_000)}, {}), specs)
    feeds = list(found.iter_feeds(specs))
    assert len(feeds) == 9
    assert (feeds[0]["x"].shape, feeds[0]["rate"].shape) == ((1, 4), ())


def test_golden_rows_are_none_that_the_quantizer_sees() -> None:
    split = make_golden(adapt(CalibrationSet({"x": numbered(100)}, {}), [X]), golden_rows=30)
    golden, seen = split.golden.inputs["x"][:, 0], split.calibration.inputs["x"][:, 0]
    assert (len(golden), len(seen), split.is_disjoint) == (30, 70, True)
    assert not set(golden.tolist()) & set(seen.tolist())


def test_golden_rows_take_at_most_half() -> None:
    split = make_golden(adapt(CalibrationSet({"x": numbered(20)}, {}), [X]))
    assert (split.golden.samples, split.calibration.samples) == (10, 10)


def test_too_few_samples_serve_as_both_and_it_is_said() -> None:
    split = make_golden(adapt(CalibrationSet({"x": numbered(9)}, {}), [X]))
    assert (split.golden.samples, split.calibration.samples) == (9, 9)
    assert not split.is_disjoint
    with pytest.raises(CalibrationError, match="no samples"):
        make_golden(CalibrationSet({}, {}))
