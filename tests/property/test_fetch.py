"""Whatever was there before and whatever the index says: the right file, or a clear error."""

import json
import random
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.blobs import publish_blob
from worker.errors import WrongHashError, WrongLengthError
from worker.update.chunks import write_chunk_index
from worker.update.fetch import BlobFetcher, FetchLimits
from worker.update.transport import FolderSource


def make_old(draw: random.Random) -> bytes:
    pieces = [draw.randbytes(draw.randrange(60_000)) for _ in range(draw.randrange(6))]
    return b"".join(draw.choices([*pieces, bytes(50_000)], k=draw.randrange(8)))


def change(draw: random.Random, old: bytes) -> bytes:
    """Return a file that shares stretches with the old one, in any order."""
    stretches = []
    for _ in range(draw.randrange(1, 6)):
        start = draw.randrange(len(old) + 1)
        stretches.append(old[start : start + draw.randrange(120_000)])
        stretches.append(draw.randbytes(draw.choice([0, 1, 100, 40_000])))
    return b"".join(stretches)


def damage(draw: random.Random, index: Path, elsewhere: Path) -> None:
    """Make an index wrong: torn, flipped, or well-formed and lying."""
    kind = draw.randrange(5)
    text = bytearray(index.read_bytes())
    if kind == 0:
        text = text[: draw.randrange(len(text))]
    elif kind == 1:
        text[draw.randrange(len(text))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        document = json.loads(text)
        draw.shuffle(document["chunks"])
        text = bytearray(json.dumps(document).encode())
    elif kind == 3:
        document = json.loads(text)
        digests = [digest for _, digest in document["chunks"]]
        draw.shuffle(digests)
        lengths = [length for length, _ in document["chunks"]]
        document["chunks"] = list(zip(lengths, digests, strict=True))
        text = bytearray(json.dumps(document).encode())
    else:
        write_chunk_index(elsewhere, index)
        return
    index.write_bytes(text)


# Without a deadline: an example writes files, and flushes them.
@settings(deadline=None, max_examples=100)
@given(st.integers(0, 1 << 32))
def test_a_fetch_ends_with_the_right_file_or_a_clear_error(seed: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        olds = [folder / f"old{number}" for number in range(draw.randrange(3))]
        for path in olds:
            path.write_bytes(make_old(draw))
        base = olds[0].read_bytes() if olds else draw.randbytes(100_000)
        new = change(draw, base)
        blob = publish_blob(folder, new)
        (folder / "other").write_bytes(change(draw, base)[: len(new)].ljust(len(new), b"x"))
        if draw.random() < 0.7:
            damage(draw, folder / "chunks" / f"{blob.sha256}.json", folder / "other")
        is_served_wrong = bool(new) and draw.random() < 0.3
        if is_served_wrong:
            wrong = draw.choice([b"", new[:-1], new + b"x", bytes([new[0] ^ 1]) + new[1:]])
            (folder / "blobs" / blob.sha256).write_bytes(wrong)
        fetcher = BlobFetcher(folder / "models", FolderSource(folder), FetchLimits(0, retries=1))
        final = folder / "models" / ".blobs" / blob.sha256
        try:
            path = fetcher.fetch(blob, olds)
        except (WrongHashError, WrongLengthError):
            assert is_served_wrong
            assert not final.exists()
        else:
            # What was served wrong need not have been fetched: old files may have it all.
            assert path.read_bytes() == new
            assert not list((folder / "models" / ".fetch").iterdir())
