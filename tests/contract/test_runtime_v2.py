"""A remote V2 server as a runtime: a real server process, real connections."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from platforms.errors import InferenceError, ModelLoadError, RunStoppedError, TensorError
from platforms.runtimes.base import (
    PROOF_FOLDER,
    LoadOptions,
    RunStop,
    Session,
    read_proof_declaration,
)
from platforms.runtimes.registry import get_runtime
from tests.harness.waiting import wait_until

ONE_THREAD = LoadOptions(threads=1)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.harness.v2_server", str(PROOF_FOLDER / "proof.onnx")]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.kill()


Load = Callable[..., Session]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    opened: list[Session] = []

    def open_session(**document: object) -> Session:
        path = tmp_path / "model.v2"
        path.write_text(json.dumps(document))
        opened.append(get_runtime("v2").load(path, ONE_THREAD))
        return opened[-1]

    yield open_session
    for session in opened:
        session.close()


def draw(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, 1, 8, 8)).astype(np.float32)


def test_remote_model_answers_as_the_same_file_here(address: str, load: Load) -> None:
    local = get_runtime("ort").load(PROOF_FOLDER / "proof.onnx", ONE_THREAD)
    remote = load(url=address, model="proof", version="1")
    declared = read_proof_declaration()
    assert (remote.inputs, remote.outputs) == (declared.inputs, declared.outputs)
    rows = [draw(1 + number % 5) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: remote.run({"x": x})["y"], rows))
    right = [local.run({"x": x})["y"] for x in rows]
    assert all(np.abs(a - b).max() <= 1e-5 for a, b in zip(found, right, strict=True))


def test_connection_closed_by_the_server_is_made_again(address: str, load: Load) -> None:
    remote = load(url=address, model="proof")
    for rows in (3, 1, 3, 3, 2):
        assert remote.run({"x": draw(rows)})["y"].shape == (rows, 10)


def test_server_s_refusal_is_an_error_with_its_words(address: str, load: Load) -> None:
    remote = load(url=address, model="proof")
    with pytest.raises(InferenceError, match="too busy for seven"):
        remote.run({"x": draw(7)})
    with pytest.raises(TensorError):
        remote.run({"x": draw(1).astype(np.float64)})


def test_stop_ends_a_run_that_waits_for_the_server(address: str, load: Load) -> None:
    remote = load(url=address, model="hang")
    stop = RunStop()
    caught: list[Exception] = []

    def run() -> None:
        try:
            remote.run({"x": draw(1)}, stop)
        except RunStoppedError as exc:
            caught.append(exc)

    waiting = threading.Thread(target=run)
    waiting.start()
    wait_until(lambda: stop._end is not None, 60, "the run waits for the server")
    stop.set()
    waiting.join(60)
    assert caught


def test_server_that_never_answers_is_an_error_after_the_time_limit(
    address: str, load: Load
) -> None:
    remote = load(url=address, model="hang", timeout_s=0.5)
    with pytest.raises(InferenceError, match="no answer"):
        remote.run({"x": draw(1)})


def test_closed_session_refuses_to_run(address: str, load: Load) -> None:
    remote = load(url=address, model="proof")
    remote.close()
    remote.close()
    with pytest.raises(InferenceError, match="closed"):
        remote.run({"x": draw(1)})


@pytest.mark.parametrize(
    "document", [{}, {"url": "ftp://x", "model": "m"}, {"url": "http://127.0.0.1:1", "model": "m"}]
)
def test_file_that_leads_nowhere_is_refused(load: Load, document: dict[str, str]) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.v2"):
        load(**document)


def test_unknown_model_is_refused_at_load(address: str, load: Load) -> None:
    with pytest.raises(ModelLoadError, match="404"):
        load(url=address, model="nonesuch")
