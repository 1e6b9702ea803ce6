"""Downloads that end with their process, and disks that end before the download."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.release import ReleaseFile
from tests.conftest import wait_until
from tests.harness.blobs import publish_blob
from tests.harness.disks import NoMountError, fill_disk, mounted_disk
from tests.harness.file_server import Behaviour, FileServer
from worker.errors import NoRoomError
from worker.update.fetch import BlobFetcher, FetchLimits
from worker.update.transport import open_source

DATA = random.Random(0).randbytes(8 << 20)
_CHILD = """
import sys
from pathlib import Path
from agent.release import ReleaseFile
from worker.update.fetch import BlobFetcher
from worker.update.transport import open_source

models, address, blob, *old = sys.argv[1:]
fetcher = BlobFetcher(Path(models), open_source(address))
fetcher.fetch(ReleaseFile.model_validate_json(blob), [Path(path) for path in old])
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    with FileServer(tmp_path / "repository") as found:
        yield found


def start_fetch(
    models: Path, server: FileServer, blob: ReleaseFile, *old: Path
) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", _CHILD, str(models), server.address, blob.model_dump_json()]
    return subprocess.Popen([*argv, *map(str, old)])


def kill_when_held(process: subprocess.Popen[bytes], part: Path, size_bytes: int) -> None:
    """Kill the process when its part file has that size."""
    try:
        wait_until(
            lambda: part.exists() and part.stat().st_size >= size_bytes, 20, "a part has come"
        )
    finally:
        process.kill()
        process.wait()


def test_download_goes_on_after_its_process_was_killed_in_the_middle(
    tmp_path: Path, server: FileServer, models: Path
) -> None:
    blob = publish_blob(server.folder, DATA)
    part = models / ".fetch" / f"{blob.sha256}.part"
    for hold in (1 << 20, 5 << 20):
        # The server holds what comes after; all that it sent before has been read then.
        server.behaviour = Behaviour(hold_after=hold)
        kill_when_held(start_fetch(models, server, blob), part, hold)
        assert not (models / ".blobs" / blob.sha256).exists()
    server.behaviour = Behaviour()
    server.release()
    process = start_fetch(models, server, blob)

    assert process.wait(30) == 0
    assert (models / ".blobs" / blob.sha256).read_bytes() == DATA
    assert server.sent_bytes <= 1.05 * len(DATA)
    assert list((models / ".fetch").iterdir()) == []


def test_delta_goes_on_after_its_process_was_killed_in_the_middle(
    tmp_path: Path, server: FileServer, models: Path
) -> None:
    old_file = tmp_path / "old"
    old_file.write_bytes(DATA[: 6 << 20])
    blob = publish_blob(server.folder, DATA)
    part = models / ".fetch" / f"{blob.sha256}.part"
    server.behaviour = Behaviour(hold_after=1 << 20)
    # Copied are 6 MiB less a chunk; what comes then is a MiB less the index.
    kill_when_held(start_fetch(models, server, blob, old_file), part, (7 << 20) - 100_000)
    server.behaviour = Behaviour()
    server.release()
    process = start_fetch(models, server, blob, old_file)

    assert process.wait(30) == 0
    assert (models / ".blobs" / blob.sha256).read_bytes() == DATA
    assert server.sent_bytes <= 1.1 * (2 << 20)


def test_power_cut_costs_no_more_than_was_not_flushed(server: FileServer, models: Path) -> None:
    blob = publish_blob(server.folder, DATA)
    server.behaviour = Behaviour(hold_after=6 << 20)
    part = models / ".fetch" / f"{blob.sha256}.part"
    kill_when_held(start_fetch(models, server, blob), part, 6 << 20)
    server.behaviour = Behaviour()
    server.release()
    # The cut: another boot, and zeros where bytes were not on the disk yet.
    journal = part.with_suffix(".journal")
    head = json.loads(journal.read_text().splitlines()[0])
    journal.write_text(
        "\n".join([json.dumps(head | {"boot": "before"}), *journal.read_text().splitlines()[1:]])
    )
    (_, flushed) = head["synced"][0]
    with part.open("r+b") as file:
        file.seek(flushed)
        file.write(bytes((6 << 20) - flushed))
    fetched: list[int] = []
    BlobFetcher(models, open_source(server.address)).fetch(
        blob, progress=lambda done, total, count: fetched.append(count)
    )

    assert flushed >= 4 << 20
    assert fetched[-1] == len(DATA) - flushed


def test_two_processes_do_not_fetch_the_same_blob(server: FileServer, models: Path) -> None:
    blob = publish_blob(server.folder, DATA)
    server.behaviour = Behaviour(hold_after=1 << 20)
    part = models / ".fetch" / f"{blob.sha256}.part"
    first = start_fetch(models, server, blob)
    try:
        wait_until(lambda: part.exists() and part.stat().st_size >= 1 << 20, 20, "it has begun")
        second = subprocess.run(
            [sys.executable, "-c", _CHILD, str(models), server.address, blob.model_dump_json()],
            capture_output=True,
            text=True,
            check=False,
        )
        server.behaviour = Behaviour()
        server.release()
        assert first.wait(30) == 0
    finally:
        first.kill()
        first.wait()

    assert "FetchBusyError" in second.stderr
    assert server.sent_bytes == len(DATA)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    try:
        with mounted_disk(tmp_path / "disk", 4 << 20) as folder:
            yield folder
    except NoMountError:
        message = "this user may not mount a small disk"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


def test_disk_that_is_too_small_is_not_written_to(disk: Path, server: FileServer) -> None:
    blob = publish_blob(server.folder, DATA)
    with pytest.raises(NoRoomError):
        BlobFetcher(disk / "models", open_source(server.address), FetchLimits(0)).fetch(blob)

    assert list(disk.iterdir()) == []
    assert server.asked == []


def test_disk_that_others_fill_meanwhile_ends_the_download_and_it_goes_on_later(
    disk: Path, server: FileServer
) -> None:
    blob = publish_blob(server.folder, DATA[: 2 << 20])
    fetcher = BlobFetcher(disk / "models", open_source(server.address), FetchLimits(0))
    fillers: list[Path] = []

    def fill(done_bytes: int, total_bytes: int, fetched_bytes: int) -> None:
        if done_bytes > 500_000 and not fillers:
            fillers.append(fill_disk(disk))

    with pytest.raises(NoRoomError):
        fetcher.fetch(blob, progress=fill)
    assert not (disk / "models" / ".blobs" / blob.sha256).exists()
    fillers[0].unlink()

    fetched: list[int] = []
    path = fetcher.fetch(blob, progress=lambda done, total, count: fetched.append(count))

    assert path.read_bytes() == DATA[: 2 << 20]
    assert fetched[-1] <= (2 << 20) - 500_000
