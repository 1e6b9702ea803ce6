"""How much one model's latency suffers while another one loads: p99 beside loads ÷ quiet p99.

`python -m benchmarks.isolation [--json] [--megabytes 50] [--seconds 5]`. Both figures come from
one run, quiet and disturbed phases in turn.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.tiny_model import write_tiny_model
from platforms.runtimes.base import LoadOptions, Session
from platforms.runtimes.registry import get_runtime

PHASES = 3


def write_large_model(path: Path, megabytes: int) -> None:
    """Write an MLP of layers of 1024 × 1024, 4 MB each."""
    random, nodes, weights, last = np.random.default_rng(3), [], [], "x"
    for layer in range(max(1, megabytes // 4)):
        weight = random.standard_normal((1024, 1024)).astype(np.float32) * 0.02
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"h{layer}"]))
        last = f"h{layer}"
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1024])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["n", 1024])],
        weights,
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def measure_p99_ms(session: Session, seconds: float) -> float:
    """Run one row every 2 ms or so; return the 99th percentile, ms."""
    row, taken = {"x": np.zeros((1, 64), np.float32)}, []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        session.run(row)
        taken.append(time.perf_counter() - started)
        time.sleep(0.002)
    return float(np.percentile(taken, 99)) * 1000


def measure_isolation(megabytes: int, seconds: float) -> dict[str, float]:
    """Return the medians of both p99s, ms, their ratio, and how many loads disturbed."""
    quiet, disturbed, loads = [], [], 0
    runtime, options = get_runtime("ort"), LoadOptions(threads=1)
    with tempfile.TemporaryDirectory() as name:
        large = Path(name) / "large.onnx"
        write_large_model(large, megabytes)
        session = runtime.load(write_tiny_model(Path(name) / "tiny" / "1"), options)

        def load_again(is_over: threading.Event) -> None:
            nonlocal loads
            while not is_over.is_set():
                runtime.load(large, options).close()
                loads += 1

        for _ in range(PHASES):
            quiet.append(measure_p99_ms(session, seconds))
            is_over = threading.Event()
            loader = threading.Thread(target=load_again, args=(is_over,))
            loader.start()
            disturbed.append(measure_p99_ms(session, seconds))
            is_over.set()
            loader.join()
    quiet_ms, disturbed_ms = float(np.median(quiet)), float(np.median(disturbed))
    return {
        "quiet_p99_ms": round(quiet_ms, 3),
        "loading_p99_ms": round(disturbed_ms, 3),
        "ratio": round(disturbed_ms / quiet_ms, 2),
        "loads": loads,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    figures = measure_isolation(given.megabytes, given.seconds)
    print(json.dumps(figures) if given.json else figures)


if __name__ == "__main__":
    main()
