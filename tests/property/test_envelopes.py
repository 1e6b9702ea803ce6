"""Whatever arrives: a command is read, or refused with a stable code, and nothing else happens."""

import json
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.commands import (
    SUBMIT,
    Envelope,
    decode_envelope,
    encode_body,
    is_same_body,
    parse_submit,
)
from agent.errors import CommandError

JOB_ID = "01JZ5W7Q2M4N8R0T3V6X9YBCDE"
LIMIT = 1 << 16

# Lone surrogates, NaN and numbers beyond 64 bits included: json.dumps writes them all.
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | st.text(st.characters(), max_size=20)
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def spoil(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return documents like a good one, with some fields of any value and some missing."""
    fields = {key: st.just(value) | values for key, value in good.items()}
    return st.fixed_dictionaries({}, optional=fields)


inputs = spoil(
    {
        "tensors": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [0.5]}],
        "data_b64": "",
        "file": "a.png",
        "sha256": "0" * 64,
        "size_bytes": 1,
    }
)
bodies = st.fixed_dictionaries(
    {"handler": st.sampled_from(["infer", "infer.batch", "shell"]) | values},
    optional={
        "job_id": st.just(JOB_ID) | values,
        "model": st.just("digits") | values,
        "version": st.just("1") | values,
        "input": inputs | values,
        "params": st.just({"top_k": 2}) | values,
        "lane": st.just("batch") | values,
        "priority": st.integers(0, 9) | values,
        "queue_ttl_s": st.floats(0.1, 10) | values,
        "run_timeout_s": st.floats(0.1, 10) | values,
        "max_attempts": st.integers(1, 100) | values,
        "on_interrupt": st.sampled_from(["retry", "fail"]) | values,
    },
)
times = st.just("2026-11-23T10:00:00Z") | st.datetimes().map(str) | values
envelopes = st.fixed_dictionaries(
    {"v": st.just(1) | values, "id": st.just("m") | values, "type": st.just(SUBMIT) | values},
    optional={"not_before": times, "not_after": times, "corr": values, "body": bodies | values},
)


def read(payload: bytes) -> Envelope | None:
    """Do what intake does with a payload; anything but a CommandError gets out."""
    with suppress(CommandError):
        envelope = decode_envelope(payload, LIMIT)
        text = encode_body(envelope.body)
        assert is_same_body(text, text)
        parse_submit(envelope, JOB_ID)
        return envelope
    return None


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(payload: bytes) -> None:
    read(payload)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(values)
def test_any_json_is_read_or_refused(value: Any) -> None:
    read(json.dumps(value).encode())


@settings(max_examples=300, derandomize=True, deadline=None)
@given(envelopes)
def test_any_envelope_is_read_or_refused(value: dict[str, Any]) -> None:
    envelope = read(json.dumps(value).encode())
    if envelope is not None:
        assert envelope.v == value["v"] == 1
        assert envelope.type == SUBMIT
        assert envelope.body["handler"] in ("infer", "infer.batch")


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 300))
def test_good_payload_with_bytes_overwritten_is_read_or_refused(noise: bytes, at: int) -> None:
    body = {"handler": "infer", "model": "digits", "input": {"data_b64": ""}}
    good = json.dumps({"v": 1, "id": "m", "type": SUBMIT, "body": body}).encode()
    assert read(good) is not None
    read(good[:at] + noise + good[at + len(noise) :])
