from collections import Counter

import pytest

from tests.fault.chaos.console import Records
from tests.fault.chaos.plan import SHARES, WIRE_LINKS, Fault, Kind, make_plan
from tests.fault.chaos.scenario import find_percentile


@pytest.mark.parametrize(("jobs", "kills"), [(1, 0), (10, 1), (1000, 40), (20_000, 400)])
def test_a_plan_has_exactly_the_jobs_and_kills_that_were_asked_for(jobs: int, kills: int) -> None:
    for seed in range(5):
        plan = make_plan(jobs, kills, seed)

        assert (plan.jobs, plan.kills) == (jobs, kills)


def test_the_seed_decides_the_plan() -> None:
    assert make_plan(500, 20, 3) == make_plan(500, 20, 3)
    assert make_plan(500, 20, 3) != make_plan(500, 20, 4)


def test_whatever_is_broken_is_healed_in_the_same_act() -> None:
    for act in make_plan(2000, 100, 1).acts:
        lasting = [step for step in act.steps if step.fault and step.fault is not Fault.KILL]
        begun = Counter((s.fault, s.target) for s in lasting if not s.is_healing)
        healed = Counter((s.fault, s.target) for s in lasting if s.is_healing)

        assert begun == healed
        assert [step.at_s for step in act.steps] == sorted(step.at_s for step in act.steps)


def test_what_is_left_out_is_nowhere_in_the_plan() -> None:
    without = ("poison", "endless", "slow", "flap", "stop", *WIRE_LINKS)
    plan = make_plan(2000, 100, 1, without=without)
    steps = [step for act in plan.acts for step in act.steps]

    assert not {kind for step in steps for kind in step.jobs} & set(without)
    assert not {step.fault for step in steps} & set(without)
    assert not {step.target for step in steps} & set(WIRE_LINKS)


def test_a_large_plan_has_every_sort_of_job() -> None:
    steps = [step for act in make_plan(5000, 100, 1).acts for step in act.steps]
    kinds = {kind for step in steps for kind in step.jobs}

    assert kinds == {*SHARES, Kind.ENDLESS, Kind.POISON}


def test_a_console_acknowledges_up_to_the_first_hole_and_counts_gaps_as_received() -> None:
    records = Records()
    seen = []
    for first, last in [(2, 2), (1, 1), (5, 5), (3, 3), (4, 4), (9, 9), (6, 8), (2, 2)]:
        records.add(first, last)
        seen.append(records.upto)

    assert seen == [0, 2, 2, 3, 5, 5, 9, 9]
    assert records.hole_since is None


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.95, 0.0), ([3.0], 0.95, 3.0), (range(1, 101), 0.95, 95), (range(1, 41), 0.95, 38)],
)
def test_a_percentile_is_one_of_the_values(
    values: list[float], share: float, expected: float
) -> None:
    assert find_percentile(values, share) == expected
