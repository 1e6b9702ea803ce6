"""A box without its processes: ledger, repository, installer and updater in one thread.

Everything that writes is the product's own; only what runs models is left out: a staging is told
as a worker would tell it.
"""

import json
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from agent.choice import compute_digest
from agent.config import Settings
from agent.daemon.updater import Updater
from agent.jobs import JobState, Lane, Reason, Source
from agent.repository import ModelRepository
from agent.store import deployments as store
from agent.store.database import migrate, open_engine, transaction
from agent.store.facts import FLOORS, read_fact
from agent.store.ledger import CrashReport, Ledger, NewJob, Outcome
from agent.store.recovery import prepare_ledger
from agent.tasks import STAGED
from agent.topics import Topics
from agent.window import BoxView
from platforms.spec import RuntimeFinding, RuntimeStatus
from tests.harness.clocks import FakeClock
from tests.harness.known_box import describe_box
from worker.update.install import Installer, describe_floors, read_floors

STEP_MS = 2000
STEPS_MAX = 40
PARAMS = {"probation": {"duration_s": 1.0}}


class QuietBox:
    """One box whose threads do not run.

    Args:
        root: with the box's folder `data`, and the publisher's `source` and `root.json`.
        clock: for ledger and updater.
    """

    def __init__(self, root: Path, source: Path, clock: FakeClock) -> None:
        data = root / "data"
        data.mkdir(parents=True, exist_ok=True)
        self.clock = clock
        updates = {
            "url": str(source / "repo"),
            "root_file": str(source / "root.json"),
            "reserve_bytes": 0,
            "keep_versions": 2,
            "remeasure": False,
        }
        self.settings = Settings.model_validate({"data_dir": data, "updates": updates})
        self.repository = ModelRepository(self.settings.models_dir)
        recovery = prepare_ledger(self.settings.ledger_file)
        self.damage = None if recovery is None else recovery.why
        """Why the ledger was taken for damaged, if it was."""
        self.engine = open_engine(self.settings.ledger_file)
        migrate(self.engine)
        self.ledger = Ledger(Topics("dev"), clock)
        self.updater = Updater(
            self.settings,
            clock,
            self.ledger,
            self.repository,
            self.run,
            lambda: (),
            BoxView,
            lambda name, _wanted, _key: name,
            lambda _job: None,
        )
        self._spec = describe_box(runtime=RuntimeFinding("ort", RuntimeStatus.PROVEN, "1"))

    def close(self) -> None:
        self.engine.dispose()

    def run(self, call: Any) -> Any:
        with transaction(self.engine) as tx:
            return call(tx)

    def begin(self) -> None:
        """Do what an agent's start does."""

        def start(tx: Connection) -> None:
            self.ledger.schedule.begin(tx)
            self.updater.begin(tx)

        self.run(start)

    # --- what a console and a worker do -----------------------------------------------------

    def ask(self, job_id: str, model: str, release: str) -> None:
        """Accept an update job and dispatch it."""
        job = NewJob(
            job_id, Source.MQTT, "{}", job_id, "update", Lane.MAINTENANCE, model, version=release
        )
        self.run(lambda tx: self.ledger.accept(tx, [job]))
        self.dispatch(job_id)

    def dispatch(self, job_id: str) -> None:
        def assign(tx: Connection) -> None:
            ready = self.ledger.schedule.find_ready(tx, Lane.MAINTENANCE, 10)
            mine = [job for job in ready if job.job_id == job_id]
            self.ledger.schedule.assign(tx, [(f"task-{job_id}", mine)])

        self.run(assign)

    def work(self, job_id: str, model: str, release: str) -> None:
        """Fetch and install a release, and tell of it, as a maintenance worker does."""
        floors = json.loads(self.run(lambda tx: read_fact(tx, FLOORS)) or "null")
        installed = Installer(self.settings, self._spec).install(
            model, release, read_floors(floors), lambda _done, _total: None
        )
        version = installed.version
        staged = {
            "model": model,
            "release": release,
            "number": version.number,
            "digest": compute_digest(version.folder),
            "params": PARAMS,
            "floors": describe_floors(installed.floors),
        }
        row = self.read_job(job_id)
        outcome = Outcome(
            job_id,
            row["attempt"],
            JobState.SUCCEEDED,
            Reason("staged"),
            self.clock.wall_ms(),
            self.clock.wall_ms(),
            {STAGED: staged},
        )
        self.run(lambda tx: self.updater.take(tx, [outcome]))

    def crash(self, model: str, number: int) -> None:
        """Tell that a version has crashed its worker."""
        report = CrashReport("t", model, str(number), "SIGSEGV", ())
        self.run(lambda tx: self.updater.note_crashes(tx, [report]))

    def step(self) -> bool:
        """Let the updater take one step of each deployment; say whether there are any left."""
        self.clock.advance(STEP_MS)
        self.updater._turn()
        return bool(self.run(store.list_deployments))

    def finish(self) -> bool:
        """Let every deployment come to its end; say whether they did."""
        return any(not self.step() for _ in range(STEPS_MAX))

    # --- what there is ------------------------------------------------------------------------

    def read_job(self, job_id: str) -> Any:
        query = text("SELECT * FROM jobs WHERE job_id = :id")
        return self.run(lambda tx: tx.execute(query, {"id": job_id}).mappings().one_or_none())

    def list_jobs(self) -> list[Any]:
        query = text("SELECT * FROM jobs ORDER BY created_ms, job_id")
        found: list[Any] = self.run(lambda tx: tx.execute(query).mappings().all())
        return found

    def list_deployments(self) -> list[Any]:
        query = text("SELECT * FROM deployments")
        found: list[Any] = self.run(lambda tx: tx.execute(query).mappings().all())
        return found

    def requeue(self, task_ids: list[str]) -> None:
        """Take back tasks that were lost with the broker."""
        reason = Reason("worker_lost", "gone")
        self.run(lambda tx: self.ledger.requeue(tx, task_ids, reason, counts=False))
        self.clock.advance(STEP_MS * 100)
