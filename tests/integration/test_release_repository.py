"""A publisher's repository: what waits, what is published, and that it is never half of both."""

import json
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import DigestMismatchError, RepositoryBusyError
from agent.release import parse_release
from console.errors import ReleaseExistsError, ReleaseRepositoryError, SigningKeyError
from console.release.keys import KeyRing, read_public_key
from console.release.repository import ReleaseRepository, Signed
from console.release.signing import sign_repository
from tests.harness.publishing import MEMORY, Box, Publisher, write_version_folder
from worker.errors import ReleaseUnknownError
from worker.update.sources import FolderReleaseSource

ONLINE = ("snapshot", "timestamp")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "publisher")


@pytest.fixture
def box(tmp_path: Path, publisher: Publisher) -> Box:
    return Box(tmp_path / "box", publisher.root)


def look(box: Box, publisher: Publisher, version: str = "1.0.0", name: str = "digits") -> None:
    box.look(FolderReleaseSource(publisher.folder), name, version, publisher.now)


def add(publisher: Publisher, version: str, name: str = "digits", by: str = "targets") -> None:
    folder = write_version_folder(publisher.home / name / version, version.encode())
    publisher.repository.add_release(name, version, folder, by)


def test_release_carries_its_own_name_and_version_in_the_manifest(publisher: Publisher) -> None:
    add(publisher, "1.2.3")
    (listed,) = publisher.repository.list_releases()
    manifest = publisher.folder / "blobs" / listed.document.get_file("manifest.json").sha256

    found = json.loads(manifest.read_text())
    assert (found["name"], found["version"]) == ("digits", "1.2.3")
    (path,) = (publisher.folder / "targets" / "digits" / "1.2.3").iterdir()
    assert parse_release(path.read_bytes()) == listed.document


def test_folder_that_is_not_what_its_manifest_says_is_not_released(publisher: Publisher) -> None:
    folder = write_version_folder(publisher.home / "folder")
    (folder / "model.onnx").write_bytes(b"WEIGHTS")

    with pytest.raises(DigestMismatchError):
        publisher.repository.add_release("digits", "1.0.0", folder)
    assert publisher.repository.list_releases() == []


def test_release_waits_until_it_is_signed(publisher: Publisher, box: Box) -> None:
    add(publisher, "1.0.0")
    assert publisher.repository.list_releases()[0].is_staged
    with pytest.raises(ReleaseUnknownError):
        look(box, publisher)

    report = publisher.sign()
    assert (dict(report.waiting), set(report.published)) == ({}, {"targets", *ONLINE})
    look(box, publisher)


def test_version_once_released_never_changes(publisher: Publisher) -> None:
    publisher.release("digits", "1.0.0")
    folder = write_version_folder(publisher.home / "other", b"other weights")

    with pytest.raises(ReleaseExistsError):
        publisher.repository.add_release("digits", "1.0.0", folder)
    publisher.release("digits", "1.0.0")


def test_publisher_cannot_release_the_version_of_another(publisher: Publisher) -> None:
    publisher.delegate("acme", "*")
    publisher.release("digits", "1.0.0")
    folder = write_version_folder(publisher.home / "other", b"other weights")

    with pytest.raises(ReleaseExistsError):
        publisher.repository.add_release("digits", "1.0.0", folder, "acme")


def test_publisher_signs_at_home_and_the_owner_publishes(publisher: Publisher, box: Box) -> None:
    publisher.delegate("acme", "acme-*")
    add(publisher, "1.0.0", "acme-digits", "acme")

    at_home = publisher.sign(publisher.take_keys("acme"))
    assert at_home.published == {}
    assert set(at_home.waiting) == {"snapshot"}
    report = publisher.sign(publisher.take_keys(*ONLINE))
    assert (dict(report.waiting), set(report.published)) == ({}, {"acme", *ONLINE})
    look(box, publisher, name="acme-digits")


def test_publisher_with_a_key_made_elsewhere_is_heard_of_once_it_has_signed(
    publisher: Publisher, tmp_path: Path, box: Box
) -> None:
    elsewhere = KeyRing([tmp_path / "acme-keys"])
    elsewhere.create("acme")
    key = read_public_key(tmp_path / "acme-keys" / "acme.pub")
    publisher.repository.delegate("acme", "acme-*", key)
    publisher.release("digits", "1.0.0")
    with pytest.raises(ReleaseUnknownError):
        # Nothing that names a publisher without metadata may go out: no box could follow it.
        look(box, publisher)

    publisher.sign(elsewhere)
    report = publisher.sign()
    assert dict(report.waiting) == {}
    look(box, publisher)


def test_root_is_signed_by_two_people_one_after_the_other(publisher: Publisher, box: Box) -> None:
    publisher.release("digits", "1.0.0")
    key = publisher.ring.create("targets-new")
    old = publisher.ring.list_keys()["targets"]
    publisher.repository.change_keys("targets", add=[key], remove=[old])

    first = publisher.sign(publisher.take_keys("root-1"))
    assert (first.published, set(first.waiting)) == ({}, {"root", "timestamp"})
    online = publisher.sign(publisher.take_keys(*ONLINE))
    assert (set(online.published), set(online.waiting)) == ({"timestamp"}, {"root"})
    look(box, publisher)

    second = publisher.sign(publisher.take_keys("root-3", "targets-new", *ONLINE))
    assert (dict(second.waiting), second.published["root"]) == ({}, 2)
    look(box, publisher)
    assert box.floors.versions["root"] == 2


