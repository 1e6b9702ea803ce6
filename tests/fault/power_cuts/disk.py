"""A disk that keeps for sure only what was synced, and loses the rest in every way allowed.

Rules, the most that POSIX promises and less than ext4 gives:

- a change of a file lasts for sure once an fsync or fdatasync of it has returned;
- each change not synced is kept, dropped or, a write, torn at sectors of 512 bytes,
  each by itself, in any order; the file's new length may last without the data (zeros);
- a creation, removal or renaming lasts for sure once the folder was synced; until
  then each is kept or dropped, so that a removed file may come back as it was.

Not in the model: a disk that lies about its cache, sectors that were synced and rot
later, damage beside the sector being written, old contents of other files in new blocks.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.fault.power_cuts.recording import MARKS, Kind, Operation

SECTOR_BYTES = 512
Image = dict[str, bytes]


class Fate:
    """What becomes of changes that were not synced: all are kept."""

    torn = 0
    dropped = 0

    def keeps(self) -> bool:
        """Say whether a change of a name or a length lasts."""
        return True

    def write(self, content: bytearray, offset: int, data: bytes) -> None:
        """Do what becomes of a write."""
        _put(content, offset, data)


class AllDropped(Fate):
    """None lasts."""

    def keeps(self) -> bool:
        """Say that it does not."""
        self.dropped += 1
        return False

    def write(self, content: bytearray, offset: int, data: bytes) -> None:
        """Leave the file as it is."""
        self.dropped += 1


class Chance(Fate):
    """Each lasts, is dropped or torn by chance; how often differs from cut to cut."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self._kept = self._random.choice((0.1, 0.5, 0.9))
        self._torn = self._random.choice((0.05, 0.3))

    def keeps(self) -> bool:
        """Say whether it lasts."""
        kept = self._random.random() < self._kept
        self.dropped += not kept
        return kept

    def write(self, content: bytearray, offset: int, data: bytes) -> None:
        """Keep, tear or drop a write."""
        if self._random.random() < self._torn:
            self._tear(content, offset, data)
        elif self.keeps():
            _put(content, offset, data)
        elif self._random.random() < 0.3:
            _extend(content, offset + len(data))

    def _tear(self, content: bytearray, offset: int, data: bytes) -> None:
        end = offset + len(data)
        edges = [offset, *range(offset - offset % SECTOR_BYTES + SECTOR_BYTES, end, SECTOR_BYTES)]
        pieces = [
            (start, data[start - offset : stop - offset])
            for start, stop in zip(edges, [*edges[1:], end], strict=True)
            if self._random.random() < 0.5
        ]
        self.torn += 0 < len(pieces) < len(edges)
        self.dropped += not pieces
        for start, piece in pieces:
            _put(content, start, piece)


def _extend(content: bytearray, size: int) -> None:
    content.extend(bytes(max(0, size - len(content))))


def _put(content: bytearray, offset: int, data: bytes) -> None:
    _extend(content, offset)
    content[offset : offset + len(data)] = data


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    _extend(content, size)


@dataclass(eq=False)
class Inode:
    """A file, whatever its names."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[Operation] = field(default_factory=list)

    def read(self, fate: Fate) -> bytearray:
        """Return the content that a cut leaves."""
        content = bytearray(self.durable)
        for change in self.pending:
            if change.kind is Kind.WRITTEN:
                fate.write(content, change.offset, change.data)
            elif fate.keeps():
                size = change.size
                _resize(content, size if change.kind is Kind.TRUNCATED else max(size, len(content)))
        return content

    def sync(self) -> None:
        """Let all of it last."""
        self.durable = self.read(Fate())
        self.pending.clear()


_Names = dict[str, Inode]


class Disk:
    """One folder on the disk: feed it operations in order, ask what a cut leaves."""

    def __init__(self) -> None:
        self._names: _Names = {}
        self._durable_names: _Names = {}
        self._pending_names: list[Callable[[_Names], None]] = []

    def apply(self, operation: Operation) -> None:
        """Let the run do its next operation."""
        kind, name = operation.kind, operation.name
        if name == MARKS:
            return
        if kind is Kind.SYNCED:
            self._sync(name)
        elif kind is Kind.CREATED:
            inode = Inode()
            self._change_names(lambda names: names.update({name: inode}))
        elif kind is Kind.UNLINKED:
            self._remove(name)
        elif kind is Kind.RENAMED:
            self._rename(name, operation.data)
        elif name in self._names:
            self._names[name].pending.append(operation)
        # Otherwise a write to a file already removed: nobody will read it.

    def _sync(self, name: str) -> None:
        if name == "":
            self._durable_names = dict(self._names)
            self._pending_names.clear()
        elif name in self._names:
            self._names[name].sync()

    def _remove(self, name: str) -> None:
        def change(names: _Names) -> None:
            names.pop(name, None)

        self._change_names(change)

    def _rename(self, old: str, target: bytes) -> None:
        inode, new = self._names[old], target.decode().rpartition("/")[2]

        def change(names: _Names) -> None:
            names.pop(old, None)
            names[new] = inode

        self._change_names(change)

    def _change_names(self, change: Callable[[_Names], None]) -> None:
        change(self._names)
        self._pending_names.append(change)

    def cut(self, fate: Fate) -> Image:
        """Return the files that a power cut now leaves."""
        names = dict(self._durable_names)
        for change in self._pending_names:
            if fate.keeps():
                change(names)
        return {name: bytes(inode.read(fate)) for name, inode in names.items()}
