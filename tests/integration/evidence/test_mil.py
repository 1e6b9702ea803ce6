"""The reference interpreter of Core ML programs, against torch and against coremltools itself."""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.errors import MilOperatorError, SourceError
from converters.evidence.budget import get_default_budget
from converters.evidence.mil import load_program
from converters.evidence.mil_values import unpack_bits
from converters.evidence.proof import Outcome, TrialLimits, prove
from converters.evidence.venues import MIL_LABEL, MIL_REFERENCE, find_venues
from converters.task import ModelFile, ModelFormat
from platforms.artifact import Datatype, Precision, TensorSpec
from platforms.parity import compare_output
from platforms.runtimes.base import Array, Declared
from tests.integration.evidence.conftest import Nets

NETS = ("mlp", "cnn", "encoder")
Convert = Callable[..., Any]


@pytest.fixture(scope="module")
def tools() -> Any:
    """Coremltools, which warns of every torch that is newer than itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
        import coremltools.optimize.coreml
    return coremltools


@pytest.fixture(scope="module")
def convert(nets: Nets, tools: Any) -> Convert:
    """Makes the ML program of a net by name, of fp32 or fp16, for iOS 16 or 18."""

    @cache
    def make(name: str, *, is_half: bool, ios: int = 16) -> Any:
        precision = tools.precision.FLOAT16 if is_half else tools.precision.FLOAT32
        rows = tools.RangeDim(1, 64, default=1)
        # Any: torch leaves `trace` untyped.
        script: Any = torch.jit
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tools.convert(
                script.trace(nets.get_net(name), torch.zeros(2, 1, 8, 8)),
                convert_to="mlprogram",
                inputs=[tools.TensorType(name="x", shape=(rows, 1, 8, 8), dtype=np.float32)],
                outputs=[tools.TensorType(name="y", dtype=np.float32)],
                minimum_deployment_target=getattr(tools.target, f"iOS{ios}"),
                compute_precision=precision,
                skip_model_load=True,
            )

    return make


def save(model: Any, path: Path) -> Path:
    model.save(str(path))
    return path


def compress(tools: Any, kind: str, model: Any) -> Any:
    optimize = tools.optimize.coreml
    linear, palette = optimize.OpLinearQuantizerConfig, optimize.OpPalettizerConfig
    every = {"weight_threshold": 0}
    config: dict[str, Any] = {
        "int8": linear(mode="linear_symmetric", **every),
        "uint8": linear(mode="linear", dtype="uint8", **every),
        "int4 blocks": linear(
            mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=8, **every
        ),
        "palette": palette(mode="uniform", nbits=6, **every),
        "palettes": palette(
            mode="uniform", nbits=4, granularity="per_grouped_channel", group_size=8, **every
        ),
        "sparse": optimize.OpMagnitudePrunerConfig(target_sparsity=0.3, **every),
    }
    run = {
        "palette": optimize.palettize_weights,
        "palettes": optimize.palettize_weights,
        "sparse": optimize.prune_weights,
    }.get(kind, optimize.linear_quantize_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(model, optimize.OptimizationConfig(config[kind]))


def answer(path: Path, x: Array) -> Array:
    return load_program(path).run({"x": x})["y"]


@pytest.mark.parametrize("name", NETS)
def test_program_of_fp32_is_torch_but_for_rounding(
    nets: Nets, convert: Convert, tmp_path: Path, name: str
) -> None:
    golden = nets.get_golden(name)
    path = save(convert(name, is_half=False), tmp_path / "net.mlpackage")
    program = load_program(path)
    assert program.inputs == (TensorSpec("x", Datatype.FP32, (-1, 1, 8, 8)),)
    found = program.run(golden.inputs)["y"]
    assert found.dtype == np.float32
    assert np.abs(found - golden.outputs["y"]).max() < 1e-4


@pytest.mark.parametrize("name", NETS)
def test_program_of_fp16_rounds_as_it_is_stored(
    nets: Nets, convert: Convert, tmp_path: Path, name: str
) -> None:
    golden = nets.get_golden(name)
    path = save(convert(name, is_half=True), tmp_path / "net.mlpackage")
    parity = compare_output("y", golden.outputs["y"], answer(path, golden.inputs["x"]))
    assert parity.sqnr_db is not None
    # Better than 100 dB would be no fp16.
    assert 50 < parity.sqnr_db < 90
    assert parity.top_1 is not None
    assert parity.top_1 >= 0.98


@pytest.mark.parametrize(
    ("name", "kind", "ios"),
    [
        *((name, "int8", 16) for name in NETS),
        *((name, "palette", 16) for name in NETS),
        ("cnn", "uint8", 16),
        ("cnn", "sparse", 16),
        ("encoder", "int4 blocks", 18),
        ("mlp", "palettes", 18),
        ("mlp", "sparse", 18),
    ],
)
def test_compressed_weights_are_what_coremltools_makes_of_them(
    nets: Nets, tools: Any, convert: Convert, tmp_path: Path, name: str, kind: str, ios: int
) -> None:
    x = nets.get_golden(name).inputs["x"]
    small = compress(tools, kind, convert(name, is_half=True, ios=ios))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = tools.optimize.coreml.decompress_weights(small)
    small_path = save(small, tmp_path / "small.mlpackage")
    assert {"const"} != {step.type for step in read_operations(small_path)}
    assert any("constexpr" in step.type for step in read_operations(small_path))
    dense_path = save(dense, tmp_path / "dense.mlpackage")
    assert not any("constexpr" in step.type for step in read_operations(dense_path))
    parity = compare_output("y", answer(dense_path, x), answer(small_path, x))
    assert (parity.sqnr_db or 0) > 60


def read_operations(path: Path) -> Any:
    from coremltools.models.utils import load_spec

    (function,) = load_spec(str(path)).mlProgram.functions.values()
    return function.block_specializations[function.opset].operations


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    """Change the first function's operations in a package's file."""
    from coremltools.models.utils import load_spec

    spec = load_spec(str(path))
    (function,) = spec.mlProgram.functions.values()
    change(function.block_specializations[function.opset].operations)
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(spec.SerializeToString())


def test_unknown_operator_is_named_before_anything_runs(convert: Convert, tmp_path: Path) -> None:
    path = save(convert("mlp", is_half=False), tmp_path / "net.mlpackage")

    def change(operations: Any) -> None:
        for item in operations:
            item.type = "acme_relu" if item.type == "relu" else item.type

    rewrite(path, change)
    with pytest.raises(MilOperatorError, match="does not know the operators acme_relu") as caught:
        load_program(path)
    assert caught.value.operator == "acme_relu"


def test_unknown_parameter_is_not_passed_over(convert: Convert, tmp_path: Path) -> None:
    path = save(convert("mlp", is_half=False), tmp_path / "net.mlpackage")

    def change(operations: Any) -> None:
        for item in operations:
            if item.type == "relu":
                item.inputs["limit"].CopyFrom(item.inputs["x"])

    rewrite(path, change)
    with pytest.raises(MilOperatorError, match=r"operator relu .* unknown parameters limit"):
        load_program(path)


def test_weights_outside_the_package_or_cut_off_are_refused(
    convert: Convert, tmp_path: Path
) -> None:
    path = save(convert("mlp", is_half=False), tmp_path / "net.mlpackage")
    weights = path / "Data/com.apple.CoreML/weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SourceError, match="has no weights at"):
        load_program(path)

    def change(operations: Any) -> None:
        for item in operations:
            value = item.attributes["val"]
            if value.WhichOneof("value") == "blobFileValue":
                value.blobFileValue.fileName = "@model_path/../../../../secret.bin"

    rewrite(path, change)
    with pytest.raises(SourceError, match="outside its own folder"):
        load_program(path)


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.mlpackage").mkdir()
    with pytest.raises(SourceError, match="cannot be read as Core ML"):
        load_program(tmp_path / "net.mlpackage")
    (tmp_path / "net.mlmodel").write_bytes(b"no protobuf at all")
    with pytest.raises(SourceError, match=r"net\.mlmodel"):
        load_program(tmp_path / "net.mlmodel")


def test_packed_elements_begin_with_the_lowest_bits() -> None:
    # coremltools' own example: 2 bits each, five elements in two bytes.
    assert unpack_bits(np.array([0b01_10_11_00, 0b11], np.uint8), 2, 5).tolist() == [0, 3, 2, 1, 3]
    six = np.array([0b11_000001, 0b1111_0000, 0b000000_10], np.uint8)
    assert unpack_bits(six, 6, 4).tolist() == [1, 0b000011, 0b101111, 0]


def test_proof_by_the_reference_interpreter_says_that_it_is_one(
    nets: Nets, convert: Convert, tmp_path: Path
) -> None:
    declared = Declared(
        (TensorSpec("x", Datatype.FP32, (-1, 1, 8, 8)),),
        (TensorSpec("y", Datatype.FP32, (-1, 10)),),
    )
    path = save(convert("mlp", is_half=True), tmp_path / "half.mlpackage")
    (proof,) = prove(
        ModelFile(path / "Manifest.json", ModelFormat.COREML),
        declared,
        nets.get_golden("mlp"),
        get_default_budget(Precision.FP16),
        size_bytes=1,
        venues=find_venues(ModelFormat.COREML, ["ort"]),
        limits=TrialLimits(answer_s=100),
    )
    assert (proof.runtime, proof.label) == (MIL_REFERENCE, MIL_LABEL)
    assert (proof.outcome, proof.reason, proof.agreement) == (Outcome.OK, "", 1.0)
    # It is no Core ML: it says nothing of time and memory.
    assert (proof.p50_ms, proof.load_ms, proof.rss_mb) == ({}, None, None)
