"""Staging on this machine: real models, real runtimes, processes that die."""

import importlib
from pathlib import Path

import pytest

from agent.choice import ChoiceRecord, Verdict, choice_path, compute_digest
from agent.lifecycle import Policy
from agent.manifest import Tolerance
from agent.repository import ModelRepository
from platforms.runtimes.proof import prove_runtime
from platforms.spec import Arch, Os, PlatformSpec
from tests.harness.releases import DIGITS, write_digits, write_garbage, write_slow
from tests.harness.wild_runtime import install_wild_runtime
from worker.engine.sessions import load_model
from worker.errors import NotProvenError
from worker.staging.preference import find_preference
from worker.staging.stage import Stager, StageRequest
from worker.staging.trial import TrialLimits

QUICK = TrialLimits(answer_s=20.0, point_s=0.05)


def build_spec(*runtimes: str, cpu: str = "a cpu") -> PlatformSpec:
    return PlatformSpec(
        os=Os.LINUX,
        os_version="12",
        arch=Arch.X86_64,
        cpu_model=cpu,
        cpu_flags=(),
        cores=1.0,
        cores_machine=2,
        memory_mb=4000,
        memory_machine_mb=4000,
        python_version="3.11",
        runtimes=tuple(prove_runtime(name) for name in runtimes),
    )


def stage(
    folder: Path,
    tmp_path: Path,
    *,
    spec: PlatformSpec | None = None,
    policy: Policy | None = None,
    active: Path | None = None,
    limits: TrialLimits = QUICK,
) -> ChoiceRecord:
    stager = Stager(spec or build_spec("ort"), 1, tmp_path / "choices")
    return stager.stage(StageRequest(folder, policy or Policy(), active, limits))


def get_refusal(*args: object, **kwargs: object) -> ChoiceRecord:
    with pytest.raises(NotProvenError) as caught:
        stage(*args, **kwargs)  # type: ignore[arg-type]
    return caught.value.record


def test_right_candidates_are_measured_and_the_best_serves(tmp_path: Path) -> None:
    files = {"digits.onnx": DIGITS / "digits.onnx", "digits.int8.onnx": DIGITS / "digits.int8.onnx"}
    folder = write_digits(tmp_path / "v", files=files, tolerance=Tolerance(min_agreement=0.9))
    spec = build_spec("ort", "openvino")
    record = stage(folder, tmp_path, spec=spec)
    chosen = record.chosen
    assert chosen is not None
    tried = {(one.file, one.runtime): one for one in record.trials}
    assert len(tried) == 4
    assert all(one.golden and one.golden.top_1 is not None for one in record.trials)
    assert all((one.load_ms or 0) > 0 and (one.rss_mb or 0) > 0 for one in record.trials)
    best = min(one.p95_ms or 1e9 for one in record.trials if one.verdict is not Verdict.WRONG)
    assert (chosen.p95_ms or 1e9) <= best * 1.05
    assert "p95" in record.reason
    # The engine loads just that one.
    model = load_model(
        folder, spec, 1, prefer=lambda at, box: find_preference(tmp_path / "choices", at, box, 1)
    )
    assert (model.artifact.file, model.runtime) == (chosen.file, chosen.runtime)


def test_choice_of_another_box_does_not_count(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "v")
    stage(folder, tmp_path)
    choices = tmp_path / "choices"
    here, there = build_spec("ort"), build_spec("ort", cpu="another cpu")
    assert find_preference(choices, folder, here, 1) is not None
    assert find_preference(choices, folder, there, 1) is None
    assert find_preference(choices, folder, here, 2) is None


def test_damaged_record_counts_for_nothing(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "v")
    stage(folder, tmp_path)
    choice_path(tmp_path / "choices", compute_digest(folder)).write_text('{"trials": 7')
    assert find_preference(tmp_path / "choices", folder, build_spec("ort"), 1) is None


