"""Files that survive: what a failing disk leaves behind.

The disk is full in a process of its own, by a limit on the size of its files:
the kernel then writes what fits and refuses the rest, as a full disk does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.fileio import append_line, fsync_tree, replace_link, write_atomic

_LIMITED = """
import resource, signal, sys
from pathlib import Path
from agent import fileio
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
try:
    getattr(fileio, sys.argv[2])(Path(sys.argv[3]), "x" * int(sys.argv[4]))
except OSError as exc:
    print(exc.strerror)
"""


def run_limited(limit: int, function: str, path: Path, length: int) -> str:
    """Call a function of `agent.fileio` where no file may have more than `limit` bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(limit), function, path, str(length)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return done.stdout.strip()


def test_line_is_added_to_a_file_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "results.jsonl"
    append_line(path, "one")
    append_line(path, "zwölf")
    assert path.read_bytes() == "one\nzwölf\n".encode()


def test_line_that_does_not_fit_is_cut_off_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_line(path, "whole")
    assert run_limited(100, "append_line", path, 500) == "File too large"
    assert path.read_text() == "whole\n"
    assert run_limited(100, "append_line", path, 50) == ""
    assert path.read_text() == "whole\n" + "x" * 50 + "\n"


def test_first_line_that_does_not_fit_leaves_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert run_limited(100, "append_line", path, 500) == "File too large"
    assert path.read_bytes() == b""


def test_replaced_file_has_the_new_text_and_leaves_no_part(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    for durable, text in ((True, "old"), (False, "nëw")):
        write_atomic(path, text, durable=durable)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_replaced_file_is_another_one_for_those_who_read_the_old(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("old and long")
    with path.open() as reader:
        write_atomic(path, "new")
        assert reader.read() == "old and long"


def test_text_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    assert run_limited(100, "write_atomic", path, 500) == "File too large"
    assert path.read_text() == "old"


def test_text_that_cannot_be_put_in_place_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(path, "text")
    assert path.is_dir()


def test_link_is_made_and_pointed_elsewhere(tmp_path: Path) -> None:
    link = tmp_path / "current"
    for target in ("1", "2"):
        replace_link(link, target)
        assert str(link.readlink()) == target
    assert list(tmp_path.iterdir()) == [link]


def test_part_of_a_crash_is_no_obstacle_to_a_link(tmp_path: Path) -> None:
    link = tmp_path / "current"
    (tmp_path / f".current.{os.getpid()}.part").symlink_to("nowhere")
    replace_link(link, "1")
    assert str(link.readlink()) == "1"
    assert list(tmp_path.iterdir()) == [link]


def test_link_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "current").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_link(tmp_path / "current", "1")
    assert (tmp_path / "current").is_dir()


def test_flushing_a_tree_passes_by_links_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    (tmp_path / "gone").symlink_to("nowhere")
    fsync_tree(tmp_path)
    with pytest.raises(FileNotFoundError):
        fsync_tree(tmp_path / "nowhere")
