"""Where a blob may be cut, so that a box fetches only the pieces that it does not have.

Owns the chunk index (`edgeward.chunks/v1`): the publisher writes one beside each blob,
and a box that holds an older blob cuts that in the same way and compares. Touches no
network and writes no blob.

Invariants: an index is an unsigned hint. It is bounded before it is parsed and checked
against the blob's size; whatever it says afterwards, the finished file is verified by
its sha256 in `worker.update.fetch`, so a lying index costs bytes and never a wrong file.

Source: FastCDC (Xia et al., 2020) as in pyfastcdc; docs/adr/0022-chunks.md for the sizes.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pyfastcdc import FastCDC

from agent.fileio import write_atomic
from worker.errors import ChunkIndexError

SCHEMA = "edgeward.chunks/v1"
AVERAGE_BYTES = 16 << 10
"""Of a chunk, as FastCDC is asked for it; its chunks are about a quarter longer.

Source: `python -m benchmarks.delta`, docs/updates.md.
"""
MIN_INDEXED_BYTES = 64 << 10
"""A blob below this is fetched whole: its index would save less than it costs."""
MAX_CHUNKS = 200_000
MAX_INDEX_BYTES = 16 << 20
MAX_RANGES = 256
"""Requests for one blob: each costs a round trip, so the smallest gaps are fetched through."""

# A blob with more chunks than this gets longer ones: 4 GiB has an index of about 3 MB.
_USUAL_CHUNKS = 1 << 16
_SPREAD = 4
"""FastCDC's shortest chunk is the average divided by this, the longest multiplied by it."""
_DIGEST_BYTES = 16
_ENTRY_BYTES = 64
"""What one chunk takes in the document at most, with room for another writer's spaces."""
_HEAD_BYTES = 1024

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class ChunkIndex(BaseModel):
    """The chunks of one blob, in its order."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_: Literal["edgeward.chunks/v1"] = Field(alias="schema")
    algorithm: Literal["fastcdc-2020"]
    """With normalization level 1 and no seed."""
    digest: Literal["blake2b-128"]
    average_bytes: int = Field(ge=4 << 10, le=4 << 20)
    """A power of two. No chunk but the last is shorter than a quarter of it, none longer
    than four times it."""
    chunks: list[tuple[Annotated[int, Field(gt=0)], _Digest]] = Field(max_length=MAX_CHUNKS)
    """Length and digest of each."""

    @model_validator(mode="after")
    def _check(self) -> "ChunkIndex":
        if self.average_bytes & (self.average_bytes - 1):
            msg = "average_bytes is no power of two"
            raise ValueError(msg)
        shortest, longest = self.average_bytes // _SPREAD, self.average_bytes * _SPREAD
        lengths = [length for length, _ in self.chunks]
        if any(length > longest for length in lengths):
            msg = f"a chunk is longer than {longest} bytes"
            raise ValueError(msg)
        if any(length < shortest for length in lengths[:-1]):
            msg = f"a chunk before the last is shorter than {shortest} bytes"
            raise ValueError(msg)
        return self

    @property
    def size_bytes(self) -> int:
        """Sum of the chunks' lengths."""
        return sum(length for length, _ in self.chunks)


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of the new blob that an old file has."""

    source: int
    """Number of the old file."""
    source_offset: int
    offset: int
    """In the new blob."""
    length: int


@dataclass(frozen=True, slots=True)
class DeltaPlan:
    """What of a blob can be copied, and what must be fetched; together all of it, once."""

    copies: tuple[Copy, ...]
    ranges: tuple[tuple[int, int], ...]
    """Start and end (exclusive) in the new blob, in order, none adjacent to another."""

    @property
    def copied_bytes(self) -> int:
        """How much need not be fetched."""
        return sum(copy.length for copy in self.copies)

    @property
    def fetched_bytes(self) -> int:
        """How much must be fetched."""
        return sum(end - start for start, end in self.ranges)


def choose_average(size_bytes: int) -> int:
    """Return the average chunk for a blob of that size."""
    average = AVERAGE_BYTES
    while size_bytes > average * _USUAL_CHUNKS and average < 4 << 20:
        average *= 2
    return average


def limit_index_bytes(size_bytes: int) -> int:
    """Return how long the index of a blob of that size can be; more is not worth reading."""
    shortest = AVERAGE_BYTES // _SPREAD
    return min(MAX_INDEX_BYTES, _HEAD_BYTES + _ENTRY_BYTES * (size_bytes // shortest + 1))


def write_chunk_index(blob: Path, index: Path, average_bytes: int | None = None) -> None:
    """Cut `blob` and write its index; the publisher's side. Reads the blob once.

    Args:
        blob: the file to cut.
        index: where the document goes; replaced in one step, durably.
        average_bytes: a power of two; by default what suits the size.

    Raises:
        OSError: the blob cannot be read or the index not written.
    """
    average = average_bytes or choose_average(blob.stat().st_size)
    with blob.open("rb") as file:
        chunks = [[length, digest] for _, length, digest in _cut(file, average)]
    document = {
        "schema": SCHEMA,
        "algorithm": "fastcdc-2020",
        "digest": "blake2b-128",
        "average_bytes": average,
        "chunks": chunks,
    }
    write_atomic(index, json.dumps(document, separators=(",", ":")) + "\n")


def read_chunk_index(text: bytes, size_bytes: int) -> ChunkIndex:
    """Check the text of an index against the size of its blob and return it.

    Raises:
        ChunkIndexError: it is too large, not valid, or of a blob of another size.
    """
    if len(text) > limit_index_bytes(size_bytes):
        msg = f"the chunk index has {len(text)} bytes, too many for a blob of {size_bytes}"
        raise ChunkIndexError(msg)
    try:
        index = ChunkIndex.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "(whole document)"
        msg = f"chunk index: {where}: {first['msg']}"
        raise ChunkIndexError(msg) from exc
    if index.size_bytes != size_bytes:
        msg = f"the chunk index is of a blob of {index.size_bytes} bytes, not {size_bytes}"
        raise ChunkIndexError(msg)
    return index


def plan_delta(
    index: ChunkIndex, old_files: Sequence[Path], max_ranges: int = MAX_RANGES
) -> DeltaPlan:
    """Find the chunks of `index` in old files.

    Reads each old file once, and none further once every chunk is found. A file
    that cannot be read has no chunks: the delta is a saving, not a need.

    Args:
        index: of the new blob.
        old_files: what may hold parts of it.
        max_ranges: at most so many ranges remain to be fetched; the shortest stretches
            between them are fetched too, although they are there.
    """
    missing = {digest: length for length, digest in index.chunks}
    found: dict[str, tuple[int, int]] = {}
    for number, path in enumerate(old_files):
        if not missing:
            break
        for offset, length, digest in _cut_quietly(path, index.average_bytes):
            if missing.get(digest) == length:
                found[digest] = (number, offset)
                del missing[digest]
    copies: list[Copy] = []
    offset = 0
    for length, digest in index.chunks:
        if digest in found:
            _append(copies, Copy(*found[digest], offset, length))
        offset += length
    kept = _drop_shortest(copies, offset, max_ranges)
    return DeltaPlan(tuple(kept), tuple(_find_ranges(kept, offset)))


def _append(copies: list[Copy], copy: Copy) -> None:
    """Add a copy, or lengthen the one before where both go on."""
    last = copies[-1] if copies else None
    if (
        last is not None
        and last.source == copy.source
        and last.offset + last.length == copy.offset
        and last.source_offset + last.length == copy.source_offset
    ):
        copies[-1] = Copy(last.source, last.source_offset, last.offset, last.length + copy.length)
    else:
        copies.append(copy)


def _drop_shortest(copies: list[Copy], size_bytes: int, max_ranges: int) -> list[Copy]:
    """Leave out the shortest copies until no more than `max_ranges` ranges are missing."""
    kept = copies
    while (excess := len(_find_ranges(kept, size_bytes)) - max_ranges) > 0 and kept:
        # One copy out joins at most two ranges, so this never leaves out too many.
        dropped = {id(copy) for copy in sorted(kept, key=lambda copy: copy.length)[:excess]}
        kept = [copy for copy in kept if id(copy) not in dropped]
    return kept


def _find_ranges(copies: Sequence[Copy], size_bytes: int) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    at = 0
    for copy in copies:
        if copy.offset > at:
            ranges.append((at, copy.offset))
        at = copy.offset + copy.length
    if at < size_bytes:
        ranges.append((at, size_bytes))
    return ranges


def _cut_quietly(path: Path, average_bytes: int) -> Iterator[tuple[int, int, str]]:
    try:
        if not path.is_file():
            return
        # A stream and no mapping: a file cut short meanwhile would end this process.
        with path.open("rb") as file:
            yield from _cut(file, average_bytes)
    except OSError:
        return


def _cut(file: BinaryIO, average_bytes: int) -> Iterator[tuple[int, int, str]]:
    """Yield offset, length and digest of each chunk."""
    cutter = FastCDC(
        average_bytes,
        min_size=average_bytes // _SPREAD,
        max_size=average_bytes * _SPREAD,
        normalized_chunking=1,
    )
    for chunk in cutter.cut_stream(file):
        digest = hashlib.blake2b(chunk.data, digest_size=_DIGEST_BYTES)
        yield chunk.offset, chunk.length, digest.hexdigest()
