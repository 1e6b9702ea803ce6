"""The wire schema: what a command must look like, and which code each mistake has."""

import json
from typing import Any

import pytest
from ulid import ULID

from agent.clock import SystemClock
from agent.commands import (
    CANCEL,
    SUBMIT,
    Envelope,
    IdSeries,
    check_type,
    decode_envelope,
    encode,
    encode_body,
    hash_text,
    is_same_body,
    new_id,
    parse_submit,
)
from agent.errors import CommandError, MalformedError
from agent.jobs import Lane
from agent.topics import JOB_ID_PATTERN

LIMIT = 4096
JOB_ID = "01JZ5W7Q2M4N8R0T3V6X9YBCDE"
GOOD_BODY = {"handler": "infer", "model": "digits", "input": {"data_b64": ""}}


def make_payload(**changes: Any) -> bytes:
    document = {"v": 1, "id": "message-1", "type": SUBMIT, "body": GOOD_BODY} | changes
    kept = {key: value for key, value in document.items() if value is not ...}
    return json.dumps(kept).encode()


def make_envelope(**changes: Any) -> Envelope:
    body = {key: value for key, value in (GOOD_BODY | changes).items() if value is not ...}
    return Envelope(v=1, id="message-1", type=SUBMIT, body=body)


def test_envelope_of_the_protocol_is_read_field_by_field() -> None:
    envelope = decode_envelope(
        b'{"v":1,"id":"01JZ5W7Q2M4N8R0T3V6X9YBCDE","type":"job.submit",'
        b'"ts":"2026-11-22T10:00:00.000Z","not_before":null,'
        b'"not_after":"2026-11-23T10:00:00Z","corr":null,"body":{"a":1}}',
        LIMIT,
    )
    assert envelope == Envelope(
        v=1,
        id=JOB_ID,
        type="job.submit",
        ts="2026-11-22T10:00:00.000Z",
        not_after="2026-11-23T10:00:00Z",
        body={"a": 1},
    )


def test_unknown_fields_of_the_envelope_are_ignored_and_those_of_the_body_are_kept() -> None:
    envelope = decode_envelope(make_payload(later=1, body=GOOD_BODY | {"later": 2}), LIMIT)
    assert not hasattr(envelope, "later")
    assert envelope.body["later"] == 2
    assert parse_submit(envelope, JOB_ID).model == "digits"


def test_cancel_needs_no_body() -> None:
    envelope = decode_envelope(make_payload(type=CANCEL, body=...), LIMIT)
    check_type(envelope, CANCEL)
    assert envelope.body == {}


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (make_payload(pad="x" * LIMIT), "payload_too_large"),
        (b"", "malformed"),
        (b"\xff\xfe", "malformed"),
        (b"{", "malformed"),
        (b"[]", "malformed"),
        (b"null", "malformed"),
        (b'"text"', "malformed"),
        (make_payload() + b"{}", "malformed"),
        (make_payload(body={"x": float("nan")}), "malformed"),
        (make_payload(body={"x": float("inf")}), "malformed"),
        (b'{"v":1,"id":"m","type":"job.submit","body":{"x":"\\ud800"}}', "malformed"),
        (b"[" * 2000 + b"]" * 2000, "malformed"),
        (make_payload(v=...), "malformed"),
        (make_payload(id=...), "malformed"),
        (make_payload(id=""), "malformed"),
        (make_payload(id="x" * 65), "malformed"),
        (make_payload(id=7), "malformed"),
        (make_payload(type=...), "malformed"),
        (make_payload(type=""), "malformed"),
        (make_payload(body=[]), "malformed"),
        (make_payload(body=None), "malformed"),
        (make_payload(not_before="tomorrow"), "malformed"),
        (make_payload(not_after="2026-13-01T00:00:00Z"), "malformed"),
        (make_payload(not_after=1_800_000_000), "malformed"),
        (make_payload(v=2), "unsupported_version"),
        (make_payload(v=0), "unsupported_version"),
        (make_payload(v="1"), "unsupported_version"),
        (make_payload(v=1.0), "unsupported_version"),
        (make_payload(v=True), "unsupported_version"),
        (make_payload(v=None), "unsupported_version"),
    ],
)
def test_payload_that_is_no_envelope_is_refused_with_its_code(payload: bytes, code: str) -> None:
    with pytest.raises(CommandError) as caught:
        decode_envelope(payload, LIMIT)
    assert caught.value.code == code


