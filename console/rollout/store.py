"""The rollouts' own file: what was planned, how far each is, and what was sent to whom.

Owns one SQLite file in the state folder, and the lock beside it: one process at a time works
on a folder's rollouts, because a device's desired document has one writer. Orders such as
`pause` and `abort` come through the file from other processes.

Invariant: a document is in here, whole, before it is published; it is published again from
here and never built a second time for the same step.
"""

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from agent.clock import SystemClock
from agent.commands import encode
from agent.store.database import open_engine, transaction
from console.errors import RolloutBusyError, RolloutNotFoundError
from console.rollout.desired import Desired
from console.rollout.progress import (
    Cause,
    Lane,
    LaneState,
    Member,
    MemberState,
    Order,
    RolloutState,
)
from console.store_schema import claim_schema

SCHEMA = 1
FILE = "rollouts.db"
_LOCK = "rollouts.lock"
_TABLES = (
    """CREATE TABLE rollouts (
        id TEXT PRIMARY KEY, model TEXT NOT NULL, release TEXT NOT NULL, wishes TEXT NOT NULL,
        state TEXT NOT NULL, wanted TEXT, started_ms INTEGER NOT NULL, changed_ms INTEGER NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE members (
        rollout TEXT NOT NULL REFERENCES rollouts, device TEXT NOT NULL, class TEXT NOT NULL,
        number INTEGER NOT NULL, state TEXT NOT NULL, detail TEXT NOT NULL, code TEXT NOT NULL,
        message TEXT NOT NULL, PRIMARY KEY (rollout, device)
    ) WITHOUT ROWID""",
    """CREATE TABLE lanes (
        rollout TEXT NOT NULL REFERENCES rollouts, class TEXT NOT NULL, number INTEGER NOT NULL,
        state TEXT NOT NULL, code TEXT NOT NULL, message TEXT NOT NULL,
        PRIMARY KEY (rollout, class)
    ) WITHOUT ROWID""",
    """CREATE TABLE errands (
        rollout TEXT NOT NULL REFERENCES rollouts, device TEXT NOT NULL, epoch TEXT NOT NULL,
        version INTEGER NOT NULL, release TEXT, payload TEXT NOT NULL, before TEXT NOT NULL,
        PRIMARY KEY (rollout, device)
    ) WITHOUT ROWID""",
    """CREATE TABLE documents (
        device TEXT PRIMARY KEY, epoch TEXT NOT NULL, version INTEGER NOT NULL, body TEXT NOT NULL
    ) WITHOUT ROWID""",
)


@dataclass(frozen=True)
class Wishes:
    """How a rollout is to go, as it was asked for."""

    groups: str
    success: str
    error: str
    min_failures: int | None = None
    probation: dict[str, Any] | None = None
    device_timeout_s: float = 900.0


@dataclass(frozen=True)
class Rollout:
    """One rollout as the file has it."""

    rollout_id: str
    model: str
    release: str
    wishes: Wishes
    state: RolloutState
    started_ms: int
    changed_ms: int
    order: Order | None = None
    """What another process has asked for."""


@dataclass(frozen=True)
class Errand:
    """What was sent to a device, and what to send to undo it."""

    device: str
    epoch: str
    version: int
    release: str | None
    """What the document names; None: to remove the model."""
    payload: str
    before: dict[str, Any]
    """The model's entry as it was before the rollout, or made from what the device had."""


@dataclass
class Step:
    """What changes together: in the file as a whole, or not at all."""

    state: RolloutState | None = None
    members: list[Member] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    errands: list[Errand] = field(default_factory=list)
    documents: dict[str, Desired] = field(default_factory=dict)
    clears_order: bool = False

    @property
    def is_empty(self) -> bool:
        """Say whether nothing changes."""
        return self == Step()


