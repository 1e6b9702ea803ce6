"""Exercise onnxruntime's CUDA and TensorRT providers through our adapter; print JSON.

Needs onnxruntime-gpu and NumPy, and nothing else of Edgeward's dependencies.

    PYTHONPATH=. python tests/hardware/cuda_check.py [MODEL.onnx ...]

Per provider: which one really ran, its nodes, the findings, the deviation of the proof
model from NumPy's answer in float64, and the times of runs on further models.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from platforms.errors import PlatformError
from platforms.runtimes.base import (
    CPU_PROVIDER,
    DTYPES,
    PROOF_ANSWER_FILE,
    PROOF_FOLDER,
    LoadOptions,
    Session,
)
from platforms.runtimes.ort import OrtRuntime

PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", CPU_PROVIDER)
RUNS = 50


def describe(session: Session) -> dict[str, Any]:
    """Return what the session says about where it runs."""
    return {
        "provider": session.provider,
        "assignment": dict(session.assignment),
        "findings": session.findings,
    }


def check_proof(options: LoadOptions) -> dict[str, Any]:
    """Run the proof model and compare it with the known answer."""
    answer = json.loads(PROOF_ANSWER_FILE.read_text(encoding="utf-8"))
    session = OrtRuntime().load(PROOF_FOLDER / "proof.onnx", options)
    found = session.run({"x": np.asarray(answer["inputs"]["x"], np.float32)})["y"]
    off = float(np.abs(found - np.asarray(answer["outputs"]["y"])).max())
    # TF32 has 10 bits of mantissa; full float32 stays under the proof's own tolerance.
    return {**describe(session), "max_abs_deviation": off, "is_exact": off <= answer["tolerance"]}


def time_model(path: Path, options: LoadOptions) -> dict[str, Any]:
    """Run a model on noise, its free axes at 1, and return the median time."""
    started = time.perf_counter()
    session = OrtRuntime().load(path, options)
    loaded = time.perf_counter() - started
    random = np.random.default_rng(0)
    inputs = {
        spec.name: random.random([max(axis, 1) for axis in spec.shape]).astype(
            DTYPES[spec.datatype]
        )
        for spec in session.inputs
    }
    times = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        session.run(inputs)
        times.append(time.perf_counter() - begun)
    median_ms = 1000 * float(np.median(times))
    return {**describe(session), "load_s": loaded, "median_ms": median_ms}


def attempt(check: Any, *arguments: Any) -> dict[str, Any]:
    """Return what a check found, or its error: the other providers are still tried."""
    try:
        found: dict[str, Any] = check(*arguments)
    except PlatformError as exc:
        return {"error": f"{exc.code}: {exc}"}
    return found


def main() -> None:
    """Print one JSON document."""
    runtime = OrtRuntime()
    report: dict[str, Any] = {"onnxruntime": runtime.version(), "available": runtime.providers()}
    for name in PROVIDERS:
        exact = {"use_tf32": "0"} if name == "CUDAExecutionProvider" else {}
        options = LoadOptions(
            threads=1, providers=(name, CPU_PROVIDER), provider_options={name: exact}
        )
        found: dict[str, Any] = {"proof": attempt(check_proof, options)}
        for path in sys.argv[1:]:
            found[path] = attempt(time_model, Path(path), options)
        report[name] = found
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