def test_payload_of_exactly_the_limit_is_read_and_one_byte_more_is_not() -> None:
    payload = make_payload()
    assert decode_envelope(payload, len(payload)).id == "message-1"
    with pytest.raises(CommandError) as caught:
        decode_envelope(payload, len(payload) - 1)
    assert caught.value.code == "payload_too_large"


def test_submit_without_options_has_the_documented_defaults() -> None:
    body = parse_submit(make_envelope(), JOB_ID)
    assert body.model_dump(exclude={"handler", "model", "input"}) == {
        "job_id": None,
        "version": None,
        "params": {},
        "lane": None,
        "priority": 5,
        "queue_ttl_s": None,
        "run_timeout_s": None,
        "max_attempts": None,
        "on_interrupt": "retry",
        "on_error": "retry",
        "retry_delay_s": None,
        "progress_timeout_s": None,
        "dedupe_key": None,
        "dedupe": "drop_new",
        "on_full": "keep_newest",
        "window": None,
        "key": None,
    }


def test_submit_with_every_option_is_read() -> None:
    body = parse_submit(
        make_envelope(
            handler="infer.batch",
            job_id=JOB_ID,
            version="2.0.0",
            input={"file": "digits/a.png", "sha256": "0" * 64, "size_bytes": 0},
            params={"top_k": 2},
            lane="maintenance",
            priority=9,
            queue_ttl_s=0.5,
            run_timeout_s=1,
            max_attempts=1,
            on_interrupt="fail",
        ),
        JOB_ID,
    )
    assert (body.lane, body.priority, body.version) == (Lane.MAINTENANCE, 9, "2.0.0")
    assert body.input is not None
    assert (body.input.file, body.on_interrupt, body.max_attempts) == ("digits/a.png", "fail", 1)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"handler": "shell"}, "unknown_handler"),
        ({"handler": ""}, "unknown_handler"),
        ({"handler": ...}, "invalid_body"),
        ({"handler": 7}, "invalid_body"),
        ({"job_id": "01JZ5W7Q2M4N8R0T3V6X9YBCDF"}, "invalid_body"),
        ({"model": ...}, "invalid_body"),
        ({"model": "../up"}, "invalid_body"),
        ({"model": ".hidden"}, "invalid_body"),
        ({"model": "digits\n"}, "invalid_body"),
        ({"model": "x" * 65}, "invalid_body"),
        ({"version": "../up"}, "invalid_body"),
        ({"version": 2}, "invalid_body"),
        ({"input": ...}, "invalid_body"),
        ({"input": {}}, "invalid_body"),
        ({"input": {"data_b64": "", "file": "a"}}, "invalid_body"),
        ({"input": {"data_b64": "", "tensors": []}}, "invalid_body"),
        ({"input": {"file": ""}}, "invalid_body"),
        ({"input": {"file": "x" * 4097}}, "invalid_body"),
        ({"input": {"file": "a", "sha256": "A" * 64}}, "invalid_body"),
        ({"input": {"file": "a", "size_bytes": -1}}, "invalid_body"),
        ({"input": {"tensors": [{"name": "x"}]}}, "invalid_body"),
        ({"params": []}, "invalid_body"),
        ({"lane": "fast"}, "invalid_body"),
        ({"priority": -1}, "invalid_body"),
        ({"priority": 10}, "invalid_body"),
        ({"queue_ttl_s": 0}, "invalid_body"),
        ({"queue_ttl_s": float("inf")}, "invalid_body"),
        ({"run_timeout_s": -1}, "invalid_body"),
        ({"max_attempts": 0}, "invalid_body"),
        ({"max_attempts": 101}, "invalid_body"),
        ({"on_interrupt": "ask"}, "invalid_body"),
    ],
)
def test_body_that_is_no_job_is_refused_with_its_code(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_submit(make_envelope(**changes), JOB_ID)
    assert caught.value.code == code


@pytest.mark.parametrize("kind", ["job.cancel", "job.state", "Job.Submit"])
def test_envelope_of_another_type_is_no_submit(kind: str) -> None:
    envelope = decode_envelope(make_payload(type=kind), LIMIT)
    with pytest.raises(CommandError) as caught:
        parse_submit(envelope, JOB_ID)
    assert caught.value.code == "unsupported_type"


def test_unknown_handler_is_told_which_there_are() -> None:
    with pytest.raises(CommandError, match=r"'shell'.*infer, infer\.batch"):
        parse_submit(make_envelope(handler="shell"), JOB_ID)


def test_json_is_compact_and_keeps_every_character() -> None:
    value = {"a": [1, 2.5, None, True], "b": "Grüße 🙂", "c": 2**70}
    text = encode(value)
    assert text == '{"a":[1,2.5,null,true],"b":"Grüße 🙂","c":1180591620717411303424}'
    assert json.loads(text) == value


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "a NaN in a sentence"])
def test_word_for_no_number_inside_a_string_is_only_a_word(word: str) -> None:
    assert json.loads(encode({"text": word})) == {"text": word}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_number_that_json_cannot_carry_is_not_written(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode({"x": [number]})
    with pytest.raises(MalformedError):
        encode_body({"x": [number]})


def test_number_beyond_a_double_is_malformed() -> None:
    envelope = decode_envelope(
        b'{"v":1,"id":"m","type":"job.submit","body":{"params":{"x":1e999}}}', LIMIT
    )
    with pytest.raises(MalformedError, match="range"):
        encode_body(envelope.body)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"a":1,"b":2}', '{ "b": 2, "a": 1 }', True),
        ('{"a":2}', '{"a":2.0}', True),
        ('{"a":"\\u00e9"}', '{"a":"é"}', True),
        ("", "null", True),
        ("", "", True),
        ('{"a":1}', '{"a":2}', False),
        ('{"a":1}', '{"a":"1"}', False),
        ('{"a":[1,2]}', '{"a":[2,1]}', False),
        ('{"a":null}', "{}", False),
        ("", "{}", False),
    ],
)
def test_bodies_are_compared_as_values(one: str, other: str, same: bool) -> None:
    assert is_same_body(one, other) is same


