"""The chunk index, and what of a blob it says is already there."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker.errors import ChunkIndexError
from worker.update.chunks import (
    AVERAGE_BYTES,
    ChunkIndex,
    choose_average,
    limit_index_bytes,
    plan_delta,
    read_chunk_index,
    write_chunk_index,
)

KIB = 1 << 10


def make_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def write_index(tmp_path: Path, data: bytes) -> tuple[bytes, ChunkIndex]:
    blob = tmp_path / "blob"
    blob.write_bytes(data)
    write_chunk_index(blob, tmp_path / "index.json")
    text = (tmp_path / "index.json").read_bytes()
    return text, read_chunk_index(text, len(data))


def check_plan(index: ChunkIndex, files: list[Path], new: bytes, max_ranges: int = 256) -> int:
    """Build the blob as the plan says; return the bytes that would be fetched."""
    plan = plan_delta(index, files, max_ranges)
    built = bytearray(len(new))
    written = 0
    for copy in plan.copies:
        old = files[copy.source].read_bytes()
        built[copy.offset : copy.offset + copy.length] = old[copy.source_offset :][: copy.length]
        written += copy.length
    for start, end in plan.ranges:
        built[start:end] = new[start:end]
        written += end - start
    ends = [end for _, end in plan.ranges]
    starts = [start for start, _ in plan.ranges]
    assert bytes(built) == new
    assert written == len(new) == plan.copied_bytes + plan.fetched_bytes
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False))
    assert len(plan.ranges) <= max_ranges
    return plan.fetched_bytes


def test_index_covers_the_blob_and_keeps_within_its_bounds(tmp_path: Path) -> None:
    text, index = write_index(tmp_path, make_bytes(1000 * KIB))

    assert index.size_bytes == 1000 * KIB
    assert 20 < len(index.chunks) < 250
    assert len(text) <= limit_index_bytes(1000 * KIB)


def test_an_empty_blob_has_an_index_without_chunks(tmp_path: Path) -> None:
    _, index = write_index(tmp_path, b"")

    assert index.chunks == []
    assert plan_delta(index, []).ranges == ()


def test_large_blobs_have_longer_chunks() -> None:
    assert choose_average(14 << 20) == AVERAGE_BYTES
    assert choose_average(8 << 30) == 8 * AVERAGE_BYTES


def test_delta_of_the_same_content_fetches_nothing(tmp_path: Path) -> None:
    data = make_bytes(500 * KIB)
    _, index = write_index(tmp_path, data)

    assert check_plan(index, [tmp_path / "blob"], data) == 0


def test_bytes_inserted_in_the_middle_cost_a_few_chunks(tmp_path: Path) -> None:
    old = make_bytes(1000 * KIB)
    new = old[: 400 * KIB] + b"inserted" + old[400 * KIB :]
    _, index = write_index(tmp_path, new)
    (tmp_path / "old").write_bytes(old)

    assert check_plan(index, [tmp_path / "old"], new) < 150 * KIB


def test_chunks_are_taken_from_several_old_files(tmp_path: Path) -> None:
    first, second = make_bytes(300 * KIB, 1), make_bytes(300 * KIB, 2)
    _, index = write_index(tmp_path, first + second)
    files = [tmp_path / "missing", tmp_path / "first", tmp_path / "second", tmp_path]
    files[1].write_bytes(first)
    files[2].write_bytes(second)

    assert check_plan(index, files, first + second) < 150 * KIB


def test_so_many_gaps_are_fetched_through_that_the_requests_stay_few(tmp_path: Path) -> None:
    old = bytearray(make_bytes(2000 * KIB))
    new = bytearray(old)
    for at in range(0, len(new), 50 * KIB):
        new[at] ^= 1
    _, index = write_index(tmp_path, bytes(new))
    (tmp_path / "old").write_bytes(old)
    cheapest = check_plan(index, [tmp_path / "old"], bytes(new))

    assert cheapest <= check_plan(index, [tmp_path / "old"], bytes(new), 5) < len(new)
    assert check_plan(index, [tmp_path / "old"], bytes(new), 1) <= len(new)


def _with(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document | changes


@pytest.mark.parametrize(
    "damage",
    [
        _with(schema="edgeward.chunks/v2"),
        _with(algorithm="rabin"),
        _with(digest="md5"),
        _with(average_bytes=16385),
        _with(average_bytes=1),
        _with(average_bytes=1 << 40),
        _with(average_bytes="16384"),
        _with(more=1),
        _with(chunks=[]),
        _with(chunks=None),
        _with(chunks=[[0, "0" * 32]]),
        _with(chunks=[[-5, "0" * 32]]),
        _with(chunks=[[1 << 60, "0" * 32]]),
        _with(chunks=[[True, "0" * 32]]),
        _with(chunks=[[5000, "0" * 32]] * 40),
        _with(chunks=[[5, "0" * 32]] * 40_000),
        lambda document: document | {"chunks": document["chunks"][:-1]},
        lambda document: document | {"chunks": [[length, "X"] for length, _ in document["chunks"]]},
        lambda document: [document],
        lambda document: None,
    ],
)
def test_a_malformed_index_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    text, _ = write_index(tmp_path, make_bytes(200_001))

    with pytest.raises(ChunkIndexError):
        read_chunk_index(json.dumps(damage(json.loads(text))).encode(), 200_001)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[" * 3000, b"NaN", b" " * (limit_index_bytes(200_001) + 1)]
)
def test_what_is_no_document_is_refused(text: bytes) -> None:
    with pytest.raises(ChunkIndexError):
        read_chunk_index(text, 200_001)


def test_index_of_another_size_is_refused(tmp_path: Path) -> None:
    text, _ = write_index(tmp_path, make_bytes(200_001))

    with pytest.raises(ChunkIndexError, match="200001 bytes, not 200002"):
        read_chunk_index(text, 200_002)
