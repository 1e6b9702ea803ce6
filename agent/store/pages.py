"""Reads SQLite's file format page by page, without SQLite, from a file that SQLite refuses.

For recovery only: it never writes, trusts nothing it reads, and answers damage
with less rows, never with an error. A page is read from the newest copy in the
write-ahead log that was committed, else from the file.

A frame of the log is checked with the checksum stored in the frame before it,
so that one damaged frame costs that frame. SQLite takes the first bad frame for
the end of the log, and drops every commit after it without a word.

Source: https://www.sqlite.org/fileformat2.html (2026-11), sections 1.3, 1.6, 2 and 4.
"""

import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

Value = int | float | str | bytes | None

_MAGIC = b"SQLite format 3\0"
_FRACTIONS = bytes((64, 32, 32))
_DEFAULT_PAGE = 4096
_HEADER = 100
_WAL_HEADER = 32
_FRAME_HEADER = 24
_WAL_MAGICS = {0x377F0682: "<", 0x377F0683: ">"}
_MASK = 0xFFFFFFFF

INDEX_INTERIOR, TABLE_INTERIOR, INDEX_LEAF, TABLE_LEAF = 0x02, 0x05, 0x0A, 0x0D
_CELLS_AT = {INDEX_INTERIOR: 12, TABLE_INTERIOR: 12, INDEX_LEAF: 8, TABLE_LEAF: 8}
# Sizes of serial types 0–9 on disk; 10 and 11 are SQLite's own.
_SIZES = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)
_VARINT_BYTES = 9


class Entry(NamedTuple):
    """One record found on a page."""

    page: int
    kind: int
    """Type of the page: `TABLE_LEAF`, or one of an index."""
    rowid: int | None
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Frame:
    """One page in the write-ahead log."""

    page: int
    offset: int
    commits_pages: int
    """Size of the database after the commit that this frame ends; 0 in between."""
    is_sound: bool
    """Fits its checksum; or nothing is left to check it with."""
    is_checked: bool


class _Damage(Exception):  # noqa: N818 - control flow of this module, seen by nobody else
    """What was read cannot be what SQLite wrote."""


