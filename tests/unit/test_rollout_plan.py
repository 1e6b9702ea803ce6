from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from console.duration import parse_duration
from console.errors import RolloutPlanError
from console.rollout.hardware import classify_hardware
from console.rollout.plan import (
    Invited,
    Share,
    assign_groups,
    parse_groups,
    parse_percent,
)
from tests.harness.fleet import CLASSES, Hardware


def test_groups_are_percentages_numbers_or_all() -> None:
    assert parse_groups("1%, 10%,100%") == (
        Share(Fraction(1, 100)),
        Share(Fraction(1, 10)),
        Share(Fraction(1)),
    )
    assert parse_groups("5,50,all") == (Share(count=5), Share(count=50), Share(Fraction(1)))
    assert parse_groups("0.5%,20")[0].size_of(1000) == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0%",
        "101%",
        "-1",
        "10%,1%",
        "5,5",
        "5,4",
        "all,10%",
        "100%,all",
        "ten",
        "5,,6",
        "²",
    ],
)
def test_groups_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(RolloutPlanError):
        parse_groups(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86_400)]
)
def test_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "5w", "m", "1h30m"])
def test_bad_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "95", "101%", "-1%", "x%"])
def test_bad_percentage_is_refused(text: str) -> None:
    with pytest.raises(RolloutPlanError):
        parse_percent(text)


def count_groups(groups: dict[str, int]) -> list[int]:
    counted = Counter(groups.values())
    return [counted[number] for number in sorted(counted)]


def test_sizes_of_groups_in_one_class() -> None:
    fleet = [Invited(f"box-{number}", "a") for number in range(200)]
    assert count_groups(assign_groups("R", fleet, parse_groups("1%,10%,100%"))) == [2, 18, 180]
    assert count_groups(assign_groups("R", fleet, parse_groups("5,50,all"))) == [5, 45, 150]
    assert count_groups(assign_groups("R", fleet, parse_groups("5,50"))) == [5, 45]
    assert count_groups(assign_groups("R", fleet[:3], parse_groups("1%,10%,100%"))) == [1, 2]


def test_first_group_has_every_class_however_small() -> None:
    fleet = [Invited(f"a-{number}", "a") for number in range(990)]
    fleet += [Invited(f"{name}-{number}", name) for name in "bcdef" for number in range(2)]
    groups = assign_groups("R", fleet, parse_groups("1,10%,100%"))
    assert sorted(device[0] for device, group in groups.items() if group == 1) == list("abcdef")


def test_another_rollout_begins_with_other_devices() -> None:
    fleet = [Invited(f"box-{number}", "a") for number in range(100)]
    shares = parse_groups("5,all")
    firsts = [
        frozenset(key for key, group in assign_groups(name, fleet, shares).items() if group == 1)
        for name in ("R1", "R2", "R1")
    ]
    assert firsts[0] == firsts[2] != firsts[1]


def test_devices_that_are_offline_come_last() -> None:
    fleet = [Invited(f"box-{number}", "a", is_online=number >= 90) for number in range(100)]
    groups = assign_groups("R", fleet, parse_groups("10,all"))
    assert {key for key, group in groups.items() if group == 1} == {
        f"box-{number}" for number in range(90, 100)
    }


@pytest.mark.parametrize("hardware", CLASSES)
def test_class_of_known_hardware(hardware: Hardware) -> None:
    assert classify_hardware(hardware.to_platform()) == CLASSES[hardware]


NVIDIA = {"kind": "nvidia_gpu", "name": "NVIDIA GeForce RTX 3060", "usable": True}


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        (None, "unknown"),
        ({}, "unknown"),
        ({"arch": "x86_64"}, "x86_64"),
        ({"arch": "x86_64", "memory_mb": 4_100}, "x86_64/4g"),
        ({"arch": "x86_64", "memory_mb": 512}, "x86_64/512m"),
        ({"arch": "x86_64", "cpu_model": "AMD EPYC 9V74 80-Core Processor"}, "x86_64/epyc-9v74"),
        ({"arch": "x86_64", "cpu_model": "x", "accelerators": [NVIDIA]}, "x86_64/geforce-rtx-3060"),
        (
            {"arch": "x86_64", "cpu_model": "x", "accelerators": [{**NVIDIA, "usable": False}]},
            "x86_64/x",
        ),
        ({"arch": 5, "cpu_model": [], "memory_mb": "8", "accelerators": "x"}, "unknown"),
        ({"memory_mb": True}, "unknown"),
        ({"memory_mb": float("inf")}, "unknown"),
    ],
)  # fmt: skip
def test_class_of_what_a_device_says(platform: dict[str, Any] | None, expected: str) -> None:
    assert classify_hardware(platform) == expected


def test_memory_of_boxes_alike_falls_into_one_class() -> None:
    for of_eight in (7_900, 8_124, 8_324, 8_589, 9_000):
        assert classify_hardware({"arch": "a", "memory_mb": of_eight}) == "a/8g"
    assert classify_hardware({"arch": "a", "memory_mb": 4_294}) == "a/4g"
    assert classify_hardware({"arch": "a", "memory_mb": 16_542}) == "a/16g"
