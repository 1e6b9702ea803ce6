"""No power cut loses an acknowledged job, and the simulator can see it when one does."""

import sys
from collections import Counter

import pytest

from tests.conftest import require_binary
from tests.fault.power_cuts.disk import SECTOR_BYTES, AllDropped, Chance, Disk, Fate, Image
from tests.fault.power_cuts.recording import MARKS, Kind, Operation, Recording, Workload, record
from tests.fault.power_cuts.simulation import VARIANTS, open_scratch, simulate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the recorder is for Linux")

SEED = 1
ROUNDS = 3
PLANTED_CUTS = 60
"""Enough to find a planted defect."""


def make_recording(synchronous: str = "FULL", *, acks_early: bool = False) -> Recording:
    compiler = require_binary("cc")
    with open_scratch() as folder:
        return record(Workload(SEED, ROUNDS, synchronous, acks_early), folder, compiler)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return make_recording()


def test_power_cut_after_any_operation_loses_nothing_acknowledged(recording: Recording) -> None:
    boundaries = len(recording.operations) + 1

    figures = simulate(recording, SEED, VARIANTS * boundaries)

    assert (figures.boundaries, figures.boundaries_cut) == (boundaries, boundaries)
    assert (figures.acked_lost, figures.unopenable) == (0, 0), figures.examples
    assert figures.is_clean(), figures.examples
    assert figures.commits > ROUNDS
    assert figures.dropped > boundaries / 2, "the cuts lost too little to prove anything"
    assert figures.torn > boundaries / 10, "the cuts tore too little to prove anything"


def test_recorded_run_meets_all_that_changes_the_files_of_a_ledger(recording: Recording) -> None:
    met = Counter((operation.name, operation.kind) for operation in recording.operations)

    assert met[MARKS, Kind.WRITTEN] > ROUNDS
    assert met["", Kind.SYNCED], "the folder is synced"
    assert met["ledger.db-journal", Kind.UNLINKED], "the file is made before it has a WAL"
    assert met["ledger.db-wal", Kind.CREATED] > 1, "the ledger is opened again"
    assert met["ledger.db-wal", Kind.TRUNCATED], "the WAL is cut"
    assert met["ledger.db", Kind.SYNCED] > 3, "checkpoints happen"


def test_commits_that_are_not_synced_are_found_lost() -> None:
    figures = simulate(make_recording("NORMAL"), SEED, PLANTED_CUTS)

    assert figures.acked_lost > 0


def test_ledger_that_never_syncs_is_found_lost_and_damaged() -> None:
    figures = simulate(make_recording("OFF"), SEED, PLANTED_CUTS)

    assert figures.acked_lost > 0
    assert figures.unopenable > 0


def test_acknowledgement_before_the_commit_is_found() -> None:
    figures = simulate(make_recording(acks_early=True), SEED, PLANTED_CUTS)

    assert figures.acked_lost > 0
    assert figures.unopenable == 0, figures.examples


def operate(kind: Kind, name: str, offset: int = 0, data: bytes = b"", size: int = 0) -> Operation:
    return Operation(kind, name, offset, size, data)


CREATED = [operate(Kind.CREATED, "a"), operate(Kind.SYNCED, "")]


def cut_often(*operations: Operation) -> list[Image]:
    disk = Disk()
    for operation in operations:
        disk.apply(operation)
    return [disk.cut(Chance(str(seed))) for seed in range(300)]


def test_synced_write_survives_every_cut() -> None:
    operations = [operate(Kind.WRITTEN, "a", 3, b"xyz"), operate(Kind.SYNCED, "a")]
    assert cut_often(*CREATED, *operations) == [{"a": b"\0\0\0xyz"}] * 300


def test_unsynced_write_is_kept_dropped_or_torn_at_a_sector() -> None:
    data = b"x" * 2 * SECTOR_BYTES
    whole, zeros = data, bytes(2 * SECTOR_BYTES)
    first, second = data[:SECTOR_BYTES], zeros[:SECTOR_BYTES] + data[:SECTOR_BYTES]
    left = {image["a"] for image in cut_often(*CREATED, operate(Kind.WRITTEN, "a", 0, data))}
    assert left == {b"", whole, zeros, first, second}


def test_unsynced_writes_last_in_any_order() -> None:
    writes = [operate(Kind.WRITTEN, "a", 0, b"1"), operate(Kind.WRITTEN, "a", 1, b"2")]
    left = {image["a"] for image in cut_often(*CREATED, *writes)}
    assert left >= {b"", b"1", b"\0" + b"2", b"12"}


def test_file_that_was_removed_may_come_back_until_its_folder_is_synced() -> None:
    write = [operate(Kind.WRITTEN, "a", 0, b"1"), operate(Kind.SYNCED, "a")]
    removal = [*CREATED, *write, operate(Kind.UNLINKED, "a")]
    assert {tuple(image.items()) for image in cut_often(*removal)} == {(), (("a", b"1"),)}
    assert cut_often(*removal, operate(Kind.SYNCED, "")) == [{}] * 300


def test_synced_file_may_be_missing_until_its_folder_is_synced() -> None:
    operations = [
        operate(Kind.CREATED, "a"),
        operate(Kind.WRITTEN, "a", 0, b"1"),
        operate(Kind.SYNCED, "a"),
    ]
    assert {tuple(image.items()) for image in cut_often(*operations)} == {(), (("a", b"1"),)}


def test_unsynced_cut_of_a_file_is_kept_or_dropped() -> None:
    write = [operate(Kind.WRITTEN, "a", 0, b"123"), operate(Kind.SYNCED, "a")]
    left = cut_often(*CREATED, *write, operate(Kind.TRUNCATED, "a", size=1))
    assert {image["a"] for image in left} == {b"1", b"123"}


def test_all_dropped_and_all_kept_are_the_two_ends() -> None:
    disk = Disk()
    for operation in [*CREATED, operate(Kind.WRITTEN, "a", 0, b"1")]:
        disk.apply(operation)
    assert (disk.cut(AllDropped()), disk.cut(Fate())) == ({"a": b""}, {"a": b"1"})
