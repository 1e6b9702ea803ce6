"""Budgets as a person writes them, and what an artifact gets of one."""

import pytest

from converters.errors import BudgetError
from converters.evidence.budget import Budget, merge_budgets, parse_budget
from platforms.artifact import Precision


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("", Budget()),
        ("agreement=0.99", Budget(agreement=0.99)),
        ("agreement=0.99, sqnr=20dB", Budget(agreement=0.99, sqnr=20)),
        ("sqnr=7.5", Budget(sqnr=7.5)),
        ("size=0.3,latency=1", Budget(size=0.3, latency=1)),
        ("top5=1,max_abs=0.01,confident=0.95", Budget(top5=1, max_abs=0.01, confident=0.95)),
    ],
)
def test_budget_is_read_and_written(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget
    assert parse_budget(budget.to_text()) == budget


@pytest.mark.parametrize(
    "text",
    [
        "agree=1",
        "agreement",
        "agreement=",
        "agreement=x",
        "agreement=1.1",
        "agreement=-1",
        "sqnr=nan",
        "sqnr=inf",
        "size=-0.1",
        "agreement=1,agreement=1",
    ],
)
def test_bad_budget_is_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        parse_budget(text)


def test_change_of_format_alone_gets_no_allowance() -> None:
    loose = Budget(agreement=0.5, sqnr=1, size=0.1)
    assert merge_budgets(loose, Precision.FP32) == Budget(agreement=1.0, sqnr=60.0)


def test_budget_without_parity_gets_the_precision_s_own() -> None:
    found = merge_budgets(Budget(size=0.3), Precision.INT8)
    assert (found.size, found.agreement) == (0.3, 0.99)
    assert merge_budgets(Budget(sqnr=15), Precision.INT8) == Budget(sqnr=15)
