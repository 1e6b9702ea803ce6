"""`edgeward diag`: the bundle has what a bug report needs, also of a broken box, and no secrets."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.harness.box import Box, RecordingConsole, make_body
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.commands import run_edgeward
from tests.harness.waiting import free_port

SECRETS = {
    "password": "planted-mqtt-1",
    "password_file": "planted-file-2",
    "queue_url": "planted-queue-3",
    "other": "planted-other-4",
    "input": "planted-input-5",
    "log": "planted-log-6",
    "section": "planted-section-7",
    "result": "planted-result-8",
}


def make_diag(folder: Path, *arguments: object, **env: str) -> dict[str, Any]:
    """Make a bundle; return its texts by name, `manifest.json` among them, and the answer."""
    path = folder / "diag.tar.gz"
    done = run_edgeward("diag", "-o", path, "--json", *arguments, env=env)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    answer = json.loads(done.stdout)
    assert path.stat().st_mode & 0o077 == 0
    texts: dict[str, Any] = {"": done.stdout}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file is not None
            texts[member.name.partition("/")[2]] = file.read().decode()
    assert {item["name"] for item in answer["files"]} | {"", "manifest.json"} == set(texts)
    return texts


def failed(texts: dict[str, Any]) -> list[str]:
    return [item["name"] for item in json.loads(texts["manifest.json"])["failed"]]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("diag")
    mqtt, queue = MqttProcess(folder / "mqtt"), QueueProcess(folder / "queue")
    mqtt.start()
    queue.start()
    box = Box(folder / "box", mqtt, queue)
    console = RecordingConsole(mqtt.port)
    box.start("agent")
    box.start("worker")
    wait_until(box.is_ready, 30, "the agent is ready")
    job_id = console.submit(make_body(params={"note": SECRETS["input"]}))
    console.wait_end(job_id)
    yield box
    console.close()
    box.close()
    queue.stop()
    mqtt.stop()


def environment(box: Box, **more: str) -> dict[str, str]:
    return {key: value for key, value in box.environment.items() if value} | more


def test_bundle_of_a_running_box_has_everything(box: Box, tmp_path: Path) -> None:
    texts = make_diag(tmp_path, **environment(box))
    assert failed(texts) == []
    ledger = json.loads(texts["ledger.json"])
    assert sum(row["jobs"] for row in ledger["jobs_by_state"]) == 1
    assert ledger["quick_check"] == [{"quick_check": "ok"}]
    assert json.loads(texts["status.json"])["is_running"]
    assert json.loads(texts["doctor.json"])["checks"]
    (model,) = json.loads(texts["models.json"])
    assert (model["model"], json.loads(model["manifest"])["name"]) == ("tiny", "tiny")
    assert json.loads(texts["mqtt.json"])["$SYS/broker/version"].startswith("mosquitto")
    assert json.loads(texts["queue.json"])["maxmemory_policy"] == "noeviction"
    assert json.loads(texts["versions.json"])["packages"]["paho-mqtt"] == "2.2.0"
    assert json.loads(texts["folders.json"])["data"]["files"] > 0
    left_out = [item["what"] for item in json.loads(texts["manifest.json"])["left_out"]]
    assert any("passwords" in what for what in left_out)


def test_jobs_own_data_is_in_it_only_where_the_job_is_named(box: Box, tmp_path: Path) -> None:
    ((job_id,),) = box.query("SELECT job_id FROM jobs")
    without = make_diag(tmp_path, **environment(box))
    assert not any(SECRETS["input"] in text for text in without.values())
    texts = make_diag(tmp_path, "--with-job", job_id, **environment(box))
    job = json.loads(texts[f"job-{job_id}.json"])
    assert SECRETS["input"] in job["job"][0]["body"]
    assert [step["state"] for step in job["transitions"]][-1] == "succeeded"


def test_no_planted_secret_is_in_the_bundle(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "log").mkdir(parents=True)
    (data / "log" / "agent.log").write_text(
        f"trying {SECRETS['password_file']} at redis://:{SECRETS['queue_url']}@h/0\n"
        f"token={SECRETS['log']}\n-----BEGIN PRIVATE KEY-----\n{SECRETS['result']}\n"
    )
    password = tmp_path / "password"
    password.write_text(SECRETS["password_file"] + "\n")
    config = tmp_path / "edgeward.toml"
    config.write_text(
        f'[mqtt]\nusername = "box"\npassword_file = "{password}"\nport = {free_port()}\n'
        f'[queue]\nurl = "redis://:{SECRETS["queue_url"]}@127.0.0.1:{free_port()}/0"\n'
    )
    for extra in (
        {"EDGEWARD_MQTT__PASSWORD": SECRETS["password"]},
        {"EDGEWARD_MQTT": json.dumps({"password": SECRETS["section"]})},
    ):
        texts = make_diag(
            tmp_path, "--config", config, "--data-dir", data, SECRET_X=SECRETS["other"], **extra
        )
        found = [
            (name, what)
            for name, text in texts.items()
            for what, secret in SECRETS.items()
            if secret in text
        ]
        assert found == []
        assert "********" in texts["settings.json"]
        assert texts["logs/agent.log"]
        assert "EDGEWARD_MQTT" in texts["environment.json"]


def test_box_that_never_ran_and_has_no_brokers_gives_a_bundle(tmp_path: Path) -> None:
    texts = make_diag(
        tmp_path, "--data-dir", tmp_path / "none", EDGEWARD_MQTT__PORT=str(free_port())
    )
    assert "no ledger" in texts["ledger.json"]
    assert {"queue.json", "mqtt.json"} <= set(failed(texts))
    assert {"versions.json", "settings.json", "doctor.json"} <= set(texts)


def test_damaged_ledger_gives_what_can_be_read(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "ledger.db").write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)
    texts = make_diag(tmp_path, "--data-dir", data, EDGEWARD_MQTT__PORT=str(free_port()))
    ledger = json.loads(texts["ledger.json"])
    assert ledger["files_bytes"] == {"ledger.db": 5016}
    assert "error" in ledger["quick_check"]


def test_settings_that_cannot_be_read_leave_the_machine(tmp_path: Path) -> None:
    config = tmp_path / "edgeward.toml"
    config.write_text("[mqtt]\nhots = 'broker'\n")
    texts = make_diag(tmp_path, "--config", config)
    assert failed(texts) == ["settings.json"]
    assert {"versions.json", "machine.json", "environment.json"} <= set(texts)


def test_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    done = run_edgeward("diag", "-o", tmp_path / "no" / "such.tar.gz", "--data-dir", tmp_path)
    assert done.returncode == 1
    assert "no/" in done.stderr
