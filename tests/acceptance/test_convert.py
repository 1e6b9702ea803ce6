"""`edgeward convert`, as somebody runs it who has an ONNX file and some samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.manifest import read_manifest, verify_files
from agent.repository import ModelRepository
from tests.harness.commands import run_edgeward
from tests.harness.known_box import describe_box
from tests.harness.releases import DIGITS, make_pixels
from worker.staging.stage import Stager, StageRequest


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "digits.npz"
    np.savez(path, pixels=make_pixels(160))
    return path


def run_convert(out: Path, samples: Path, *options: object) -> tuple[int, dict[str, Any]]:
    done = run_edgeward(
        "convert",
        DIGITS / "digits.onnx",
        "--quantize=int8",
        "--calibration",
        samples,
        "--name=digits",
        "--version=2.0.0",
        "-o",
        out,
        "--json",
        *options,
        limit_s=200,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.timeout(240)
def test_artifacts_within_budget_make_a_version_that_the_repository_takes(
    tmp_path: Path, samples: Path
) -> None:
    out = tmp_path / "out"
    code, report = run_convert(out, samples, "--to=onnx,openvino", "--targets=x86-avx2")
    assert code == 0, report
    assert any(one["boxes"] == ["x86-avx2"] for one in report["artifacts"])
    made = {(one["format"], one["precision"]): one for one in report["artifacts"]}
    assert set(made) == {(f, p) for f in ("onnx", "openvino") for p in ("fp32", "int8")}
    for one in made.values():
        assert any(proof["outcome"] == "ok" for proof in one["proofs"]), one
    assert made["openvino", "int8"]["size_ratio"] < 0.7
    assert report["golden"]["rows"] == 64
    assert report["warnings"] == []
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "within budget" in page
    # It opens without a network.
    assert "://" not in page.replace("http://www.w3.org", "")
    manifest = read_manifest(out)
    verify_files(manifest, out)
    assert {entry.file for entry in manifest.artifacts} == {
        one["name"] for one in report["artifacts"]
    }
    assert {"arch": ("x86_64",), "cpu_flags": ("avx2",)} in [
        entry.requires.model_dump(exclude_defaults=True) for entry in manifest.artifacts
    ]
    assert (out / "config.pbtxt").read_text().startswith('name: "digits"')
    # The box proves it again, by the golden set that came along.
    version = ModelRepository(tmp_path / "models").add(out)
    stager = Stager(describe_box(), 1, tmp_path / "choices")
    record = stager.stage(StageRequest(version.folder))
    assert record.chosen is not None
    assert record.has_golden


@pytest.mark.timeout(240)
def test_artifact_outside_the_budget_is_refused_with_the_figure(
    tmp_path: Path, samples: Path
) -> None:
    out = tmp_path / "out"
    code, report = run_convert(out, samples, "--to=openvino", "--budget=agreement=1,sqnr=90dB")
    assert code == 5
    plain, small = report["artifacts"]
    assert plain["verdict"] == "published"
    assert small["verdict"] == "refused"
    assert "SQNR" in small["reason"]
    assert "at least 90 asked" in small["reason"]
    assert [entry.file for entry in read_manifest(out).artifacts] == [plain["name"]]


def test_recipe_that_needs_samples_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    done = run_edgeward(
        "convert", DIGITS / "digits.onnx", "--quantize=fp16", "--to=tflite", "-o", folder, "--json"
    )
    report = json.loads(done.stdout)
    assert done.returncode == 5, done.stderr
    assert "EDGEWARD_ONNX2TF_PYTHON" in report["artifacts"][0]["reason"]


@pytest.mark.parametrize(
    ("options", "code", "what"),
    [
        (["--to=word"], 2, "--to"),
        (["--quantize=int3"], 2, "--quantize"),
        (["--budget=agreement=2"], 1, "bad_budget"),
        (["--calibration=nowhere.npz"], 1, "bad_calibration"),
    ],
)
def test_bad_order_is_refused_before_anything_is_written(
    tmp_path: Path, options: list[str], code: int, what: str
) -> None:
    out = tmp_path / "out"
    done = run_edgeward("convert", DIGITS / "digits.onnx", *options, "-o", out, "--json")
    assert done.returncode == code
    assert what in done.stdout + done.stderr
    assert not out.exists()


def test_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run_edgeward("convert", DIGITS / "digits.onnx", "-o", tmp_path)
    assert done.returncode == 1
    assert "output_exists" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
