"""The step `byte_window` agrees with magika's own feature extraction."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from magika import Magika
from magika.types import Seekable

from platforms.artifact import Datatype
from tests.unit.test_processing_tensor import declare
from worker.errors import PreprocessError, StepParamsError
from worker.processing.step import JobInput
from worker.processing.window import WindowParams, build_byte_window, extract_window

PARAMS = WindowParams()


def extract_by_magika(data: bytes) -> list[int]:
    features = Magika._extract_features_from_seekable(
        Seekable(io.BytesIO(data)), 1024, 0, 1024, 256, 4096, use_inputs_at_offsets=False
    )
    return [*features.beg, *features.end]


def make_cases() -> list[bytes]:
    random = np.random.default_rng(0)
    sizes = (0, 1, 2, 7, 8, 9, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 8192, 20000)
    plain = [random.bytes(size) for size in sizes]
    blank = [b" \t\r\n\v\f" * (size // 6 + 1) for size in sizes]
    framed = [b" " * 2000 + data + b"\n" * 3000 for data in plain]
    mostly_blank = [
        bytes(random.choice(np.frombuffer(b" \n\x00a\x85\xa0", np.uint8), size)) for size in sizes
    ]
    text = [(b"line of text \n" * size)[:size] for size in sizes]
    return [*plain, *blank, *framed, *mostly_blank, *text, b" ", b"a ", b" a", b"\n" * 4096 + b"a"]


def test_window_is_exactly_magika_s_own_on_many_inputs() -> None:
    cases = make_cases()
    for data in cases:
        assert extract_window(data, PARAMS)[0].tolist() == extract_by_magika(data)
    assert len(cases) > 80


def test_window_is_int32_with_a_batch_axis_and_an_empty_file_is_all_padding() -> None:
    window = extract_window(b"", PARAMS)
    assert window.dtype == np.int32
    assert window.shape == (1, 2048)
    assert set(window[0].tolist()) == {256}


def test_one_byte_stands_first_and_last() -> None:
    window = extract_window(b"A", PARAMS)[0].tolist()
    assert window == [65, *[256] * 2046, 65]


def test_sides_may_differ_or_be_left_out() -> None:
    assert extract_window(b"abcdef", WindowParams(begin=2, end=0)).tolist() == [[97, 98]]
    assert extract_window(b"abcdef", WindowParams(begin=0, end=3)).tolist() == [[100, 101, 102]]


@pytest.mark.parametrize(
    ("params", "datatype"),
    [
        ({}, Datatype.INT64),
        ({"begin": 1}, Datatype.INT32),
        ({"begin": -1}, Datatype.INT32),
        ({"start": 1024}, Datatype.INT32),
        ({"begin": 0, "end": 0}, Datatype.INT32),
    ],
)
def test_parameters_that_do_not_fit_the_model_are_refused(params: Any, datatype: Datatype) -> None:
    with pytest.raises(StepParamsError):
        build_byte_window(params, declare(("b", datatype, (-1, 2048))), Path())


def test_job_without_bytes_is_refused() -> None:
    step = build_byte_window({}, declare(("b", Datatype.INT32, (-1, 2048))), Path())
    assert step(JobInput(data=b"x"))["b"].shape == (1, 2048)
    with pytest.raises(PreprocessError):
        step(JobInput())
