"""Fetching blobs from a real web server, one that serves well and ones that do not."""

import gzip
import itertools
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.errors import ReleaseError
from agent.release import ReleaseDocument, ReleaseFile
from benchmarks.delta import build_model, fine_tune_last, make_weights
from tests.conftest import require_binary
from tests.harness.blobs import publish_blob
from tests.harness.file_server import Behaviour, FileServer
from worker.errors import (
    FetchCanceledError,
    FetchError,
    NoRoomError,
    RedirectRefusedError,
    SourceAddressError,
    SourceAnswerError,
    SourceMissingError,
    SourceUnavailableError,
    WrongHashError,
    WrongLengthError,
)
from worker.update.fetch import BlobFetcher, FetchLimits
from worker.update.partfile import remove_parts
from worker.update.transport import FolderSource, open_source

DATA = random.Random(0).randbytes(600_000)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def blob(repository: Path) -> ReleaseFile:
    return publish_blob(repository, DATA)


@pytest.fixture
def server(repository: Path, blob: ReleaseFile) -> Iterator[FileServer]:
    with FileServer(repository) as found:
        yield found


def make_fetcher(models: Path, address: str, **limits: Any) -> BlobFetcher:
    """Return a fetcher that waits for nothing."""
    settings = FetchLimits(**({"reserve_bytes": 0, "retries": 3} | limits))
    return BlobFetcher(models, open_source(address), settings, pause=lambda wait_s: None)


class _EndOfProcessError(Exception):
    """Ends a fetch where it would wait, with nothing left of it but what is on the disk."""


def fetch_until_cut(
    models: Path, address: str, blob: ReleaseFile, old_files: Sequence[Path] = ()
) -> None:
    def end(wait_s: float) -> None:
        raise _EndOfProcessError

    limits = FetchLimits(reserve_bytes=0)
    fetcher = BlobFetcher(models, open_source(address), limits, pause=end)
    with pytest.raises(_EndOfProcessError):
        fetcher.fetch(blob, old_files)


def find_files(models: Path) -> list[str]:
    return sorted(path.name for path in models.rglob("*") if path.is_file())


