import base64
import json
from pathlib import Path

import pytest

from agent.commands import SubmitBody, decode_envelope, parse_submit
from agent.sections import LimitSettings
from console.commands.submit import describe_answer, describe_time
from console.demo import pick_percentile
from console.errors import InlineTooLargeError, InputFileError
from console.submission import (
    INLINE_BYTES,
    Wanted,
    build_cancel,
    build_submit,
    read_input,
    read_reference,
)

LIMIT_BYTES = LimitSettings().payload_bytes


def read_back(payload: str, job_id: str) -> SubmitBody:
    return parse_submit(decode_envelope(payload.encode(), LIMIT_BYTES), job_id)


def test_largest_inline_file_still_fits_into_a_payload(tmp_path: Path) -> None:
    path = tmp_path / "largest.bin"
    path.write_bytes(bytes(range(256)) * (INLINE_BYTES // 256))
    wanted = Wanted("m" * 64, version="v" * 64, lane="maintenance", priority=9)
    command = build_submit(wanted, read_input(path))
    body = read_back(command.payload, command.job_id)
    assert body.input is not None
    assert base64.b64decode(body.input.data_b64 or "") == path.read_bytes()
    assert (body.model, body.version, body.lane, body.priority) == (
        "m" * 64,
        "v" * 64,
        "maintenance",
        9,
    )


def test_larger_file_is_refused_with_the_way_to_send_it(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(INLINE_BYTES + 1))
    with pytest.raises(InlineTooLargeError, match="--by-path"):
        read_input(path)


def test_json_file_with_tensors_goes_as_tensors(tmp_path: Path) -> None:
    tensors = [{"name": "x", "datatype": "FP32", "shape": [1], "data": [0.5]}]
    path = tmp_path / "input.json"
    path.write_text(json.dumps({"tensors": tensors}))
    assert read_input(path) == {"tensors": tensors}


@pytest.mark.parametrize("content", ['{"some": "document"}', "[1, 2]", "no JSON at all"])
def test_any_other_json_file_goes_as_bytes(tmp_path: Path, content: str) -> None:
    path = tmp_path / "input.json"
    path.write_text(content)
    assert read_input(path) == {"data_b64": base64.b64encode(content.encode()).decode()}


def test_tensors_that_are_no_list_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "input.json"
    path.write_text('{"tensors": 1}')
    with pytest.raises(InputFileError, match="is a list"):
        read_input(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"nothing\.png cannot be read"):
        read_input(tmp_path / "nothing.png")


def test_reference_has_path_digest_and_size(tmp_path: Path) -> None:
    path = tmp_path / "input.bin"
    path.write_bytes(b"abc")
    assert read_reference(path) == {
        "file": str(path),
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "size_bytes": 3,
    }


def test_cancel_names_its_job() -> None:
    command = build_cancel("01M828YRXD24KGBPQAVBA31ETP")
    envelope = decode_envelope(command.payload.encode(), LIMIT_BYTES)
    assert (envelope.type, envelope.body) == (
        "job.cancel",
        {"job_id": "01M828YRXD24KGBPQAVBA31ETP"},
    )


@pytest.mark.parametrize(
    ("result", "reason", "expected"),
    [
        ({"output": [{"label": "7", "score": 0.5}]}, None, "7  50.0%"),
        ({"output": {"file": "results/1.json"}}, None, "in the file results/1.json on the box"),
        ({"output": [1, 2]}, None, "[1,2]"),
        (None, {"code": "bad_image", "message": "no picture"}, "no picture"),
        (None, {"code": "bad_image", "message": ""}, "bad_image"),
        (None, None, ""),
    ],
)
def test_answer_is_told_in_a_few_words(
    result: dict[str, object] | None, reason: dict[str, object] | None, expected: str
) -> None:
    assert describe_answer(result, reason) == expected


def test_time_is_the_run_without_the_wait() -> None:
    timings = {"queue": 900.0, "pre": 1.0, "infer": 2.0, "post": 0.25}
    assert describe_time({"timings_ms": timings}) == "3.2"
    assert describe_time(None) == ""


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, None), ([3], 0.95, 3), ([1, 2, 3, 4], 0.5, 2), (list(range(1, 101)), 0.95, 95)],
)
def test_percentile_is_by_nearest_rank(
    values: list[int], share: float, expected: int | None
) -> None:
    assert pick_percentile(values, share) == expected
