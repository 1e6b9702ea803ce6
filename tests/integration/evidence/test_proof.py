"""A file that loads, runs and is wrong is found, with the figure; so is one that does not run."""

import importlib
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from converters.errors import ConversionCanceledError
from converters.evidence.budget import Budget, get_default_budget, parse_budget
from converters.evidence.proof import (
    Baseline,
    Golden,
    Outcome,
    Proof,
    TrialLimits,
    prove,
    prove_artifact,
)
from converters.evidence.venues import (
    TFLITE_RUNTIME,
    Venue,
    find_runtimes,
    find_venues,
    make_legacy_venue,
)
from converters.task import ModelFile, ModelFormat
from platforms.artifact import Datatype, Precision, TensorSpec
from platforms.runtimes.base import Array, Declared
from tests.harness.wild_runtime import install_wild_runtime
from tests.integration.evidence.conftest import Nets

DECLARED = Declared(
    (TensorSpec("x", Datatype.FP32, (-1, 1, 8, 8)),), (TensorSpec("y", Datatype.FP32, (-1, 10)),)
)
QUICK = TrialLimits(answer_s=60, point_s=0.01)
INT8 = get_default_budget(Precision.INT8)


def prove_onnx(path: Path, golden: Golden, budget: Budget = INT8, **more: Any) -> Proof:
    return prove_artifact(
        ModelFile(path, ModelFormat.ONNX),
        more.pop("runtime", "ort"),
        DECLARED,
        golden,
        budget,
        size_bytes=path.stat().st_size,
        limits=more.pop("limits", QUICK),
        **more,
    )


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, x: Array) -> None:
        self.rows = iter(x)

    def get_next(self) -> dict[str, Array] | None:
        row = next(self.rows, None)
        return None if row is None else {"x": row[None]}


def quantize(nets: Nets, name: str, folder: Path, *, per_channel: bool) -> Path:
    prepared = folder / "prepared.onnx"
    target = folder / f"{name}-{'channel' if per_channel else 'tensor'}.onnx"
    quant_pre_process(nets.get_onnx(name), prepared)
    quantize_static(
        prepared,
        target,
        Calibration(nets.train.x[:64]),
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return target


def test_original_in_another_format_is_within_the_strictest_budget(nets: Nets) -> None:
    golden = nets.get_golden("mlp")
    proof = prove_onnx(nets.get_onnx("mlp"), golden, get_default_budget(Precision.FP32))
    assert (proof.outcome, proof.reason, proof.agreement) == (Outcome.OK, "", 1.0)
    assert (proof.sqnr_db or 0) > 80
    assert proof.p50_ms.keys() == {1, 8}
    assert (proof.load_ms or 0) > 0


def test_garbage_that_loads_and_runs_is_refused_with_the_figure(nets: Nets, tmp_path: Path) -> None:
    model = onnx.load(nets.get_onnx("mlp"))
    rng = np.random.default_rng(1)
    for weights in model.graph.initializer:
        values = numpy_helper.to_array(weights)
        if values.ndim == 2 and values.dtype == np.float32:
            values = rng.permutation(values.reshape(-1)).reshape(values.shape)
            weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    onnx.save(model, tmp_path / "garbage.onnx")
    proof = prove_onnx(tmp_path / "garbage.onnx", nets.get_golden("mlp"))
    assert proof.outcome is Outcome.REFUSED
    assert proof.agreement is not None
    assert proof.agreement < 0.4
    assert f"y: agreement {proof.agreement:.4g}, at least 0.99 asked" in proof.reason


def make_overflowing(folder: Path) -> tuple[Path, Golden]:
    """Return a net of fp16 whose weights left the range, and what fp32 answers."""
    rng = np.random.default_rng(2)
    wide = rng.normal(0, 1e5, (10, 10)).astype(np.float32)
    x = rng.normal(0, 1, (32, 10)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "wide"], ["sums"]),
            helper.make_node("Div", ["sums", "scale"], ["y"]),
        ],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [
            numpy_helper.from_array(wide, "wide"),
            numpy_helper.from_array(np.array(1e4, np.float32), "scale"),
        ],
    )
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    with warnings.catch_warnings():
        # The one word that is said of it: it clips, exits well, and the file runs.
        warnings.simplefilter("ignore")
        narrow = convert_float_to_float16(model, keep_io_types=True)
    onnx.save(narrow, folder / "fp16.onnx")
    return folder / "fp16.onnx", Golden({"x": x}, {"y": x @ wide / 1e4})


