"""Whatever a stranger sends as a tensor, it is read exactly or refused as declared."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agent.manifest import Manifest
from platforms.artifact import Datatype
from tests.unit.test_processing_tensor import declare, save_npy
from worker.errors import PreprocessError
from worker.processing.step import JobInput
from worker.processing.tensor import build_tensor_input, read_npy

DATATYPES = sorted(set(Datatype) - {Datatype.BF16})

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just(10**400)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)
shapes = st.lists(st.integers(-2, 4), max_size=4) | anything
tensors = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "z"]) | scalars,
        "datatype": st.sampled_from([datatype.value for datatype in DATATYPES]) | scalars,
        "shape": shapes,
        "data": st.lists(scalars, max_size=16) | anything,
    },
    optional={"parameters": anything, "other": anything},
)


def manifest(datatype: Datatype) -> Manifest:
    return declare(("x", datatype, (-1, 2)))


@given(st.sampled_from(DATATYPES), st.lists(tensors | anything, max_size=3) | anything)
def test_bad_tensors_raise_only_the_declared_error(datatype: Datatype, sent: Any) -> None:
    step = build_tensor_input({}, manifest(datatype), Path())
    try:
        found = step(JobInput(tensors=sent))
    except PreprocessError:
        return
    assert found["x"].ndim == 2
    assert found["x"].shape[1] == 2


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.data(),
    st.booleans(),
)
def test_good_tensors_are_read_exactly(shape: list[int], data: Any, is_nested: bool) -> None:
    count = math.prod(shape)
    floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
    values = data.draw(st.lists(floats, min_size=count, max_size=count))
    right = np.array(values, np.float32).reshape(shape)
    sent = {
        "name": "x",
        "datatype": "FP32",
        "shape": shape,
        "data": right.tolist() if is_nested else values,
    }
    step = build_tensor_input({}, declare(("x", Datatype.FP32, (-1,) * len(shape))), Path())
    found = step(JobInput(tensors=[json.loads(json.dumps(sent))]))
    assert found["x"].tobytes() == right.tobytes()


@given(st.binary(max_size=300))
def test_random_bytes_as_npy_raise_only_the_declared_error(sent: bytes) -> None:
    for data in (sent, b"\x93NUMPY\x01\x00" + sent):
        try:
            read_npy(data)
        except PreprocessError:
            continue


@given(st.data())
def test_npy_with_a_changed_byte_raises_only_the_declared_error(data: Any) -> None:
    whole = bytearray(save_npy(np.ones((2, 3), np.float32)))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_npy(bytes(whole))
    except PreprocessError:
        return
    assert found.size * found.itemsize == 24
