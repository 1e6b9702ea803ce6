"""The model repository on a real folder: how versions appear, change places and go."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.errors import (
    DigestMismatchError,
    ManifestError,
    ModelError,
    ModelNotFoundError,
    RepositoryBusyError,
    VersionNotFoundError,
)
from agent.manifest import compute_sha256, parse_manifest
from agent.repository import ModelRepository

TENSOR = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}


def write_source(
    folder: Path,
    release: str = "1.0.0",
    *,
    content: bytes = b"weights",
    file: str = "model.onnx",
    **changes: Any,
) -> Path:
    """Write a version's folder as a publisher does; nothing here loads its model."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    (folder / "labels.txt").write_text("zero\none\n")
    artifact = {
        "file": file,
        "format": "onnx",
        "precision": "fp32",
        "sha256": compute_sha256(path),
        "size_bytes": len(content),
    }
    manifest = {
        "schema": "edgeward.manifest/v1",
        "name": "digits",
        "version": release,
        "inputs": [TENSOR],
        "outputs": [TENSOR],
        "artifacts": [artifact],
        "files": {"labels.txt": compute_sha256(folder / "labels.txt")},
    } | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def repository(root: Path) -> ModelRepository:
    return ModelRepository(root)


@pytest.fixture
def two(repository: ModelRepository, tmp_path: Path) -> ModelRepository:
    """A repository with releases 1.0.0 and 2.0.0 of one model, the second one active."""
    repository.add(write_source(tmp_path / "one", "1.0.0"))
    repository.add(write_source(tmp_path / "two", "2.0.0", content=b"better weights"))
    return repository


def read_links(root: Path) -> dict[str, str]:
    model = root / "digits"
    return {
        name: str((model / name).readlink())
        for name in ("current", "previous")
        if (model / name).is_symlink()
    }


def test_added_version_is_whole_and_active(
    repository: ModelRepository, root: Path, tmp_path: Path
) -> None:
    added = repository.add(write_source(tmp_path / "source", file="onnx/model.onnx"))
    assert (added.name, added.number, added.release, added.is_active) == (
        "digits",
        1,
        "1.0.0",
        True,
    )
    files = {str(path.relative_to(added.folder)) for path in added.folder.rglob("*.*")}
    assert files == {"manifest.json", "labels.txt", "onnx/model.onnx"}
    assert (added.folder / "onnx" / "model.onnx").read_bytes() == b"weights"
    assert list(root.glob("*/.staging-*")) == []
    assert repository.list_models() == ["digits"]
    assert repository.has_active("digits")


def test_same_file_of_two_versions_is_on_the_disk_once(two: ModelRepository, root: Path) -> None:
    first, second = (item.folder for item in two.list_versions("digits"))
    assert (first / "labels.txt").samefile(second / "labels.txt")
    assert not (first / "model.onnx").samefile(second / "model.onnx")
    for path in (first / "model.onnx", first / "labels.txt"):
        assert (root / ".blobs" / compute_sha256(path)).samefile(path)


