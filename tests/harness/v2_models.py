"""A worker's HTTP API over real models: one of every datatype, two inputs, labels, a queue.

Run as a program it serves them until it is killed and prints its port, for differential runs:

    python -m tests.harness.v2_models FOLDER [PORT]
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from agent.manifest import (
    ArtifactEntry,
    Manifest,
    Step,
    TensorEntry,
    compute_sha256,
    write_manifest,
)
from agent.repository import ModelRepository
from agent.sections import HttpSettings
from platforms.artifact import ArtifactFormat, Datatype, Precision
from tests.harness.known_box import describe_box
from tests.harness.models import write_endless_model
from worker.engine.configured import configure
from worker.engine.costs import CostPolicy
from worker.engine.engine import Engine
from worker.engine.serving import EngineService
from worker.rest.management import Extras
from worker.rest.predict import EnginePredictor
from worker.rest.server import HttpServer

LABELS = ("cat", "dog", "fox", "owl")

ONNX_TYPES: dict[Datatype, int] = {
    Datatype.BOOL: TensorProto.BOOL,
    Datatype.UINT8: TensorProto.UINT8,
    Datatype.UINT16: TensorProto.UINT16,
    Datatype.UINT32: TensorProto.UINT32,
    Datatype.UINT64: TensorProto.UINT64,
    Datatype.INT8: TensorProto.INT8,
    Datatype.INT16: TensorProto.INT16,
    Datatype.INT32: TensorProto.INT32,
    Datatype.INT64: TensorProto.INT64,
    Datatype.FP16: TensorProto.FLOAT16,
    Datatype.FP32: TensorProto.FLOAT,
    Datatype.FP64: TensorProto.DOUBLE,
    Datatype.BYTES: TensorProto.STRING,
}

Tensors = dict[str, tuple[Datatype, tuple[int, ...]]]


@dataclass
class Box:
    """A running API and what is behind it."""

    server: HttpServer
    service: EngineService
    engine: Engine
    repository: ModelRepository

    @property
    def url(self) -> str:
        """Address as Triton's clients take it."""
        return f"127.0.0.1:{self.server.port}"


def _infos(tensors: Tensors) -> list[Any]:
    return [
        helper.make_tensor_value_info(
            name, ONNX_TYPES[datatype], [None if axis == -1 else axis for axis in shape]
        )
        for name, (datatype, shape) in tensors.items()
    ]


def _entries(tensors: Tensors) -> tuple[TensorEntry, ...]:
    return tuple(
        TensorEntry(name=name, datatype=datatype, shape=shape)
        for name, (datatype, shape) in tensors.items()
    )


def write_model(
    folder: Path,
    name: str,
    nodes: list[Any],
    inputs: Tensors,
    outputs: Tensors,
    weights: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
    **manifest: Any,
) -> Path:
    """Write a version folder of an ONNX graph; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    kept = [numpy_helper.from_array(value, key) for key, value in (weights or {}).items()]
    graph = helper.make_graph(nodes, name, _infos(inputs), _infos(outputs), kept)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path
    )
    digests = {}
    for file, text in (files or {}).items():
        (folder / file).write_text(text, encoding="utf-8")
        digests[file] = compute_sha256(folder / file)
    artifact = ArtifactEntry(
        file=path.name,
        format=ArtifactFormat.ONNX,
        precision=Precision.FP32,
        sha256=compute_sha256(path),
        size_bytes=path.stat().st_size,
    )
    write_manifest(
        Manifest(
            schema="edgeward.manifest/v1",
            name=name,
            version="1.0.0",
            inputs=_entries(inputs),
            outputs=_entries(outputs),
            artifacts=(artifact,),
            files=digests,
            **manifest,
        ),
        folder,
    )
    return folder


def write_models(source: Path) -> Iterator[Path]:
    """Write the version folders of all models."""
    for datatype in ONNX_TYPES:
        name = f"identity_{datatype.value.lower()}"
        nodes = [helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])]
        shape = (-1, -1)
        yield write_model(
            source / name,
            name,
            nodes,
            {"INPUT0": (datatype, shape)},
            {"OUTPUT0": (datatype, shape)},
        )
    yield write_model(
        source / "simple",
        "simple",
        [
            helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
            helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
        ],
        {"INPUT0": (Datatype.INT32, (-1, 16)), "INPUT1": (Datatype.INT32, (-1, 16))},
        {"OUTPUT0": (Datatype.INT32, (-1, 16)), "OUTPUT1": (Datatype.INT32, (-1, 16))},
    )
    yield write_model(
        source / "scores",
        "scores",
        [helper.make_node("Identity", ["x"], ["y"])],
        {"x": (Datatype.FP32, (-1, 4))},
        {"y": (Datatype.FP32, (-1, 4))},
        files={"labels.txt": "\n".join(LABELS) + "\n"},
        postprocess=(Step(name="top_k", params={"k": 2, "labels_file": "labels.txt"}),),
    )
    weights = np.random.default_rng(7).standard_normal((64, 10)).astype(np.float32)
    yield write_model(
        source / "mlp",
        "mlp",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (Datatype.FP32, (-1, 64))},
        {"y": (Datatype.FP32, (-1, 10))},
        {"w": weights},
    )
    write_endless_model(source / "endless")
    yield source / "endless"


@contextmanager
def serve_models(folder: Path, **settings: Any) -> Iterator[Box]:
    """Serve all models from a repository in `folder` on a free port."""
    repository = ModelRepository(folder / "models")
    for version in write_models(folder / "source"):
        repository.add(version)
    engine = Engine(describe_box(), 2, configure=configure, costs=CostPolicy())
    service = EngineService(engine, repository)
    extras = Extras(EnginePredictor(lambda: engine, repository))
    server = HttpServer(HttpSettings(**{"port": 0, **settings}), service, extras)
    server.start()
    try:
        yield Box(server, service, engine, repository)
    finally:
        server.stop()
        service.close()


def main() -> None:
    """Serve until killed."""
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with serve_models(Path(sys.argv[1]), port=port) as box:
        print(box.server.port, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