class RolloutStore:
    """The file in one state folder. Every method is one transaction; close it when done.

    Args:
        folder: the state folder.
        create: make it where it is missing.

    Raises:
        RolloutNotFoundError: there is none.
        ConsoleStoreError: the file is another program's, or a newer version's.
        StoreError: SQLite cannot do what was asked.
    """

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        if not create and not (folder / FILE).is_file():
            msg = f"there are no rollouts in {folder}: name their folder with --state"
            raise RolloutNotFoundError(msg)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._engine = open_engine(folder / FILE)
        with transaction(self._engine) as tx:
            _prepare(tx, folder / FILE)

    def __enter__(self) -> "RolloutStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.dispose()

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other processes from working on the folder's rollouts while the block runs.

        Raises:
            RolloutBusyError: one does.
        """
        with (self._folder / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                msg = f"another `edgeward rollout` works on {self._folder}"
                raise RolloutBusyError(msg) from exc
            yield

    # --- rollouts -------------------------------------------------------------------------

    def add(self, rollout: Rollout, members: Iterable[Member]) -> None:
        """Keep a new rollout with its members."""
        with transaction(self._engine) as tx:
            tx.exec_driver_sql(
                "INSERT INTO rollouts VALUES (?, ?, ?, ?, ?, NULL, ?, ?)",
                (
                    rollout.rollout_id,
                    rollout.model,
                    rollout.release,
                    encode(asdict(rollout.wishes)),
                    rollout.state,
                    rollout.started_ms,
                    rollout.changed_ms,
                ),
            )
            _save_members(tx, rollout.rollout_id, list(members))

    def get(self, rollout_id: str) -> Rollout:
        """Return a rollout.

        Raises:
            RolloutNotFoundError: there is none of that id.
        """
        for rollout in self._read_rollouts("WHERE id = ?", (rollout_id,)):
            return rollout
        msg = f"{self._folder} has no rollout {rollout_id!r}: `edgeward rollout status` lists them"
        raise RolloutNotFoundError(msg)

    def list_rollouts(self) -> list[Rollout]:
        """Return all rollouts, newest first."""
        return self._read_rollouts("ORDER BY started_ms DESC, id DESC", ())

    def _read_rollouts(self, clause: str, values: tuple[object, ...]) -> list[Rollout]:
        return [
            Rollout(
                row["id"],
                row["model"],
                row["release"],
                Wishes(**json.loads(row["wishes"])),
                RolloutState(row["state"]),
                row["started_ms"],
                row["changed_ms"],
                Order(row["wanted"]) if row["wanted"] else None,
            )
            for row in self._read(f"SELECT * FROM rollouts {clause}", values)
        ]

    def put_order(self, rollout_id: str, order: Order) -> None:
        """Ask the process that works on a rollout for something."""
        with transaction(self._engine) as tx:
            tx.exec_driver_sql("UPDATE rollouts SET wanted = ? WHERE id = ?", (order, rollout_id))

    # --- how far one is -------------------------------------------------------------------

    def read_members(self, rollout_id: str) -> list[Member]:
        """Return the members of a rollout, by group and name."""
        rows = self._read(
            "SELECT * FROM members WHERE rollout = ? ORDER BY number, device", (rollout_id,)
        )
        return [
            Member(
                row["device"],
                row["class"],
                row["number"],
                MemberState(row["state"]),
                row["detail"],
                Cause(row["code"], row["message"]),
            )
            for row in rows
        ]

    def read_lanes(self, rollout_id: str) -> list[Lane]:
        """Return the lanes of a rollout that have begun."""
        return [
            Lane(
                row["class"],
                row["number"],
                LaneState(row["state"]),
                Cause(row["code"], row["message"]),
            )
            for row in self._read(
                "SELECT * FROM lanes WHERE rollout = ? ORDER BY class", (rollout_id,)
            )
        ]

    def read_errands(self, rollout_id: str) -> dict[str, Errand]:
        """Return what was sent for a rollout, by device."""
        return {
            row["device"]: Errand(
                row["device"],
                row["epoch"],
                row["version"],
                row["release"],
                row["payload"],
                json.loads(row["before"]),
            )
            for row in self._read("SELECT * FROM errands WHERE rollout = ?", (rollout_id,))
        }

    def read_documents(self) -> dict[str, Desired]:
        """Return the newest desired document that was sent to each device from this folder."""
        return {
            row["device"]: Desired(row["epoch"], row["version"], json.loads(row["body"]))
            for row in self._read("SELECT * FROM documents", ())
        }

    def save(self, rollout_id: str, step: Step) -> None:
        """Keep what changed, all of it or nothing.

        Raises:
            StoreError: it could not be written.
        """
        with transaction(self._engine) as tx:
            tx.exec_driver_sql(
                "UPDATE rollouts SET state = coalesce(?, state), changed_ms = ?, "
                "wanted = iif(?, NULL, wanted) WHERE id = ?",
                (step.state, SystemClock().wall_ms(), step.clears_order, rollout_id),
            )
            _save_members(tx, rollout_id, step.members)
            _save_many(
                tx,
                "INSERT OR REPLACE INTO lanes VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (rollout_id, item.hardware_class, item.group, item.state, *_cells(item.reason))
                    for item in step.lanes
                ],
            )
            _save_errands(tx, rollout_id, step.errands)
            _save_many(
                tx,
                "INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?)",
                [
                    (device, item.epoch, item.version, encode(item.body))
                    for device, item in step.documents.items()
                ],
            )

    def _read(self, statement: str, values: tuple[object, ...]) -> list[Mapping[Any, Any]]:
        with transaction(self._engine) as tx:
            return list(tx.exec_driver_sql(statement, values).mappings())


def _prepare(tx: Connection, path: Path) -> None:
    if not claim_schema(tx, path, SCHEMA, "name another folder with --state"):
        return
    for statement in _TABLES:
        tx.exec_driver_sql(statement)
    tx.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")


def _save_members(tx: Connection, rollout_id: str, members: list[Member]) -> None:
    _save_many(
        tx,
        "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                rollout_id,
                item.device,
                item.hardware_class,
                item.group,
                item.state,
                item.detail,
                *_cells(item.reason),
            )
            for item in members
        ],
    )


def _save_errands(tx: Connection, rollout_id: str, errands: list[Errand]) -> None:
    _save_many(
        tx,
        "INSERT OR REPLACE INTO errands VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (
                rollout_id,
                item.device,
                item.epoch,
                item.version,
                item.release,
                item.payload,
                encode(item.before),
            )
            for item in errands
        ],
    )


def _save_many(tx: Connection, statement: str, rows: list[tuple[Any, ...]]) -> None:
    if rows:
        tx.exec_driver_sql(statement, rows)


def _cells(reason: Cause) -> tuple[str, str]:
    return reason.code, reason.message
