"""Ledgers with jobs in every state, as a busy box leaves them."""

import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine
from ulid import ULID

from agent.jobs import JobState, Lane, Reason, Source
from agent.store import outbox
from agent.store.database import migrate, open_engine, transaction
from agent.store.facts import ensure_identity, save_fact
from agent.store.ledger import Ledger, NewJob, Outcome
from agent.topics import Topics
from tests.harness.clocks import FakeClock

ENDS = ("succeeded", "failed", "timed_out")
FILES = ("", "-wal", "-shm")
LARGE_EVERY = 40
_FAR_FUTURE_MS = 2**60


class BusyLedger:
    """Fills a ledger the way the agent does, with a seed."""

    def __init__(self, path: Path, seed: int = 1) -> None:
        self.path = path
        self.clock = FakeClock()
        self.engine: Engine = open_engine(path)
        migrate(self.engine)
        self.ledger = Ledger(Topics("dev"), self.clock)
        self._random = random.Random(seed)
        self._tasks = 0
        with transaction(self.engine) as tx:
            ensure_identity(tx)
            save_fact(tx, "boot_id", "boot-1")
            for name, value in (("boot", 7), ("conn", 9)):
                outbox.save_counter(tx, name, value)

    def new_id(self) -> str:
        """Return an id that only the seed and the clock decide."""
        random_part = self._random.getrandbits(80).to_bytes(10, "big")
        return str(ULID(self.clock.wall.to_bytes(6, "big") + random_part))

    def work(self, rounds: int, jobs: int = 16) -> None:
        """Let jobs come and go: each round is some transactions."""
        for number in range(rounds):
            self.clock.advance(1000)
            self._accept(jobs, large=number % 3 == 0)
            with transaction(self.engine) as tx:
                self._run_some(tx, jobs)
            with transaction(self.engine) as tx:
                self._report_some(tx, acknowledged=number < rounds // 2)

    def _accept(self, count: int, *, large: bool) -> None:
        new = []
        for number in range(count):
            size = 9000 if large and number == 0 else self._random.randrange(20, 400)
            body = '{"model":"digits","input":"' + "x" * size + '"}'
            job = NewJob(self.new_id(), Source.MQTT, body, f"hash-{number}", "infer")
            job = job._replace(model="digits", priority=self._random.randrange(10))
            if number == count - 1:
                ended = self._random.choice([JobState.REJECTED, JobState.EXPIRED])
                job = job._replace(state=ended, reason=Reason("queue_full", "no room"))
            new.append(job)
        with transaction(self.engine) as tx:
            self.ledger.accept(tx, new)
            self.ledger.cancel(tx, [new[1].job_id], Source.MQTT)
            self.ledger.add_event(tx, "test", {"number": count})

    def _run_some(self, tx: Connection, jobs: int) -> None:
        ready = self.ledger.schedule.find_ready(tx, Lane.INFERENCE, jobs - 4)
        self._tasks += 1
        task_id = f"task-{self._tasks}"
        self.ledger.schedule.assign(tx, [(task_id, ready)])
        self.ledger.record_started(tx, [task_id])
        outcomes = [self._end(job.job_id, job.attempt + 1) for job in ready[:-2]]
        self.ledger.record_outcomes(tx, outcomes)
        if self._tasks % 4 == 0:
            self.ledger.requeue(tx, [task_id], Reason("worker_lost", "gone"), counts=True)

    def _end(self, job_id: str, attempt: int) -> Outcome:
        state = JobState(self._random.choices(ENDS, (8, 1, 1))[0])
        wall = self.clock.wall
        result = {"label": "seven", "scores": [0.5] * self._random.randrange(30)}
        return Outcome(job_id, attempt, state, Reason("ok"), wall, wall + 5, result)

    def _report_some(self, tx: Connection, *, acknowledged: bool) -> None:
        taken = outbox.take_unsent(tx, 20, _FAR_FUTURE_MS)
        if acknowledged:
            outbox.delete_acknowledged(tx, [record.seq for record in taken if record.seq])

    def copy(self, folder: Path) -> Path:
        """Copy the files as they lie on the disk now, as after a power cut."""
        folder.mkdir(parents=True)
        for suffix in FILES[:2]:
            source = self.path.with_name(self.path.name + suffix)
            if source.exists():
                shutil.copy(source, folder / source.name)
        return folder / self.path.name

    def close(self) -> None:
        """Close it cleanly: the log is written into the file and deleted."""
        self.engine.dispose()


def read_rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    """Run a query on a ledger that nobody has open."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()
