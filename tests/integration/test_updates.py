"""An update on a real box: staged, switched, watched, committed, or rolled back by itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.choice import ChoiceRecord, compute_digest, find_choice, write_choice
from agent.clock import SystemClock
from agent.lease import release_lease, take_lease
from tests.harness.box import make_body, make_envelope
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.releases import DIGITS, make_pixels, write_garbage, write_slow
from tests.harness.rollouts import RolloutProcess
from tests.harness.update_box import Load, UpdateBox
from tests.harness.waiting import wait_until


@pytest.fixture
def fleet(
    tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess
) -> Iterator[UpdateBox]:
    fleet = UpdateBox(tmp_path, mosquitto, queue_broker)
    yield fleet
    fleet.close()


@pytest.mark.timeout(240)
def test_good_update_under_load_fails_no_request_and_is_committed(fleet: UpdateBox) -> None:
    fleet.add("2.0.0")
    wait_until(lambda: fleet.serves(), 30, "the HTTP API answers")
    with Load(fleet) as load:
        state = fleet.wait_end(fleet.update("2.0.0"))
    assert (state["state"], state["reason"]["code"]) == ("succeeded", "committed")
    assert load.failures == []
    assert set(load.versions) == {"1", "2"}
    # Each client sees the switch once, and never the old version again.
    assert fleet.get_active() == "2.0.0"
    assert not (fleet.box.data_dir / "models" / "digits" / "traffic.json").exists()
    wait_until(lambda: fleet.get_reported().get("status") == "in_sync", 10, "it is reported")
    reported = fleet.get_reported()
    assert reported["active"] == {"version": 2, "release": "2.0.0"}
    assert reported["previous"]["release"] == "1.0.0"
    assert reported["last"]["choice"]["candidates"][0]["verdict"] == "chosen"


@pytest.mark.timeout(240)
def test_garbage_is_refused_at_staging_reported_and_not_tried_again(fleet: UpdateBox) -> None:
    bad = write_garbage(fleet.tmp_path / "bad.onnx")
    fleet.add("2.0.0", files={"digits.int8.onnx": bad})
    state = fleet.wait_end(fleet.update("2.0.0"))
    assert (state["state"], state["reason"]["code"]) == ("failed", "update_refused")
    assert "agreement" in state["reason"]["message"]
    assert fleet.get_active() == "1.0.0"
    wait_until(lambda: fleet.get_reported().get("status") == "failed", 10, "it is reported")
    assert fleet.get_reported()["bad"][0]["release"] == "2.0.0"


@pytest.mark.timeout(240)
def test_slow_version_that_staging_was_told_to_pass_is_rolled_back_in_probation(
    fleet: UpdateBox,
) -> None:
    slow = write_slow(fleet.tmp_path / "slow.onnx")
    fleet.add("2.0.0", files={"digits.onnx": slow})
    wait_until(lambda: fleet.serves(), 30, "the HTTP API answers")
    policy = {"max_slowdown": 1e6}
    probation = {"duration_s": 60.0, "max_slowdown": 2.0}
    with Load(fleet) as load:
        wait_until(lambda: len(load.versions) > 300, 30, "the old version has a latency")
        state = fleet.wait_end(fleet.update("2.0.0", policy=policy, probation=probation))
    assert (state["state"], state["reason"]["code"]) == ("failed", "probation_slow")
    assert load.failures == []
    assert fleet.get_active() == "1.0.0"
    # Quarantined by its digest, until somebody forces it.
    again = fleet.wait_end(fleet.update("2.0.0", policy=policy))
    assert again["reason"]["code"] == "version_bad"
    forced = fleet.wait_end(fleet.update("2.0.0", policy=policy, force=True))
    assert forced["reason"]["code"] == "committed"


@pytest.mark.timeout(240)
def test_update_waits_for_its_window_and_a_cancel_leaves_everything_as_it_was(
    fleet: UpdateBox,
) -> None:
    fleet.add("2.0.0")
    window = {"cron": "0 0 30 2 *", "duration_s": 60}
    job_id = fleet.update("2.0.0", window={**window, "cron": "0 3 1 1 *"})
    wait_until(
        lambda: fleet.get_reported().get("status") == "deferred", 60, "it waits, and says so"
    )
    assert "window opens" in fleet.get_reported()["reason"]["message"]
    fleet.console.publish(
        fleet.console.topics.cancel(job_id), make_envelope({"job_id": job_id}, "job.cancel")
    )
    assert fleet.wait_end(job_id)["state"] == "canceled"
    wait_until(lambda: "candidate" not in fleet.get_reported(), 20, "it is over")
    assert fleet.get_active() == "1.0.0"


@pytest.mark.timeout(240)
def test_canary_takes_its_share_and_then_all(fleet: UpdateBox) -> None:
    fleet.add("2.0.0")
    wait_until(lambda: fleet.serves(), 30, "the HTTP API answers")
    probation = {"duration_s": 16.0}
    with Load(fleet, 2) as load:
        job_id = fleet.update("2.0.0", probation=probation, rollout={"canary": [30]})
        assert fleet.wait_end(job_id)["reason"]["code"] == "committed"
    assert load.failures == []
    # Between its first answer and the old version's last one it was a canary.
    last = len(load.versions) - load.versions[::-1].index("1")
    canary = load.versions[load.versions.index("2") : last]
    assert len(canary) > 20
    assert 0.1 < canary.count("2") / len(canary) < 0.6
    result = fleet.console.results[job_id][0]["update"]
    assert result["canary_0"]["candidate"]["success"] > 0


@pytest.mark.timeout(240)
def test_shadow_that_disagrees_never_answers_anybody(fleet: UpdateBox) -> None:
    bad = write_garbage(fleet.tmp_path / "bad.onnx")
    fleet.add("2.0.0", files={"digits.onnx": bad}, golden=False)
    wait_until(lambda: fleet.serves(), 30, "the HTTP API answers")
    with Load(fleet, 2) as load:
        state = fleet.wait_end(
            fleet.update(
                "2.0.0",
                policy={"max_slowdown": 1e6},
                probation={"duration_s": 60, "min_agreement": 0.9},
                rollout={"shadow_s": 60},
            )
        )
    assert state["reason"]["code"] == "probation_disagreement"
    assert load.failures == []
    assert set(load.versions) == {"1"}


@pytest.mark.timeout(240)
def test_desired_document_is_converged_to_and_only_the_newest_counts(fleet: UpdateBox) -> None:
    fleet.add("2.0.0")
    topic = "edgeward/v1/box-1/c2d/desired"

    def want(version: int, release: str | None, epoch: str = "e1") -> None:
        models = {"digits": {"release": release, "probation": {"duration_s": 0.5}}}
        body = {"epoch": epoch, "version": version, "models": models}
        fleet.console.publish(topic, make_envelope(body, "desired"))

    want(2, "2.0.0")
    wait_until(lambda: fleet.get_active() == "2.0.0", 60, "the release that is wanted serves")
    wait_until(lambda: fleet.get_reported().get("status") == "in_sync", 20, "it is reported")
    body = fleet.console.find("reported")[-1]["body"]
    assert (body["epoch"], body["desired_version"], body["status"]) == ("e1", 2, "in_sync")
    want(1, "1.0.0")
    want(3, "1.0.0")
    wait_until(lambda: fleet.get_active() == "1.0.0", 60, "and back again, by version 3")
    want(4, None)
    wait_until(lambda: "digits" not in fleet.models.list_models(), 30, "it is removed")
    assert fleet.models.list_models() == ["tiny"]


@pytest.mark.timeout(240)
def test_newer_document_takes_the_place_of_one_that_is_still_on_its_way(fleet: UpdateBox) -> None:
    fleet.add("2.0.0")
    fleet.add("3.0.0")
    topic = "edgeward/v1/box-1/c2d/desired"

    def want(version: int, release: str, duration_s: float) -> None:
        models = {"digits": {"release": release, "probation": {"duration_s": duration_s}}}
        body = {"epoch": "e1", "version": version, "models": models}
        fleet.console.publish(topic, make_envelope(body, "desired"))

    want(1, "2.0.0", 600.0)
    wait_until(lambda: fleet.get_active() == "2.0.0", 60, "the first one is on probation")
    want(2, "3.0.0", 0.5)
    wait_until(lambda: fleet.get_active() == "3.0.0", 60, "the second one takes its place")
    wait_until(lambda: fleet.get_reported().get("status") == "in_sync", 20, "it is reported")
    # What was committed before the first one is what to go back to.
    assert fleet.get_reported()["previous"]["release"] == "1.0.0"


@pytest.mark.timeout(240)
def test_local_pin_wins_and_is_visible(fleet: UpdateBox) -> None:
    fleet.add("2.0.0")
    fleet.models.pin("digits")
    models = {"digits": {"release": "2.0.0", "probation": {"duration_s": 0.1}}}
    body = {"epoch": "e1", "version": 1, "models": models}
    fleet.console.publish("edgeward/v1/box-1/c2d/desired", make_envelope(body, "desired"))
    wait_until(lambda: fleet.get_reported().get("status") == "pinned_local", 20, "it is visible")
    assert fleet.get_active() == "1.0.0"
    fleet.models.unpin("digits")
    wait_until(lambda: fleet.get_active() == "2.0.0", 60, "it follows the console again")


@pytest.mark.timeout(240)
def test_document_can_ask_for_an_ab_test_that_lasts(fleet: UpdateBox) -> None:
    fleet.add("2.0.0")
    wanted = {
        "release": "2.0.0",
        "probation": {"duration_s": 0.5},
        "traffic": {"2.0.0": 70, "1.0.0": 30},
    }
    body = {"epoch": "e1", "version": 1, "models": {"digits": wanted}}
    fleet.console.publish("edgeward/v1/box-1/c2d/desired", make_envelope(body, "desired"))
    wait_until(lambda: fleet.get_reported().get("status") == "in_sync", 60, "it is reported")
    wait_until(fleet.serves, 30, "the HTTP API answers")
    wait_until(lambda: {fleet.answer() for _ in range(20)} == {"1", "2"}, 20, "both answer")
    counted = [fleet.answer() for _ in range(200)]
    assert 40 <= counted.count("1") <= 80
    body = {"epoch": "e1", "version": 2, "models": {"digits": {"release": "2.0.0"}}}
    fleet.console.publish("edgeward/v1/box-1/c2d/desired", make_envelope(body, "desired"))
    wait_until(lambda: {fleet.answer() for _ in range(20)} == {"2"}, 20, "it is over")


@pytest.mark.timeout(240)
def test_lease_holds_an_update_back_until_it_is_given_back(fleet: UpdateBox) -> None:
    leases = fleet.box.data_dir / "leases"
    take_lease(leases, SystemClock(), "surgery", 3600, "until noon")
    fleet.add("2.0.0")
    job_id = fleet.update("2.0.0", probation={"duration_s": 0.2})
    wait_until(lambda: fleet.get_reported().get("status") == "deferred", 60, "it is held, and told")
    assert "surgery until noon" in fleet.get_reported()["reason"]["message"]
    assert fleet.get_active() == "1.0.0"
    assert release_lease(leases, "surgery")
    assert fleet.wait_end(job_id)["reason"]["code"] == "committed"


@pytest.mark.timeout(240)
def test_choice_is_taken_without_a_restart_and_made_again_when_the_box_has_changed(
    tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess
) -> None:
    slow = write_slow(tmp_path / "slow.onnx")
    files = {"digits.onnx": slow, "plain.onnx": DIGITS / "digits.onnx"}
    fleet = UpdateBox(tmp_path, mosquitto, queue_broker, files=files)
    try:
        assert run_artifact(fleet) == "digits.onnx", "the publisher's order, nothing is measured"
        # The same release again: only its artifacts are measured.
        assert fleet.wait_end(fleet.update("1.0.0"))["reason"]["code"] == "committed"
        wait_until(lambda: run_artifact(fleet) == "plain.onnx", 30, "what was measured serves")
        record, identity = find_record(fleet), find_identity(fleet)
        write_choice(fleet.box.data_dir / "choices", forge_conditions(record))
        # The agent looks when it starts, and now and then.
        fleet.box.stop("agent")
        fleet.box.start("agent")
        wait_until(lambda: find_identity(fleet) == identity, 60, "measured again")
        wait_until(lambda: fleet.get_reported().get("status") == "in_sync", 20, "and reported")
        assert len(list((fleet.box.data_dir / "choices").iterdir())) == 1
    finally:
        fleet.close()


@pytest.mark.timeout(240)
def test_rollout_leads_our_own_agent_to_a_release_and_stops_at_a_bad_one(
    fleet: UpdateBox, mosquitto: MqttProcess, tmp_path: Path
) -> None:
    fleet.add("2.0.0")
    fleet.add("3.0.0", files={"digits.onnx": write_garbage(tmp_path / "bad.onnx")})
    good = RolloutProcess(tmp_path / "good", mosquitto.port)
    good.start("2.0.0", "--probation", "1s", model="digits")
    assert good.wait() == 0, good.errors()
    assert fleet.get_active() == "2.0.0"
    bad = RolloutProcess(tmp_path / "bad", mosquitto.port)
    bad.start("3.0.0", "--probation", "1s", model="digits")
    assert bad.wait() == 1, bad.errors()
    assert fleet.get_active() == "2.0.0"
    assert bad.status()["classes"][0]["state"] == "stopped"


def run_artifact(fleet: UpdateBox) -> str:
    """Return which artifact answers a job."""
    pixels = make_pixels(1).reshape(-1).tolist()
    tensor = {"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": pixels}
    job_id = fleet.console.submit(make_body(model="digits", input={"tensors": [tensor]}))
    assert fleet.wait_end(job_id)["state"] == "succeeded"
    wait_until(lambda: job_id in fleet.console.results, 10, "its result is there")
    return str(fleet.console.results[job_id][0]["artifact"])


def find_record(fleet: UpdateBox) -> ChoiceRecord:
    folder = fleet.models.get_version("digits").folder
    record = find_choice(fleet.box.data_dir / "choices", compute_digest(folder))
    assert record is not None
    return record


def find_identity(fleet: UpdateBox) -> str:
    chosen = find_record(fleet).chosen
    return "" if chosen is None else chosen.identity


def forge_conditions(record: ChoiceRecord) -> ChoiceRecord:
    """Return a record as another driver or runtime would have left it."""
    trials = tuple(one.model_copy(update={"identity": "0" * 32}) for one in record.trials)
    return record.model_copy(update={"trials": trials})
