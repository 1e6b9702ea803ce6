"""Play all requests to real Triton and keep what it answered.

    python -m tests.differential.record --environment VENV

VENV has the nvidia-pytriton wheel, which brings the server (`benchmarks/serving.py` makes such an
environment). Writes `triton.json` beside this file.
"""

import argparse
import json
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.serving import run_triton
from console.embedded import find_free_port
from tests.differential.cases import Case, build_cases, play
from tests.harness.v2_models import LABELS, ONNX_TYPES

RECORDING = Path(__file__).with_name("triton.json")
_TYPES = {"BYTES": "STRING"}
_START_S = 60.0


def _write_config(folder: Path, name: str, inputs: str, outputs: str) -> None:
    version = folder / "models" / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_bytes(Path(__file__).with_name("triton_model.py").read_bytes())
    (version.parent / "config.pbtxt").write_text(
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: 32\n'
        f"input [ {inputs} ]\noutput [ {outputs} ]\ndynamic_batching {{ }}\n"
    )


def _describe(name: str, datatype: str, width: int, more: str = "") -> str:
    known = f"TYPE_{_TYPES.get(datatype, datatype)}"
    return f'{{ name: "{name}" data_type: {known} dims: [ {width} ] {more} }}'


def write_models(folder: Path) -> None:
    """Lay out the models that `tests.harness.v2_models` has, for Triton."""
    for datatype in ONNX_TYPES:
        _write_config(
            folder,
            f"identity_{datatype.value.lower()}",
            _describe("INPUT0", datatype.value, -1),
            _describe("OUTPUT0", datatype.value, -1),
        )
    _write_config(
        folder,
        "simple",
        ", ".join(_describe(f"INPUT{n}", "INT32", 16) for n in (0, 1)),
        ", ".join(_describe(f"OUTPUT{n}", "INT32", 16) for n in (0, 1)),
    )
    labels = 'label_filename: "labels.txt"'
    _write_config(folder, "scores", _describe("x", "FP32", 4), _describe("y", "FP32", 4, labels))
    (folder / "models" / "scores" / "labels.txt").write_text("\n".join(LABELS) + "\n")


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    ready = Case("ready", "GET", "/v2/health/ready")
    deadline = time.monotonic() + _START_S
    while True:
        with suppress(OSError):
            if play(port, ready).status == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            msg = f"Triton does not start:\n{log.read_text(errors='replace')[-3000:]}"
            raise RuntimeError(msg)
        time.sleep(0.1)


class Triton:
    """A running Triton, started again when a request ended it (2.51 has such requests)."""

    def __init__(self, argv: Sequence[str], port: int, log: Path) -> None:
        self._argv = argv
        self._port = port
        self._log = log
        self._start()

    def _start(self) -> None:
        with self._log.open("ab") as file:
            self._process = subprocess.Popen(self._argv, stdout=file, stderr=file)
        _wait_ready(self._process, self._port, self._log)

    def play(self, case: Case) -> dict[str, Any]:
        """Return what it answers."""
        seen = play(self._port, case).to_json()
        if seen["status"] == 0:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        if self._process.poll() is not None:
            print(f"Triton died of {case.name!r}")
            self._start()
        return seen

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--environment", type=Path, required=True)
    python = str(parser.parse_args().environment / "bin" / "python")
    port = find_free_port()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder)
        argv = [*run_triton(python, folder, port), "--model-control-mode=explicit"]
        triton = Triton([*argv, "--load-model=*"], port, folder / "log")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2", timeout=10) as answer:
                version = json.load(answer)["version"]
            seen = {case.name: triton.play(case) for case in build_cases()}
        finally:
            triton.stop()
    # A line for each answer: a change can be read in a diff.
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in seen.items())
    head = json.dumps({"triton": version})[:-1]
    RECORDING.write_text(f'{head}, "answers": {{\n{lines}\n}}}}\n', encoding="utf-8")
    print(f"{len(seen)} answers of Triton {version} in {RECORDING.name}")


if __name__ == "__main__":
    main()
