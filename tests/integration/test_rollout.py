"""`edgeward rollout` as a process, over a real broker, with devices that speak the protocol."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import publish
from typer.testing import CliRunner

from agent.config import load_settings
from console.cli import app
from console.errors import RolloutOrderError
from console.rollout.conductor import Choice, Conductor, Happening, plan_rollout
from console.rollout.fleet import Fleet
from console.rollout.store import RolloutStore, Wishes
from tests.harness.brokers import MqttProcess
from tests.harness.fleet import (
    CLASSES,
    NUC,
    ORIN,
    PI,
    Behaviour,
    SimDevice,
    SimFleet,
    make_devices,
)
from tests.harness.rollouts import RolloutProcess
from tests.harness.waiting import wait_until

OLD, NEW = "2.2.1", "2.3.0"
LIMIT_S = 20.0


@pytest.fixture
def rollout(mosquitto: MqttProcess, tmp_path: Path) -> Iterator[RolloutProcess]:
    process = RolloutProcess(tmp_path, mosquitto.port)
    yield process
    process.close()


@contextmanager
def fleet_of(broker: MqttProcess, *parts: list[SimDevice]) -> Iterator[SimFleet]:
    with SimFleet(broker.port, [device for part in parts for device in part]) as fleet:
        yield fleet


def write_desired(broker: MqttProcess, device: str, body: dict[str, Any]) -> None:
    """Publish a desired document as another console would."""
    payload = json.dumps({"v": 1, "id": "X", "type": "desired", "body": body})
    topic = f"edgeward/v1/{device}/c2d/desired"
    publish.single(topic, payload, qos=1, retain=True, hostname="127.0.0.1", port=broker.port)


def classes_of(rollout: RolloutProcess) -> dict[str, dict[str, Any]]:
    return {item["class"]: item for item in rollout.status()["classes"]}


def assert_asked_once(fleet: SimFleet, release: str) -> None:
    """Every device that was asked for a release saw one document that names it, and no other."""
    for device in fleet.devices.values():
        assert len(device.asked_for(release)) <= 1, device.name


def test_two_hundred_good_devices_get_the_release_group_by_group(
    mosquitto: MqttProcess, rollout: RolloutProcess
) -> None:
    had = {"release": OLD, "policy": {"max_rss_mb": 400}, "traffic": {OLD: 90, "2.2.0": 10}}
    other = {"release": "1.0.0"}
    known = {"epoch": "E", "version": 41, "models": {"detector": had, "tracker": other}}
    write_desired(mosquitto, "pi-007", known)
    parts = (make_devices(120, PI, "pi"), make_devices(80, NUC, "nuc"), make_devices(12, ORIN, "o"))
    with fleet_of(mosquitto, *parts) as fleet:
        rollout.start(NEW, "--probation", "10m")
        assert rollout.wait() == 0, rollout.errors()
        assert fleet.with_release(NEW) == set(fleet.devices)
        assert_asked_once(fleet, NEW)
        last = fleet.devices["pi-007"].heard[-1]
        assert (last["epoch"], last["version"]) == ("E", 42)
        kept = {"release": NEW, "policy": {"max_rss_mb": 400}, "probation": {"duration_s": 600.0}}
        assert last["models"] == {"detector": kept, "tracker": other}
    asked = rollout.lines("asked")
    assert [line["version"] for line in asked if line["device"] != "pi-007"] == [1] * 211
    firsts = [line["class"] for line in asked if line["group"] == 1]
    assert set(firsts) == set(CLASSES.values())
    assert len(firsts) == 3
    assert {name: found["state"] for name, found in classes_of(rollout).items()} == dict.fromkeys(
        CLASSES.values(), "done"
    )


def test_release_that_fails_on_one_class_stops_there_and_goes_on_elsewhere(
    mosquitto: MqttProcess, rollout: RolloutProcess
) -> None:
    bad = make_devices(30, ORIN, "o", Behaviour.ROLLS_BACK)
    echoing = make_devices(30, NUC, "nuc", Behaviour.ECHOING)
    with fleet_of(mosquitto, make_devices(30, PI, "pi"), echoing, bad) as fleet:
        rollout.start(NEW, "--groups", "3,50%,all")
        assert rollout.wait() == 1, rollout.errors()
        refused = rollout.run("resume", rollout.rollout_id)
        assert (refused.returncode, "rollout_order_refused" in refused.stdout) == (1, True)
        assert fleet.with_release(NEW) == {name for name in fleet.devices if name[0] != "o"}
        asked = {name for name in fleet.asked_for(NEW) if name[0] == "o"}
        assert len(asked) == 1, "those that have it not yet are left alone"
        assert_asked_once(fleet, NEW)
    found = classes_of(rollout)[CLASSES[ORIN]]
    assert (found["state"], found["reason"]["code"]) == ("stopped", "too_many_failures")
    assert found["counts"] == {"waiting": 29, "failed": 1}
    (failed,) = [item for item in rollout.status()["devices"] if item["state"] == "failed"]
    assert failed["reason"] == {"code": "error_rate", "message": f"{NEW} is not good here"}


def test_release_that_fails_everywhere_stops_everywhere_also_with_the_library(
    mosquitto: MqttProcess, tmp_path: Path
) -> None:
    parts = [
        make_devices(20, PI, "pi", Behaviour.FAILS_STAGING),
        make_devices(20, NUC, "nuc", Behaviour.ROLLS_BACK),
    ]
    settings = load_settings(flags={"mqtt": {"port": mosquitto.port}})
    wishes = Wishes("1%,10%,100%", "95%", "5%")
    happened: list[Happening] = []
    with (
        fleet_of(mosquitto, *parts) as devices,
        RolloutStore(tmp_path / "state", create=True) as store,
        store.claim(),
        Fleet(settings) as fleet,
    ):
        fleet.discover(0.5)
        rollout, members = plan_rollout(fleet, "detector", NEW, wishes, Choice())
        store.add(rollout, members)
        conductor = Conductor(fleet, store, rollout.rollout_id, happened.append)
        assert conductor.run(threading.Event()) == "stopped"
        assert len(devices.asked_for(NEW)) == 2
        assert devices.with_release(OLD) == set(devices.devices)
        again = Conductor(fleet, store, rollout.rollout_id)
        with pytest.raises(RolloutOrderError):
            again.run(threading.Event())
    assert happened[-1].state == "stopped"


def test_paused_rollout_asks_nobody_until_it_is_resumed(
    mosquitto: MqttProcess, rollout: RolloutProcess
) -> None:
    with fleet_of(mosquitto, make_devices(40, PI, "pi", Behaviour.SLOW)) as fleet:
        rollout.start(NEW, "--groups", "10,all")
        fleet.wait_asked(NEW, 10)
        busy = rollout.run("resume", rollout.rollout_id)
        assert (busy.returncode, "rollout_busy" in busy.stdout) == (8, True)
        paused = rollout.run("pause", rollout.rollout_id)
        assert paused.returncode == 0, paused.stdout
        assert json.loads(paused.stdout)["state"] == "paused"
        assert rollout.wait() == 5, rollout.errors()
        for device in fleet.devices.values():
            device.may_finish.set()
        wait_until(lambda: len(fleet.with_release(NEW)) == 10, LIMIT_S, "those that were asked end")
        assert len(fleet.asked_for(NEW)) == 10
        rollout.resume()
        assert rollout.wait() == 0, rollout.errors()
        assert fleet.with_release(NEW) == set(fleet.devices)
        assert_asked_once(fleet, NEW)


def test_abort_with_roll_back_gives_each_device_what_it_had(
    mosquitto: MqttProcess, rollout: RolloutProcess
) -> None:
    had = {"release": OLD, "policy": {"min_agreement": 0.99}, "traffic": {OLD: 100}}
    write_desired(mosquitto, "pi-000", {"epoch": "E", "version": 3, "models": {"detector": had}})
    new = make_devices(1, ORIN, "o")
    new[0].active = None
    slow = make_devices(30, NUC, "nuc", Behaviour.SLOW)
    with fleet_of(mosquitto, make_devices(4, PI, "pi"), slow, new) as fleet:
        rollout.start(NEW, "--groups", "50%,all")
        quick = {*(device for device in fleet.devices if device[:2] == "pi"), "o-000"}
        wait_until(lambda: fleet.with_release(NEW) == quick, LIMIT_S, "small classes are done")
        asked = fleet.asked_for(NEW)
        done = rollout.run("abort", rollout.rollout_id, "--roll-back", "--discover", 0.5)
        assert done.returncode == 0, done.stdout
        assert rollout.wait() == 5, rollout.errors()
        assert fleet.with_release(NEW) == set()
        assert fleet.devices["o-000"].active is None
        last = fleet.devices["pi-000"].heard[-1]
        assert (last["epoch"], last["version"], last["models"]["detector"]) == ("E", 5, had)
        assert fleet.asked_for(NEW) == asked, "nobody else is asked"
        untouched = set(fleet.devices) - asked
        assert untouched
        assert fleet.asked_for(OLD) == asked - {"o-000"}
    status = rollout.status()
    assert status["state"] == "rolled_back"
    states = {item["device"]: item["state"] for item in status["devices"]}
    assert {name for name, state in states.items() if state == "returned"} == asked


def test_silent_devices_are_unknown_and_hold_up_nobody(
    mosquitto: MqttProcess, rollout: RolloutProcess
) -> None:
    parts = [
        make_devices(30, PI, "pi"),
        make_devices(3, PI, "quiet", Behaviour.SILENT),
        make_devices(2, NUC, "pinned", Behaviour.PINNED),
        make_devices(6, NUC, "nuc"),
        make_devices(2, ORIN, "gone"),
    ]
    with fleet_of(mosquitto, *parts) as fleet:
        gone = [fleet.devices["gone-000"], fleet.devices["gone-001"]]
        for device in gone:
            device.vanish()
        rollout.start(NEW, "--groups", "100%", "--device-timeout", "2s")
        assert rollout.wait() == 5, rollout.errors()
        found = classes_of(rollout)
        assert found[CLASSES[PI]]["counts"] == {"succeeded": 30, "unknown": 3}
        assert found[CLASSES[NUC]]["counts"] == {"succeeded": 6, "pinned": 2}
        assert found[CLASSES[ORIN]]["counts"] == {"unknown": 2}
        states = {name: item["state"] for name, item in found.items()}
        assert states == {CLASSES[PI]: "done", CLASSES[NUC]: "done", CLASSES[ORIN]: "stalled"}
        fleet.connect(gone)
        wait_until(lambda: len(fleet.with_release(NEW)) == 38, LIMIT_S, "retained: they get it")
        rollout.resume()
        assert rollout.wait() == 0, rollout.errors()
        assert classes_of(rollout)[CLASSES[ORIN]]["counts"] == {"succeeded": 2}
        assert_asked_once(fleet, NEW)


def test_other_writer_is_noticed_and_left_alone(
    mosquitto: MqttProcess, rollout: RolloutProcess
) -> None:
    with fleet_of(mosquitto, make_devices(6, PI, "pi", Behaviour.SLOW)) as fleet:
        rollout.start(NEW, "--groups", "100%")
        fleet.wait_asked(NEW, 6)
        for name, models in (
            ("pi-000", {"detector": {"release": "9.9.9"}}),
            ("pi-001", {"detector": {"release": NEW}, "tracker": {"release": "1"}}),
        ):
            document = fleet.devices[name].heard[-1]
            body = {**document, "version": document["version"] + 1, "models": models}
            write_desired(mosquitto, name, body)
        for device in fleet.devices.values():
            device.may_finish.set()
        assert rollout.wait() == 0, rollout.errors()
        assert fleet.with_release("9.9.9") == {"pi-000"}
        assert len(fleet.with_release(NEW)) == 5
    assert classes_of(rollout)[CLASSES[PI]]["counts"] == {"succeeded": 5, "superseded": 1}


REFUSED: list[tuple[list[str], int, str]] = [
    (["start", "m", "1", "--yes", "--groups", "10%,5%"], 2, "bad_rollout_plan"),
    (["start", "m", "1", "--yes", "--success", "many"], 2, "bad_rollout_plan"),
    (["start", "m", "1", "--yes", "--probation", "soon"], 2, "bad_rollout_plan"),
    (["start", "m", "1"], 2, "bad_rollout_plan"),
    (["start", "m", "1", "--yes", "--discover", "0.3"], 3, "unknown_rollout"),
    (["resume", "01NONE"], 3, "unknown_rollout"),
    (["status", "01NONE"], 3, "unknown_rollout"),
    (["abort", "01NONE"], 3, "unknown_rollout"),
]


def test_what_makes_no_sense_is_refused_with_its_exit_code(
    mosquitto: MqttProcess, tmp_path: Path
) -> None:
    # The broker has no device at all.
    environment = {"EDGEWARD_MQTT__PORT": str(mosquitto.port)}
    for arguments, code, word in REFUSED:
        line = ["rollout", *arguments, "--state", str(tmp_path / "rollouts"), "--json"]
        done = CliRunner().invoke(app, line, env=environment)
        assert (done.exit_code, word in done.stdout) == (code, True), f"{line}: {done.output}"