def test_digest_is_the_same_for_text_and_its_bytes_and_tells_others_apart() -> None:
    assert hash_text("Grüße") == hash_text("Grüße".encode())
    assert hash_text("a") != hash_text("b")


def test_series_gives_valid_unique_ids_in_the_order_of_their_making() -> None:
    series = IdSeries()
    ids = [series.next() for _ in range(2**15 + 1000)]
    assert all(JOB_ID_PATTERN.fullmatch(item) for item in ids)
    assert len(set(ids)) == len(ids)
    # Two heads may be of the same millisecond; order is promised for one head and across time.
    assert ids[: 2**15] == sorted(ids[: 2**15])
    assert ids[2**15 :] == sorted(ids[2**15 :])
    assert [item[:10] for item in ids] == sorted(item[:10] for item in ids)
    assert ids[2**15 - 1][:23] != ids[2**15][:23]


def test_two_series_do_not_meet() -> None:
    one, other = IdSeries(), IdSeries()
    first = {one.next() for _ in range(2**12)}
    assert first.isdisjoint(other.next() for _ in range(2**12))


def test_id_tells_the_time_of_its_making() -> None:
    before_ms = SystemClock().wall_ms()
    made = [new_id(), IdSeries().next()]
    after_ms = SystemClock().wall_ms()
    for item in made:
        assert before_ms <= ULID.from_str(item).milliseconds <= after_ms
