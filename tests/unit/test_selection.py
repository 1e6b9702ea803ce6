"""Artifact selection: who is chosen, who is ruled out, and the reason a person reads."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from platforms.artifact import ArtifactFormat, ArtifactSpec, Precision
from platforms.errors import NoArtifactError
from platforms.selection import Candidate, Verdict, select_artifact
from platforms.spec import (
    Accelerator,
    AcceleratorKind,
    PlatformSpec,
    RuntimeFinding,
    RuntimeStatus,
)
from tests.unit.recorded import detect_recorded

FORMATS: Mapping[str, frozenset[ArtifactFormat]] = {
    "ort": frozenset({ArtifactFormat.ONNX}),
    "litert": frozenset({ArtifactFormat.TFLITE}),
    "openvino": frozenset({ArtifactFormat.OPENVINO, ArtifactFormat.ONNX}),
}
ORT = RuntimeFinding("ort", RuntimeStatus.PROVEN, "1.32.0")


def make_artifact(file: str = "model.onnx", **changes: Any) -> ArtifactSpec:
    artifact = ArtifactSpec(
        file=file,
        format=ArtifactFormat.ONNX,
        precision=Precision.FP32,
        size_bytes=4_000_000,
        sha256=file.encode().hex().ljust(64, "0"),
    )
    return replace(artifact, **changes)


def make_spec(name: str = "rpi4", *runtimes: RuntimeFinding) -> PlatformSpec:
    return replace(detect_recorded(name), runtimes=runtimes or (ORT,))


def judge(artifact: ArtifactSpec, spec: PlatformSpec) -> Candidate:
    (candidate,) = select_artifact([artifact], spec, FORMATS).candidates
    return candidate


def test_first_compatible_artifact_of_the_manifest_is_chosen() -> None:
    tflite = make_artifact("model.tflite", format=ArtifactFormat.TFLITE)
    int8 = make_artifact("model.int8.onnx", precision=Precision.INT8)
    selection = select_artifact([tflite, int8, make_artifact()], make_spec(), FORMATS)
    assert [found.verdict for found in selection.candidates] == [
        Verdict.RULED_OUT,
        Verdict.CHOSEN,
        Verdict.COMPATIBLE,
    ]
    chosen = selection.get_chosen()
    assert chosen is selection.chosen
    assert (chosen.artifact, chosen.runtime) == (int8, "ort")
    assert chosen.reason == "first compatible in the manifest's order; not measured on this box yet"
    assert "model.int8.onnx before it" in selection.candidates[2].reason


def test_candidates_keep_the_manifests_order() -> None:
    files = ["c.onnx", "a.onnx", "b.onnx"]
    selection = select_artifact([make_artifact(file) for file in files], make_spec(), FORMATS)
    assert [found.artifact.file for found in selection.candidates] == files


def test_same_artifact_listed_twice_is_chosen_once() -> None:
    selection = select_artifact([make_artifact(), make_artifact()], make_spec(), FORMATS)
    verdicts = [found.verdict for found in selection.candidates]
    assert verdicts == [Verdict.CHOSEN, Verdict.COMPATIBLE]


def test_second_reader_runs_it_where_the_first_is_not_proven() -> None:
    broken = RuntimeFinding("ort", RuntimeStatus.BROKEN, detail="died with SIGILL")
    proven = RuntimeFinding("openvino", RuntimeStatus.PROVEN)
    assert judge(make_artifact(), make_spec("rpi4", broken, proven)).runtime == "openvino"


def test_missing_runtime_is_ruled_out_with_the_command_that_installs_it() -> None:
    missing = RuntimeFinding("litert", RuntimeStatus.MISSING, detail="no module named …")
    artifact = make_artifact("model.tflite", format=ArtifactFormat.TFLITE)
    found = judge(artifact, make_spec("rpi4", missing))
    assert (found.verdict, found.runtime) == (Verdict.RULED_OUT, None)
    assert found.reason == "runtime litert is missing: pip install 'edgeward[litert]'"


def test_missing_runtime_of_a_user_gives_its_own_remedy() -> None:
    missing = RuntimeFinding("ncnn", RuntimeStatus.MISSING, detail="pip install our-ncnn")
    formats = {"ncnn": frozenset({ArtifactFormat.ONNX})}
    (found,) = select_artifact([make_artifact()], make_spec("rpi4", missing), formats).candidates
    assert found.reason == "runtime ncnn is missing: pip install our-ncnn"


def test_broken_runtime_is_ruled_out_with_what_it_did() -> None:
    broken = RuntimeFinding("ort", RuntimeStatus.BROKEN, detail="died with SIGILL")
    unsupported = RuntimeFinding("openvino", RuntimeStatus.UNSUPPORTED, detail="no build for ARM")
    reason = judge(make_artifact(), make_spec("rpi4", broken, unsupported)).reason
    assert reason == (
        "runtime ort is broken: died with SIGILL; runtime openvino is unsupported: no build for ARM"
    )


def test_runtime_that_was_never_tried_is_ruled_out() -> None:
    spec = replace(make_spec(), runtimes=())
    artifact = make_artifact("model.tflite", format=ArtifactFormat.TFLITE)
    reason = judge(artifact, spec).reason
    assert reason == "runtime litert has not been tried on this box: run `edgeward doctor`"


def test_format_that_no_runtime_reads_is_ruled_out() -> None:
    artifact = make_artifact("model.mlpackage", format=ArtifactFormat.COREML)
    assert judge(artifact, make_spec()).reason == "no runtime of this version reads coreml"


def test_other_architecture_is_ruled_out() -> None:
    artifact = make_artifact(requires_arch=("x86_64", "apple_silicon"))
    reason = judge(artifact, make_spec()).reason
    assert reason == "built for x86_64 or apple_silicon, and this box is aarch64"


def test_missing_cpu_feature_is_ruled_out_by_name() -> None:
    artifact = make_artifact(requires_cpu_flags=("asimd", "asimddp", "i8mm"))
    reason = judge(artifact, make_spec()).reason
    assert reason == "needs the CPU feature asimddp, i8mm, which Cortex-A72 does not have"


def test_missing_accelerator_is_ruled_out() -> None:
    reason = judge(make_artifact(requires_accelerator="nvidia_gpu"), make_spec()).reason
    assert reason == "needs the accelerator nvidia_gpu, and this box has none"


def test_unusable_accelerator_is_ruled_out_with_its_trouble() -> None:
    gpu = Accelerator(AcceleratorKind.NVIDIA_GPU, "Tesla T4", usable=False, detail="no driver")
    spec = replace(make_spec(), accelerators=(gpu,))
    reason = judge(make_artifact(requires_accelerator="nvidia_gpu"), spec).reason
    assert reason == "needs the accelerator nvidia_gpu; Tesla T4 cannot be used: no driver"


def test_unknown_accelerator_is_ruled_out() -> None:
    reason = judge(make_artifact(requires_accelerator="tpu_v9"), make_spec()).reason
    assert "'tpu_v9', which this version of Edgeward does not know" in reason


def test_accelerator_that_is_there_suffices() -> None:
    found = judge(make_artifact(requires_accelerator="nvidia_gpu"), make_spec("x86-server-t4"))
    assert found.verdict is Verdict.CHOSEN


def test_too_little_memory_is_ruled_out_by_what_the_cgroup_allows() -> None:
    reason = judge(make_artifact(min_memory_mb=1000), make_spec("container-half-core")).reason
    assert reason == "needs 1000 MB of memory, and this box allows 536"


def test_file_larger_than_the_memory_is_ruled_out() -> None:
    spec = make_spec("container-half-core")
    reason = judge(make_artifact(size_bytes=700_000_000), spec).reason
    assert reason == "the file alone is 700 MB, and this box allows 536 of memory"


def test_every_reason_against_an_artifact_is_given() -> None:
    artifact = make_artifact(requires_arch=("x86_64",), requires_accelerator="intel_npu")
    reason = judge(artifact, make_spec()).reason
    assert "built for x86_64" in reason
    assert "intel_npu" in reason


def test_no_artifact_left_raises_with_all_files_and_reasons() -> None:
    artifacts = [
        make_artifact("a.onnx", requires_arch=("x86_64",)),
        make_artifact("b.tflite", format=ArtifactFormat.TFLITE),
    ]
    selection = select_artifact(artifacts, make_spec(), FORMATS)
    assert selection.chosen is None
    with pytest.raises(NoArtifactError) as caught:
        selection.get_chosen()
    message = str(caught.value)
    assert "none of 2 artifacts" in message
    for found in selection.candidates:
        assert f"{found.artifact.file}: {found.reason}" in message


def test_model_version_without_artifacts_says_so() -> None:
    with pytest.raises(NoArtifactError, match="has no artifacts"):
        select_artifact([], make_spec(), FORMATS).get_chosen()