def test_garbage_is_wrong_however_fast_it_is(tmp_path: Path) -> None:
    bad = write_garbage(tmp_path / "bad.onnx")
    folder = write_digits(tmp_path / "v", files={"digits.int8.onnx": bad})
    record = get_refusal(folder, tmp_path)
    (trial,) = record.trials
    assert trial.verdict is Verdict.WRONG
    assert "agreement" in trial.reason
    assert NotProvenError.code == "update_refused"


def test_garbage_beside_a_right_artifact_costs_only_itself(tmp_path: Path) -> None:
    files = {
        "digits.int8.onnx": write_garbage(tmp_path / "bad.onnx"),
        "digits.onnx": DIGITS / "digits.onnx",
    }
    record = stage(write_digits(tmp_path / "v", files=files), tmp_path)
    assert [one.verdict for one in record.trials] == [Verdict.WRONG, Verdict.CHOSEN]


def test_slower_version_is_refused_beside_the_active_one(tmp_path: Path) -> None:
    active = write_digits(tmp_path / "v1")
    slow = write_slow(tmp_path / "slow.onnx")
    folder = write_digits(tmp_path / "v2", "2.0.0", files={"digits.onnx": slow})
    record = get_refusal(folder, tmp_path, active=active)
    assert record.trials[0].verdict is Verdict.REFUSED
    assert "× the active version's" in record.trials[0].reason
    assert record.baseline is not None
    assert record.trials[0].active is not None
    assert record.trials[0].active.top_1 == 1.0
    allowed = Policy(max_slowdown=1e9)
    assert stage(folder, tmp_path, active=active, policy=allowed).chosen is not None


def test_disagreement_with_the_active_version_is_refused_where_the_policy_says(
    tmp_path: Path,
) -> None:
    active = write_digits(tmp_path / "v1")
    bad = write_garbage(tmp_path / "bad.onnx")
    folder = write_digits(tmp_path / "v2", "2.0.0", files={"digits.onnx": bad}, golden=False)
    policy = Policy(min_agreement=0.9, max_slowdown=1e9)
    record = get_refusal(folder, tmp_path, active=active, policy=policy)
    assert "agrees with the active version in" in record.trials[0].reason
    assert not record.has_golden


def test_golden_set_can_be_asked_for(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "v", golden=False)
    record = get_refusal(folder, tmp_path, policy=Policy(require_golden=True))
    assert "golden" in record.trials[0].reason


def test_memory_limit_ends_the_trial_and_nothing_else(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "v")
    record = get_refusal(folder, tmp_path, limits=TrialLimits(20.0, memory_mb=20.0))
    assert record.trials[0].verdict is Verdict.FAILED
    assert "MB of memory, over the limit of 20" in record.trials[0].reason


@pytest.mark.parametrize(
    ("file", "why"), [("abort.onnx", "SIGABRT"), ("hang.onnx", "hangs"), ("leak.onnx", "leaks")]
)
def test_candidate_that_kills_hangs_or_leaks_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, why: str
) -> None:
    install_wild_runtime(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    folder = write_digits(tmp_path / "v", files={file: DIGITS / "digits.onnx"})
    limits = TrialLimits(answer_s=4.0, point_s=0.05)
    record = get_refusal(folder, tmp_path, spec=build_spec("wild"), limits=limits)
    (trial,) = record.trials
    assert trial.verdict is Verdict.FAILED
    assert why in trial.reason


def test_measured_once_it_is_not_measured_again_until_something_changes(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "v")
    first = stage(folder, tmp_path)
    second = stage(folder, tmp_path)
    assert [one.points for one in second.trials] == [one.points for one in first.trials]
    third = stage(folder, tmp_path, spec=build_spec("ort", cpu="another cpu"))
    assert [one.points for one in third.trials] != [one.points for one in first.trials]


def test_staged_version_stays_inactive(tmp_path: Path) -> None:
    repository = ModelRepository(tmp_path / "models")
    repository.add(write_digits(tmp_path / "v1"))
    added = repository.add(write_digits(tmp_path / "v2", "2.0.0"), activate=False)
    stage(added.folder, tmp_path, active=repository.get_folder("digits"))
    assert repository.get_version("digits").number == 1
