"""The models of a chaos run: what each answers says which job, and which attempt, it is of.

- `echo` gives back its input, so an answer that belongs to another job is seen;
- `slow` loops as often as its input says and gives that number 400 times: too long for the
  wire, so it stays in a file that is named after its attempt;
- `endless` is `slow` under another name, for jobs that never end;
- `poison` kills its worker where the job asks for it.
"""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from agent.manifest import Step, TensorEntry, read_manifest, write_manifest
from agent.repository import ModelRepository
from benchmarks.tiny_model import write_version
from platforms.artifact import Datatype

ECHO, SLOW, ENDLESS, POISON = "echo", "slow", "endless", "poison"
WIDTH = 4
SLOW_REPEATS = 400
_STEPS_MODULE = "chaos_poison_step"
_CRASHING_STEP = '''\
"""A postprocessing step with a defect: it ends its process where a job asks for it."""

import os
import signal


def build(params, manifest, folder):
    def step(outputs, value, params):
        if params.get("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        return {name: array.tolist() for name, array in outputs.items()}

    return step
'''


def install_models(work_dir: Path, models_dir: Path) -> Path:
    """Write all models into the repository; return the folder the worker's path needs."""
    repository = ModelRepository(models_dir)
    _write_echo(work_dir / ECHO, ECHO)
    _write_slow(work_dir / SLOW, SLOW)
    _write_slow(work_dir / ENDLESS, ENDLESS)
    _write_echo(work_dir / POISON, POISON)
    manifest = read_manifest(work_dir / POISON)
    write_manifest(
        manifest.model_copy(update={"postprocess": (Step(name=_STEPS_MODULE),)}), work_dir / POISON
    )
    for name in (ECHO, SLOW, ENDLESS, POISON):
        repository.add(work_dir / name)
    return _write_steps(work_dir / "steps")


def _write_steps(folder: Path) -> Path:
    """Write a distribution that announces the crashing step, as a user's would."""
    info = folder / f"{_STEPS_MODULE}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {_STEPS_MODULE.replace('_', '-')}\nVersion: 1.0\n"
    )
    (info / "entry_points.txt").write_text(
        f"[edgeward.postprocess]\n{_STEPS_MODULE} = {_STEPS_MODULE}:build\n"
    )
    (folder / f"{_STEPS_MODULE}.py").write_text(_CRASHING_STEP)
    return folder


def _write_echo(folder: Path, name: str) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
    )
    tensors = (
        TensorEntry(name="x", datatype=Datatype.FP32, shape=(-1, WIDTH)),
        TensorEntry(name="y", datatype=Datatype.FP32, shape=(-1, WIDTH)),
    )
    write_version(folder, name, graph, tensors)


def _write_slow(folder: Path, name: str) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["again"]),
            helper.make_node("Add", ["sum", "one"], ["more"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.INT64, [1]),
        ],
        [numpy_helper.from_array(np.ones(1, np.int64), "one")],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Squeeze", ["x"], ["times"]),
            helper.make_node("Loop", ["times", "true", "zero"], ["sum"], body=body),
            helper.make_node("Expand", ["sum", "width"], ["y"]),
        ],
        name,
        [helper.make_tensor_value_info("x", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [SLOW_REPEATS])],
        [
            numpy_helper.from_array(np.array(True), "true"),
            numpy_helper.from_array(np.zeros(1, np.int64), "zero"),
            numpy_helper.from_array(np.array([SLOW_REPEATS], np.int64), "width"),
        ],
    )
    tensors = (
        TensorEntry(name="x", datatype=Datatype.INT64, shape=(1,)),
        TensorEntry(name="y", datatype=Datatype.INT64, shape=(SLOW_REPEATS,)),
    )
    write_version(folder, name, graph, tensors)
