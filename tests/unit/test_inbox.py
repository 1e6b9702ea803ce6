"""The inbox's pure parts: is a file complete, what is delivered, where does it go."""

import fcntl
from pathlib import Path

import pytest

from agent.daemon.inbox import choose_target, is_being_written, read_delivered


@pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="only Linux has leases")
@pytest.mark.parametrize("mode", ["ab", "r+b", "wb"])
def test_file_is_being_written_while_a_writer_has_it_open(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(b"half")
    assert not is_being_written(path)
    with path.open(mode):
        assert is_being_written(path)
    assert not is_being_written(path)


def test_readers_do_not_count_as_writers(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(b"whole")
    with path.open("rb"):
        assert not is_being_written(path)


def test_looking_at_a_file_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(b"whole")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        is_being_written(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_file_that_is_gone_and_link_are_not_taken(tmp_path: Path) -> None:
    assert is_being_written(tmp_path / "gone")
    (tmp_path / "photo.png").write_bytes(b"whole")
    (tmp_path / "link.png").symlink_to("photo.png")
    assert is_being_written(tmp_path / "link.png")


def test_torn_line_is_cut_off_and_the_whole_ones_are_delivered(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    whole = b'{"job_id":"A","x":1}\n{"job_id":"B"}\n'
    file.write_bytes(whole + b'{"job_id":"C","x"')
    assert read_delivered(file) == {"A", "B"}
    assert file.read_bytes() == whole


def test_line_without_its_end_is_torn_even_where_it_reads_well(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_bytes(b'{"job_id":"A"}')
    assert read_delivered(file) == set()
    assert file.read_bytes() == b""


def test_lines_of_others_are_ignored_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    content = b'# note\n[1]\n"job_id"\n{"id":1}\n\xff\n\n7\n{"job_id":"A"}\n'
    file.write_bytes(content)
    assert read_delivered(file) == {"A"}
    assert file.read_bytes() == content


def test_file_that_is_not_there_has_nothing_delivered(tmp_path: Path) -> None:
    assert read_delivered(tmp_path / "results.jsonl") == set()
    assert list(tmp_path.iterdir()) == []


def test_file_keeps_its_name_where_that_is_free(tmp_path: Path) -> None:
    target = choose_target(tmp_path / "done", "a.png", "ID")
    assert target == tmp_path / "done" / "a.png"
    assert target.parent.is_dir()


def test_file_gets_its_jobs_id_where_its_name_is_taken(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "a.png").write_bytes(b"first")
    assert choose_target(tmp_path / "done", "a.png", "ID") == tmp_path / "done" / "ID__a.png"
