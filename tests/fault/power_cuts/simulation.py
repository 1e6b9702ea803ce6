"""Cuts the power at every operation of a recorded run, and reopens what is left.

Each operation's end is a boundary, and so is the start. The first three rounds of cuts
visit every boundary: what is not synced lasts by chance; none of it; all of it. What
`cuts` leaves is by chance, spread over all boundaries.
"""

import random
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from agent.commands import new_id
from agent.errors import AgentError
from agent.jobs import Source
from agent.store.database import migrate, open_engine, transaction
from agent.store.ledger import Ledger, NewJob, Verdict
from agent.store.recovery import prepare_ledger
from agent.topics import Topics
from tests.fault.power_cuts.contents import Contents, read_contents
from tests.fault.power_cuts.disk import AllDropped, Chance, Disk, Fate, Image
from tests.fault.power_cuts.promises import Losses, Promise, find_losses, read_promises
from tests.fault.power_cuts.recording import (
    MARKS,
    IncompleteRecordError,
    Kind,
    Operation,
    Recording,
)
from tests.harness.clocks import FakeClock

LEDGER = "ledger.db"
VARIANTS = 3
"""Cuts that each boundary needs to be seen in every way."""
_KEPT_EXAMPLES = 5
_EXAMPLE_CHARACTERS = 300
_MEMORY_FOLDER = Path("/dev/shm")
_SHM_BYTES = 32768


@dataclass
class Figures:
    """What a simulation found; the keys of the command's JSON."""

    seed: int
    cuts: int = 0
    boundaries: int = 0
    boundaries_cut: int = 0
    commits: int = 0
    syncs: int = 0
    acked_lost: int = 0
    """Acknowledged jobs lost, summed over all cuts."""
    records_lost: int = 0
    histories_broken: int = 0
    half_commits: int = 0
    unopenable: int = 0
    """Ledgers that do not open, are taken for damaged, fail `quick_check`, or take no job."""
    bad_cuts: int = 0
    """Cuts after which anything at all was wrong."""
    dropped: int = 0
    """Cuts that lost at least one change that was not synced."""
    torn: int = 0
    """Cuts that tore at least one write."""
    examples: list[str] = field(default_factory=list)

    def is_clean(self) -> bool:
        """Say whether every cut was survived."""
        return self.bad_cuts == 0

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class _Cut:
    variant: str
    fate: Fate


class DamagedError(Exception):
    """A ledger opens, and `quick_check` finds damage, or it can't go on."""


@contextmanager
def open_scratch() -> Iterator[Path]:
    """Lend a folder that is removed at the end, in memory where the machine has such a place."""
    memory = _MEMORY_FOLDER if _MEMORY_FOLDER.is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def simulate(
    recording: Recording,
    seed: int,
    cuts: int,
    on_cut: Callable[[int], None] = lambda _done: None,
) -> Figures:
    """Cut the power `cuts` times and return what was found.

    Args:
        recording: the run.
        seed: of all chances.
        cuts: how many; `VARIANTS` for each boundary show it in every way.
        on_cut: called with the number of cuts done.

    Raises:
        IncompleteRecordError: the record does not lead to the files that the run left.
    """
    operations = recording.operations
    promises = read_promises(operations)
    plan = _plan(len(operations) + 1, cuts, seed)
    figures = Figures(
        seed,
        boundaries=len(plan),
        boundaries_cut=sum(map(bool, plan)),
        commits=len(promises) - 1,
        syncs=sum(operation.kind is Kind.SYNCED for operation in operations),
    )
    disk, marks = Disk(), 0
    with open_scratch() as folder:
        reopening = _Reopening(folder)
        for boundary, chosen in enumerate(plan):
            if boundary:
                disk.apply(operations[boundary - 1])
                marks += _is_mark(operations[boundary - 1])
            for cut in chosen:
                _count(figures, disk, cut, boundary, reopening, promises[marks : marks + 2])
                on_cut(figures.cuts)
    if disk.cut(Fate()) != recording.files:
        msg = "the record does not lead to the files that the run left"
        raise IncompleteRecordError(msg)
    return figures


def _is_mark(operation: Operation) -> bool:
    return operation.name == MARKS and operation.kind is Kind.WRITTEN


