"""Every cell of the rollout's state machines, typed out."""

from fractions import Fraction

import pytest

from console.errors import RolloutOrderError
from console.rollout.plan import Thresholds
from console.rollout.progress import (
    Lane,
    LaneState,
    Member,
    MemberState,
    News,
    Order,
    Progress,
    RolloutState,
    conclude,
    follow,
    judge,
    obey,
)

NEWS = ("ask", "working", "success", "failure", "pin", "silence", "foreign", "recall")
# One row a state; a column for each news, in the order above; `-` changes nothing.
MEMBERS = {
    "waiting": "asked - - - - - - -",
    "asked": "- - succeeded failed pinned unknown superseded returning",
    "unknown": "- asked succeeded failed pinned - superseded returning",
    "pinned": "- - succeeded failed - - superseded returning",
    "succeeded": "- - - - - - - returning",
    "failed": "- - - - - - - returning",
    "superseded": "- - - - - - - -",
    "returning": "- - returned not_returned not_returned not_returned superseded -",
    "not_returned": "- - returned - - - superseded returning",
    "returned": "- - - - - - - -",
}
STATES = ("running", "paused", "stalled", "stopped", "done", "aborted", "rolling_back")
# One row an order; a column for each state above and `rolled_back`; `!` is refused.
ORDERS = {
    "pause": "paused paused paused ! ! ! ! !",
    "resume": "running running running ! ! ! rolling_back !",
    "abort": "aborted aborted aborted aborted ! aborted ! !",
    "roll_back": " ".join(["rolling_back"] * 8),
}
LIMITS = Thresholds(Fraction(95, 100), Fraction(5, 100))


def test_table_has_every_state_and_every_news() -> None:
    assert set(MEMBERS) == set(MemberState)
    assert list(NEWS) == list(News)
    assert set(ORDERS) == set(Order)
    assert {*STATES, "rolled_back"} == set(RolloutState)


@pytest.mark.parametrize("state", MEMBERS)
@pytest.mark.parametrize(("at", "news"), list(enumerate(NEWS)))
def test_member_follows_the_table(state: str, at: int, news: str) -> None:
    expected = MEMBERS[state].split()[at]
    after = follow(MemberState(state), News(news))
    assert after == (state if expected == "-" else expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("at", "state"), list(enumerate([*STATES, "rolled_back"])))
def test_rollout_obeys_the_table(order: str, at: int, state: str) -> None:
    expected = ORDERS[order].split()[at]
    if expected == "!":
        with pytest.raises(RolloutOrderError):
            obey(RolloutState(state), Order(order))
    else:
        assert obey(RolloutState(state), Order(order)) == expected


def make_members(*groups: str) -> list[Member]:
    """Return members by groups of letters: Waiting Asked Succeeded Failed Unknown Pinned."""
    letters = {
        "w": MemberState.WAITING,
        "a": MemberState.ASKED,
        "s": MemberState.SUCCEEDED,
        "f": MemberState.FAILED,
        "u": MemberState.UNKNOWN,
        "p": MemberState.PINNED,
        "x": MemberState.SUPERSEDED,
    }
    return [
        Member(f"box-{group}-{at}", "class", group, letters[letter])
        for group, text in enumerate(groups, start=1)
        for at, letter in enumerate(text)
    ]


def describe(lane: Lane) -> str:
    return f"{lane.state} {lane.group} {lane.reason.code}".strip()


