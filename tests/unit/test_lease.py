"""Leases end by themselves, whatever happens to the clocks."""

from pathlib import Path

import pytest

from agent.errors import LeaseError
from agent.lease import list_leases, release_lease, take_lease
from tests.harness.clocks import FakeClock


def list_names(folder: Path, clock: FakeClock) -> list[str]:
    return [lease.name for lease in list_leases(folder, clock)]


def test_lease_holds_for_its_time_and_no_longer(tmp_path: Path) -> None:
    clock = FakeClock()
    take_lease(tmp_path / "leases", clock, "ward-3", 60, "an operation")
    clock.advance(59_999)
    assert list_names(tmp_path / "leases", clock) == ["ward-3"]
    clock.advance(1)
    assert list_names(tmp_path / "leases", clock) == []


def test_wall_clock_that_jumps_changes_nothing_within_a_boot(tmp_path: Path) -> None:
    clock = FakeClock()
    take_lease(tmp_path, clock, "a", 60)
    clock.wall += 10**10
    assert list_names(tmp_path, clock) == ["a"]
    clock.wall -= 10**11
    clock.boot += 60_000
    assert list_names(tmp_path, clock) == []


def test_restart_ends_no_lease_before_its_time(tmp_path: Path) -> None:
    clock = FakeClock()
    take_lease(tmp_path, clock, "a", 600)
    clock.wall += 300_000
    clock.boot, clock.boot_name = 5_000, "boot-2"
    (lease,) = list_leases(tmp_path, clock)
    assert lease.compute_left_s(clock) == 300


def test_clock_set_back_at_a_restart_makes_no_lease_longer(tmp_path: Path) -> None:
    clock = FakeClock()
    take_lease(tmp_path, clock, "a", 600)
    clock.wall = 0
    clock.boot, clock.boot_name = 599_999, "boot-2"
    assert list_names(tmp_path, clock) == ["a"]
    clock.boot = 600_000
    assert list_names(tmp_path, clock) == []


def test_taking_it_anew_makes_it_last(tmp_path: Path) -> None:
    clock = FakeClock()
    take_lease(tmp_path, clock, "a", 60)
    clock.advance(50_000)
    take_lease(tmp_path, clock, "a", 60)
    clock.advance(50_000)
    assert list_names(tmp_path, clock) == ["a"]


def test_given_back_once(tmp_path: Path) -> None:
    clock = FakeClock()
    take_lease(tmp_path, clock, "a", 60)
    assert release_lease(tmp_path, "a")
    assert not release_lease(tmp_path, "a")
    assert list_names(tmp_path, clock) == []


@pytest.mark.parametrize(
    ("name", "duration_s"), [("", 1), ("../up", 1), ("a", 0), ("a", -1), ("a", 8 * 86_400)]
)
def test_bad_lease_is_refused(tmp_path: Path, name: str, duration_s: float) -> None:
    with pytest.raises(LeaseError):
        take_lease(tmp_path, FakeClock(), name, duration_s)


def test_file_that_is_no_lease_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("x" * 5000)
    assert list_names(tmp_path, FakeClock()) == []
