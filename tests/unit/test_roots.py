"""Files that jobs name are read below the roots, and nothing else is."""

import hashlib
import os
from pathlib import Path

import pytest

from agent.errors import (
    DigestMismatchError,
    InputError,
    InputNotFoundError,
    InputTooLargeError,
    PathNotAllowedError,
)
from agent.roots import open_below, read_below
from tests.harness.users import open_folder, ordinary_user

SECRET = b"outside"


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "deep" / "er").mkdir(parents=True)
    second.mkdir()
    (first / "a.bin").write_bytes(b"0123456789")
    (first / "deep" / "er" / "b.bin").write_bytes(b"b")
    (second / "c.bin").write_bytes(b"c")
    (tmp_path / "secret").write_bytes(SECRET)
    return [first, second]


@pytest.mark.parametrize("path", ["a.bin", "./a.bin", "deep/er/b.bin", "deep//er/./b.bin"])
def test_relative_path_is_read_below_the_first_root(roots: list[Path], path: str) -> None:
    assert read_below(roots, path, 10) == (roots[0] / path).read_bytes()


def test_absolute_path_is_read_below_any_root(roots: list[Path]) -> None:
    assert read_below(roots, roots[0] / "deep/er/b.bin", 10) == b"b"
    assert read_below(roots, str(roots[1] / "c.bin"), 10) == b"c"


def test_relative_path_is_not_looked_for_below_later_roots(roots: list[Path]) -> None:
    with pytest.raises(InputNotFoundError):
        read_below(roots, "c.bin", 10)


@pytest.mark.parametrize(
    "path", ["../secret", "deep/../a.bin", "..", "deep/../../secret", "/etc/passwd", "/", "", "."]
)
def test_path_that_leaves_the_roots_or_names_no_file_is_refused(
    roots: list[Path], path: str
) -> None:
    with pytest.raises(PathNotAllowedError):
        read_below(roots, path, 1 << 20)


def test_sibling_whose_name_begins_like_a_root_is_refused(roots: list[Path]) -> None:
    sibling = roots[0].with_name("first-not")
    sibling.mkdir()
    (sibling / "x").write_bytes(SECRET)
    with pytest.raises(PathNotAllowedError):
        read_below(roots, sibling / "x", 10)


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 300, "deep/" + "y" * 300 + "/z"])
def test_string_that_no_path_can_be_is_refused(roots: list[Path], path: str) -> None:
    with pytest.raises(PathNotAllowedError):
        read_below(roots, path, 10)


def test_without_roots_nothing_is_read() -> None:
    with pytest.raises(PathNotAllowedError, match="none is configured"):
        read_below([], "a.bin", 10)


def test_link_to_a_file_is_refused_even_inside_the_root(roots: list[Path]) -> None:
    (roots[0] / "in").symlink_to(roots[0] / "a.bin")
    (roots[0] / "out").symlink_to(roots[0].parent / "secret")
    for name in ("in", "out"):
        with pytest.raises(PathNotAllowedError, match="link"):
            read_below(roots, name, 10)


def test_link_to_a_folder_on_the_way_is_refused(roots: list[Path]) -> None:
    (roots[0] / "side").symlink_to(roots[1])
    with pytest.raises(PathNotAllowedError, match="link"):
        read_below(roots, "side/c.bin", 10)


def test_root_itself_may_be_a_link(roots: list[Path], tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(roots[0])
    assert read_below([tmp_path / "alias"], "a.bin", 10) == b"0123456789"


def test_missing_file_or_folder_is_not_found(roots: list[Path]) -> None:
    for path in ("gone", "gone/a.bin", "a.bin/below"):
        with pytest.raises(InputNotFoundError):
            read_below(roots, path, 10)


def test_missing_root_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError):
        read_below([tmp_path / "gone"], "a", 10)


def test_folder_fifo_and_device_are_not_read_and_do_not_block(roots: list[Path]) -> None:
    os.mkfifo(roots[0] / "fifo")
    for path in ("deep", "fifo"):
        with pytest.raises(InputNotFoundError, match="no regular file"):
            read_below(roots, path, 10)
    with pytest.raises(InputNotFoundError, match="no regular file"):
        read_below([Path("/dev")], "zero", 10)


def test_file_of_the_allowed_size_is_read_and_one_byte_more_is_not(roots: list[Path]) -> None:
    assert len(read_below(roots, "a.bin", 10)) == 10
    with pytest.raises(InputTooLargeError):
        read_below(roots, "a.bin", 9)


def test_file_whose_size_reads_as_zero_is_still_capped() -> None:
    assert Path("/proc/self/status").stat().st_size == 0
    with pytest.raises(InputTooLargeError):
        read_below([Path("/proc/self")], "status", 10)


def test_expected_digest_and_size_are_checked(roots: list[Path]) -> None:
    digest = hashlib.sha256(b"0123456789").hexdigest()
    assert read_below(roots, "a.bin", 10, sha256=digest.upper(), size_bytes=10)
    with pytest.raises(DigestMismatchError, match="10 bytes"):
        read_below(roots, "a.bin", 10, sha256=digest, size_bytes=9)
    with pytest.raises(DigestMismatchError, match="sha256"):
        read_below(roots, "a.bin", 10, sha256="0" * 64)


def test_file_without_permission_is_an_input_error() -> None:
    with open_folder() as root:
        (root / "a.bin").write_bytes(b"0123456789")
        (root / "a.bin").chmod(0)
        with ordinary_user(), pytest.raises(InputError, match="cannot be read"):
            read_below([root], "a.bin", 10)


def test_no_descriptor_is_left_open_whatever_happens(roots: list[Path]) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (counts itself both times)
    for path in ("a.bin", "deep/er/b.bin", "deep/gone", "deep", "../secret", "deep/er/\0"):
        try:
            with open_below(roots, path) as file:
                file.read()
        except InputError:
            pass
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