def test_fp16_model_that_overflowed_without_a_word_is_refused(tmp_path: Path) -> None:
    path, golden = make_overflowing(tmp_path)
    declared = Declared(
        (TensorSpec("x", Datatype.FP32, (-1, 10)),), (TensorSpec("y", Datatype.FP32, (-1, 10)),)
    )
    proof = prove_artifact(
        ModelFile(path, ModelFormat.ONNX),
        "ort",
        declared,
        golden,
        get_default_budget(Precision.FP16),
        size_bytes=1,
        limits=QUICK,
    )
    assert proof.outcome is Outcome.REFUSED
    assert proof.sqnr_db is not None
    assert f"y: SQNR {proof.sqnr_db:.4g} dB, at least 30 asked" in proof.reason
    # All answers are numbers: nothing but the comparison can see it.
    assert proof.parities[0].max_abs is not None
    assert np.isfinite(proof.parities[0].max_abs)


def test_fp16_file_keeps_its_tensor_names_on_every_runtime(nets: Nets, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        narrow = convert_float_to_float16(onnx.load(nets.get_onnx("mlp")), keep_io_types=True)
    onnx.save(narrow, tmp_path / "fp16.onnx")
    budget = get_default_budget(Precision.FP16)
    for runtime in ("ort", "openvino"):
        # OpenVINO knows each tensor by two names here, and would tell the wrong one.
        proof = prove_onnx(tmp_path / "fp16.onnx", nets.get_golden("mlp"), budget, runtime=runtime)
        assert (proof.outcome, proof.reason) == (Outcome.OK, "")


def test_one_row_of_nan_refuses_whatever_the_budget(nets: Nets, tmp_path: Path) -> None:
    model = onnx.load(nets.get_onnx("mlp"))
    scores = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["scores" if name == scores else name for name in node.output]
    golden = nets.get_golden("mlp")
    worst = np.sort(golden.outputs["y"].max(axis=1))[-2:].mean()
    limit = numpy_helper.from_array(np.array(worst, np.float32), "limit")
    # The square root of what is below 0 for the one row with the largest score.
    model.graph.initializer.append(limit)
    model.graph.node.extend(
        [
            helper.make_node("Sub", ["limit", "scores"], ["room"]),
            helper.make_node("Sqrt", ["room"], ["root"]),
            helper.make_node("Mul", ["root", "root"], ["squared"]),
            helper.make_node("Sub", ["limit", "squared"], [scores]),
        ]
    )
    onnx.save(model, tmp_path / "nan.onnx")
    proof = prove_onnx(tmp_path / "nan.onnx", golden, parse_budget("agreement=0.5"))
    assert proof.outcome is Outcome.REFUSED
    assert "NaN or infinity" in proof.reason


def test_weights_per_tensor_ruin_a_depthwise_net_and_per_channel_do_not(
    nets: Nets, tmp_path: Path
) -> None:
    golden = nets.get_golden("unbalanced")
    budget = parse_budget("agreement=0.9,sqnr=15dB")
    found = [
        prove_onnx(quantize(nets, "unbalanced", tmp_path, per_channel=how), golden, budget)
        for how in (False, True)
    ]
    assert [proof.outcome for proof in found] == [Outcome.REFUSED, Outcome.OK]
    assert "agreement" in found[0].reason
    assert (found[0].agreement or 0) < 0.8


def test_dynamic_int8_tflite_is_refused_for_tflite_runtime_and_right_in_litert(
    nets: Nets, tmp_path: Path, legacy_python: Path
) -> None:
    from ai_edge_quantizer import quantizer, recipe

    source, golden = nets.get_tflite()
    target = tmp_path / "dynamic.tflite"
    made = quantizer.Quantizer(str(source), recipe.dynamic_wi8_afp32())
    target.write_bytes(made.quantize(None, enable_progress_report=False).quantized_model)
    venues = find_venues(ModelFormat.TFLITE, ["litert"], legacy_python)
    proofs = {
        path.name: prove(
            ModelFile(path, ModelFormat.TFLITE),
            DECLARED,
            golden,
            INT8,
            size_bytes=path.stat().st_size,
            venues=venues,
            limits=QUICK,
        )
        for path in (source, target)
    }
    found = {
        (name, proof.runtime): proof.outcome for name, pair in proofs.items() for proof in pair
    }
    assert found == {
        ("small.tflite", "litert"): Outcome.OK,
        ("small.tflite", TFLITE_RUNTIME): Outcome.OK,
        ("dynamic.tflite", "litert"): Outcome.OK,
        ("dynamic.tflite", TFLITE_RUNTIME): Outcome.REFUSED,
    }
    here, there = proofs["dynamic.tflite"]
    assert (here.agreement or 0) >= 0.99
    assert (there.agreement or 1) < 0.4
    assert (here.version, there.version) == ("2.3.0", "2.14.0")


@pytest.fixture
def wild(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install_wild_runtime(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "why", "limits"),
    [
        ("abort", "SIGABRT", QUICK),
        ("hang", "hangs", TrialLimits(answer_s=2)),
        ("armed", "SIGSEGV", QUICK),
        ("calm", "MB of memory", TrialLimits(answer_s=60, memory_mb=10)),
    ],
)
def test_what_a_runtime_does_to_its_process_is_a_verdict(
    nets: Nets, wild: Path, name: str, why: str, limits: TrialLimits
) -> None:
    path = wild / f"{name}.onnx"
    shutil.copy(nets.get_onnx("mlp"), path)
    (wild / "armed-segv").touch()
    proof = prove_onnx(path, nets.get_golden("mlp"), runtime="wild", limits=limits)
    assert proof.outcome is Outcome.FAILED
    assert why in proof.reason


def test_file_without_a_runtime_here_is_not_run(tmp_path: Path, nets: Nets) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(b"")
    golden = nets.get_golden("mlp")
    model = ModelFile(path, ModelFormat.TFLITE)
    (none,) = prove(model, DECLARED, golden, INT8, size_bytes=1, venues=[])
    assert (none.outcome, none.reason) == (
        Outcome.NOT_RUN,
        "no runtime for tflite is installed here",
    )
    absent = Venue("acme", "acme", target="acme_runtime_that_is_nowhere:Runtime")
    (missing,) = prove(model, DECLARED, golden, INT8, size_bytes=1, venues=[absent])
    assert missing.outcome is Outcome.NOT_RUN
    assert "acme_runtime_that_is_nowhere" in missing.reason


def test_fixed_batch_is_filled_up(nets: Nets, tmp_path: Path) -> None:
    model = onnx.load(nets.get_onnx("mlp"))
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 7
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "seven.onnx")
    proof = prove_onnx(tmp_path / "seven.onnx", nets.get_golden("mlp"))
    assert (proof.outcome, proof.reason, proof.agreement) == (Outcome.OK, "", 1.0)
    assert proof.p50_ms.keys() == {7}