def test_blob_is_in_the_store_and_nothing_else_is_left(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    path = make_fetcher(models, server.address).fetch(blob)

    assert path == models / ".blobs" / blob.sha256
    assert path.read_bytes() == DATA
    assert find_files(models) == [blob.sha256]
    assert server.sent_bytes == len(DATA)


def test_blob_that_is_in_the_store_is_not_asked_for(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    fetcher = make_fetcher(models, server.address)
    fetcher.fetch(blob)
    fetcher.fetch(blob)

    assert len(server.asked) == 1


def test_blob_that_was_damaged_in_the_store_is_fetched_again(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    fetcher = make_fetcher(models, server.address)
    for damage in (b"x" + DATA[1:], DATA[:-1], DATA + b"x", b""):
        fetcher.fetch(blob).write_bytes(damage)
        assert fetcher.fetch(blob).read_bytes() == DATA


def test_an_empty_blob_is_fetched(repository: Path, server: FileServer, models: Path) -> None:
    blob = publish_blob(repository, b"")

    assert make_fetcher(models, server.address).fetch(blob).read_bytes() == b""


def test_a_folder_is_a_source(repository: Path, models: Path, blob: ReleaseFile) -> None:
    assert make_fetcher(models, str(repository)).fetch(blob).read_bytes() == DATA


def test_download_cut_at_fifty_random_bytes_goes_on(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    cuts = sorted(random.Random(5).sample(range(1, len(DATA)), 50))
    server.behaviour.cuts = (end - start for start, end in itertools.pairwise([0, *cuts]))

    assert make_fetcher(models, server.address, retries=20).fetch(blob).read_bytes() == DATA
    assert len(server.asked) == 51
    assert server.sent_bytes <= 1.05 * len(DATA)


def test_download_cut_fifty_times_goes_on_in_another_process_each_time(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    cuts = sorted(random.Random(6).sample(range(1, len(DATA)), 50))
    server.behaviour.cuts = (end - start for start, end in itertools.pairwise([0, *cuts]))
    for _ in range(50):
        fetch_until_cut(models, server.address, blob)
        assert not (models / ".blobs" / blob.sha256).exists()

    assert make_fetcher(models, server.address).fetch(blob).read_bytes() == DATA
    assert server.sent_bytes <= 1.05 * len(DATA)


def test_server_that_is_busy_at_first_is_asked_again(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    server.behaviour.failures = 3

    assert make_fetcher(models, server.address).fetch(blob).read_bytes() == DATA
    assert len(server.asked) == 4


def test_server_that_stays_busy_is_given_up(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    server.behaviour.failures = 100
    with pytest.raises(SourceUnavailableError, match="503"):
        make_fetcher(models, server.address).fetch(blob)

    assert len(server.asked) == 4


def test_server_that_gives_a_byte_a_connection_is_given_up(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    server.behaviour.cuts = itertools.repeat(1)
    with pytest.raises(SourceUnavailableError):
        make_fetcher(models, server.address).fetch(blob)

    assert len(server.asked) == 4


def test_waits_are_drawn_below_a_bound_that_doubles(repository: Path, models: Path) -> None:
    waits: list[float] = []
    limits = FetchLimits(reserve_bytes=0, retries=6, first_wait_s=0.01, max_wait_s=0.2)
    blob = publish_blob(repository, DATA)
    source = open_source("http://127.0.0.1:1")
    fetcher = BlobFetcher(models, source, limits, pause=waits.append, draw=lambda: 0.5)
    with pytest.raises(SourceUnavailableError):
        fetcher.fetch(blob)

    assert waits == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.1, 0.1])


def test_server_that_knows_no_ranges_is_read_from_the_beginning(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    server.behaviour = Behaviour(ignores_range=True, cuts=iter([200_000, 400_000]))

    assert make_fetcher(models, server.address).fetch(blob).read_bytes() == DATA
    assert server.sent_bytes == 200_000 + 400_000 + len(DATA)


def test_server_that_says_no_length_is_read_to_the_end(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    server.behaviour.has_length = False

    assert make_fetcher(models, server.address).fetch(blob).read_bytes() == DATA


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(replace=lambda data: data[:-1] + b"x"), WrongHashError),
        (Behaviour(replace=lambda data: bytes(len(data))), WrongHashError),
        (Behaviour(more_bytes=1), WrongLengthError),
        (Behaviour(more_bytes=-1), WrongLengthError),
        (Behaviour(more_bytes=1, has_length=False), WrongLengthError),
        (Behaviour(more_bytes=-1, has_length=False), WrongLengthError),
        (Behaviour(is_endless=True), WrongLengthError),
        (Behaviour(redirect_to="http://127.0.0.1:1/elsewhere"), RedirectRefusedError),
        (Behaviour(redirect_to="/blobs/elsewhere"), RedirectRefusedError),
        (Behaviour(status=304), RedirectRefusedError),
        (Behaviour(status=204), SourceAnswerError),
        (Behaviour(status=206), SourceAnswerError),
        (Behaviour(status=400), SourceAnswerError),
        (Behaviour(status=404), SourceMissingError),
        (Behaviour(status=403), SourceMissingError),
        (Behaviour(status=416), WrongLengthError),
        (Behaviour(encoding="gzip", replace=gzip.compress), SourceAnswerError),
    ],
)
def test_what_is_not_the_blob_is_refused(
    server: FileServer,
    models: Path,
    blob: ReleaseFile,
    behaviour: Behaviour,
    kind: type[FetchError],
) -> None:
    server.behaviour = behaviour
    with pytest.raises(FetchError) as caught:
        make_fetcher(models, server.address).fetch(blob)

    assert type(caught.value) is kind
    assert not (models / ".blobs" / blob.sha256).exists()
    # An endless answer is read to the file's length and what the sockets hold, no further.
    assert server.sent_bytes < len(DATA) + (16 << 20)


@pytest.mark.parametrize(
    "behaviour", [Behaviour(replace=lambda data: bytes(len(data))), Behaviour(is_endless=True)]
)
def test_nothing_is_kept_of_a_file_that_is_not_the_blob(
    server: FileServer, models: Path, blob: ReleaseFile, behaviour: Behaviour
) -> None:
    server.behaviour = behaviour
    with pytest.raises((WrongHashError, WrongLengthError)):
        make_fetcher(models, server.address).fetch(blob)

    assert find_files(models) == []


@pytest.mark.parametrize(
    "content_range",
    [
        "bytes 0-599999/600000",
        "bytes 99999-599999/600000",
        "bytes 99999-599998/600000",
        "bytes 100000-600000/600001",
        "bytes 100000-599999/600001",
        "bytes 100000-99999/600000",
        "bytes 100000-400000/600000",
        "bytes */600000",
        "items 100000-599999/600000",
        "",
    ],
)
def test_a_range_that_was_not_asked_for_is_refused(
    server: FileServer, models: Path, blob: ReleaseFile, content_range: str
) -> None:
    server.behaviour = Behaviour(cuts=iter([100_000]), content_range=content_range or "none")
    with pytest.raises((SourceAnswerError, WrongLengthError)):
        make_fetcher(models, server.address).fetch(blob)

    assert not (models / ".blobs" / blob.sha256).exists()
    server.behaviour = Behaviour()
    # Counted here: the server may still be sending what was refused.
    fetched: list[int] = []
    path = make_fetcher(models, server.address).fetch(
        blob, progress=lambda done, total, count: fetched.append(count)
    )
    assert path.read_bytes() == DATA
    assert fetched[-1] == len(DATA) - 100_000, "what had come before was not kept"


def test_resumed_bytes_that_are_wrong_cost_a_whole_download_and_no_wrong_file(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    server.behaviour.cuts = iter([300_000])
    fetch_until_cut(models, server.address, blob)
    part = next((models / ".fetch").glob("*.part"))
    with part.open("r+b") as file:
        file.write(b"damaged")
    server.sent_bytes = 0

    assert make_fetcher(models, server.address).fetch(blob).read_bytes() == DATA
    assert server.sent_bytes == len(DATA) - 300_000 + len(DATA)


def test_resumed_bytes_and_a_wrong_source_end_in_an_error(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    server.behaviour = Behaviour(cuts=iter([300_000]), replace=lambda data: bytes(len(data)))
    fetch_until_cut(models, server.address, blob)
    server.sent_bytes = 0
    with pytest.raises(WrongHashError):
        make_fetcher(models, server.address).fetch(blob)

    assert server.sent_bytes == len(DATA) - 300_000 + len(DATA), "it is tried once more, not again"
    assert find_files(models) == []


@pytest.mark.parametrize(
    "address",
    [
        "http://192.0.2.1/releases",
        "http://localhost.example/releases",
        "ftp://127.0.0.1/",
        "https:///releases",
        "https://user:secret@host/releases",
        "https://host/releases?x=1",
        "https://host/releases#x",
        "https://host/a/../b",
        "https://host:port/",
        "https://[::1/",
    ],
)
def test_an_address_that_may_not_be_used_is_refused_and_not_shown_with_its_password(
    address: str,
) -> None:
    with pytest.raises(SourceAddressError) as caught:
        open_source(address)

    assert "secret" not in str(caught.value)


def test_plain_http_is_for_this_machine_unless_it_is_allowed() -> None:
    for address in ("http://127.0.0.1:8000", "http://localhost", "http://[::1]:80/x", "https://h"):
        open_source(address)
    open_source("http://192.0.2.1/", allow_plain=True)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key and a certificate for 127.0.0.1 that nobody has signed, in one file."""
    path = tmp_path / "server.pem"
    argv = [require_binary("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    argv += ["-days", "1", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*argv, "-keyout", path, "-out", tmp_path / "cert"], check=True, timeout=60)
    path.write_bytes(path.read_bytes() + (tmp_path / "cert").read_bytes())
    return path


def test_tls_is_verified(
    repository: Path, models: Path, blob: ReleaseFile, certificate: Path
) -> None:
    with FileServer(repository, certificate=certificate) as server:
        with pytest.raises(SourceUnavailableError, match="certificate"):
            make_fetcher(models, server.address).fetch(blob)
        assert server.asked == []
        source = open_source(server.address, ca_file=certificate)
        path = BlobFetcher(models, source, FetchLimits(reserve_bytes=0)).fetch(blob)

    assert path.read_bytes() == DATA


@pytest.mark.parametrize("path", ["../secret", "blobs/../../x", "/etc/passwd", "", "a//b", "a/.b"])
def test_only_files_below_the_source_are_opened(repository: Path, path: str) -> None:
    for source in (open_source("http://127.0.0.1:1"), FolderSource(repository)):
        with pytest.raises(SourceAddressError), source.open(path):
            pass


def test_links_and_folders_in_a_folder_are_no_blobs(
    tmp_path: Path, repository: Path, models: Path, blob: ReleaseFile
) -> None:
    path = repository / "blobs" / blob.sha256
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FetchError):
        make_fetcher(models, str(repository), retries=0).fetch(blob)
    path.unlink()
    path.mkdir()
    with pytest.raises(SourceMissingError):
        make_fetcher(models, str(repository)).fetch(blob)


# --- room, limits, progress ------------------------------------------------------------------


def test_no_room_is_found_before_anything_is_written(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    with pytest.raises(NoRoomError, match="free"):
        make_fetcher(models, server.address, reserve_bytes=1 << 60).fetch(blob)

    assert not models.exists()
    assert server.asked == []


def test_download_keeps_to_its_bandwidth(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    now_s = 0.0

    def pause(wait_s: float) -> None:
        nonlocal now_s
        now_s += wait_s

    limits = FetchLimits(reserve_bytes=0, bytes_per_s=100_000)
    source = open_source(server.address)
    BlobFetcher(models, source, limits, clock=lambda: now_s, pause=pause).fetch(blob)

    assert 5.5 <= now_s <= 6.5


def test_progress_goes_up_to_the_end(server: FileServer, models: Path, blob: ReleaseFile) -> None:
    told: list[tuple[int, int, int]] = []
    server.behaviour.cuts = iter([250_000])
    make_fetcher(models, server.address).fetch(blob, progress=lambda *counts: told.append(counts))

    assert told == sorted(told)
    assert told[-1] == (len(DATA), len(DATA), len(DATA))


def test_canceled_download_stops_and_goes_on_another_time(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    held = 0

    def remember(done_bytes: int, total_bytes: int, fetched_bytes: int) -> None:
        nonlocal held
        held = done_bytes

    fetcher = make_fetcher(models, server.address)
    with pytest.raises(FetchCanceledError):
        fetcher.fetch(blob, progress=remember, is_canceled=lambda: held > 300_000)
    fetched: list[int] = []
    fetcher.fetch(blob, progress=lambda done, total, count: fetched.append(count))

    assert fetched[-1] == len(DATA) - held


def test_cancel_is_seen_during_a_wait(server: FileServer, models: Path, blob: ReleaseFile) -> None:
    waits: list[float] = []
    server.behaviour.failures = 100
    limits = FetchLimits(reserve_bytes=0, first_wait_s=60, max_wait_s=60)
    source = open_source(server.address)
    fetcher = BlobFetcher(models, source, limits, pause=waits.append, draw=lambda: 1.0)
    with pytest.raises(FetchCanceledError):
        fetcher.fetch(blob, is_canceled=lambda: len(waits) == 3)

    assert waits == [0.5, 0.5, 0.5]


# --- by difference ---------------------------------------------------------------------------


def test_fine_tuned_last_layer_costs_a_little_more_than_itself(
    repository: Path, server: FileServer, models: Path
) -> None:
    weights = make_weights()
    old, new = build_model(weights), build_model(fine_tune_last(weights))
    old_blob, new_blob = publish_blob(repository, old), publish_blob(repository, new)
    fetcher = make_fetcher(models, server.address)
    old_path = fetcher.fetch(old_blob)
    server.sent_bytes = 0

    assert fetcher.fetch(new_blob, [old_path]).read_bytes() == new
    assert server.sent_bytes <= 0.15 * len(new)
    assert old_path.read_bytes() == old


def make_pair(repository: Path) -> tuple[bytes, ReleaseFile, Path]:
    """Return a new blob's content, itself, and an old file that shares most of it."""
    new = DATA[:300_000] + b"changed" + DATA[300_000:]
    old_file = repository.parent / "old"
    old_file.write_bytes(DATA)
    return new, publish_blob(repository, new), old_file


def test_delta_that_was_cut_goes_on_without_another_index(
    repository: Path, server: FileServer, models: Path
) -> None:
    new, blob, old_file = make_pair(repository)
    server.behaviour.cuts = iter([5_000])
    fetch_until_cut(models, server.address, blob, [old_file])
    old_file.unlink()

    assert make_fetcher(models, server.address).fetch(blob, [old_file]).read_bytes() == new
    assert server.count_asked("/chunks/") == 1
    assert server.sent_bytes < 0.3 * len(new)


def test_index_that_lies_costs_a_whole_download_and_no_wrong_file(
    repository: Path, server: FileServer, models: Path
) -> None:
    new, blob, old_file = make_pair(repository)
    other = publish_blob(repository, DATA + b"changed")
    index = repository / "chunks" / f"{blob.sha256}.json"
    # Of the right size, and about another file.
    index.write_bytes((repository / "chunks" / f"{other.sha256}.json").read_bytes())

    assert make_fetcher(models, server.address).fetch(blob, [old_file]).read_bytes() == new
    assert len(new) < server.sent_bytes < 1.1 * len(new)


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(status=404),
        Behaviour(redirect_to="/chunks/elsewhere"),
        Behaviour(encoding="gzip"),
        Behaviour(is_endless=True),
        Behaviour(replace=lambda data: b"no index"),
        Behaviour(replace=lambda data: data[:-3]),
    ],
)
def test_without_a_usable_index_the_blob_is_fetched_whole(
    repository: Path, server: FileServer, models: Path, behaviour: Behaviour
) -> None:
    new, blob, old_file = make_pair(repository)
    behaviour.applies_to = lambda path: path.startswith("/chunks/")
    server.behaviour = behaviour

    assert make_fetcher(models, server.address).fetch(blob, [old_file]).read_bytes() == new
    assert server.count_asked("/chunks/") == 1


def test_server_that_knows_no_ranges_gives_a_delta_whole(
    repository: Path, server: FileServer, models: Path
) -> None:
    new, blob, old_file = make_pair(repository)
    server.behaviour.ignores_range = True

    assert make_fetcher(models, server.address).fetch(blob, [old_file]).read_bytes() == new


def test_small_blobs_are_fetched_without_an_index(
    repository: Path, server: FileServer, models: Path
) -> None:
    _, _, old_file = make_pair(repository)
    blob = publish_blob(repository, DATA[:10_000])
    make_fetcher(models, server.address).fetch(blob, [old_file])

    assert server.count_asked("/chunks/") == 0


# --- a release -------------------------------------------------------------------------------


def make_release(repository: Path) -> tuple[ReleaseDocument, dict[str, bytes]]:
    contents = {
        "manifest.json": b"{}",
        "model.onnx": DATA,
        "copy/model.onnx": DATA,
        "model.tflite": DATA[::-1],
        "golden/input.npy": b"golden",
    }
    files = tuple(publish_blob(repository, data, path) for path, data in contents.items())
    document = ReleaseDocument(
        schema="edgeward.release/v1", name="net", version="2.0.0", files=files
    )
    return document, contents


def test_only_wanted_files_of_a_release_are_fetched_each_once(
    repository: Path, server: FileServer, models: Path
) -> None:
    document, contents = make_release(repository)
    wanted = ["manifest.json", "model.onnx", "copy/model.onnx"]
    told: list[tuple[int, int, int]] = []
    report = make_fetcher(models, server.address).fetch_release(
        document, wanted, progress=lambda *counts: told.append(counts)
    )

    assert {path: file.read_bytes() for path, file in report.files.items()} == {
        path: contents[path] for path in wanted
    }
    assert report.bytes_total == report.bytes_fetched == server.sent_bytes == len(DATA) + 2
    assert report.bytes_reused == 0
    assert report.duration_s >= 0
    assert told == sorted(told)
    assert told[-1] == (report.bytes_total,) * 3


def test_files_that_are_in_the_store_are_not_fetched(
    repository: Path, server: FileServer, models: Path
) -> None:
    document, _ = make_release(repository)
    fetcher = make_fetcher(models, server.address)
    fetcher.fetch_release(document, ["model.onnx"])
    report = fetcher.fetch_release(document, ["manifest.json", "model.onnx"])

    assert (report.bytes_total, report.bytes_fetched) == (len(DATA) + 2, 2)
    assert report.bytes_reused == len(DATA)


def test_room_for_all_of_a_release_is_looked_for_first(
    repository: Path, server: FileServer, models: Path
) -> None:
    document, _ = make_release(repository)
    with pytest.raises(NoRoomError):
        make_fetcher(models, server.address, reserve_bytes=1 << 60).fetch_release(
            document, ["manifest.json"]
        )

    assert not models.exists()


def test_a_file_that_the_release_has_not_is_refused(
    repository: Path, server: FileServer, models: Path
) -> None:
    document, _ = make_release(repository)
    with pytest.raises(ReleaseError):
        make_fetcher(models, server.address).fetch_release(document, ["other.onnx"])


def test_parts_of_blobs_that_are_no_longer_wanted_are_removed(
    server: FileServer, models: Path, blob: ReleaseFile
) -> None:
    server.behaviour.cuts = iter([300_000])
    fetch_until_cut(models, server.address, blob)

    assert remove_parts(models, keep=[blob.sha256]) == 0
    assert remove_parts(models, min_age_s=3600) == 0
    assert remove_parts(models) >= 300_000
    assert find_files(models) == []