class Image:
    """A database file with its write-ahead log, as bytes.

    Args:
        path: the database; it, its log, or both may be missing.
    """

    def __init__(self, path: Path) -> None:
        self._fd = _open(path)
        self._wal = _open(path.with_name(f"{path.name}-wal"))
        header = self._read(self._fd, 0, _HEADER)
        self._page_size = _find_page_size(header, self._read(self._wal, 0, _WAL_HEADER))
        self._usable = self._page_size
        self.frames = _read_frames(self._wal, self._page_size)
        pages = os.fstat(self._fd).st_size // self._page_size if self._fd is not None else 0
        self._newest = _find_newest(self.frames, pages)
        first = self.read_page(1)
        # Bytes 21–23 are always these: without them byte 20 can't be believed either.
        if first.startswith(_MAGIC) and first[21:24] == _FRACTIONS:
            self._usable -= first[20]
        self._first = first
        self.page_count = max([pages, *self._newest])
        """Pages there are, in the file or in the log."""

    def __enter__(self) -> "Image":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in (self._fd, self._wal):
            if fd is not None:
                os.close(fd)

    def read_page(self, number: int) -> bytes:
        """Return a page's newest committed bytes; empty where there are none to read."""
        size = self._page_size
        if number in self._newest:
            return self._read(self._wal, self._newest[number], size)
        data = self._read(self._fd, (number - 1) * size, size)
        return data if len(data) == size else b""

    def _read(self, fd: int | None, offset: int, size: int) -> bytes:
        return b"" if fd is None else _read_at(fd, size, offset)

    def find_free_pages(self) -> set[int]:
        """Return pages that hold nothing any more; none where the first page is damaged."""
        free: set[int] = set()
        if not self._first.startswith(_MAGIC):
            return free
        trunk = int.from_bytes(self._first[32:36], "big")
        while 0 < trunk <= self.page_count and trunk not in free:
            free.add(trunk)
            page = self.read_page(trunk)
            if len(page) < self._usable:
                break
            trunk, count = struct.unpack_from(">II", page)
            count = min(count, self._usable // 4 - 2)
            free.update(struct.unpack_from(f">{count}I", page, 8))
        return free

    def scan(
        self, skip: set[int], used: set[int], damaged: list[int], mark: bytes = b""
    ) -> Iterator[Entry]:
        """Yield every record that is whole, page by page in their order.

        Args:
            skip: pages to leave out.
            used: gets the pages that only continue records of others.
            damaged: gets the pages that are neither sound nor, so far, in `used`.
            mark: leave out pages without these bytes.
        """
        for number in range(1, self.page_count + 1):
            if number in skip:
                continue
            page = self.read_page(number)
            if mark not in page:
                continue
            try:
                kind, cells = self._list_cells(number, page)
            except _Damage:
                damaged.append(number)
                continue
            if kind == TABLE_INTERIOR:
                continue
            lost = False
            for at in cells:
                try:
                    yield self._read_cell(number, kind, page, at, used)
                except _Damage:
                    lost = True
            if lost:
                damaged.append(number)

    def _list_cells(self, number: int, page: bytes) -> tuple[int, tuple[int, ...]]:
        start = _HEADER if number == 1 else 0
        if len(page) < self._usable or page[start] not in _CELLS_AT:
            raise _Damage
        kind = page[start]
        count = int.from_bytes(page[start + 3 : start + 5], "big")
        first = start + _CELLS_AT[kind]
        if first + 2 * count > self._usable:
            raise _Damage
        cells = struct.unpack_from(f">{count}H", page, first)
        if cells and not first + 2 * count <= min(cells) <= max(cells) < self._usable:
            raise _Damage
        return kind, cells

    def _read_cell(self, number: int, kind: int, page: bytes, at: int, used: set[int]) -> Entry:
        if kind == INDEX_INTERIOR:
            at += 4
        size, at = _read_varint(page, at)
        rowid = None
        if kind == TABLE_LEAF:
            rowid, at = _read_varint(page, at)
            if rowid >= 1 << 63:
                rowid -= 1 << 64
        payload = self._read_payload(kind, page, at, size, used)
        return Entry(number, kind, rowid, tuple(_decode_record(payload)))

    def _read_payload(self, kind: int, page: bytes, at: int, size: int, used: set[int]) -> bytes:
        usable = self._usable
        most = usable - 35 if kind == TABLE_LEAF else (usable - 12) * 64 // 255 - 23
        if size <= most:
            if at + size > usable:
                raise _Damage
            return page[at : at + size]
        least = (usable - 12) * 32 // 255 - 23
        local = least + (size - least) % (usable - 4)
        local = local if local <= most else least
        if at + local + 4 > usable or size > self.page_count * usable:
            raise _Damage
        parts = [page[at : at + local]]
        number = int.from_bytes(page[at + local : at + local + 4], "big")
        missing, chain = size - local, []
        while missing > 0:
            more = self.read_page(number) if 0 < number <= self.page_count else b""
            if len(more) < usable:
                raise _Damage
            chain.append(number)
            parts.append(more[4 : 4 + min(missing, usable - 4)])
            missing -= usable - 4
            number = int.from_bytes(more[:4], "big")
        if number:
            # The chain should end here: one of its pages is another one's by now, or damaged.
            raise _Damage
        used.update(chain)
        return b"".join(parts)


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _read_at(fd: int, size: int, offset: int) -> bytes:
    """Read what is there; nothing of a bad sector, so that only its page is lost."""
    try:
        return os.pread(fd, size, offset)
    except OSError:
        return b""


def _find_page_size(header: bytes, wal_header: bytes) -> int:
    """Return the page size; SQLite's default, which the ledger has, where nothing tells it."""
    candidates = []
    if header.startswith(_MAGIC):
        size = int.from_bytes(header[16:18], "big")
        candidates.append(65536 if size == 1 else size)
    if len(wal_header) == _WAL_HEADER:
        candidates.append(int.from_bytes(wal_header[8:12], "big"))
    for size in candidates:
        if 512 <= size <= 65536 and size & (size - 1) == 0:
            return size
    return _DEFAULT_PAGE


def _read_frames(fd: int | None, page_size: int) -> list[Frame]:
    """Return the frames of a write-ahead log that belong to its present round, in order.

    Frames of an earlier round, which the log is overwritten from the front of,
    have other salts. With a damaged header the first frame's salts count.
    """
    if fd is None:
        return []
    header = _read_at(fd, _WAL_HEADER, 0)
    if len(header) < _WAL_HEADER:
        return []
    stride = _FRAME_HEADER + page_size
    salts, order, previous = _read_wal_header(fd, header)
    frames: list[Frame] = []
    for offset in range(_WAL_HEADER, os.fstat(fd).st_size - stride + 1, stride):
        # Of a bad sector there is nothing: zeros fit no salts.
        data = _read_at(fd, stride, offset).ljust(stride, b"\0")
        page, commits = struct.unpack_from(">II", data)
        stored = struct.unpack_from(">II", data, 16)
        if data[8:16] == salts and page:
            summed = previous and _sum_words(
                data[_FRAME_HEADER:], _sum_words(data[:8], previous, order), order
            )
            # Behind a bad header nothing is left to check a frame with: its page is looked at.
            sound = summed == stored if previous else True
            frames.append(Frame(page, offset + _FRAME_HEADER, commits, sound, previous is not None))
            previous = stored
        elif _is_older_round(fd, offset + stride, stride, salts):
            break
        else:
            # A frame that is damaged to its header; what follows is of this round.
            frames.append(Frame(0, offset + _FRAME_HEADER, 0, is_sound=False, is_checked=True))
            previous = None
    return frames


def _read_wal_header(fd: int, header: bytes) -> tuple[bytes, str, tuple[int, ...] | None]:
    """Return the salts, the byte order and, where the header is sound, the first checksum."""
    magic, *_, salts, seed = struct.unpack(">IIII8s8s", header)
    order = _WAL_MAGICS.get(magic)
    first = struct.unpack(">II", seed)
    if order is not None and _sum_words(header[:24], (0, 0), order) == first:
        return salts, order, first
    native = "<" if sys.byteorder == "little" else ">"
    return _read_at(fd, _FRAME_HEADER, _WAL_HEADER)[8:16], native, None


def count_lost_commits(path: Path, accepted: int) -> int:
    """Return how many commits the write-ahead log holds behind the frames that SQLite accepts.

    One is usual after a power cut: the transaction that was being written. Two are damage:
    the first of them was on disk before the second one began.

    Args:
        path: the database.
        accepted: how many frames SQLite takes.
    """
    fd = _open(path.with_name(f"{path.name}-wal"))
    if fd is None:
        return 0
    try:
        header = _read_at(fd, _WAL_HEADER, 0)
        if len(header) < _WAL_HEADER:
            return 0
        size = _find_page_size(b"", header)
        salts, _, _ = _read_wal_header(fd, header)
        stride = _FRAME_HEADER + size
        behind = range(_WAL_HEADER + accepted * stride, os.fstat(fd).st_size - stride + 1, stride)
        heads = (_read_at(fd, _FRAME_HEADER, offset) for offset in behind)
        return sum(head[8:16] == salts and head[4:8] != bytes(4) for head in heads)
    finally:
        os.close(fd)


def _is_older_round(fd: int, offset: int, stride: int, salts: bytes) -> bool:
    """Say whether no later frame has the salts of this round."""
    for at in range(offset, os.fstat(fd).st_size - stride + 1, stride):
        if _read_at(fd, 16, at)[8:16] == salts:
            return False
    return True


def _find_newest(frames: list[Frame], file_pages: int) -> dict[int, int]:
    """Return where each page's newest committed bytes are."""
    last = max((number for number, frame in enumerate(frames) if frame.commits_pages), default=-1)
    sound = [frame for frame in frames[: last + 1] if frame.is_sound]
    # A page number that no checksum vouches for must not make a database of 4 thousand million.
    top = max([file_pages, *(frame.page for frame in sound if frame.is_checked)])
    return {frame.page: frame.offset for frame in sound if frame.page <= top}


def _sum_words(data: bytes, seed: tuple[int, ...], order: str) -> tuple[int, ...]:
    """Return the log's checksum over `data`, going on from `seed`."""
    first, second = seed
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & _MASK
        second = (second + odd + first) & _MASK
    return first, second


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(_VARINT_BYTES):
        if at >= len(data):
            raise _Damage
        byte = data[at]
        at += 1
        if index == _VARINT_BYTES - 1:
            return value << 8 | byte, at
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            break
    return value, at


def _decode_record(payload: bytes) -> list[Value]:
    """Return a record's values.

    Raises:
        _Damage: the bytes are no whole record.
    """
    header, at = _read_varint(payload, 0)
    start = header
    size = len(payload)
    if not at <= header <= size:
        raise _Damage
    values: list[Value] = []
    while at < header:
        kind = payload[at]
        at += 1
        if kind >= 0x80:
            kind, at = _read_varint(payload, at - 1)
        if kind >= 12:
            end = start + (kind - 12) // 2
            # With a flipped bit in its text a job fails by its hash, instead of vanishing.
            values.append(
                payload[start:end] if kind % 2 == 0 else payload[start:end].decode(errors="replace")
            )
        elif kind < 10:
            end = start + _SIZES[kind]
            values.append(_decode_number(kind, payload[start:end]))
        else:
            raise _Damage
        if end > size:
            raise _Damage
        start = end
    if start != size:
        raise _Damage
    return values


def _decode_number(kind: int, data: bytes) -> Value:
    if kind == 0:
        return None
    if kind < 7:
        return int.from_bytes(data, "big", signed=True)
    if kind >= 8:
        return kind - 8
    if len(data) < 8:
        raise _Damage
    return float(struct.unpack(">d", data)[0])
