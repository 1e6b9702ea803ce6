"""`edgeward bench` as a user types it: real models, real children, real misfortune."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from onnx import TensorProto, helper, save

from console.models.magika import write_magika_version
from tests.harness.commands import PROGRAM, clean_environment, run_edgeward
from tests.harness.waiting import wait_until
from tests.harness.wild_runtime import install_wild_runtime

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "console" / "models" / "digits"
QUICK = ("--seconds", "0.06", "--rounds", "2", "--concurrency", "1,2", "--batch", "1,3")
ORT = ("--runtime", "ort")
_LIMIT_S = 60.0


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    env = install_wild_runtime(tmp_path_factory.mktemp("site"))
    return {"PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], str(ROOT)])}


@pytest.fixture(scope="module")
def wild_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of its own: what this box can run is kept in it."""
    return tmp_path_factory.mktemp("wild")


def bench(
    data_dir: Path, *arguments: object, env: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    done = run_edgeward("bench", *arguments, "--json", "--data-dir", data_dir, env=env)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def copy_digits(path: Path) -> Path:
    shutil.copyfile(DIGITS / "digits.onnx", path)
    return path


@pytest.fixture(scope="module")
def kept(data_dir: Path) -> Path:
    """A folder with everything that one measurement can write."""
    folder = data_dir / "kept"
    files = ("--report", folder, "--plot", folder / "p.png", "--save-baseline", folder / "b.json")
    done = run_edgeward("bench", DIGITS, *QUICK, *ORT, *files, "--data-dir", data_dir)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_every_artifact_is_measured_at_every_load(kept: Path) -> None:
    report = json.loads((kept / "bench.json").read_text())
    assert report["schema"] == "edgeward.bench/v1"
    measured = [item for item in report["configurations"] if item["runtime"] == "ort"]
    assert [item["artifact"] for item in measured] == ["digits.onnx", "digits.int8.onnx"]
    assert [item["is_chosen"] for item in measured] == [True, False]
    for item in measured:
        assert item["status"] == "measured"
        loads = [(point["concurrency"], point["batch"]) for point in item["points"]]
        assert loads == [(1, 1), (2, 1), (1, 3)]
        assert item["load_ms"]["rounds"] == 2
        assert 0 < item["base_rss_mb"]["median"] < item["rss_mb"]["median"]
        for point in item["points"]:
            assert point["runs"] > 0
            assert point["rows_per_s"]["min"] > 0
            p50, p95, p99 = (point[f"p{share}_ms"]["median"] for share in (50, 95, 99))
            assert 0 < p50 <= p95 <= p99


def test_table_report_and_picture_say_the_same(kept: Path) -> None:
    shown, text = (kept / "stdout.txt").read_text(), (kept / "bench.md").read_text()
    for part in ("digits.int8.onnx", "ort 1.", "2 × 1", "made-up pictures"):
        assert part in shown
        assert part in text
    assert "![Throughput and latency](bench.svg)" in text
    svg = (kept / "bench.svg").read_text()
    assert "digits.int8.onnx · ort" in svg
    assert (kept / "p.png").read_bytes().startswith(b"\x89PNG")


def test_baseline_holds_until_it_is_beaten_by_far(kept: Path, data_dir: Path) -> None:
    baseline = json.loads((kept / "b.json").read_text())
    for item in baseline["configurations"]:
        for point in item["points"]:
            for figure, factor in (("p95_ms", 1e-6), ("rows_per_s", 1e6)):
                point[figure] = {k: v * factor for k, v in point[figure].items() if k != "rounds"}
                # Without a range there is no noise to excuse it.
                point[figure] = {**dict.fromkeys(point[figure], point[figure]["median"])}
                point[figure]["rounds"] = 2
    path = kept / "impossible.json"
    path.write_text(json.dumps(baseline))
    code, document = bench(data_dir, DIGITS, *QUICK, *ORT, "--against", path)
    assert code == 1
    figures = {item["figure"] for item in document["against"]["regressions"]}
    assert "p95_ms" in figures

    for item in baseline["configurations"]:
        for point in item["points"]:
            for figure, worst in (("p95_ms", 1e9), ("rows_per_s", 1e-9)):
                point[figure] = {"median": worst, "min": worst, "max": worst, "rounds": 2}
    path.write_text(json.dumps(baseline))
    code, document = bench(data_dir, DIGITS, *QUICK, *ORT, "--against", path)
    assert (code, document["against"]["is_worse"]) == (0, False)
    assert document["against"]["compared"] >= 6


def test_baseline_of_another_model_is_refused_unless_forced(kept: Path, data_dir: Path) -> None:
    options = (DIGITS / "digits.onnx", *QUICK, *ORT, "--against", kept / "b.json")
    code, document = bench(data_dir, *options)
    assert (code, document["error"]["code"]) == (2, "baseline_mismatch")
    assert "sha256" in document["error"]["message"]
    code, document = bench(data_dir, *options, "--force")
    assert code in (0, 1), "what is slower on a busy machine is not this test's matter"
    assert "configurations" in document


def test_model_of_file_bytes_is_fed_through_its_own_preprocessing(
    data_dir: Path, tmp_path: Path
) -> None:
    write_magika_version(tmp_path)
    code, document = bench(data_dir, tmp_path, *QUICK, *ORT)
    (item,) = document["configurations"]
    assert (code, item["status"], len(item["points"])) == (0, "measured", 3)
    assert document["conditions"]["inputs"] == "16 files of random bytes"


def test_shape_gives_free_axes_their_lengths(data_dir: Path, tmp_path: Path) -> None:
    path = write_net(tmp_path / "free.onnx", "Relu", ["n", "m"])
    bench_it = (path, *QUICK, *ORT, "--shape")
    assert bench(data_dir, *bench_it, "x=7")[0] == 0
    code, document = bench(data_dir, *bench_it, "z=7")
    assert code == 1
    assert "no input z" in document["configurations"][0]["detail"]


def write_net(path: Path, operator: str, shape: list[Any]) -> Path:
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    opset = [helper.make_opsetid("", 18)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def test_fixed_batch_is_left_out_and_said(data_dir: Path, tmp_path: Path) -> None:
    path = write_net(tmp_path / "fixed.onnx", "Relu", [1, 4])
    code, document = bench(data_dir, path, *QUICK, *ORT)
    (item,) = document["configurations"]
    assert (code, len(item["points"])) == (0, 2)
    assert "3 rows left out: the model's batch is fixed" in item["detail"]


def test_crash_at_load_costs_its_row_only(
    wild_data_dir: Path, wild: dict[str, str], tmp_path: Path
) -> None:
    model = copy_digits(tmp_path / "abort.onnx")
    options = (*ORT, "--runtime", "wild")
    code, document = bench(wild_data_dir, model, *QUICK, *options, env=wild)
    found = {item["runtime"]: item for item in document["configurations"]}
    assert code == 1
    assert found["ort"]["status"] == "measured"
    assert found["wild"]["status"] == "failed"
    assert "SIGABRT" in found["wild"]["detail"]
    assert "something terrible" in found["wild"]["detail"]


def test_file_that_is_no_model_has_a_row_with_the_reason(data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes((DIGITS / "digits.onnx").read_bytes()[:5000])
    code, document = bench(data_dir, path, *QUICK, *ORT)
    (item,) = document["configurations"]
    assert (code, item["status"]) == (1, "failed")
    assert "model_load_failed" in item["detail"]


def test_runtime_that_is_not_here_is_ruled_out_with_its_reason(
    data_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.mlpackage"
    path.mkdir()
    (path / "Manifest.json").write_text("{}")
    code, document = bench(data_dir, path, *QUICK)
    assert code == 1
    assert {item["status"] for item in document["configurations"]} == {"ruled_out"}
    assert all(item["detail"] for item in document["configurations"])


def test_stress_counts_failures_and_fails(
    wild_data_dir: Path, wild: dict[str, str], tmp_path: Path
) -> None:
    model = copy_digits(tmp_path / "flaky.onnx")
    options = ("--runtime", "wild", "--concurrency", "4", "--stress", "0.5")
    code, document = bench(wild_data_dir, model, *options, env=wild)
    (item,) = document["configurations"]
    stress = item["stress"]
    assert code == 1
    failed = stress["failures"]["inference_failed"]
    # Threads share the counter; every tenth run fails, the first one having been the warm-up.
    assert failed == (stress["runs"] + failed + 1) // 10
    assert "every tenth run fails" in stress["first_failure"]


def test_stress_without_failures_succeeds(data_dir: Path) -> None:
    options = ("--artifact", "digits.onnx", *ORT, "--concurrency", "2")
    code, document = bench(data_dir, DIGITS, *options, "--stress", "0.5")
    stress = document["configurations"][0]["stress"]
    assert code == 0
    assert stress["failures"] == {}
    assert stress["runs"] > 0
    assert 0 < stress["p50_ms"] <= stress["p99_ms"]
    assert stress["longest_gap_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("nosuch",), 3, "unknown_model"),
        (("./nosuch.onnx",), 1, "bad_input_file"),
        ((str(DIGITS), "--artifact", "nosuch.onnx"), 1, "bad_input_file"),
        ((str(DIGITS), "--plot", "picture.doc"), 1, "bad_input_file"),
        ((str(DIGITS), "--against", "nosuch.json"), 1, "bad_input_file"),
    ],
)
def test_mistake_is_told_before_the_work(
    data_dir: Path, arguments: tuple[str, ...], code: int, error: str
) -> None:
    found, document = bench(data_dir, *arguments)
    assert (found, document["error"]["code"]) == (code, error)


@pytest.mark.parametrize(
    "option", [("--concurrency", "1,x"), ("--batch", "0"), ("--shape", "3,4"), ("--shape", "x=3,a")]
)
def test_option_of_another_form_is_a_usage_error(data_dir: Path, option: tuple[str, str]) -> None:
    done = run_edgeward("bench", DIGITS, *option, "--data-dir", data_dir)
    assert done.returncode == 2, done.stderr


def find_children(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Return the measuring children that have loaded their Python."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
        return [item for item in below if "platforms.measuring.child" in item.cmdline()]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_end_of_the_command_leaves_no_child_behind(
    data_dir: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    # A folder that is up to date, so that no runtime is being proven at that moment.
    run_edgeward("bench", "nosuch", "--data-dir", data_dir)
    options = ("--seconds", "600", *ORT, "--data-dir", str(data_dir))
    command = [PROGRAM, "bench", str(DIGITS), *options]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=clean_environment())
    try:
        wait_until(lambda: bool(find_children(process)), _LIMIT_S, "a model is being measured")
        children = find_children(process)
        process.send_signal(sent)
        code = process.wait(_LIMIT_S)
        wait_until(
            lambda: not any(_is_alive(child) for child in children), _LIMIT_S, "no child is left"
        )
    finally:
        process.kill()
        process.wait()
    assert code == (130 if sent is signal.SIGINT else -sent)


def _is_alive(child: psutil.Process) -> bool:
    try:
        return bool(child.is_running() and child.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
