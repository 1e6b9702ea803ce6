"""What an attacker can do between a publisher and a box, each refused, over all three channels.

Where it can, a test also shows that the material is genuine, or that a box which has seen
nothing takes it: a forgery that is refused for its clumsiness shows nothing.
"""

import fcntl
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root, TargetFile, Targets

from console.release.bundle import write_bundle
from console.release.verification import verify_releases
from tests.harness.publishing import (
    MEMORY,
    START,
    Box,
    Lead,
    Publisher,
    Thief,
    lead_to,
    pack_members,
    serve,
)
from worker.errors import (
    BundleError,
    FetchError,
    ReleaseExpiredError,
    ReleaseUnknownError,
    SourceUnavailableError,
    TrustBusyError,
    TrustError,
    WrongHashError,
    WrongLengthError,
)
from worker.update.sources import (
    BundleSource,
    FolderReleaseSource,
    HttpReleaseSource,
    open_release_source,
)
from worker.update.trust import Floors

ONLINE = ("snapshot", "timestamp")


@pytest.fixture(params=["http", "folder", "bundle"])
def channel(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def lead(channel: str) -> Iterator[Lead]:
    """Open a repository as the box reads it over the channel."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(lead_to(channel, folder))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("template") / "publisher"
    Publisher(home).release("digits", "1.0.0")
    return home


@pytest.fixture
def publisher(tmp_path: Path, template: Path) -> Publisher:
    """Return a publisher with keys, and one release."""
    return Publisher(shutil.copytree(template, tmp_path / "publisher"))


@pytest.fixture
def box(tmp_path: Path, publisher: Publisher) -> Box:
    return Box(tmp_path / "box", publisher.root)


@pytest.fixture
def make_box(tmp_path: Path, publisher: Publisher) -> Callable[[str], Box]:
    """Make boxes that have seen nothing yet."""
    return lambda name: Box(tmp_path / name, publisher.root)


def steal(publisher: Publisher, *keys: str) -> Thief:
    """Copy the repository for somebody who has some of its keys."""
    return Thief(publisher.copy("mirror"), publisher.take_keys(*keys))


def forge_target(name: str, version: str, text: bytes, mirror: Path) -> TargetFile:
    """Put a release document of somebody else's making into a mirror."""
    target = TargetFile.from_data(f"{name}/{version}/release.json", text, ["sha256"])
    path = mirror / "targets" / name / version / f"{target.hashes['sha256']}.release.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return target


def forge_release(name: str, version: str) -> bytes:
    files = f'[{{"path": "manifest.json", "sha256": "{"0" * 64}", "size_bytes": 1}}]'
    return (
        f'{{"schema": "edgeward.release/v1", "name": "{name}", "version": "{version}", '
        f'"files": {files}}}'
    ).encode()


def test_genuine_release_is_verified_and_raises_the_floors(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    found = box.look(lead(publisher.folder), now=START + timedelta(days=3))

    assert (found.document.name, found.document.version) == ("digits", "1.0.0")
    assert {file.path for file in found.document.files} == {
        "manifest.json",
        "model.onnx",
        "labels.txt",
    }
    assert found.floors.versions == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}
    assert found.floors.time_ms == (START + timedelta(days=3)).timestamp() * 1000
    assert found.expires_at == START + timedelta(days=30)
    assert found.signed_at == START
    assert not found.is_stale


def test_release_that_nobody_signed_is_unknown(lead: Lead, publisher: Publisher, box: Box) -> None:
    source = lead(publisher.folder)
    for name, version in (("digits", "9"), ("other", "1.0.0"), ("../digits", "1.0.0")):
        with pytest.raises(ReleaseUnknownError):
            box.look(source, name, version)


def test_rollback_to_older_metadata_is_refused(
    lead: Lead, publisher: Publisher, box: Box, make_box: Callable[[str], Box]
) -> None:
    old = publisher.copy("old")
    publisher.release("digits", "2.0.0")
    box.look(lead(publisher.folder), version="2.0.0")

    make_box("new").look(lead(old))
    with pytest.raises(TrustError, match="timestamp version"):
        box.look(lead(old))


def test_freeze_is_refused_when_the_timestamp_runs_out(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    frozen = lead(publisher.copy("frozen"))
    box.look(frozen, now=START + timedelta(days=29))

    with pytest.raises(ReleaseExpiredError):
        box.look(frozen, now=START + timedelta(days=31))

    publisher.pass_days(30)
    publisher.sign()
    box.look(lead(publisher.folder), now=START + timedelta(days=31))


def test_mix_and_match_of_two_states_is_refused(lead: Lead, publisher: Publisher, box: Box) -> None:
    old = (publisher.folder / "metadata" / "2.targets.json").read_bytes()
    publisher.release("digits", "2.0.0")
    mixed = publisher.copy("mixed")
    (mixed / "metadata" / "3.targets.json").write_bytes(old)

    with pytest.raises(TrustError):
        box.look(lead(mixed))
    box.look(lead(publisher.folder))


def test_fast_forward_is_recovered_from_by_new_keys(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    thief = steal(publisher, *ONLINE)
    thief.list_in({}, {"snapshot": 1 << 31, "timestamp": 1 << 31})
    box.look(lead(thief.mirror))
    assert box.floors.versions["timestamp"] == 1 << 31

    publisher.sign()
    with pytest.raises(TrustError):
        box.look(lead(publisher.copy("before")))

    for role in ONLINE:
        publisher.rotate(role)
    box.look(lead(publisher.folder))
    assert box.floors.versions["timestamp"] < 100
    assert box.floors.versions["root"] == 3


@pytest.mark.parametrize("role", ONLINE)
def test_fast_forward_is_recovered_from_when_only_one_key_was_changed(
    publisher: Publisher, box: Box, role: str
) -> None:
    thief = steal(publisher, *ONLINE)
    thief.list_in({}, {"snapshot": 1 << 31, "timestamp": 1 << 31})
    box.look(FolderReleaseSource(thief.mirror))

    publisher.rotate(role)
    box.look(FolderReleaseSource(publisher.folder))
    assert box.floors.versions["snapshot"] < 100


def test_fast_forward_beyond_what_a_ledger_can_keep_is_refused(
    publisher: Publisher, box: Box
) -> None:
    thief = steal(publisher, *ONLINE)
    thief.list_in({}, {"timestamp": 1 << 53})

    with pytest.raises(TrustError):
        box.look(FolderReleaseSource(thief.mirror))


def test_thief_of_the_online_keys_sets_no_floor_for_the_root(
    publisher: Publisher, box: Box
) -> None:
    thief = steal(publisher, *ONLINE)
    targets = thief.read("targets").to_bytes()
    thief.list_in({"root": targets, "timestamp": targets})
    box.look(FolderReleaseSource(thief.mirror))

    assert box.floors.versions["root"] == 1


def test_wrong_key_is_refused(lead: Lead, publisher: Publisher, box: Box, tmp_path: Path) -> None:
    stranger = Publisher(tmp_path / "stranger")
    stranger.release("digits", "1.0.0")

    Box(tmp_path / "strangers-box", stranger.root).look(lead(stranger.folder))
    with pytest.raises(TrustError):
        box.look(lead(stranger.folder))


def test_root_that_is_none_is_told_from_a_bad_source(publisher: Publisher, tmp_path: Path) -> None:
    targets = (publisher.folder / "metadata" / "1.targets.json").read_bytes()
    for root in (b"", b"{}", targets):
        with pytest.raises(TrustError, match="was given is no root"):
            Box(tmp_path / "box", root).look(FolderReleaseSource(publisher.folder))


def test_expired_root_is_refused(lead: Lead, tmp_path: Path) -> None:
    days = {"root": 10, "targets": 365, "snapshot": 30, "timestamp": 30}
    publisher = Publisher(tmp_path / "publisher", days)
    publisher.release("digits", "1.0.0")
    box = Box(tmp_path / "box", publisher.root)
    publisher.pass_days(9)
    publisher.sign(publisher.take_keys("targets", *ONLINE))
    source = lead(publisher.folder)

    box.look(source, now=START + timedelta(days=9))
    with pytest.raises(ReleaseExpiredError, match="root"):
        box.look(source, now=START + timedelta(days=11))


def test_expired_root_is_refused_by_a_box_whose_clock_starts_in_1970(
    lead: Lead, tmp_path: Path
) -> None:
    days = {"root": 10, "targets": 365, "snapshot": 30, "timestamp": 30}
    publisher = Publisher(tmp_path / "publisher", days)
    publisher.release("digits", "1.0.0")
    box = Box(tmp_path / "box", publisher.root)
    dawn = datetime(1970, 1, 2, tzinfo=UTC)
    box.look(lead(publisher.copy("before")), now=dawn)
    publisher.pass_days(20)
    publisher.sign(publisher.take_keys("targets", *ONLINE))

    with pytest.raises(ReleaseExpiredError):
        box.look(lead(publisher.folder), now=dawn)


class _Endless(SimpleHTTPRequestHandler):
    """Sends a timestamp that never ends."""

    sent_bytes = 0

    def do_GET(self) -> None:
        if not self.path.endswith("timestamp.json"):
            super().do_GET()
            return
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                type(self).sent_bytes += self.wfile.write(b" " * 65536)
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        del format, args


def test_endless_data_from_a_server_is_cut_off(publisher: Publisher, box: Box) -> None:
    with serve(publisher.folder, _Endless) as address, pytest.raises(WrongLengthError):
        box.look(HttpReleaseSource(address))
    assert _Endless.sent_bytes < 32 << 20, "more than the sockets hold was read"


@pytest.mark.parametrize("file", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
def test_endless_data_in_a_folder_is_not_read(publisher: Publisher, box: Box, file: str) -> None:
    os.truncate(publisher.folder / "metadata" / file, 1 << 40)

    with pytest.raises(WrongLengthError):
        box.look(FolderReleaseSource(publisher.folder))


def test_arbitrary_software_in_place_of_a_release_document_is_refused(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    (path,) = (publisher.folder / "targets" / "digits" / "1.0.0").iterdir()
    path.write_bytes(path.read_bytes().replace(b"labels.txt", b"evil-1.txt"))

    with pytest.raises(TrustError):
        box.look(lead(publisher.folder))


def test_arbitrary_software_in_a_blob_is_refused(
    lead: Lead, publisher: Publisher, make_box: Callable[[str], Box]
) -> None:
    wanted = [("digits", "1.0.0")]
    (look,) = verify_releases(lead(publisher.folder), publisher.root, wanted, START)
    assert look.blobs == 3

    blob = max((publisher.folder / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(bytes(blob.stat().st_size))
    changed = lead(publisher.copy("changed"))
    with pytest.raises(WrongHashError):
        list(verify_releases(changed, publisher.root, wanted, START))

    blob.write_bytes(b"")
    shorter = lead(publisher.copy("shorter"))
    with pytest.raises(WrongLengthError):
        list(verify_releases(shorter, publisher.root, wanted, START))


def test_signed_document_of_another_release_is_refused(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    thief = steal(publisher, "targets", *ONLINE)
    targets = thief.read("targets")
    target = forge_target("digits", "1.0.0", forge_release("digits", "0.9.0"), thief.mirror)
    targets.signed.targets[target.path] = target
    targets.signed.version += 1
    thief.list_in({"targets": thief.write("targets", targets)})

    with pytest.raises(TrustError, match="signed in its place"):
        box.look(lead(thief.mirror))


def test_clock_set_back_does_not_bring_expired_metadata_back(
    lead: Lead, publisher: Publisher, box: Box, make_box: Callable[[str], Box]
) -> None:
    old = lead(publisher.copy("old"))
    make_box("new").look(old, now=START + timedelta(days=1))
    # Nothing is known but the time: neither versions nor a cache help.
    box.floors = Floors(time_ms=int((START + timedelta(days=40)).timestamp() * 1000))

    with pytest.raises(ReleaseExpiredError):
        box.look(old, now=START + timedelta(days=1))


def test_box_whose_clock_starts_in_1970_learns_the_time_from_the_timestamp(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    old = lead(publisher.copy("old"))
    publisher.pass_days(40)
    publisher.sign()
    dawn = datetime(1970, 1, 2, tzinfo=UTC)
    box.look(lead(publisher.folder), now=dawn)
    assert box.floors.time_ms == publisher.now.timestamp() * 1000

    box.wipe()
    box.floors = Floors(box.floors.time_ms)
    with pytest.raises(ReleaseExpiredError):
        box.look(old, now=dawn)


def test_timestamp_that_claims_a_time_after_the_root_is_refused_and_sets_no_floor(
    publisher: Publisher, box: Box
) -> None:
    thief = steal(publisher, *ONLINE)
    timestamp = thief.read("timestamp")
    timestamp.signed.version += 1
    timestamp.signed.expires = datetime(2100, 1, 1, tzinfo=UTC)
    timestamp.signed.unrecognized_fields["x-edgeward-signed-at"] = "2099-01-01T00:00:00+00:00"
    thief.write("timestamp", timestamp)

    with pytest.raises(ReleaseExpiredError):
        box.look(FolderReleaseSource(thief.mirror))
    assert box.floors.time_ms == 0


def test_wiped_local_metadata_does_not_bring_version_1_back(
    lead: Lead, publisher: Publisher, box: Box, make_box: Callable[[str], Box]
) -> None:
    first = publisher.copy("first")
    publisher.release("digits", "2.0.0")
    box.look(lead(publisher.folder))
    box.wipe()

    make_box("new").look(lead(first))
    with pytest.raises(TrustError, match="played back"):
        box.look(lead(first))
    box.look(lead(publisher.folder))


def test_wiped_local_metadata_does_not_bring_an_old_root_back(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    publisher.rotate("root")
    publisher.rotate("targets")
    box.look(lead(publisher.folder))
    box.wipe()
    withheld = publisher.copy("withheld")
    (withheld / "metadata" / "3.root.json").unlink()
    (withheld / "metadata" / "2.root.json").unlink()

    with pytest.raises(TrustError):
        box.look(lead(withheld))


def test_torn_root_with_newer_roots_withheld_does_not_look_like_new_keys(
    publisher: Publisher, box: Box
) -> None:
    first = FolderReleaseSource(publisher.copy("first"))
    publisher.rotate("root")
    publisher.rotate("timestamp")
    box.look(FolderReleaseSource(publisher.folder))
    (box.folder / "metadata" / "root_history" / "2.root.json").write_bytes(b"")

    with pytest.raises(TrustError, match="played back"):
        box.look(first)


@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "folder"])
def test_torn_local_metadata_costs_a_download_and_no_trust(
    publisher: Publisher, box: Box, damage: str
) -> None:
    first = FolderReleaseSource(publisher.copy("first"))
    publisher.rotate("timestamp")
    source = FolderReleaseSource(publisher.folder)
    box.look(source)
    cached = box.list_cached()
    assert {path.name for path in cached} == {
        "1.root.json",
        "2.root.json",
        "timestamp.json",
        "snapshot.json",
        "targets.json",
    }
    for path in cached:
        spoil(path, damage)
        with pytest.raises(TrustError):
            box.look(first)
        box.look(source)


def spoil(path: Path, damage: str) -> None:
    """Leave a file as a power cut or a bad disk may."""
    size = path.stat().st_size
    path.write_bytes(
        {"half": path.read_bytes()[: size // 2], "zeros": bytes(size)}.get(damage, b"")
    )
    if damage == "folder":
        path.unlink()
        path.mkdir()


def test_local_metadata_is_flushed_before_it_has_its_name(
    publisher: Publisher, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    renamed: list[int] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(fd: int) -> None:
        flushed.add(os.fstat(fd).st_ino)
        fsync(fd)

    def record_replace(path: Path, target: Path) -> Path:
        renamed.append(path.stat().st_ino)
        assert renamed[-1] in flushed
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    box.look(FolderReleaseSource(publisher.folder))

    assert {path.stat().st_ino for path in box.list_cached()} == set(renamed)


def test_second_process_in_the_same_trust_folder_is_sent_away(
    publisher: Publisher, box: Box
) -> None:
    box.folder.mkdir()
    with (box.folder / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TrustBusyError):
            box.look(FolderReleaseSource(publisher.folder))
    box.look(FolderReleaseSource(publisher.folder))


def test_delegated_publisher_signs_its_own_models(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    publisher.delegate("acme", "acme-*")
    publisher.release("acme-digits", "1.0.0", "acme")

    found = box.look(lead(publisher.folder), "acme-digits")
    assert found.document.name == "acme-digits"
    assert found.floors.versions["acme"] == 2


def test_delegated_publisher_cannot_sign_the_model_of_another(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    publisher.delegate("acme", "acme-*")
    thief = steal(publisher, "acme", *ONLINE)
    acme = thief.read("acme")
    for name in ("acme-digits", "digits", "other"):
        target = forge_target(name, "6.6.6", forge_release(name, "6.6.6"), thief.mirror)
        acme.signed.targets[target.path] = target
    acme.signed.version += 1
    thief.list_in({"acme": thief.write("acme", acme)})
    source = lead(thief.mirror)

    box.look(source, "acme-digits", "6.6.6")
    for name in ("digits", "other"):
        with pytest.raises(ReleaseUnknownError):
            box.look(source, name, "6.6.6")


def test_delegated_publisher_cannot_be_rolled_back_where_its_model_was_not_looked_at(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    publisher.delegate("acme", "acme-*")
    old = (publisher.folder / "metadata" / "1.acme.json").read_bytes()
    publisher.release("acme-digits", "1.0.0", "acme")
    box.look(lead(publisher.folder), "digits")
    thief = steal(publisher, *ONLINE)
    thief.list_in({"acme": old})
    box.wipe()

    with pytest.raises(TrustError, match="played back"):
        box.look(lead(thief.mirror), "digits")


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp", "acme"])
def test_key_rotation_is_followed_from_the_first_root(
    publisher: Publisher, box: Box, make_box: Callable[[str], Box], role: str
) -> None:
    publisher.delegate("acme", "acme-*")
    publisher.release("acme-digits", "1.0.0", "acme")
    source = FolderReleaseSource(publisher.folder)
    box.look(source, "acme-digits")
    for _ in range(2):
        publisher.rotate(role)
        box.look(source, "acme-digits")
    publisher.release("acme-digits", "2.0.0", "acme")

    box.look(source, "acme-digits", "2.0.0")
    make_box("new").look(source, "acme-digits", "2.0.0")


def test_key_rotation_reaches_a_box_over_every_channel(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    box.look(lead(publisher.copy("before")))
    for role in ("root", "targets", "snapshot", "timestamp"):
        publisher.rotate(role)

    assert box.look(lead(publisher.folder)).floors.versions["root"] == 5


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp", "acme"])
def test_revoked_key_is_refused(
    lead: Lead, publisher: Publisher, box: Box, make_box: Callable[[str], Box], role: str
) -> None:
    publisher.delegate("acme", "acme-*")
    publisher.release("acme-digits", "1.0.0", "acme")
    genuine = publisher.take_keys(*({*ONLINE, role}))
    publisher.rotate(role)
    fresh = {name: f"{name}-2" if name == role else name for name in ONLINE}
    thief = Thief(publisher.copy("mirror"), publisher.take_keys(*fresh.values()))
    if role in ONLINE:
        thief.list_in({})
        make_box("control").look(lead(thief.mirror), "acme-digits")
        shutil.rmtree(thief.mirror)
        thief = Thief(publisher.copy("mirror"), genuine)
        thief.list_in({})
    else:
        changed = thief.read(role)
        changed.signed.version += 1
        data = Thief(thief.mirror, publisher.take_keys(role)).write(role, changed)
        thief.list_in({role: data})

    with pytest.raises(TrustError, match="signed"):
        box.look(lead(thief.mirror), "acme-digits")


def test_revoked_root_key_no_longer_counts(lead: Lead, publisher: Publisher, box: Box) -> None:
    ring = publisher.ring
    gone = ring.list_keys()["root-1"]
    publisher.repository.change_keys("root", add=[], remove=[gone])
    publisher.sign()
    box.look(lead(publisher.copy("after")))

    make_root_of(publisher, ["root-1", "root-2"])
    with pytest.raises(TrustError):
        box.look(lead(publisher.folder))


def test_root_below_its_threshold_is_refused(
    lead: Lead, publisher: Publisher, box: Box, make_box: Callable[[str], Box]
) -> None:
    genuine = publisher.copy("genuine")
    make_root_of(publisher, ["root-2", "root-3"])
    make_box("control").look(lead(publisher.copy("control")))

    make_root_of(publisher, ["root-3"], version=2)
    with pytest.raises(TrustError):
        box.look(lead(publisher.folder))
    box.look(lead(genuine))


def make_root_of(publisher: Publisher, keys: list[str], version: int | None = None) -> None:
    """Publish a next root that only these keys have signed."""
    found = publisher.repository.find_published("root")
    assert found is not None
    metadata = Metadata[Root].from_bytes(found.data)
    metadata.signed.version = version or metadata.signed.version + 1
    Thief(publisher.folder, publisher.take_keys(*keys)).write("root", metadata)


def test_targets_below_their_threshold_are_refused(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    ring = publisher.ring
    publisher.repository.change_keys("targets", add=[ring.create("second")], remove=[], threshold=2)
    publisher.sign()
    box.look(lead(publisher.copy("before")))
    thief = steal(publisher, "targets", *ONLINE)
    targets: Metadata[Targets] = thief.read("targets")
    targets.signed.version += 1
    thief.list_in({"targets": thief.write("targets", targets)})

    with pytest.raises(TrustError, match="signed"):
        box.look(lead(thief.mirror))


def test_old_but_valid_timestamp_is_taken_and_said_to_be_stale(lead: Lead, tmp_path: Path) -> None:
    days = {"root": 3650, "targets": 3650, "snapshot": 1825, "timestamp": 1825}
    publisher = Publisher(tmp_path / "publisher", days)
    publisher.release("digits", "1.0.0")
    box = Box(tmp_path / "box", publisher.root)
    source = lead(publisher.folder)

    assert not box.look(source, now=START + timedelta(days=29)).is_stale
    assert box.look(source, now=START + timedelta(days=400)).is_stale


def test_missing_metadata_is_told_from_forged_metadata(
    lead: Lead, publisher: Publisher, box: Box
) -> None:
    (publisher.folder / "metadata" / "timestamp.json").unlink()

    with pytest.raises(SourceUnavailableError) as failed:
        box.look(lead(publisher.folder))
    assert failed.value.retryable


# Bundles


def test_bundle_of_a_release_is_verified_with_its_blobs(
    publisher: Publisher, tmp_path: Path
) -> None:
    publisher.rotate("root")
    publisher.delegate("acme", "acme-*")
    name, version = "acme-" + "n" * 59, "v" * 64
    publisher.release(name, version, "acme")
    path = tmp_path / "release.edgeward"
    write_bundle(publisher.repository, name, version, path)

    source = open_release_source(path)
    (look,) = verify_releases(source, publisher.root, [(name, version)], START)
    assert look.blobs == 3
    before = path.read_bytes()
    write_bundle(publisher.repository, name, version, path)
    assert path.read_bytes() == before
    with tarfile.open(path) as tar:
        assert all(member.isreg() for member in tar)


def make_member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "metadata/../../evil.json",
        "/etc/passwd",
        "metadata/..json",
        "./metadata/timestamp.json",
        "metadata/sub/1.root.json",
        "blobs/../blobs/" + "0" * 64,
        "targets/../../1.0.0/" + "0" * 64 + ".release.json",
        "evil.sh",
        "metadata/\u202etxt.json",
    ],
)
def test_bundle_with_path_traversal_is_refused(tmp_path: Path, name: str) -> None:
    path = pack_members(tmp_path / "evil.edgeward", (make_member(name, 1), b"x"))

    with pytest.raises(BundleError):
        BundleSource(path)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_bundle_with_a_link_member_is_refused(tmp_path: Path, kind: bytes) -> None:
    member = make_member("metadata/timestamp.json", kind=kind)
    member.linkname = "/etc/passwd"
    path = pack_members(tmp_path / "evil.edgeward", (member, b""))

    with pytest.raises(BundleError, match="plain file"):
        BundleSource(path)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("metadata/timestamp.json", 5_000_001),
        (f"targets/digits/1.0.0/{'0' * 64}.release.json", (1 << 20) + 1),
        (f"chunks/{'0' * 64}.json", (16 << 20) + 1),
    ],
)
def test_bundle_with_an_oversize_member_is_refused(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / "evil.edgeward"
    path.write_bytes(make_member(name, size).tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 512 + size + 2048)

    with pytest.raises(BundleError, match=str(size)):
        BundleSource(path)


@pytest.mark.parametrize("size", [1, 1 << 50, 1 << 70])
def test_bundle_member_that_is_longer_than_the_bundle_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "evil.edgeward"
    path.write_bytes(make_member(f"blobs/{'0' * 64}", size).tobuf(tarfile.GNU_FORMAT))

    with pytest.raises(BundleError, match="torn"):
        BundleSource(path)


def test_bundle_with_extended_headers_is_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "evil.edgeward"
    for kind in (
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_SPARSE,
    ):
        path.write_bytes(make_member("metadata/1.root.json", 1 << 40, kind).tobuf())
        os.truncate(path, 1 << 41)

        with pytest.raises(BundleError, match="plain file"):
            BundleSource(path)


def test_bundle_with_the_same_member_twice_is_refused(tmp_path: Path) -> None:
    member = make_member("metadata/timestamp.json", 2)
    path = pack_members(tmp_path / "evil.edgeward", (member, b"{}"), (member, b"[]"))

    with pytest.raises(BundleError, match="twice"):
        BundleSource(path)


def test_bundle_torn_anywhere_is_refused_or_verified_never_believed(
    publisher: Publisher, tmp_path: Path
) -> None:
    path = tmp_path / "release.edgeward"
    write_bundle(publisher.repository, "digits", "1.0.0", path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1024, 1300):
        path.write_bytes(whole[:length])
        with pytest.raises((BundleError, FetchError)):
            list(verify_releases(BundleSource(path), publisher.root, [("digits", "1.0.0")], START))


def test_bundle_that_is_a_link_or_a_pipe_is_not_opened(
    publisher: Publisher, tmp_path: Path
) -> None:
    real = tmp_path / "real.edgeward"
    write_bundle(publisher.repository, "digits", "1.0.0", real)
    link, pipe = tmp_path / "link.edgeward", tmp_path / "pipe.edgeward"
    link.symlink_to(real)
    os.mkfifo(pipe)

    with pytest.raises(SourceUnavailableError):
        BundleSource(link)
    with pytest.raises(BundleError):
        BundleSource(pipe)
