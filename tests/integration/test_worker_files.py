"""One job over many files: one list, progress on the way, one bad file is one bad entry."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.jobs import Lane
from tests.harness.brokers import QueueProcess
from tests.harness.lone_worker import LoneWorker, make_item, write_row


@pytest.fixture
def worker(tmp_path: Path, queue_broker: QueueProcess) -> Iterator[LoneWorker]:
    worker = LoneWorker(tmp_path, queue_broker, EDGEWARD_LIMITS__RESULT_BYTES="65536")
    worker.start()
    yield worker
    worker.close()


def send_files(worker: LoneWorker, model: str, files: list[str], **changes: Any) -> dict[str, Any]:
    item = make_item({"files": files}, **changes)
    worker.send(model, [item], Lane.BATCH)
    return item


def hear_job(worker: LoneWorker) -> dict[str, Any]:
    [job] = worker.hear()["jobs"]
    assert isinstance(job, dict)
    return job


def test_files_become_one_list_in_their_order(worker: LoneWorker) -> None:
    files = [write_row(worker.inbox / f"{n:02}.npy", n) for n in range(40)]
    item = send_files(worker, "tiny", files)
    job = hear_job(worker)
    assert (job["state"], job["reason"]["code"]) == ("succeeded", "ok")
    output = job["result"]["output"]
    assert [entry["file"] for entry in output] == files
    first = output[1]["output"]["outputs"][0]["data"]
    last = output[39]["output"]["outputs"][0]["data"]
    assert last == pytest.approx([39 * number for number in first], rel=1e-4)
    assert job["result"]["batch_rows"] == 16
    assert (job["result"]["model"], job["result"]["artifact"]) == ("tiny", "model.onnx")
    assert min(job["result"]["timings_ms"].values()) > 0
    progress = worker.heard[-2]
    assert progress["kind"] == "progress"
    told = {"attempt": 1, "done": 40, "total": 40, "unit": "files", "eta_s": 0.0}
    assert progress["job"] == {"id": item["id"], **told}


def test_one_bad_file_is_one_bad_entry(worker: LoneWorker) -> None:
    good = write_row(worker.inbox / "good.npy")
    (worker.inbox / "bad.npy").write_bytes(b"no array")
    send_files(worker, "tiny", ["bad.npy", good, "../secret", "gone.npy"])
    job = hear_job(worker)
    assert job["state"] == "succeeded"
    codes = [entry.get("error", {}).get("code", "ok") for entry in job["result"]["output"]]
    assert codes == ["bad_input_data", "ok", "path_not_allowed", "input_not_found"]


def test_all_bad_files_fail_the_job_with_the_first_one_s_code(worker: LoneWorker) -> None:
    (worker.inbox).mkdir(parents=True)
    (worker.inbox / "bad.npy").write_bytes(b"no array")
    send_files(worker, "tiny", ["gone.npy", "bad.npy"])
    job = hear_job(worker)
    assert (job["state"], job["reason"]["code"]) == ("failed", "input_not_found")
    assert job["result"] is None


def test_slow_list_tells_its_progress_at_most_once_a_second(worker: LoneWorker) -> None:
    files = [write_row(worker.inbox / f"{n:02}.npy") for n in range(30)]
    send_files(worker, "wild", files, params={"sleep_s": 0.1})
    job = hear_job(worker)
    assert job["state"] == "succeeded"
    told = [said["job"] for said in worker.heard if said["kind"] == "progress"]
    done = [step["done"] for step in told]
    assert done == sorted(set(done))
    assert done[-1] == 30
    # 3 s of work: two on the way, one at the end, and one more on a slow machine.
    assert 2 <= len(told) <= 5 + (job["ended_ms"] - job["started_ms"]) // 1000 - 3
    assert all(step["eta_s"] > 0 for step in told[:-1])


def test_list_is_cancelled_between_its_files(worker: LoneWorker) -> None:
    files = [write_row(worker.inbox / f"{n:02}.npy") for n in range(200)]
    pid = worker.pid
    item = send_files(worker, "wild", files, params={"sleep_s": 0.1})
    worker.hear("progress")
    worker.cancel(item["id"])
    job = hear_job(worker)
    assert (job["state"], job["reason"]["code"]) == ("canceled", "canceled")
    assert job["ended_ms"] - job["started_ms"] < 15_000
    assert worker.pid == pid


def test_list_that_goes_on_outlives_its_progress_limit_and_meets_its_run_limit(
    worker: LoneWorker,
) -> None:
    files = [write_row(worker.inbox / f"{n:02}.npy") for n in range(200)]
    send_files(
        worker, "wild", files, params={"sleep_s": 0.2}, timeout_s=4.0, progress_timeout_s=1.5
    )
    job = hear_job(worker)
    assert (job["state"], job["reason"]["code"]) == ("timed_out", "run_timeout")


def test_model_that_does_not_load_fails_the_list_at_once(worker: LoneWorker) -> None:
    files = [write_row(worker.inbox / f"{n:02}.npy") for n in range(3)]
    (worker.data_dir / "models" / "tiny" / "1" / "model.onnx").write_bytes(b"rubbish")
    send_files(worker, "tiny", files)
    job = hear_job(worker)
    assert (job["state"], job["reason"]["code"]) == ("failed", "digest_mismatch")


def test_large_list_goes_to_a_file(worker: LoneWorker) -> None:
    files = [write_row(worker.inbox / "one.npy")] * 1000
    send_files(worker, "tiny", files)
    output = hear_job(worker)["result"]["output"]
    text = (worker.data_dir / output["file"]).read_text()
    assert len(json.loads(text)) == 1000


def test_list_and_single_jobs_share_a_task(worker: LoneWorker) -> None:
    name = write_row(worker.inbox / "one.npy")
    items = [make_item(), make_item({"files": [name, name]}), make_item({"file": name})]
    worker.send("tiny", items, Lane.BATCH)
    jobs = worker.hear()["jobs"]
    assert [job["id"] for job in jobs] == [item["id"] for item in items]
    assert [job["state"] for job in jobs] == ["succeeded"] * 3
