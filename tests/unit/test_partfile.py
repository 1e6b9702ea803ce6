"""Part files: what is taken up again, and what is not trusted."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from agent.release import ReleaseFile
from worker.errors import FetchBusyError
from worker.update.partfile import SpanSet, measure_part, open_part, remove_parts

DATA = random.Random(0).randbytes(100_000)
BLOB = ReleaseFile(path="m", sha256=hashlib.sha256(DATA).hexdigest(), size_bytes=len(DATA))


def journal_of(models: Path) -> Path:
    return models / ".fetch" / f"{BLOB.sha256}.journal"


def part_of(models: Path) -> Path:
    return models / ".fetch" / f"{BLOB.sha256}.part"


def test_spans_are_a_set_of_bytes() -> None:
    draw = random.Random(1)
    for _ in range(200):
        spans, reference = SpanSet(), set[int]()
        for _ in range(draw.randrange(12)):
            start = draw.randrange(60)
            end = start + draw.randrange(-2, 15)
            spans.add(start, end)
            reference |= set(range(start, end))

        assert {at for start, end in spans.spans for at in range(start, end)} == reference
        assert spans.size_bytes == len(reference)
        missing = {at for start, end in spans.find_gaps(70) for at in range(start, end)}
        assert missing == set(range(70)) - reference
        assert spans.clip(30).size_bytes == len([at for at in reference if at < 30])
        edges = [edge for span in spans.spans for edge in span]
        assert edges == sorted(set(edges)), "spans that touch were not joined"


def test_what_was_written_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    with open_part(tmp_path, BLOB) as part:
        part.write(50_000, DATA[50_000:60_000])
        part.write(0, DATA[:10_000])
    with open_part(tmp_path, BLOB) as part:
        assert part.held.spans == [(0, 10_000), (50_000, 60_000)]
        assert part.is_mixed
        for start, end in part.gaps:
            part.write(start, DATA[start:end])
        assert part.finish(tmp_path / "final")

    assert (tmp_path / "final").read_bytes() == DATA
    assert list((tmp_path / ".fetch").iterdir()) == []


def test_a_wrong_file_does_not_get_its_final_name(tmp_path: Path) -> None:
    with open_part(tmp_path, BLOB) as part:
        part.write(0, DATA[:-1] + b"x")
        assert not part.finish(tmp_path / "final")
        part.discard()

    assert list((tmp_path / ".fetch").iterdir()) == []
    assert not (tmp_path / "final").exists()


def test_after_a_power_cut_only_what_was_flushed_counts(tmp_path: Path) -> None:
    with open_part(tmp_path, BLOB) as part:
        part.write(0, DATA[:10_000])
        part.sync()
        part.write(10_000, DATA[10_000:20_000])
        text = journal_of(tmp_path).read_text()
    # As the cut left it: what close() flushes did not come to pass.
    head, _, rest = text.partition("\n")
    journal_of(tmp_path).write_text(f"{json.dumps(json.loads(head) | {'boot': 'before'})}\n{rest}")

    with open_part(tmp_path, BLOB) as part:
        assert part.held.spans == [(0, 10_000)]


def test_a_torn_line_and_what_follows_it_do_not_count(tmp_path: Path) -> None:
    with open_part(tmp_path, BLOB) as part:
        part.write(0, DATA)
        part.sync()
    head = json.loads(journal_of(tmp_path).read_text())
    for tail, held in (("0 500\n7", 500), ("0 500\n700 9", 500), ("0 500\nx y\n0 900\n", 500)):
        journal_of(tmp_path).write_text(f"{json.dumps(head | {'synced': []})}\n{tail}")
        with open_part(tmp_path, BLOB) as part:
            assert part.held.size_bytes == held, tail


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[]\n",
        "null\n",
        "[" * 10_000,
        '{"schema":"edgeward.part/v1"}\n',
        '{"schema":"edgeward.part/v1","size_bytes":7,"boot":"","planned":true,"synced":[[0,7]]}\n',
        '{"schema":"edgeward.part/v1","size_bytes":100000,"boot":"","planned":0,"synced":[[0]]}\n',
        '{"schema":"edgeward.part/v1","size_bytes":100000,"boot":"","planned":0,"synced":7}\n',
        "\x00" * 200,
    ],
)
def test_a_journal_that_cannot_be_understood_vouches_for_nothing(tmp_path: Path, text: str) -> None:
    with open_part(tmp_path, BLOB) as part:
        part.write(0, DATA)
    journal_of(tmp_path).write_text(text)
    with open_part(tmp_path, BLOB) as part:
        assert part.gaps == [(0, len(DATA))]
        assert not part.is_mixed


def test_journal_that_says_more_than_the_file_has_is_cut_to_it(tmp_path: Path) -> None:
    with open_part(tmp_path, BLOB) as part:
        part.write(0, DATA)
    with part_of(tmp_path).open("r+b") as file:
        file.truncate(3000)
    with open_part(tmp_path, BLOB) as part:
        assert part.held.spans == [(0, 3000)]


def test_a_part_file_longer_than_its_blob_is_cut(tmp_path: Path) -> None:
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).write_bytes(DATA + b"more")
    with open_part(tmp_path, BLOB) as part:
        part.write(0, DATA)
        assert part.finish(tmp_path / "final")


def test_a_part_file_that_has_become_a_blob_is_not_written_to(tmp_path: Path) -> None:
    with open_part(tmp_path, BLOB) as part:
        part.write(0, DATA)
    (tmp_path / "blob").hardlink_to(part_of(tmp_path))
    with open_part(tmp_path, BLOB) as part:
        part.write(0, b"other")
        part.reset()

    assert (tmp_path / "blob").read_bytes() == DATA


def test_two_do_not_hold_the_same_part_file(tmp_path: Path) -> None:
    with (
        open_part(tmp_path, BLOB) as part,
        pytest.raises(FetchBusyError),
        open_part(tmp_path, BLOB),
    ):
        pass
    with open_part(tmp_path, BLOB) as part:
        assert part.gaps


def test_parts_that_nobody_wants_or_holds_are_removed(tmp_path: Path) -> None:
    other = BLOB.model_copy(update={"sha256": "0" * 64})
    held = BLOB.model_copy(update={"sha256": "1" * 64})
    for blob in (BLOB, other):
        with open_part(tmp_path, blob) as part:
            part.write(0, DATA)
    (tmp_path / ".fetch" / f"{'2' * 64}.journal").write_text("of a part file that is gone")
    with open_part(tmp_path, held):
        assert remove_parts(tmp_path, keep=[other.sha256]) >= len(DATA)

    left = {path.name.partition(".")[0] for path in (tmp_path / ".fetch").iterdir()}
    assert left == {other.sha256, held.sha256}
    assert measure_part(tmp_path, BLOB.sha256) == 0
    assert measure_part(tmp_path, other.sha256) >= len(DATA)


def test_removing_parts_where_there_are_none_is_no_error(tmp_path: Path) -> None:
    assert remove_parts(tmp_path) == 0
