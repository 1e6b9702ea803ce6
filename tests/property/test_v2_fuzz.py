"""The request parser under broken input: by structure (Hypothesis) and by seeded mutation."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from platforms.artifact import Datatype
from platforms.runtimes.base import DTYPES
from tests.fuzz_v2 import run
from tests.harness.v2_models import serve_models
from worker.engine.service import TensorResponse
from worker.rest.codec import encode_answer, parse_call, parse_head
from worker.rest.errors import RequestFormatError
from worker.rest.tensors import read_binary, read_json, write_binary, write_json

INPUTS = int(os.environ.get("EDGEWARD_TEST_FUZZ_INPUTS", "3000"))

_KEYS = st.sampled_from(
    [
        *("inputs", "outputs", "name", "datatype", "shape", "data", "parameters", "id", "timeout"),
        *("binary_data_size", "binary_data", "classification", "binary_data_output", "priority"),
    ]
)
_WORDS = st.sampled_from(["FP32", "INT8", "BYTES", "BOOL", "BF16", "UINT64", "x", ""])
_LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=5)
)
_JSON: st.SearchStrategy[Any] = st.recursive(
    _LEAVES | _WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=5),
    max_leaves=20,
)


@given(
    document=st.dictionaries(_KEYS, _JSON, max_size=5),
    tail=st.binary(max_size=40),
    off=st.integers(-3, 3),
)
@settings(max_examples=400, deadline=None)
def test_any_json_is_a_request_or_refused(document: Any, tail: bytes, off: int) -> None:
    try:
        head = orjson.dumps(document)
    except TypeError:
        # Whole numbers beyond 64 bits.
        return
    for head_bytes in (None, len(head) + off):
        # Any other error fails the test.
        with suppress(RequestFormatError):
            parse_call("m", None, head + tail, head_bytes)


@given(text=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_request_or_refused(text: bytes) -> None:
    with pytest.raises(RequestFormatError):
        parse_head(text)


def _arrays() -> st.SearchStrategy[Any]:
    kinds = st.sampled_from([kind for kind in DTYPES if kind is not Datatype.BYTES])
    shapes = npst.array_shapes(min_dims=0, max_dims=4, max_side=4)
    return kinds.flatmap(
        lambda kind: shapes.flatmap(lambda shape: npst.arrays(DTYPES[kind], shape))
    )


@given(array=_arrays(), off=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_array_survives_the_wire_in_both_forms(array: Any, off: int) -> None:
    datatype = Datatype(next(kind for kind, dtype in DTYPES.items() if dtype == array.dtype))
    tail = bytes(write_binary(array))
    body = bytes(off) + tail
    read = read_binary("x", datatype, array.shape, body, off, len(tail))
    assert read.dtype == array.dtype
    assert read.tobytes() == array.tobytes()
    assert read.flags.aligned
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return
    as_json = orjson.loads(write_json(array))
    again = read_json("x", datatype, array.shape, as_json)
    np.testing.assert_array_equal(again, array)
    assert again.dtype == array.dtype


@given(texts=st.lists(st.text(max_size=10), max_size=6))
@settings(max_examples=100, deadline=None)
def test_texts_survive_the_wire_in_both_forms(texts: list[str]) -> None:
    array = np.empty(len(texts), np.object_)
    array[:] = texts
    tail = bytes(write_binary(array))
    shape = (len(texts),)
    assert read_binary("x", Datatype.BYTES, shape, tail, 0, len(tail)).tolist() == texts
    as_json = orjson.loads(write_json(array))
    assert read_json("x", Datatype.BYTES, shape, as_json).tolist() == texts


@given(name=st.text(max_size=8), text=st.text(max_size=8))
@settings(max_examples=100, deadline=None)
def test_answer_is_json_whatever_the_names_are(name: str, text: str) -> None:
    head = orjson.dumps(
        {"id": text, "inputs": [{"name": "x", "datatype": "INT8", "shape": [0], "data": []}]}
    )
    call = parse_call("m", None, head, None)
    answer = encode_answer(call, TensorResponse(text, "1", {name: np.zeros((1, 2), np.float32)}))
    document = orjson.loads(answer.body)
    assert document.get("id", "") == text
    assert document["model_name"] == text
    assert document["outputs"][0]["name"] == name


@pytest.mark.timeout(3600)
def test_broken_requests_never_get_a_500(tmp_path: Path) -> None:
    with serve_models(tmp_path) as box:
        statuses = run(box, INPUTS, seed=1)
    # Most of them are broken, and some are not.
    assert sum(statuses.values()) == INPUTS
    assert statuses[200] > INPUTS // 20
    assert statuses[400] > INPUTS // 20
