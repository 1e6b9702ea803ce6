"""The walk-through of docs/protocol.md, run as it stands there: a shell and mosquitto's clients."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.documents import extract_walk_through
from tests.conftest import require_binary, wait_until
from tests.harness.box import RecordingConsole
from tests.harness.commands import UpProcess

DIGITS = Path(__file__).parents[2] / "console" / "models" / "digits"
DEVICE = "demo-box"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    process = UpProcess(tmp_path_factory.mktemp("walk") / "box", DEVICE)
    added = process.run("models", "add", "digits", DIGITS)
    assert added.returncode == 0, added.stderr
    yield process
    assert process.stop() == 0, process.read_log()


@pytest.fixture(scope="module")
def said(box: UpProcess, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the walk-through printed, message by message."""
    for program in ("mosquitto_pub", "mosquitto_sub", "awk", "od", "base64"):
        require_binary(program)
    port = json.loads((box.data_dir / "run" / "up.json").read_text())["flags"]["mqtt"]["port"]
    # The agent reports a new model at its next look at the repository.
    console = RecordingConsole(port, DEVICE)
    wait_until(
        lambda: any("digits" in item["body"]["models"] for item in console.find("reported")),
        20,
        "the model is reported",
    )
    console.close()
    done = subprocess.run(
        ["sh", "-e", "-c", extract_walk_through()],
        cwd=tmp_path_factory.mktemp("shell"),
        env={**os.environ, "PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{box.read_log()}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_messages_are_of_the_documented_kinds_in_order(said: list[dict[str, Any]]) -> None:
    assert [message.get("type") for message in said] == [
        None,
        "reported",
        "cmd.ping.reply",
        "job.result",
        "job.state",
        "job.result",
        "job.state",
        "event.id_conflict",
        "job.state",
        "job.state",
        "job.state",
    ]


def test_box_is_online_with_its_model(said: list[dict[str, Any]]) -> None:
    status, reported = said[:2]
    ledger = status.pop("ledger")
    assert status == {"state": "online", "boot": 1, "conn": 1}
    assert {message["ledger"] for message in said if "seq" in message} == {ledger}
    digits = reported["body"]["models"]["digits"]
    assert (digits["active"]["version"], digits["versions"]) == (1, [1])


def test_ping_is_answered_with_the_time(said: list[dict[str, Any]]) -> None:
    assert list(said[2]["body"]) == ["pong"]


def test_zero_is_seen_as_a_zero_as_picture_and_as_tensor(said: list[dict[str, Any]]) -> None:
    picture, tensor = said[3]["body"], said[5]["body"]
    assert [item["label"] for item in picture["output"]] == ["0", "8"]
    assert tensor["output"][0]["label"] == "0"
    # The same pixels both ways: the scores differ only by the rounding to four digits.
    score = picture["output"][0]["score"]
    assert tensor["output"][0]["score"] == pytest.approx(score, abs=1e-4)
    assert score > 0.99
    assert picture["model"] == tensor["model"] == "digits"


def test_state_stays_readable_and_a_repeated_command_runs_nothing(
    said: list[dict[str, Any]],
) -> None:
    first, again = said[4]["body"], said[6]["body"]
    assert first["job_id"] == said[3]["body"]["job_id"]
    assert again["job_id"] == said[5]["body"]["job_id"]
    for state in (first, again):
        assert (state["state"], state["rev"], state["attempt"]) == ("succeeded", 3, 1)
        assert state["reason"] == {"code": "ok", "message": ""}


def test_another_body_under_a_known_id_is_a_conflict(said: list[dict[str, Any]]) -> None:
    event = said[7]["body"]
    assert (event["code"], event["state"]) == ("id_conflict", "succeeded")
    assert event["job_id"] == said[5]["body"]["job_id"]


def test_job_for_a_missing_model_is_rejected(said: list[dict[str, Any]]) -> None:
    state = said[8]["body"]
    assert (state["state"], state["rev"], state["attempt"]) == ("rejected", 1, 0)
    assert state["reason"]["code"] == "unknown_model"


def test_cancel_that_comes_first_wins(said: list[dict[str, Any]]) -> None:
    tombstone, answer = said[9]["body"], said[10]["body"]
    assert (tombstone["state"], tombstone["rev"]) == ("canceled", 1)
    assert answer == tombstone


def test_reports_are_numbered_and_an_end_goes_before_its_result(
    said: list[dict[str, Any]],
) -> None:
    # The script reads the first job's retained state after its result.
    in_order = [said[at]["seq"] for at in (4, 3, 5, 6, 7, 8, 9, 10)]
    assert in_order == sorted(set(in_order))
