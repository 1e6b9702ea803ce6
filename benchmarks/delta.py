"""How much of a changed model is fetched, by size of the chunks.

Makes a 13.5 MB ONNX model and changes of it as they happen (the last layer
fine-tuned, exported again, all weights moved a little …), publishes each with
chunk indexes of several average sizes, and fetches it with the product's own
fetcher on a box that has the old model. Beside it, where the program `zstd` is
installed, what a binary patch from exactly that old file would take.

Bytes are exact; times are of this machine and include cutting the old file,
verifying and flushing the new one.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from agent.release import BLOBS_DIR, CHUNKS_DIR, ReleaseFile
from worker.update.chunks import write_chunk_index
from worker.update.fetch import BlobFetcher
from worker.update.transport import FolderSource

Weights = list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]

AVERAGES = (4 << 10, 16 << 10, 64 << 10)
_WIDTHS = (1024, 1400, 900, 380, 900)
"""Of the layers: 13.5 MB of float32 weights, of which the last layer has 10 %."""
_ROUNDS = 3


def make_weights(seed: int = 0) -> Weights:
    """Return the weights of a perceptron, float32[inputs, outputs] a layer."""
    draw = np.random.default_rng(seed)
    return [draw.standard_normal(pair, np.float32) for pair in pairwise(_WIDTHS)]


def build_model(
    weights: Weights, *, name: str = "net", prefix: str = "layer", is_reversed: bool = False
) -> bytes:
    """Return an ONNX file of layers with these weights.

    Args:
        weights: of the layers.
        name: the graph's.
        prefix: of the layers' names.
        is_reversed: the file holds the weights in the other order, as another exporter may.
    """
    nodes, at = [], "x"
    for number in range(len(weights)):
        nodes.append(helper.make_node("MatMul", [at, f"{prefix}{number}"], [f"h{number}"]))
        nodes.append(helper.make_node("Relu", [f"h{number}"], [f"r{number}"]))
        at = f"r{number}"
    stored = [
        numpy_helper.from_array(weight, f"{prefix}{number}")
        for number, weight in enumerate(weights)
    ]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weights[0].shape[0]])],
        [helper.make_tensor_value_info(at, TensorProto.FLOAT, ["n", weights[-1].shape[1]])],
        stored[::-1] if is_reversed else stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    checker.check_model(model)
    return bytes(model.SerializeToString())


def fine_tune_last(weights: Weights, seed: int = 1) -> Weights:
    """Return the weights with another last layer."""
    return [*weights[:-1], make_weights(seed)[-1]]


def _fine_tune_all(weights: Weights) -> Weights:
    return [weight * np.float32(1.0001) for weight in weights]


def _fine_tune_some(weights: Weights) -> Weights:
    """Change one weight in 10,000, wherever it lies."""
    changed = [weight.copy() for weight in weights]
    draw = np.random.default_rng(2)
    for weight in changed:
        weight.flat[draw.integers(0, weight.size, weight.size // 10_000)] += 1
    return changed


def _insert_layer(weights: Weights) -> Weights:
    """Put a square layer after the second one."""
    width = weights[1].shape[1]
    inserted = np.random.default_rng(3).standard_normal((width, width // 2), np.float32)
    return [*weights[:2], inserted, inserted.T.copy(), *weights[2:]]


CHANGES: dict[str, Callable[[Weights], bytes]] = {
    "none (the same bytes)": build_model,
    "last layer fine-tuned (10 % of the file)": lambda old: build_model(fine_tune_last(old)),
    "exported again: other names, other order": lambda old: build_model(
        old, name="other", prefix="encoder.block.", is_reversed=True
    ),
    "two layers inserted (19 % of the file)": lambda old: build_model(_insert_layer(old)),
    "one weight in 10,000 changed": lambda old: build_model(_fine_tune_some(old)),
    "all weights changed slightly": lambda old: build_model(_fine_tune_all(old)),
}


def measure(old: bytes, new: bytes, average_bytes: int, folder: Path) -> dict[str, Any]:
    """Fetch `new` on a box that has `old`; return bytes and seconds."""
    digest = hashlib.sha256(new).hexdigest()
    blob, index = folder / BLOBS_DIR / digest, folder / CHUNKS_DIR / f"{digest}.json"
    old_file = folder / "old"
    for path in (blob, index):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(new)
    old_file.write_bytes(old)
    write_chunk_index(blob, index, average_bytes)
    file = ReleaseFile(path="model.onnx", sha256=digest, size_bytes=len(new))
    fetched = []
    durations = []
    for number in range(_ROUNDS):
        fetcher = BlobFetcher(folder / f"models{number}", FolderSource(folder))
        told: list[int] = []
        started = time.monotonic()
        fetcher.fetch(file, [old_file], progress=lambda *counts: told.append(counts[2]))  # noqa: B023
        durations.append(time.monotonic() - started)
        fetched.append(told[-1])
    return {
        "average_bytes": average_bytes,
        "size_bytes": len(new),
        "index_bytes": index.stat().st_size,
        "fetched_bytes": fetched[0],
        "fetched_share": round(fetched[0] / len(new), 4),
        "duration_s": round(statistics.median(durations), 3),
    }


def measure_zstd(old: bytes, new: bytes, folder: Path) -> dict[str, Any] | None:
    """Return the size of a zstd patch, and the seconds to make it; None without the program."""
    if shutil.which("zstd") is None:
        return None
    old_file, new_file, patch = (folder / name for name in ("old", "new", "patch"))
    old_file.write_bytes(old)
    new_file.write_bytes(new)
    argv = ["zstd", "-q", "-f", "-19", "--long=27", f"--patch-from={old_file}"]
    started = time.monotonic()
    subprocess.run([*argv, str(new_file), "-o", str(patch)], check=True, capture_output=True)
    return {
        "fetched_bytes": patch.stat().st_size,
        "fetched_share": round(patch.stat().st_size / len(new), 4),
        "duration_s": round(time.monotonic() - started, 3),
    }


def run(averages: Sequence[int]) -> list[dict[str, Any]]:
    """Measure every change; return a row for each."""
    weights = make_weights()
    old = build_model(weights)
    rows = []
    for name, change in CHANGES.items():
        new = change(weights)
        row: dict[str, Any] = {"change": name, "chunks": []}
        for average in averages:
            with tempfile.TemporaryDirectory() as folder:
                row["chunks"].append(measure(old, new, average, Path(folder)))
        with tempfile.TemporaryDirectory() as folder:
            row["zstd_patch"] = measure_zstd(old, new, Path(folder))
        rows.append(row)
    return rows


def _build_table(rows: Sequence[dict[str, Any]], averages: Sequence[int]) -> Table:
    heads = (f"{average >> 10} KiB" for average in averages)
    table = Table("change", *heads, "zstd patch")
    for row in rows:
        cells = [
            f"{100 * found['fetched_share']:.1f} %, {found['duration_s']:.2f} s"
            for found in row["chunks"]
        ]
        patch = row["zstd_patch"]
        shown = (
            "–"
            if patch is None
            else f"{100 * patch['fetched_share']:.1f} %, {patch['duration_s']:.1f} s to make"
        )
        table.add_row(row["change"], *cells, shown)
    indexes = [f"{found['index_bytes'] / 1000:.0f} kB" for found in rows[0]["chunks"]]
    table.add_row("index, which is fetched too and counted above", *indexes, "")
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    rows = run(AVERAGES)
    if options.json:
        print(json.dumps({"rows": rows}, indent=2))
        return
    Console(width=140).print(_build_table(rows, AVERAGES))


if __name__ == "__main__":
    main()