def test_complete_root_waits_for_the_key_that_must_sign_anew_with_it(
    publisher: Publisher, box: Box
) -> None:
    publisher.release("digits", "1.0.0")
    key = publisher.ring.create("elsewhere")
    old = publisher.ring.list_keys()["timestamp"]
    publisher.repository.change_keys("timestamp", add=[key], remove=[old])

    report = publisher.sign(publisher.take_keys("root-1", "root-2", *ONLINE))
    assert set(report.published) == {"timestamp"}
    assert set(report.waiting) == {"root"}
    look(box, publisher)

    report = publisher.sign(publisher.take_keys("elsewhere"))
    assert (dict(report.waiting), set(report.published)) == ({}, {"root", "timestamp"})
    look(box, publisher)


def test_role_is_not_left_with_fewer_keys_than_must_sign(publisher: Publisher) -> None:
    keys = publisher.ring.list_keys()
    publisher.repository.change_keys("root", add=[], remove=[keys["root-1"]])
    with pytest.raises(ReleaseRepositoryError, match="2 must sign"):
        publisher.repository.change_keys("root", add=[], remove=[keys["root-2"]])
    with pytest.raises(ReleaseRepositoryError):
        publisher.repository.change_keys("nobody", add=[], remove=[keys["root-2"]])


def test_timestamp_is_signed_anew_each_time_and_the_rest_only_when_it_ages(
    publisher: Publisher, box: Box
) -> None:
    publisher.release("digits", "1.0.0")
    publisher.pass_days(7)
    assert set(publisher.sign().published) == {"timestamp"}
    publisher.pass_days(15)
    assert set(publisher.sign().published) == set(ONLINE)
    publisher.pass_days(250)
    assert set(publisher.sign(publisher.take_keys(*ONLINE)).published) == set(ONLINE)
    look(box, publisher)
    assert set(publisher.sign().published) == {"root", "targets", "timestamp", "snapshot"}
    look(box, publisher)


class _Dying(ReleaseRepository):
    """A repository whose process dies after it has published so many files."""

    def __init__(self, publisher: Publisher, lives: int) -> None:
        super().__init__(publisher.folder, lambda: publisher.now)
        self._lives = lives

    def publish(self, signed: Signed) -> None:
        if self._lives == 0:
            raise KeyboardInterrupt
        self._lives -= 1
        super().publish(signed)


@pytest.mark.parametrize("lives", [0, 1, 2, 3])
def test_publishing_that_is_cut_short_shows_boxes_the_old_state_and_is_taken_up_again(
    publisher: Publisher, box: Box, lives: int
) -> None:
    publisher.delegate("acme", "acme-*")
    publisher.release("digits", "1.0.0")
    add(publisher, "2.0.0")
    add(publisher, "1.0.0", "acme-digits", "acme")
    with pytest.raises(KeyboardInterrupt):
        sign_repository(_Dying(publisher, lives), publisher.ring)

    look(box, publisher)
    with pytest.raises(ReleaseUnknownError):
        look(box, publisher, "2.0.0")
    report = publisher.sign()
    assert dict(report.waiting) == {}
    look(box, publisher, "2.0.0")
    look(box, publisher, name="acme-digits")


def test_second_publisher_in_the_same_repository_is_sent_away(publisher: Publisher) -> None:
    with publisher.repository.lock(), pytest.raises(RepositoryBusyError):
        publisher.sign()


def test_private_keys_are_for_their_owner_only_and_never_overwritten(publisher: Publisher) -> None:
    for path in publisher.keys.glob("*.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(SigningKeyError, match="never overwritten"):
        publisher.ring.create("root-1")


def test_keys_in_the_repository_are_refused(publisher: Publisher, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(publisher.folder)
    for folder in (publisher.folder / "keys", publisher.folder, link / "keys"):
        with pytest.raises(SigningKeyError, match="lies in the repository"):
            KeyRing([folder], publisher.folder)


def test_delegation_whose_name_is_taken_is_refused(publisher: Publisher) -> None:
    key = publisher.ring.create("key")
    publisher.delegate("acme", "acme-*")
    for name in ("root", "timestamp", "targets", "acme"):
        with pytest.raises(ReleaseRepositoryError):
            publisher.repository.delegate(name, "*", key)
    with pytest.raises(ReleaseRepositoryError, match="none of these"):
        add(publisher, "1.0.0", "digits", "acme")


def test_large_blob_gets_a_list_of_chunks(publisher: Publisher) -> None:
    folder = write_version_folder(publisher.home / "large", bytes(range(256)) * 1024)
    listed = publisher.repository.add_release("digits", "1.0.0", folder)

    large = listed.document.get_file("model.onnx").sha256
    assert [path.stem for path in (publisher.folder / "chunks").iterdir()] == [large]
