"""A rollout under whatever order of news, and groups of whatever fleet."""

from collections import Counter
from fractions import Fraction
from math import ceil

from hypothesis import given, settings
from hypothesis import strategies as st

from console.rollout.plan import Invited, Share, Thresholds, assign_groups
from console.rollout.progress import LaneState, Member, MemberState, News, Progress

fleets = st.lists(st.integers(1, 60), min_size=1, max_size=6).map(
    lambda sizes: [
        Invited(f"box-{name}-{number}", f"class-{name}", is_online=number % 3 > 0)
        for name, size in enumerate(sizes)
        for number in range(size)
    ]
)
shares = st.one_of(
    st.integers(1, 200).map(lambda count: Share(count=count)),
    st.integers(1, 100).map(lambda percent: Share(Fraction(percent, 100))),
)
plans = st.lists(shares, min_size=1, max_size=5)


@given(fleets, plans, st.text("ABC", min_size=1))
def test_every_group_has_each_class_in_proportion(
    fleet: list[Invited], plan: list[Share], rollout: str
) -> None:
    groups = assign_groups(rollout, fleet, plan)
    assert groups == assign_groups(rollout, fleet[::-1], plan)
    sizes = Counter(item.hardware_class for item in fleet)
    classes = {item.device: item.hardware_class for item in fleet}
    last = max(groups.values())
    assert set(groups.values()) == set(range(1, last + 1))
    for number in range(1, last + 1):
        upto = [device for device, group in groups.items() if group <= number]
        counted = Counter(classes[device] for device in upto)
        assert counted.keys() == sizes.keys()
        for name, size in sizes.items():
            even = len(upto) * size / len(fleet)
            # The first of each class comes before its turn, so others may lack as many.
            assert even - len(sizes) <= counted[name] <= ceil(even) + 1
    furthest = max(share.size_of(len(fleet)) for share in plan)
    assert len(groups) == max(furthest, len(sizes))


news = st.sampled_from([item for item in News if item not in (News.ASK, News.RECALL)])
SUCCESS, ERROR = Fraction(90, 100), Fraction(10, 100)


def make_progress(sizes: list[list[int]]) -> Progress:
    members = [
        Member(f"{name}-{group}-{number}", str(name), group)
        for name, groups in enumerate(sizes)
        for group, size in enumerate(groups, start=1)
        for number in range(size)
    ]
    return Progress(members, (), Thresholds(SUCCESS, ERROR))


layouts = st.lists(
    st.lists(st.integers(0, 12), min_size=1, max_size=3).filter(any), min_size=1, max_size=3
)


@settings(max_examples=200)
@given(layouts, st.data())
def test_nobody_is_asked_in_a_class_that_failed_or_before_its_group_is_due(
    sizes: list[list[int]], data: st.DataObject
) -> None:
    progress = make_progress(sizes)
    ended: dict[str, LaneState] = {}
    for _ in range(data.draw(st.integers(1, 60))):
        _, asked = progress.advance()
        assert not {member.hardware_class for member in asked} & ended.keys()
        for lane in progress.lanes.values():
            if lane.hardware_class in ended:
                assert lane.state is ended[lane.hardware_class]
            if lane.state in (LaneState.STOPPED, LaneState.DONE):
                ended[lane.hardware_class] = lane.state
        for member in progress.members.values():
            is_due = member.group <= progress.lanes[member.hardware_class].group
            assert is_due is (member.state is not MemberState.WAITING)
        device = data.draw(st.sampled_from(sorted(progress.members)))
        progress.tell(device, data.draw(news))
    for lane in progress.lanes.values():
        check_end(progress, lane.hardware_class)


def check_end(progress: Progress, name: str) -> None:
    """Compare where a class stands with the counts of its members, counted here."""
    lane, members = progress.lanes[name], list(progress.members_of(name))
    failed = [member for member in members if member.state is MemberState.FAILED]
    if lane.state is LaneState.STOPPED:
        assert failed
    if lane.state is LaneState.DONE:
        assert all(member.state is not MemberState.WAITING for member in members)
        assert any(member.state is MemberState.SUCCEEDED for member in members)


@settings(max_examples=200)
@given(layouts, st.lists(st.tuples(st.integers(0, 1000), news), max_size=80), st.data())
def test_what_comes_twice_or_late_changes_nothing(
    sizes: list[list[int]], heard: list[tuple[int, News]], data: st.DataObject
) -> None:
    once, often = make_progress(sizes), make_progress(sizes)
    devices = sorted(once.members)
    ends: dict[str, News] = {}
    for number, item in heard:
        device = devices[number % len(devices)]
        for progress in (once, often):
            progress.advance()
            progress.tell(device, item)
        if often.members[device].state in (MemberState.SUCCEEDED, MemberState.FAILED):
            ends.setdefault(device, item)
        # A duplicate of this, and old words of those that have given their last one.
        often.tell(device, item)
        for ended in ends:
            often.tell(ended, data.draw(news))
    assert once.members == often.members
    assert once.lanes == often.lanes
