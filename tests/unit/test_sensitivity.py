"""The search for what to leave in full precision, on nets whose noise is known."""

import math
from collections.abc import Callable

import pytest

from converters.compression.sensitivity import Budget, Score, Search, TrialKind

NODES = [f"n{number}" for number in range(60)]
BUDGET = Budget(min_agreement=None, min_sqnr_db=20.0)


def add_noises(noises: dict[str, float]) -> Callable[[frozenset[str]], Score]:
    """Return a net whose nodes' noises add up; what is not named brings a little."""

    def measure(left_out: frozenset[str]) -> Score:
        noise = sum(noises.get(node, 1e-6) for node in NODES if node not in left_out)
        return Score(None, -10 * math.log10(noise) if noise else math.inf, 100 + len(left_out))

    return measure


def test_nothing_is_left_out_where_the_plain_form_holds_the_budget() -> None:
    found = Search(NODES, add_noises({}), BUDGET).run()
    assert (found.left_out, len(found.trials)) == ((), 1)
    assert found.best.is_within_budget


@pytest.mark.parametrize("bad", [["n0"], ["n59"], ["n17", "n18", "n44"], ["n3", "n30", "n50"]])
def test_noisy_nodes_are_found_among_many_within_the_trials(bad: list[str]) -> None:
    found = Search(NODES, add_noises(dict.fromkeys(bad, 0.1)), BUDGET).run()
    assert found.best.is_within_budget
    assert set(bad) <= set(found.left_out)
    assert len(found.left_out) <= len(bad) + 2
    assert len(found.trials) <= 40


def test_fewest_nodes_that_hold_the_budget_are_left_out() -> None:
    noises = {"n5": 0.1, "n20": 0.05, "n40": 0.004, "n41": 0.003}
    found = Search(NODES[:45], add_noises(noises), BUDGET, max_trials=80).run()
    assert set(found.left_out) == {"n5", "n20"}


def test_measured_score_decides_where_leaving_out_more_makes_it_worse() -> None:
    measured = {0: 5.0, 1: 9.0, 2: 30.0, 3: 8.0}

    def measure(left_out: frozenset[str]) -> Score:
        if len(left_out) == 3:
            return Score(None, {"abc": 20.0, "abd": 20.0}.get("".join(sorted(left_out)), 1.0), 1)
        return Score(None, measured[len(left_out)], 1)

    found = Search(list("abcd"), measure, BUDGET).run()
    assert len(found.left_out) == 2
    assert found.best.score.sqnr_db == 30.0


def test_best_measured_candidate_is_returned_where_none_holds_the_budget() -> None:
    # Each brings far too much.
    found = Search(NODES, add_noises(dict.fromkeys(NODES, 0.1)), BUDGET).run()
    candidates = [trial for trial in found.trials if trial.kind is not TrialKind.ALONE]
    assert not found.best.is_within_budget
    assert found.best.score.sqnr_db == max(trial.score.sqnr_db for trial in candidates)
    assert found.why_ended in {"no candidate is within the budget", "40 trials were made"}


def test_no_more_trials_are_made_than_allowed() -> None:
    noises = {"n5": 0.1, "n20": 0.05}
    found = Search(NODES, add_noises(noises), BUDGET, max_trials=7).run()
    assert len(found.trials) == 7
    assert found.why_ended == "7 trials were made"


def test_no_trial_begins_after_the_time_but_the_first() -> None:
    now = iter(range(0, 1000, 10))
    found = Search(
        NODES,
        add_noises(dict.fromkeys(NODES, 0.1)),
        BUDGET,
        time_limit_s=35,
        clock=lambda: float(next(now)),
    ).run()
    assert len(found.trials) == 4
    assert found.why_ended == "the time was over"


@pytest.mark.parametrize("sqnr_db", [math.nan, -math.inf])
def test_candidate_that_fails_or_gives_nan_never_holds_a_budget(sqnr_db: float) -> None:
    assert not Budget(min_sqnr_db=20).is_held(Score(1.0, sqnr_db, 1))
    assert Score(None, sqnr_db, 1).noise == math.inf


def test_agreement_is_asked_of_classes_only() -> None:
    budget = Budget(min_agreement=0.99, min_sqnr_db=20)
    assert budget.is_held(Score(None, 30.0, 1))
    assert budget.is_held(Score(0.99, 20.0, 1))
    assert not budget.is_held(Score(0.98, 30.0, 1))


def test_progress_is_told_and_trials_are_json_ready() -> None:
    told: list[float] = []
    found = Search(
        NODES[:4],
        add_noises({"n1": 0.1}),
        BUDGET,
        report=lambda share, doing: told.append(share),
    ).run()
    assert told == sorted(told)
    assert len(told) == len(found.trials)
    assert found.trials[0].to_json()["kind"] == "plain"
    assert (
        Search(["a"], lambda out: Score(None, math.inf, 1), BUDGET).run().best.to_json()["sqnr_db"]
        is None
    )
