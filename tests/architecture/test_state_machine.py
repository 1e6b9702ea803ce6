"""Every cell of the job transition table, typed out from docs/protocol.md, "Jobs", rule 5."""

from typing import Final

import pytest

from agent.errors import IllegalTransitionError
from agent.jobs import ENDS, JobState, check_transition
from tests.architecture.documents import find_section, iter_rows, read_document

Y: Final = True
N: Final = False

COLUMNS = (
    "queued", "running", "succeeded", "failed", "timed_out", "canceled", "expired", "rejected",
)  # fmt: skip
TABLE: dict[str | None, tuple[bool, ...]] = {
    # to:        queued running succ. failed timed  canc.  exp.   rejected
    None:        (Y,     N,      N,    N,     N,     Y,     Y,     Y),
    "queued":    (N,     Y,      N,    Y,     Y,     Y,     Y,     N),
    "running":   (Y,     N,      Y,    Y,     Y,     Y,     N,     N),
    "succeeded": (N,     N,      N,    N,     N,     N,     N,     N),
    "failed":    (N,     N,      N,    N,     N,     N,     N,     N),
    "timed_out": (N,     N,      N,    N,     N,     N,     N,     N),
    "canceled":  (N,     N,      N,    N,     N,     N,     N,     N),
    "expired":   (N,     N,      N,    N,     N,     N,     N,     N),
    "rejected":  (N,     N,      N,    N,     N,     N,     N,     N),
}  # fmt: skip
CELLS = [
    (before, after, allowed)
    for before, row in TABLE.items()
    for after, allowed in zip(COLUMNS, row, strict=True)
]


def test_the_table_has_every_state() -> None:
    states = {state.value for state in JobState}

    assert set(COLUMNS) == states
    assert {before for before in TABLE if before is not None} == states


@pytest.mark.parametrize(("before", "after", "allowed"), CELLS)
def test_a_job_goes_where_the_table_says_and_nowhere_else(
    before: str | None, after: str, allowed: bool
) -> None:
    source = None if before is None else JobState(before)
    if allowed:
        check_transition(source, JobState(after))
    else:
        with pytest.raises(IllegalTransitionError):
            check_transition(source, JobState(after))


def test_ends_are_the_states_that_nothing_follows() -> None:
    absorbing = {before for before, row in TABLE.items() if before and not any(row)}

    assert {state.value for state in ENDS} == absorbing


def test_the_protocol_shows_the_same_table() -> None:
    rows = list(iter_rows(find_section(read_document("protocol.md"), "### Rules")))
    shown = {row[0]: tuple(cell == "yes" for cell in row[1:]) for row in rows[2:]}

    assert rows[0][1:] == list(COLUMNS)
    assert shown["(new)"] == TABLE[None]
    assert shown["queued"] == TABLE["queued"]
    assert shown["running"] == TABLE["running"]
    for end in COLUMNS[2:]:
        assert shown["any end"] == TABLE[end]