def _plan(boundaries: int, cuts: int, seed: int) -> list[list[_Cut]]:
    """Return the cuts of each boundary."""
    chance = random.Random(seed)
    plan: list[list[_Cut]] = [[] for _ in range(boundaries)]
    for number, boundary in enumerate(_visit(boundaries, cuts, chance)):
        turn = number // boundaries
        if turn == 1:
            cut = _Cut("all dropped", AllDropped())
        elif turn == 2:
            cut = _Cut("all kept", Fate())
        else:
            cut = _Cut("by chance", Chance(f"{seed}:{number}"))
        plan[boundary].append(cut)
    return plan


def _visit(boundaries: int, cuts: int, chance: random.Random) -> Iterator[int]:
    for start in range(0, cuts, boundaries):
        yield from chance.sample(range(boundaries), min(boundaries, cuts - start))


def _count(
    figures: Figures,
    disk: Disk,
    cut: _Cut,
    boundary: int,
    reopening: "_Reopening",
    promises: list[Promise],
) -> None:
    image = disk.cut(cut.fate)
    figures.cuts += 1
    figures.torn += cut.fate.torn > 0
    figures.dropped += cut.fate.dropped > 0
    found = reopening.read(image, cut.variant)
    if isinstance(found, str):
        figures.unopenable += 1
        # Nothing can be read of it, so all that was acknowledged is lost with it.
        losses = Losses(acked_lost=len(promises[0].jobs), records_lost=len(promises[0].sent))
        problem = found
    else:
        losses = find_losses(found, promises[0], promises[1] if len(promises) > 1 else None)
        problem = str(losses) if losses else ""
    for name, value in asdict(losses).items():
        setattr(figures, name, getattr(figures, name) + value)
    if problem:
        figures.bad_cuts += 1
        if len(figures.examples) < _KEPT_EXAMPLES:
            text = f"boundary {boundary}, commit {promises[0].commit}, {cut.variant}: {problem}"
            figures.examples.append(text[:_EXAMPLE_CHARACTERS])


class _Reopening:
    """Opens ledgers as the product does after a power cut."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ledger = Ledger(Topics("dev"), FakeClock())
        # Where all is dropped, boundary after boundary leaves the same files.
        self._newest: dict[str, tuple[Image, Contents | str]] = {}

    def read(self, image: Image, variant: str) -> Contents | str:
        """Return what the ledger holds, or why it can't be read."""
        known = self._newest.get(variant)
        if known is None or known[0] != image:
            self._lay_out(image)
            self._newest[variant] = known = (image, self._open())
        return known[1]

    def _lay_out(self, image: Image) -> None:
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        checksum = 0
        for name, data in image.items():
            (self._folder / name).write_bytes(data)
            checksum = zlib.crc32(data, checksum)
        if checksum % 2:
            # The shared index is never synced: after a cut it is missing, or garbage.
            garbage = random.Random(checksum).randbytes(_SHM_BYTES)
            (self._folder / f"{LEDGER}-shm").write_bytes(garbage)

    def _open(self) -> Contents | str:
        engine = open_engine(self._folder / LEDGER)
        try:
            recovery = prepare_ledger(self._folder / LEDGER)
            if recovery is not None:
                return f"taken for damaged: {recovery.why}"
            migrate(engine)
            with transaction(engine) as tx:
                raw: Any = tx.connection.driver_connection
                found = _read_checked(raw)
                self._prove_use(tx)
        except (AgentError, SQLAlchemyError, sqlite3.Error, DamagedError) as exc:
            return f"{type(exc).__name__}: {exc}"
        finally:
            engine.dispose()
        return found

    def _prove_use(self, tx: Connection) -> None:
        """Let the reopened ledger take one more job."""
        job = NewJob(new_id(), Source.LOCAL, "{}", "hash", "infer")
        if self._ledger.accept(tx, [job]).verdicts != [Verdict.ACCEPTED]:
            msg = "the ledger takes no new job"
            raise DamagedError(msg)


def _read_checked(connection: sqlite3.Connection) -> Contents:
    [(first, *_), *_] = connection.execute("PRAGMA quick_check")
    if first != "ok":
        raise DamagedError(first)
    return read_contents(connection)