def test_added_version_does_not_follow_its_source(
    repository: ModelRepository, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source")
    added = repository.add(source)
    (source / "model.onnx").write_bytes(b"changed")
    assert (added.folder / "model.onnx").read_bytes() == b"weights"


def test_version_may_be_added_without_becoming_active(
    two: ModelRepository, root: Path, tmp_path: Path
) -> None:
    added = two.add(write_source(tmp_path / "three", "3.0.0"), activate=False)
    assert (added.number, added.is_active) == (3, False)
    assert read_links(root) == {"current": "2", "previous": "1"}


def test_model_may_get_another_name_than_its_publisher_gave(
    repository: ModelRepository, tmp_path: Path
) -> None:
    added = repository.add(write_source(tmp_path / "source"), name="numbers")
    assert repository.list_models() == ["numbers"]
    assert parse_manifest((added.folder / "manifest.json").read_bytes()).name == "numbers"
    with pytest.raises(ManifestError, match="name"):
        repository.add(tmp_path / "source", name="../up")


def test_activation_and_rollback_change_places(two: ModelRepository, root: Path) -> None:
    assert two.activate("digits", "1.0.0").number == 1
    assert read_links(root) == {"current": "1", "previous": "2"}
    assert two.roll_back("digits").number == 2
    assert read_links(root) == {"current": "2", "previous": "1"}
    assert two.roll_back("digits").number == 1


def test_activating_the_active_version_keeps_the_way_back(two: ModelRepository, root: Path) -> None:
    two.activate("digits", "2")
    assert read_links(root) == {"current": "2", "previous": "1"}


def test_without_a_previous_version_there_is_no_way_back(
    repository: ModelRepository, tmp_path: Path
) -> None:
    repository.add(write_source(tmp_path / "source"))
    with pytest.raises(VersionNotFoundError, match="no previous version"):
        repository.roll_back("digits")


def test_active_version_cannot_be_removed(two: ModelRepository) -> None:
    with pytest.raises(ModelError, match="activate another one first"):
        two.remove("digits", "2.0.0")
    assert two.get_version("digits").number == 2


def test_removed_version_takes_its_files_and_its_place_with_it(
    two: ModelRepository, root: Path
) -> None:
    assert two.remove("digits", "1") == [1]
    assert [item.number for item in two.list_versions("digits")] == [2]
    assert read_links(root) == {"current": "2"}
    kept = {compute_sha256(path) for path in (root / "digits" / "2").glob("[lm]*.[to]*")}
    assert {path.name for path in (root / ".blobs").iterdir()} == kept
    assert len(kept) == 2


def test_removed_model_leaves_nothing(two: ModelRepository, root: Path) -> None:
    assert two.remove("digits") == [1, 2]
    assert two.list_models() == []
    assert not (root / "digits").exists()
    assert list((root / ".blobs").iterdir()) == []


def test_damaged_version_is_not_activated(two: ModelRepository, root: Path) -> None:
    damaged = two.get_folder("digits", "1") / "model.onnx"
    damaged.write_bytes(b"weighed")
    with pytest.raises(DigestMismatchError, match=r"model\.onnx has another sha256"):
        two.activate("digits", "1")
    damaged.write_bytes(b"weight")
    with pytest.raises(DigestMismatchError, match=r"has 6 bytes, its manifest says 7"):
        two.activate("digits", "1")
    damaged.unlink()
    with pytest.raises(ManifestError, match=r"model\.onnx"):
        two.activate("digits", "1")
    (damaged.parent / "manifest.json").write_text("{")
    with pytest.raises(ManifestError):
        two.activate("digits", "1")
    assert two.list_versions("digits")[0].release == "(damaged)"
    assert read_links(root) == {"current": "2", "previous": "1"}


def test_damaged_blob_is_replaced_by_the_next_add(
    repository: ModelRepository, root: Path, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source")
    blob = root / ".blobs" / compute_sha256(source / "model.onnx")
    repository.add(source)
    blob.write_bytes(b"rotten!")
    added = repository.add(source)
    assert (added.folder / "model.onnx").read_bytes() == b"weights"
    assert blob.samefile(added.folder / "model.onnx")


def test_file_that_is_not_what_its_manifest_says_is_not_added(
    repository: ModelRepository, root: Path, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source")
    (source / "model.onnx").write_bytes(b"weighed")
    with pytest.raises(DigestMismatchError, match="fetch or add it again"):
        repository.add(source)
    write_source(source)
    (source / "labels.txt").write_text("other\n")
    with pytest.raises(DigestMismatchError, match=r"labels\.txt"):
        repository.add(source)
    assert not root.exists()


def test_source_may_not_name_a_link_as_its_file(
    repository: ModelRepository, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source")
    (source / "model.onnx").rename(tmp_path / "elsewhere")
    (source / "model.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match="no file in"):
        repository.add(source)


@pytest.mark.parametrize(
    "name", ["manifest.json", "../model.onnx", "/etc/passwd", "a/../../b", "a\\b", "", "."]
)
def test_manifest_names_only_other_files_in_its_folder(
    repository: ModelRepository, tmp_path: Path, name: str
) -> None:
    source = write_source(tmp_path / "source")
    text = json.loads((source / "manifest.json").read_text())
    for changed in (
        text | {"artifacts": [text["artifacts"][0] | {"file": name}]},
        text | {"files": {name: "0" * 64}},
    ):
        (source / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ManifestError):
            repository.add(source)
    assert repository.list_models() == []


@pytest.mark.parametrize("changes", [{"inputz": []}, {"schema": "v2"}, {"version": "a b"}])
def test_manifest_with_a_mistake_is_refused(
    repository: ModelRepository, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ManifestError):
        repository.add(write_source(tmp_path / "source", **changes))


def test_folder_without_a_manifest_is_no_version(
    repository: ModelRepository, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json cannot be read"):
        repository.add(tmp_path)


def test_second_writer_is_told_that_another_is_at_work(
    two: ModelRepository, root: Path, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "three", "3.0.0")
    with (root / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for change in (
            lambda: two.add(source),
            lambda: two.activate("digits", "1"),
            lambda: two.roll_back("digits"),
            lambda: two.remove("digits", "1"),
        ):
            with pytest.raises(RepositoryBusyError) as caught:
                change()
            assert (caught.value.code, caught.value.retryable) == ("repository_busy", True)
        assert two.get_version("digits").number == 2
    assert two.add(source).number == 3


def test_lock_of_a_killed_writer_is_free_again(two: ModelRepository, root: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    code = f"{hold}; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, root / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RepositoryBusyError):
            two.activate("digits", "1")
        other.kill()
        other.wait()
    assert two.activate("digits", "1").number == 1


def test_staging_folder_of_a_crash_is_no_version_and_the_next_add_takes_its_place(
    two: ModelRepository, root: Path, tmp_path: Path
) -> None:
    left = root / "digits" / ".staging-3"
    left.mkdir()
    (left / "model.onnx").write_bytes(b"half")
    assert [item.number for item in two.list_versions("digits")] == [1, 2]
    added = two.add(write_source(tmp_path / "three", "3.0.0"))
    assert added.number == 3
    assert (added.folder / "model.onnx").read_bytes() == b"weights"
    assert not left.exists()


def test_staging_folder_of_a_crash_is_gone_after_the_next_remove(
    two: ModelRepository, root: Path
) -> None:
    for name in (".staging-7", ".staging-removed-6"):
        left = root / "digits" / name
        left.mkdir()
        os.link(root / "digits" / "1" / "model.onnx", left / "model.onnx")
    two.remove("digits", "1")
    assert list((root / "digits").glob(".staging-*")) == []


def test_version_is_found_as_active_by_number_and_by_release(
    two: ModelRepository, root: Path
) -> None:
    model = root / "digits"
    assert two.get_folder("digits") == model / "2"
    assert two.get_folder("digits", "1") == model / "1"
    assert two.get_folder("digits", "1.0.0") == model / "1"
    assert two.get_folder("digits", "2.0.0") == model / "2"


def test_release_added_twice_means_the_newer(two: ModelRepository, tmp_path: Path) -> None:
    two.add(write_source(tmp_path / "again", "1.0.0", content=b"fixed"), activate=False)
    assert two.get_version("digits", "1.0.0").number == 3


def test_what_is_not_there_is_told_with_what_is(
    two: ModelRepository, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(VersionNotFoundError, match=r"'9'; it has 1 \(1\.0\.0\), 2 \(2\.0\.0\)"):
        two.get_folder("digits", "9")
    for name in ("cats", "", ".blobs", "../models/digits", "digits/1"):
        with pytest.raises(ModelNotFoundError, match="there are: digits"):
            two.get_folder(name)
        assert not two.has_active(name)
    (root / "digits" / "current").unlink()
    with pytest.raises(ModelNotFoundError, match="no active version"):
        two.get_folder("digits")
    assert not two.has_active("digits")
