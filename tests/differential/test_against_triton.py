"""Our answers beside Triton's, request by request; each difference is listed with its reason."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.differential.cases import Case, build_cases, play
from tests.differential.differences import DIFFERENCES
from tests.differential.record import RECORDING
from tests.harness.v2_models import serve_models

CASES = {case.name: case for case in build_cases()}
RECORDED: dict[str, dict[str, Any]] = json.loads(RECORDING.read_text("utf-8"))["answers"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """Play all requests in their order, as some change what the next ones meet."""
    with serve_models(tmp_path_factory.mktemp("v2")) as box:
        assert box.server.port is not None
        yield {name: play(box.server.port, case).to_json() for name, case in CASES.items()}


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return in which respects two answers differ."""
    differing = [
        key for key in ("status", "kind", "encoding", "values") if ours[key] != theirs[key]
    ]
    if not _has_all(ours["shape"], theirs["shape"]):
        differing.append("shape")
    return differing


def _has_all(ours: Any, theirs: Any) -> bool:
    """Say whether all that Triton's JSON has is in ours, of the same type; more is allowed."""
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(
            key in ours and _has_all(ours[key], value) for key, value in theirs.items()
        )
    if isinstance(theirs, list):
        # An empty list says nothing of its items.
        return isinstance(ours, list) and (not theirs or not ours or _has_all(ours[0], theirs[0]))
    return bool(ours == theirs)


def test_every_request_is_recorded_and_every_listed_difference_is_of_one() -> None:
    assert RECORDED.keys() == CASES.keys()
    assert DIFFERENCES.keys() <= CASES.keys()
    assert len(CASES) >= 120


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answer_is_tritons_or_differs_as_listed(
    answers: dict[str, dict[str, Any]], case: Case
) -> None:
    ours, theirs = answers[case.name], RECORDED[case.name]
    listed = DIFFERENCES.get(case.name)
    found = compare(ours, theirs)
    assert found == (list(listed.what) if listed else []), f"ours {ours}\ntheirs {theirs}"


def test_no_request_is_answered_with_an_internal_error(
    answers: dict[str, dict[str, Any]],
) -> None:
    assert [name for name, seen in answers.items() if seen["status"] == 500] == []
