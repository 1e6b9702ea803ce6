"""The command line as a user types it, on a real box: brokers, agent and worker run."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from console.embedded import find_free_port
from tests.conftest import wait_until
from tests.harness.commands import UpProcess, run_edgeward

PROOF = Path(__file__).parents[2] / "platforms" / "runtimes" / "data"
DIGITS = Path(__file__).parents[2] / "console" / "models" / "digits"


def describe_proof_input() -> dict[str, object]:
    values = json.loads((PROOF / "proof.json").read_text())["inputs"]["x"]
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 1, 8, 8], "data": values}
    return {"tensors": [tensor]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def tensors(folder: Path) -> Path:
    path = folder / "input.json"
    path.write_text(json.dumps(describe_proof_input()))
    return path


@pytest.fixture(scope="module")
def box(folder: Path) -> Iterator[UpProcess]:
    # Without a maintenance worker, so that a job of that lane waits.
    process = UpProcess(folder / "data", "box-1", EDGEWARD_UPDATES__ENABLED="false")
    added = process.run("models", "add", "proof", PROOF / "proof.onnx", "--release", "1.2.0")
    assert added.returncode == 0, added.stderr
    descendants = process.find_descendants()
    yield process
    code = process.stop()
    assert code == 0, process.read_log()
    assert [child for child in descendants if child.is_running()] == []


def test_up_says_where_things_are(box: UpProcess) -> None:
    text = box.read_log()
    for part in ("✓ queue", "✓ mqtt", "✓ agent", "✓ worker", str(box.data_dir), "Ctrl-C"):
        assert part in text


def test_second_up_on_the_same_folder_names_the_first(box: UpProcess) -> None:
    refused = box.run("up")
    assert refused.returncode == 8
    assert "already, as process" in refused.stderr
    assert box.ask("status")["running"]


def test_plain_onnx_file_becomes_an_active_version_from_its_graph(box: UpProcess) -> None:
    (model,) = [item for item in box.ask("models", "list") if item["model"] == "proof"]
    assert (model["version"], model["release"], model["active"]) == (1, "1.2.0", True)
    manifest = json.loads((Path(model["folder"]) / "manifest.json").read_text())
    assert manifest["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    assert manifest["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}]


def test_versions_are_activated_rolled_back_and_removed(box: UpProcess) -> None:
    for release in ("1.0.0", "2.0.0"):
        box.ask("models", "add", "rolling", PROOF / "proof.onnx", "--release", release)
    assert box.ask("models", "rollback", "rolling")["release"] == "1.0.0"
    assert box.ask("models", "activate", "rolling", "2.0.0")["version"] == 2
    assert box.ask("models", "remove", "rolling", "1") == {"model": "rolling", "removed": [1]}
    assert box.ask("models", "remove", "rolling")["removed"] == [2]
    assert box.ask("models", "activate", "rolling", "1", code=3)["error"]["code"] == "unknown_model"


def test_submitted_job_brings_its_answer_and_can_be_looked_at(
    box: UpProcess, tensors: Path
) -> None:
    (job,) = box.ask("submit", "proof", "--input", tensors, "--wait", 60)["jobs"]
    assert job["state"] == "succeeded"
    (output,) = job["result"]["output"]["outputs"]
    expected = json.loads((PROOF / "proof.json").read_text())["outputs"]["y"]
    flat = [value for row in expected for value in row]
    assert output["data"] == pytest.approx(flat, abs=1e-4)

    shown = box.ask("jobs", "show", job["job_id"])
    assert shown["result"] == job["result"]
    assert [step["state"] for step in shown["transitions"]][0::2] == ["queued", "succeeded"]

    listed = box.ask("jobs", "list", "--state", "succeeded", "--model", "proof")
    assert job["job_id"] in [item["job_id"] for item in listed]

    why = box.ask("explain", "job", job["job_id"])
    assert why["why"][0].startswith("It ended succeeded after ")
    assert why["timings_ms"].keys() >= {"queue", "pre", "infer", "post"}


def test_shell_pattern_after_input_submits_every_file(box: UpProcess, folder: Path) -> None:
    paths = [folder / f"{number}.json" for number in range(3)]
    for path in paths:
        path.write_text(json.dumps(describe_proof_input()))
    done = box.run("submit", "proof", "--input", *paths)
    assert done.returncode == 0, done.stderr
    assert all(str(path) in done.stdout for path in paths)
    assert done.stdout.count("succeeded") == 3


def test_local_submit_needs_no_mqtt(box: UpProcess, tensors: Path) -> None:
    (job,) = box.ask("submit", "proof", "--local", "--input", tensors)["jobs"]
    assert job["state"] == "succeeded"
    assert box.ask("jobs", "show", job["job_id"])["source"] == "local"
    commands = box.data_dir / "inbox" / "_commands"
    wait_until(lambda: not list(commands.iterdir()), 10, "the command file is removed")


def test_file_that_the_box_may_read_goes_by_its_path(box: UpProcess, tensors: Path) -> None:
    readable = box.data_dir / "inbox" / "shared" / ".kept" / "input.json"
    readable.parent.mkdir(parents=True)
    readable.write_bytes(tensors.read_bytes())
    refused = box.ask("submit", "proof", "--by-path", "-i", tensors, code=5)["jobs"][0]
    assert refused["reason"]["code"] == "path_not_allowed"
    taken = box.ask("submit", "proof", "--by-path", "-i", readable, code=5)["jobs"][0]
    # Found and read; the step `tensor` takes .npy files.
    assert taken["reason"]["code"] == "bad_input_data"


def test_unknown_model_is_rejected_by_the_box(box: UpProcess, tensors: Path) -> None:
    (job,) = box.ask("submit", "nothing", "--input", tensors, code=5)["jobs"]
    assert (job["state"], job["reason"]["code"]) == ("rejected", "unknown_model")


@pytest.mark.parametrize("how", [[], ["--mqtt"]], ids=["local", "mqtt"])
def test_waiting_job_is_explained_and_canceled(
    box: UpProcess, tensors: Path, how: list[str]
) -> None:
    # Nobody serves the lane, so it waits.
    options = ["--lane", "maintenance", "--wait", "0"]
    (job,) = box.ask("submit", "proof", "--input", tensors, *options)["jobs"]
    assert job["state"] == "queued"
    why = box.ask("explain", "job", job["job_id"])["why"]
    assert any("has not begun it yet" in sentence for sentence in why)

    assert box.ask("jobs", "cancel", job["job_id"], *how)["state"] == "canceled"

    assert box.ask("jobs", "show", job["job_id"])["reason"]["code"] == "canceled"


def test_ended_job_cannot_be_canceled(box: UpProcess, tensors: Path) -> None:
    (job,) = box.ask("submit", "proof", "--input", tensors)["jobs"]
    assert box.ask("jobs", "cancel", job["job_id"], code=5)["state"] == "succeeded"


def test_unfinished_job_is_a_time_out(box: UpProcess, tensors: Path) -> None:
    options = ["--lane", "maintenance", "--wait", "0.5"]
    (job,) = box.ask("submit", "proof", "--input", tensors, *options, code=6)["jobs"]
    assert job["state"] == "queued"
    box.ask("jobs", "cancel", job["job_id"])


def test_status_tells_what_runs(box: UpProcess) -> None:
    document = box.ask("status")
    assert document["running"]
    assert document["device"] == "box-1"
    assert document["status"]["mqtt"] == "online"
    assert document["status"]["workers"] == 1
    assert "proof" in document["models"]
    assert "running, up" in box.run("status").stdout


def test_model_is_explained_with_every_candidate(box: UpProcess) -> None:
    box.ask("models", "add", "digits", DIGITS)
    document = box.ask("explain", "model", "digits")
    verdicts = {item["file"]: item["verdict"] for item in document["candidates"]}
    assert verdicts == {"digits.onnx": "chosen", "digits.int8.onnx": "compatible"}
    assert all(item["reason"] for item in document["candidates"])
    # This box has no HTTP API, for which alone batches are measured.
    assert document["batching"] is None
    assert "not measured yet" in box.run("explain", "model", "digits").stdout
    assert "digits.int8.onnx" in box.run("explain", "model", "digits").stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("jobs", "show", "01M828YRXD24KGBPQAVBA31ETP"), "unknown_job"),
        (("jobs", "cancel", "01M828YRXD24KGBPQAVBA31ETP"), "unknown_job"),
        (("explain", "job", "01M828YRXD24KGBPQAVBA31ETP"), "unknown_job"),
        (("explain", "model", "nothing"), "unknown_model"),
        (("explain", "model", "proof", "9"), "unknown_version"),
        (("models", "remove", "nothing"), "unknown_model"),
    ],
)
def test_what_does_not_exist_ends_with_3(
    box: UpProcess, arguments: tuple[str, ...], code: str
) -> None:
    assert box.ask(*arguments, code=3)["error"]["code"] == code


def test_error_is_one_line_with_its_code(box: UpProcess) -> None:
    done = box.run("jobs", "show", "nothing")
    assert done.stdout == ""
    assert done.stderr.startswith("error: no job 'nothing'")
    assert done.stderr.endswith("[unknown_job]\n")


def test_common_options_may_stand_before_or_after_the_command(tmp_path: Path) -> None:
    options = ("--json", "--device", "d-7")
    for before, after in ((options, ()), ((), options)):
        done = run_edgeward(*before, "config", "show", *after, "--data-dir", tmp_path)
        values = {line["key"]: line for line in json.loads(done.stdout)}
        assert values["device_id"]["value"] == "d-7"
        assert values["device_id"]["origin"] == "flag"
        assert values["data_dir"]["value"] == str(tmp_path)


def test_config_hides_the_password(tmp_path: Path) -> None:
    env = {"EDGEWARD_MQTT__PASSWORD": "hidden-1"}
    done = run_edgeward("config", "show", "--data-dir", tmp_path, env=env)
    assert done.returncode == 0
    assert "hidden-1" not in done.stdout
    assert "env EDGEWARD_MQTT__PASSWORD" in done.stdout


def test_misspelt_setting_ends_with_2_and_names_the_nearest(tmp_path: Path) -> None:
    config = tmp_path / "edgeward.toml"
    config.write_text("[mqtt]\nhots = 'broker'\n")
    done = run_edgeward("status", "--config", config, "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "bad_config"
    assert "mqtt.host" in error["message"]


def test_wrong_usage_ends_with_2(tmp_path: Path) -> None:
    assert run_edgeward("submit", "proof", "--data-dir", tmp_path).returncode == 2
    assert run_edgeward("jobs", "list", "--state", "nonsense").returncode == 2
    assert run_edgeward("up", "--mqtt-broker", "nonsense", "--data-dir", tmp_path).returncode == 2


def test_box_without_an_agent_says_so(tmp_path: Path) -> None:
    done = run_edgeward("status", "--data-dir", tmp_path)
    assert done.returncode == 7
    assert "does not run" in done.stdout


def test_local_submit_without_an_agent_ends_with_7(tmp_path: Path, tensors: Path) -> None:
    done = run_edgeward("submit", "m", "--local", "-i", tensors, "--data-dir", tmp_path, "--json")
    assert done.returncode == 7
    assert json.loads(done.stdout)["error"]["code"] == "agent_down"


def test_submit_without_a_broker_ends_with_4(tmp_path: Path, tensors: Path) -> None:
    env = {"EDGEWARD_MQTT__PORT": str(find_free_port())}
    done = run_edgeward("submit", "m", "-i", tensors, "--data-dir", tmp_path, "--json", env=env)
    assert done.returncode == 4
    assert json.loads(done.stdout)["error"]["code"] == "broker_unavailable"


def test_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no protobuf")
    done = run_edgeward("models", "add", "m", broken, "--data-dir", tmp_path / "d", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "model_load_failed"
    assert not (tmp_path / "d" / "models" / "m").exists()


def test_help_names_every_command() -> None:
    text = run_edgeward("--help").stdout
    services = ["up", "demo", "agent", "worker"]
    groups = ["config", "explain", "models", "jobs", "console"]
    names = [*services, "status", "doctor", "diag", "submit", *groups]
    assert [name for name in names if f" {name} " not in text] == []


def test_loopback_of_the_box_is_not_open_to_others(box: UpProcess) -> None:
    listening = [
        connection.laddr.ip
        for child in box.find_descendants()
        for connection in child.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {socket.inet_ntoa(bytes([127, 0, 0, 1]))}
