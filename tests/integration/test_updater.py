"""The updater on a real ledger: what it takes in with a transaction, and what it must not undo."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.config import Settings
from agent.daemon.updater import Updater
from agent.jobs import JobState, Reason
from agent.lifecycle import Phase, UpdateParams
from agent.repository import ModelRepository
from agent.store import deployments as store
from agent.store.deployments import Deployment
from agent.store.ledger import CrashReport, Outcome
from agent.window import BoxView
from tests.harness.ledger import Store
from tests.harness.releases import write_digits


class Desk:
    """An updater whose thread does not run."""

    def __init__(self, tmp_path: Path) -> None:
        self.store = Store(tmp_path / "ledger.db")
        self.settings = Settings(data_dir=tmp_path)
        self.repository = ModelRepository(self.settings.models_dir)
        self.repository.add(write_digits(tmp_path / "v1"))
        self.repository.add(write_digits(tmp_path / "v2", "2.0.0"), activate=False)
        self.updater = Updater(
            self.settings,
            self.store.clock,
            self.store.ledger,
            self.repository,
            self.store.run,
            lambda: (),
            BoxView,
            lambda name, _wanted, _key: name,
            lambda _job: None,
        )
        self.store.run(self.updater.begin)

    def deploy(self, phase: Phase) -> Deployment:
        """Put version 2 into a phase."""
        clock = self.store.clock
        one = Deployment(
            model="digits",
            job_id=self.store.accept(),
            release="2.0.0",
            number=2,
            digest="d" * 64,
            previous=1,
            older=None,
            phase=phase,
            params=UpdateParams(),
            boot_id=clock.boot_id(),
            since_ms=clock.wall_ms(),
            since_boot_ms=clock.boot_ms(),
        )
        self.store.run(lambda tx: store.save_deployment(tx, one))
        return one

    def find(self) -> Deployment:
        found: Deployment | None = self.store.run(lambda tx: store.find_deployment(tx, "digits"))
        assert found is not None
        return found

    def tell_crash(self, model: str, version: str | None, signal: str = "SIGSEGV") -> None:
        report = CrashReport("task-1", model, version, signal, ())
        self.store.run(lambda tx: self.updater.note_crashes(tx, [report]))

    def refuse(self, model: str, number: int) -> list[Outcome]:
        """Let a maintenance worker say that a version is wrong here."""
        staged = {"model": model, "release": "x", "number": number, "digest": "e" * 64}
        outcome = Outcome(
            self.store.accept(),
            1,
            JobState.FAILED,
            Reason("update_refused", "wrong"),
            0,
            1,
            {"staged": staged},
        )
        rest: list[Outcome] = self.store.run(lambda tx: self.updater.take(tx, [outcome]))[0]
        return rest

    def read_bad(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.store.run(store.read_bad)
        return found


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.store.close()


@pytest.mark.parametrize("phase", [Phase.SHADOW, Phase.CANARY, Phase.ACTIVATING, Phase.PROBATION])
@pytest.mark.parametrize(("model", "version"), [("digits", "2"), ("", None)])
def test_crash_turns_a_candidate_back_in_the_transaction_that_tells_of_it(
    desk: Desk, phase: Phase, model: str, version: str | None
) -> None:
    desk.deploy(phase)
    desk.tell_crash(model, version)
    # Nothing else has run: an agent that is killed now goes on with the roll-back.
    found = desk.find()
    assert found.phase == Phase.ROLLING_BACK
    assert (found.detail["code"], found.detail["failed_in"]) == ("probation_crash", phase)


@pytest.mark.parametrize(
    ("phase", "model", "version"),
    [
        (Phase.WAITING, "digits", "2"),
        (Phase.COMMITTING, "digits", "2"),
        (Phase.PROBATION, "other", "2"),
        (Phase.PROBATION, "digits", "1"),
    ],
)
def test_crash_that_is_none_of_its_own_changes_nothing(
    desk: Desk, phase: Phase, model: str, version: str
) -> None:
    desk.deploy(phase)
    desk.tell_crash(model, version)
    assert desk.find().phase == phase


def test_step_that_was_under_way_does_not_undo_a_roll_back(desk: Desk) -> None:
    one = desk.deploy(Phase.PROBATION)
    desk.tell_crash("digits", "2")
    # As the thread does that has looked before the crash was told.
    desk.updater._replace(one, replace(one, phase=Phase.COMMITTING))
    assert desk.find().phase == Phase.ROLLING_BACK


def test_version_that_staging_refuses_is_marked_bad(desk: Desk) -> None:
    (rest,) = desk.refuse("digits", 2)
    assert rest.result is None
    assert set(desk.read_bad()) == {"e" * 64}


def test_version_that_serves_is_reported_but_not_marked_when_staging_refuses_it_again(
    desk: Desk,
) -> None:
    desk.refuse("digits", 1)
    assert desk.read_bad() == {}
    assert desk.store.run(store.read_states)["digits"]["status"] == "failed"


def test_refusal_of_a_model_that_is_gone_meanwhile_is_kept(desk: Desk) -> None:
    desk.refuse("gone", 1)
    assert set(desk.read_bad()) == {"e" * 64}
