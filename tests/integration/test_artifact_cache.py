"""Prepared models: the same answers, made again when damaged, never a reason to fail."""

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest

from platforms.errors import ModelLoadError
from platforms.runtimes.base import LoadOptions, Session
from platforms.runtimes.registry import get_runtime
from tests.integration.test_memory import write_wide_model
from worker.engine.artifact_cache import ArtifactCache, Loader


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide_model(tmp_path_factory.mktemp("models") / "m" / "1", 2)


class Log:
    """Loads a model, and keeps which folders it was given."""

    def __init__(self, path: Path) -> None:
        self.given: list[Path | None] = []
        self._path = path

    def __call__(self, prepared: Path | None) -> Session:
        self.given.append(prepared)
        options = LoadOptions(threads=1, prepared=prepared)
        return get_runtime("ort").load(self._path, options)


def run(session: Session) -> np.ndarray:
    return session.run({"x": np.linspace(0, 1, 500, dtype=np.float32).reshape(2, 250)})["y"]


def load(cache: ArtifactCache, loader: Loader, identity: object = "m") -> Session:
    return cache.load(identity, 2_000_000, loader)


def list_entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_second_load_uses_what_the_first_prepared_and_answers_the_same(
    model: Path, tmp_path: Path
) -> None:
    cache, log = ArtifactCache(tmp_path / "cache", 10**8), Log(model)

    first, second = load(cache, log), load(cache, log)

    (entry,) = list_entries(tmp_path / "cache")
    assert log.given[1] == entry
    assert (entry / "weights.data").stat().st_size >= 2_000_000
    assert np.array_equal(run(first), run(second))
    assert np.allclose(run(second), run(log(None)))


@pytest.mark.parametrize("name", ["model.onnx", "weights.data", "entry.json"])
def test_a_damaged_entry_is_made_again(model: Path, tmp_path: Path, name: str) -> None:
    cache, log = ArtifactCache(tmp_path / "cache", 10**8), Log(model)
    load(cache, log)
    (entry,) = list_entries(tmp_path / "cache")
    damaged = bytearray((entry / name).read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    # Another file, as a disk would have it: the session above has mapped the old one.
    (entry / name).unlink()
    (entry / name).write_bytes(damaged)

    session = load(cache, log)

    assert log.given[-1] != entry
    assert np.allclose(run(session), run(log(None)))
    load(cache, log)
    assert log.given[-1] == entry


def test_the_entry_used_longest_ago_makes_room(model: Path, tmp_path: Path) -> None:
    cache, log = ArtifactCache(tmp_path / "cache", 5_000_000), Log(model)
    load(cache, log, "a")
    (first,) = list_entries(tmp_path / "cache")
    for identity in "bc":
        load(cache, log, identity)

    entries = list_entries(tmp_path / "cache")

    assert len(entries) == 2
    assert first not in entries


def test_a_folder_that_cannot_be_made_keeps_no_model_from_loading(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    log = Log(model)

    assert load(ArtifactCache(tmp_path / "file" / "cache", 10**8), log)
    assert log.given == [None]


def test_a_model_larger_than_the_cache_is_not_kept(model: Path, tmp_path: Path) -> None:
    assert load(ArtifactCache(tmp_path / "cache", 1000), Log(model))
    assert not (tmp_path / "cache").exists()


_PREPARE_FOR_EVER = """
import sys
from pathlib import Path

from worker.engine.artifact_cache import ArtifactCache


def prepare(folder):
    (folder / "half.onnx").write_bytes(bytes(1000))
    print(folder, flush=True)
    sys.stdin.read()


ArtifactCache(Path(sys.argv[1]), 10**8).load("theirs", 1, prepare)
"""


def read_folder(process: "subprocess.Popen[str]") -> Path:
    """Return where a process prepares its model, as soon as it does."""
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_half_done_is_swept_and_a_living_one_s_is_not(
    model: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "cache", Log(model)
    command = [sys.executable, "-c", _PREPARE_FOR_EVER, str(folder)]
    with (
        subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as killed,
        subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as living,
    ):
        theirs = [read_folder(killed), read_folder(living)]
        killed.kill()
        killed.wait(30)
        assert all((one / "half.onnx").exists() for one in theirs)

        load(ArtifactCache(folder, 10**8), log)

        assert [one.exists() for one in theirs] == [False, True]
        assert len([one for one in list_entries(folder) if one.name[0] != "."]) == 1
        living.kill()


def test_a_file_that_is_no_model_fails_as_without_a_cache(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")

    with pytest.raises(ModelLoadError):
        load(ArtifactCache(tmp_path / "cache", 10**8), Log(tmp_path / "broken.onnx"))

    assert list_entries(tmp_path / "cache") == []