def test_outputs_under_another_name_are_a_failure(nets: Nets) -> None:
    golden = nets.get_golden("mlp")
    renamed = Golden(golden.inputs, {"logits": golden.outputs["y"]})
    proof = prove_onnx(nets.get_onnx("mlp"), renamed)
    assert proof.outcome is Outcome.FAILED
    assert "there is no output 'logits', only y" in proof.reason


def test_size_and_latency_are_judged_by_the_baseline(nets: Nets, tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    shutil.copy(nets.get_onnx("mlp"), copy)
    baseline = Baseline(ModelFile(copy, ModelFormat.ONNX), "ort", copy.stat().st_size)
    budget = parse_budget("size=0.3,latency=0.0001,agreement=0.9")
    proof = prove_onnx(nets.get_onnx("mlp"), nets.get_golden("mlp"), budget, baseline=baseline)
    assert proof.outcome is Outcome.REFUSED
    assert "1.00 × the uncompressed size, at most 0.3 asked" in proof.reason
    assert "× the uncompressed latency, at most 0.0001 asked" in proof.reason
    assert proof.latency_ratio.keys() == {1, 8}


def test_baseline_that_does_not_run_is_no_word_on_the_candidate(nets: Nets, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    baseline = Baseline(ModelFile(tmp_path / "broken.onnx", ModelFormat.ONNX), "ort", 100)
    proof = prove_onnx(nets.get_onnx("mlp"), nets.get_golden("mlp"), baseline=baseline)
    assert proof.outcome is Outcome.OK
    assert proof.latency_ratio == {}


def test_trial_ends_when_it_is_called_off(nets: Nets) -> None:
    off = threading.Event()
    told: list[str] = []

    def report(share: float, doing: str) -> None:
        told.append(doing)
        if doing == "golden inputs":
            off.set()

    with pytest.raises(ConversionCanceledError):
        prove_onnx(
            nets.get_onnx("mlp"), nets.get_golden("mlp"), report=report, is_canceled=off.is_set
        )
    assert told == ["loading", "golden inputs"]


def test_every_format_has_its_venues(tmp_path: Path) -> None:
    everything = ["ort", "litert", "openvino", "torchscript", "coreml"]
    assert find_runtimes(ModelFormat.ONNX, everything) == ["ort", "openvino"]
    assert find_runtimes(ModelFormat.COREML, everything) == ["coreml"]
    assert find_runtimes(ModelFormat.COREML, ["ort"]) == ["mil-reference"]
    assert find_runtimes(ModelFormat.CALLABLE, everything) == []
    legacy = make_legacy_venue(tmp_path)
    assert find_venues(ModelFormat.TFLITE, ["litert"], tmp_path)[1:] == [legacy]
    assert find_venues(ModelFormat.ONNX, [], tmp_path) == []
