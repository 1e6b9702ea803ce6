"""The demo's second model: magika, which tells a file's type from its bytes.

Owns the making of a model version from the installed `magika` package (Apache-2.0):
its ONNX file and labels are copied, nothing of its code is used or imported.
"""

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from agent.errors import ModelNotFoundError
from agent.manifest import (
    ArtifactEntry,
    Manifest,
    Step,
    TensorEntry,
    compute_sha256,
    write_manifest,
)
from platforms.artifact import ArtifactFormat, Datatype, Precision

MODEL_FILE = "magika.onnx"
LABELS_FILE = "labels.txt"

_PACKAGE = "magika"
_MODEL = "standard_v3_3"
"""The default model of magika 1.0.3."""
_LICENSE = "Apache-2.0"
_FREE = -1


def write_magika_version(folder: Path) -> Manifest:
    """Write manifest, ONNX file and labels of the installed magika into `folder`.

    The folder is made where it is missing. Its model answers as magika's raw `dl`
    output: without magika's thresholds, and without its rules for tiny files.

    Raises:
        ModelNotFoundError: magika is not installed, or has another model; names the extra.
    """
    source = _find_model()
    config = json.loads((source / "config.min.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "model.onnx", folder / MODEL_FILE)
    labels = config["target_labels_space"]
    (folder / LABELS_FILE).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    manifest = _describe(folder, config)
    write_manifest(manifest, folder)
    return manifest


def _find_model() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    source = Path(spec.origin).parent / "models" / _MODEL if spec and spec.origin else None
    if source is None or not (source / "model.onnx").is_file():
        msg = f"the demo's model {_MODEL} needs magika 1.0: pip install 'edgeward[demo]'"
        raise ModelNotFoundError(msg)
    return source


def _describe(folder: Path, config: dict[str, Any]) -> Manifest:
    window = {
        "begin": config["beg_size"],
        "end": config["end_size"],
        "block": config["block_size"],
        "padding": config["padding_token"],
    }
    model = folder / MODEL_FILE
    tokens, classes = window["begin"] + window["end"], len(config["target_labels_space"])
    return Manifest(
        schema="edgeward.manifest/v1",
        name=_PACKAGE,
        version=importlib.metadata.version(_PACKAGE),
        description=f"Google's magika ({_MODEL}): the type of a file from its bytes.",
        license=_LICENSE,
        inputs=(TensorEntry(name="bytes", datatype=Datatype.INT32, shape=(_FREE, tokens)),),
        outputs=(TensorEntry(name="target_label", datatype=Datatype.FP32, shape=(_FREE, classes)),),
        preprocess=Step(name="byte_window", params=window),
        postprocess=(Step(name="top_k", params={"k": 3, "labels_file": LABELS_FILE}),),
        artifacts=(
            ArtifactEntry(
                file=MODEL_FILE,
                format=ArtifactFormat.ONNX,
                precision=Precision.FP32,
                sha256=compute_sha256(model),
                size_bytes=model.stat().st_size,
            ),
        ),
        files={LABELS_FILE: compute_sha256(folder / LABELS_FILE)},
    )
