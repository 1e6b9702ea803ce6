"""Make a version of a model that loads, runs and is wrong, as a conversion gone wrong does.

    python -m benchmarks.break_model console/models/digits broken

Copies a version folder and turns the signs of half the weights in its ONNX files. The golden set
stays, so that a box can find out.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from agent.manifest import compute_sha256, read_manifest, write_manifest
from platforms.artifact import ArtifactFormat


def break_model(source: Path, target: Path) -> None:
    """Write a broken copy of the version in `source`.

    Raises:
        ManifestError: there is no version.
        OSError: the target exists, or cannot be written.
    """
    shutil.copytree(source, target)
    manifest = read_manifest(target)
    entries = []
    for entry in manifest.artifacts:
        path = target / entry.file
        if entry.format is ArtifactFormat.ONNX:
            _break_file(path)
        changed = {"sha256": compute_sha256(path), "size_bytes": path.stat().st_size}
        entries.append(entry.model_copy(update=changed))
    write_manifest(manifest.model_copy(update={"artifacts": tuple(entries)}), target)


def _break_file(path: Path) -> None:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1:
            broken = array.copy()
            broken[::2] = np.flip(broken[::2])
            tensor.CopyFrom(numpy_helper.from_array(broken, tensor.name))
    onnx.save(model, path)


def main() -> int:
    """Break a version; return the exit status."""
    parser = argparse.ArgumentParser(description="Make a version that runs and is wrong.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    break_model(options.source, options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
