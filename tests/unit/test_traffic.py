"""Shares of traffic: exact in the long run, sticky by key, and none where nothing is said."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.traffic import TRAFFIC_FILE, Traffic, find_traffic, write_traffic


@pytest.mark.parametrize("percent", [0.0, 1.0, 10.0, 50.0, 99.0, 100.0])
def test_requests_without_a_key_are_shared_exactly(percent: float) -> None:
    traffic = Traffic(shares={2: percent})
    chosen = [traffic.choose("m", "", turn) for turn in range(10_000)]
    assert abs(chosen.count(2) / 100 - percent) < 0.1
    assert {*chosen} <= {2, None}


@pytest.mark.parametrize("percent", [1.0, 10.0, 50.0])
def test_keys_are_shared_about_so(percent: float) -> None:
    traffic = Traffic(shares={2: percent})
    chosen = [traffic.choose("m", f"key {n}") for n in range(20_000)]
    assert abs(chosen.count(2) / 200 - percent) < 1.0


@given(key=st.text(min_size=1), small=st.floats(0, 100), more=st.floats(0, 100))
def test_whoever_has_the_new_version_keeps_it_when_its_share_grows(
    key: str, small: float, more: float
) -> None:
    small, large = sorted((small, more))
    before = Traffic(shares={2: small}).choose("m", key)
    after = Traffic(shares={2: large}).choose("m", key)
    assert before is None or after == 2


@given(key=st.text(min_size=1), turn=st.integers(0, 1 << 40))
def test_equal_keys_get_the_same_version_whatever_their_turn(key: str, turn: int) -> None:
    traffic = Traffic(shares={3: 30.0, 2: 30.0})
    assert traffic.choose("m", key, turn) == traffic.choose("m", key, 0)


def test_two_models_share_their_traffic_independently() -> None:
    traffic = Traffic(shares={2: 50.0})
    keys = [f"key {n}" for n in range(4000)]
    both = sum(traffic.choose("a", key) == traffic.choose("b", key) for key in keys)
    assert 1800 < both < 2200


def test_shares_over_100_are_refused() -> None:
    with pytest.raises(ValidationError, match="over 100"):
        Traffic(shares={2: 60.0, 3: 60.0})


def test_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    traffic = Traffic(shares={2: 10.0}, shadow=3, fallback=1, keep=(1,), watch=(1, 2), hang_s=5.0)
    write_traffic(tmp_path, traffic)
    assert find_traffic(tmp_path) == traffic
    write_traffic(tmp_path, None)
    assert find_traffic(tmp_path) is None
    assert not (tmp_path / TRAFFIC_FILE).exists()
    write_traffic(tmp_path, None)


@pytest.mark.parametrize("text", ["", "{", '{"shares": {"0": 5}}', '{"what": 1}', "[]"])
def test_file_that_cannot_be_read_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / TRAFFIC_FILE).write_text(text)
    assert find_traffic(tmp_path) is None