# What a class does next, by its members in groups 1 and 2 and the group that was asked last.
CASES = [
    ("nothing was asked yet", 0, ["w", "ww"], "running 1"),
    ("the first is at work", 1, ["a", "ww"], "running 1"),
    ("the first has it", 1, ["s", "ww"], "running 2"),
    ("the first failed", 1, ["f", "ww"], "stopped 1 too_many_failures"),
    ("the first is silent", 1, ["u", "ww"], "stalled 1 nobody_answers"),
    ("the first is pinned", 1, ["p", "ww"], "stalled 1 nobody_answers"),
    ("the first was asked for something else", 1, ["x", "ww"], "stalled 1 nobody_answers"),
    ("who is silent does not count", 1, ["su", "ww"], "running 2"),
    ("who is pinned does not count", 1, ["sp", "ww"], "running 2"),
    ("who is at work counts as not having it", 1, ["sa", "ww"], "running 1"),
    ("95 of 100 are enough, the others at work", 1, ["s" * 95 + "a" * 5, "w"], "running 2"),
    ("94 of 100 are not", 1, ["s" * 94 + "a" * 6, "w"], "running 1"),
    ("one failure of 20 is too few to stop", 1, ["s" * 19 + "f", "w"], "running 2"),
    ("two of 20 stop it", 1, ["s" * 18 + "ff", "w"], "stopped 1 too_many_failures"),
    ("4 of 100 do not stop", 1, ["s" * 90 + "f" * 4 + "a" * 6, "w"], "running 1"),
    ("5 of 100 stop, whoever is at work", 1, ["a" * 95 + "f" * 5], "stopped 1 too_many_failures"),
    ("2 of 40 who are not silent", 1, ["ff" + "a" * 38 + "u" * 60], "stopped 1 too_many_failures"),
    ("too few have it, one may come", 1, ["s" * 18 + "fp", "w"], "stalled 1 too_few_successes"),
    ("the last group is at work", 2, ["s", "sa"], "running 2"),
    ("the last group waits for all", 2, ["s", "s" * 99 + "a"], "running 2"),
    ("the last group waits for those before", 2, ["sa" + "s" * 30, "s"], "running 2"),
    ("all have it", 2, ["s", "ss"], "done 2"),
    ("all who answer have it", 2, ["s", "suu"], "done 2"),
    ("nobody of the last group answers", 2, ["s", "uu"], "stalled 2 nobody_answers"),
    ("a late failure of the first group", 2, ["f", "aa"], "stopped 2 too_many_failures"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("group", "groups", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_class_goes_on_or_stops(group: int, groups: list[str], expected: str) -> None:
    for before in (LaneState.RUNNING, LaneState.STALLED):
        lane = Lane("class", group, before)
        assert describe(judge(lane, make_members(*groups), LIMITS)) == expected


def test_too_few_without_anybody_to_come_stops() -> None:
    limits = Thresholds(Fraction(95, 100), Fraction(20, 100))
    lane = judge(Lane("class", 1), make_members("s" * 18 + "ff", "w"), limits)
    assert describe(lane) == "stopped 1 too_few_successes"


@pytest.mark.parametrize("state", [LaneState.STOPPED, LaneState.DONE])
@pytest.mark.parametrize("groups", [case[2] for case in CASES])
def test_class_that_has_ended_does_nothing_more(state: LaneState, groups: list[str]) -> None:
    lane = Lane("class", 1, state)
    assert judge(lane, make_members(*groups), LIMITS) == lane


@pytest.mark.parametrize(
    ("fewest", "reachable", "expected"),
    [(None, 1, 1), (None, 9, 1), (None, 10, 2), (None, 41, 3), (3, 5, 3), (1, 20, 1), (1, 21, 2)],
)
def test_number_of_failures_that_stop(fewest: int | None, reachable: int, expected: int) -> None:
    limits = Thresholds(Fraction(95, 100), Fraction(5, 100), fewest)
    assert limits.failures_of(reachable) == expected


def test_error_threshold_of_nothing_still_needs_a_failure() -> None:
    limits = Thresholds(Fraction(1), Fraction(0))
    assert judge(Lane("class", 1), make_members("a", "w"), limits).state is LaneState.RUNNING


@pytest.mark.parametrize(
    ("lanes", "expected"),
    [
        (["running", "stopped", "stalled", "done"], "running"),
        (["stopped", "stalled", "done"], "stalled"),
        (["stopped", "done"], "stopped"),
        (["done", "done"], "done"),
    ],
)
def test_whole_is_what_its_classes_are(lanes: list[str], expected: str) -> None:
    given = [Lane(str(at), 1, LaneState(state)) for at, state in enumerate(lanes)]
    assert conclude(RolloutState.RUNNING, given, ()) == expected
    for still in (RolloutState.PAUSED, RolloutState.ABORTED, RolloutState.DONE):
        assert conclude(still, given, ()) is still


def test_rolling_back_ends_with_the_last_answer() -> None:
    members = [Member("a", "class", 1, MemberState.RETURNED), Member("b", "class", 1)]
    waiting = [*members, Member("c", "class", 1, MemberState.RETURNING)]
    assert conclude(RolloutState.ROLLING_BACK, (), waiting) is RolloutState.ROLLING_BACK
    assert conclude(RolloutState.ROLLING_BACK, (), members) is RolloutState.ROLLED_BACK


def test_classes_go_their_own_ways() -> None:
    members = [
        Member(f"{name}-{group}", name, group) for name in ("arm", "x86") for group in (1, 2)
    ]
    progress = Progress(members, (), LIMITS)
    _, asked = progress.advance()
    assert {item.device for item in asked} == {"arm-1", "x86-1"}
    progress.tell("arm-1", News.FAILURE)
    progress.tell("x86-1", News.SUCCESS)
    _, asked = progress.advance()
    assert [item.device for item in asked] == ["x86-2"]
    progress.tell("x86-2", News.SUCCESS)
    progress.advance()
    assert {name: lane.state.value for name, lane in progress.lanes.items()} == {
        "arm": "stopped",
        "x86": "done",
    }
    assert progress.members["arm-2"].state is MemberState.WAITING
