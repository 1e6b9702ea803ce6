"""After a power cut anywhere in an update the old or the new version serves, whole."""

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.power_cuts.disk import Chance, Fate
from tests.fault.power_cuts.recording import Kind, Operation
from tests.fault.power_cuts.simulation import open_scratch
from tests.fault.update_cuts.tree import Image, Tree
from tests.fault.update_cuts.walk import Recording, publish, record, walk
from tests.fault.update_cuts.workload import DEFECTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the recorder is for Linux")

SEED = 1
CUTS = 150
PLANTED_CUTS = 400
"""Enough to find a planted defect; the first one is enough."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with open_scratch() as folder:
        yield folder


@pytest.fixture(scope="module")
def source(scratch: Path) -> Path:
    return publish(scratch)


@pytest.fixture(scope="module")
def recording(scratch: Path, source: Path) -> Recording:
    return record(scratch, source)


def test_old_or_new_version_serves_whole_after_every_cut(
    recording: Recording, source: Path
) -> None:
    figures = walk(recording, source, SEED, CUTS)
    assert figures.cuts == CUTS
    assert figures.bad_cuts == 0, figures.examples
    assert figures.old > CUTS / 10, "too few cuts came out as the old version to prove anything"
    assert figures.new > CUTS / 10, "too few cuts came out as the new version to prove anything"


def test_recorded_run_meets_all_that_changes_a_repository(recording: Recording) -> None:
    met = Counter(operation.kind for operation in recording.operations)
    wanted = {
        Kind.CREATED,
        Kind.WRITTEN,
        Kind.SYNCED,
        Kind.UNLINKED,
        Kind.RENAMED,
        Kind.FOLDER_MADE,
        Kind.FOLDER_REMOVED,
        Kind.LINKED,
        Kind.SYMLINKED,
    }
    assert wanted <= set(met)
    names = {operation.name for operation in recording.operations if operation.kind is Kind.SYNCED}
    assert {"models", "models/digits", "models/digits/2", "ledger.db-wal"} <= names | {
        # A version is synced while it is staged, under that name.
        name.replace(".staging-", "")
        for name in names
    }


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defect_is_found(defect: str) -> None:
    with open_scratch() as folder:
        source = publish(folder)
        figures = walk(record(folder, source, defect), source, SEED, PLANTED_CUTS, stops_early=True)
    assert figures.bad_cuts > 0


def operate(kind: Kind, name: str, data: bytes = b"") -> Operation:
    return Operation(kind, name, 0, 0, data)


def cut_often(*operations: Operation) -> list[Image]:
    tree = Tree()
    for operation in operations:
        tree.apply(operation)
    return [tree.cut(Chance(str(seed))) for seed in range(200)]


MADE = (operate(Kind.FOLDER_MADE, "a"), operate(Kind.CREATED, "a/f"), operate(Kind.SYNCED, "a"))


def test_synced_folder_is_gone_where_the_one_above_was_not_synced() -> None:
    assert {tuple(image) for image in cut_often(*MADE)} == {(), ("a", "a/f")}
    assert {tuple(image) for image in cut_often(*MADE, operate(Kind.SYNCED, ""))} == {("a", "a/f")}


def test_renamed_folder_takes_what_is_in_it_along() -> None:
    lasting = (*MADE, operate(Kind.SYNCED, ""), operate(Kind.RENAMED, "a", b"b"))
    assert {tuple(image) for image in cut_often(*lasting)} == {("a", "a/f"), ("b", "b/f")}


def test_two_names_of_a_file_have_one_content() -> None:
    lasting = (
        *MADE,
        operate(Kind.SYNCED, ""),
        operate(Kind.LINKED, "a/f", b"g"),
        operate(Kind.SYNCED, ""),
        operate(Kind.WRITTEN, "a/f", b"new"),
    )
    for image in cut_often(*lasting):
        assert image["a/f"] == image["g"]
        assert image["g"].content in (b"", b"new", bytes(3))


def test_link_lasts_with_its_folder() -> None:
    made = (operate(Kind.SYMLINKED, "l", b"1"), operate(Kind.SYNCED, ""))
    assert [image["l"].content for image in cut_often(*made)] == ["1"] * 200
    tree = Tree()
    for operation in (*made, operate(Kind.SYMLINKED, "n", b"2"), operate(Kind.RENAMED, "n", b"l")):
        tree.apply(operation)
    assert tree.cut(Fate())["l"].content == "2"
