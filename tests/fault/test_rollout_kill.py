"""A console that is killed in the middle of a rollout, and a broker that forgets."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from console.rollout.store import RolloutStore
from tests.harness.brokers import MqttProcess
from tests.harness.fleet import NUC, PI, Behaviour, SimFleet, make_devices
from tests.harness.rollouts import RolloutProcess
from tests.harness.waiting import require_binary, wait_until

NEW = "2.3.0"
LIMIT_S = 20.0


@pytest.fixture
def rollout(mosquitto: MqttProcess, tmp_path: Path) -> Iterator[RolloutProcess]:
    process = RolloutProcess(tmp_path, mosquitto.port)
    yield process
    process.close()


def assert_asked_once(fleet: SimFleet) -> None:
    for device in fleet.devices.values():
        assert len(device.asked_for(NEW)) == 1, device.name


def test_killed_console_goes_on_and_asks_nobody_twice(
    mosquitto: MqttProcess, rollout: RolloutProcess
) -> None:
    parts = [
        make_devices(120, PI, "pi", Behaviour.SLOW),
        make_devices(80, NUC, "nuc", Behaviour.SLOW),
    ]
    with SimFleet(mosquitto.port, [device for part in parts for device in part]) as fleet:
        rollout.start(NEW, "--groups", "2,25%,all")
        # While the first group is sent; once it is; while the second is sent, and the third.
        for asked, finished in ((1, 0), (2, 1), (20, 2), (90, 3)):
            fleet.wait_asked(NEW, asked)
            rollout.kill()
            # What happens meanwhile is heard from the broker's memory.
            with RolloutStore(rollout.state) as store:
                for member in store.read_members(rollout.rollout_id):
                    if member.group <= finished:
                        fleet.devices[member.device].may_finish.set()
            rollout.resume()
        assert rollout.wait() == 0, rollout.errors()
        assert fleet.with_release(NEW) == set(fleet.devices)
        assert_asked_once(fleet)


def test_broker_that_lost_everything_is_told_again(tmp_path: Path) -> None:
    require_binary("mosquitto")
    broker = MqttProcess(tmp_path / "first")
    broker.start()
    rollout = RolloutProcess(tmp_path, broker.port)
    try:
        with SimFleet(broker.port, make_devices(20, PI, "pi")) as fleet:
            away = [fleet.devices[f"pi-{number:03}"] for number in range(5)]
            for device in away:
                device.vanish()
            rollout.start(NEW, "--groups", "all")
            wait_until(lambda: len(fleet.with_release(NEW)) == 15, LIMIT_S, "the others have it")
            broker.kill()
            for file in (tmp_path / "first").glob("*.db"):
                file.unlink()
            broker.start()
            fleet.connect(away)
            assert rollout.wait() == 0, rollout.errors()
            assert fleet.with_release(NEW) == set(fleet.devices)
            assert_asked_once(fleet)
    finally:
        rollout.close()
        broker.stop()
