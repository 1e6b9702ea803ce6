"""The response cache against a plain dict, and the key against the request itself."""

import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from worker.engine.responses import ResponseCache, compute_key, compute_size

DTYPES = ("<f4", "<i4", "<i8", "|u1", "|b1", "<f2", "object")
TEXT = st.text(max_size=3) | st.binary(max_size=3)


@st.composite
def draw_array(draw: st.DrawFn) -> Any:
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    count = int(np.prod(shape))
    if dtype == "object":
        array = np.empty(count, object)
        array[:] = draw(st.lists(TEXT, min_size=count, max_size=count))
        return array.reshape(shape)
    values = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    return np.array(values, dtype=dtype).reshape(shape)


REQUESTS = st.tuples(
    st.sampled_from(["m", "mm"]),
    st.sampled_from(["a", "b"]),
    st.lists(st.sampled_from(["y", "z", "yz"]), max_size=2),
    st.dictionaries(st.sampled_from(["x", "xx", "w"]), draw_array(), min_size=1, max_size=2),
)


def spell_out(request: Any) -> Any:
    """Return a request as a value that Python compares."""
    model, digest, wanted, inputs = request
    tensors = {
        name: (str(array.dtype), array.shape, tuple(map(repr, array.flat)))
        for name, array in inputs.items()
    }
    return model, digest, frozenset(wanted), tensors


@settings(max_examples=300, deadline=None)
@given(REQUESTS, REQUESTS)
def test_two_requests_share_a_key_just_when_they_are_equal(one: Any, other: Any) -> None:
    are_equal = spell_out(one) == spell_out(other)
    assert (compute_key(*one) == compute_key(*other)) == are_equal


def test_bytes_are_not_run_together() -> None:
    one, other = (np.array(items, object) for items in (["ab", "c"], ["a", "bc"]))
    assert compute_key("m", "d", (), {"x": one}) != compute_key("m", "d", (), {"x": other})


def test_a_view_has_the_key_of_its_copy() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert compute_key("m", "d", (), {"x": array.T}) == compute_key(
        "m", "d", (), {"x": array.T.copy()}
    )


class CacheAgainstDict(RuleBasedStateMachine):
    """The oracle: an ordered dict that is told the same things."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.capacity = 24_000
        self.cache = ResponseCache(self.capacity, ttl_s=10, clock=lambda: self.now_s)
        self.model: OrderedDict[bytes, tuple[str, Any, float, int]] = OrderedDict()

    @rule(
        key=st.sampled_from([b"1", b"2", b"3", b"4", b"5"]),
        owner=st.sampled_from(["v1", "v2"]),
        rows=st.sampled_from([0, 1, 200, 500, 620, 700]),
    )
    def insert(self, key: bytes, owner: str, rows: int) -> None:
        outputs = {"y": np.full(rows, float(rows), np.float32)}
        size = compute_size(outputs)
        is_stored = self.cache.insert(key, owner, outputs)
        assert is_stored == (size * 8 <= self.capacity)
        outputs["y"][:] = -1
        if is_stored:
            self.model.pop(key, None)
            while sum(item[3] for item in self.model.values()) + size > self.capacity:
                self.model.popitem(last=False)
            self.model[key] = (owner, np.full(rows, float(rows), np.float32), self.now_s, size)

    @rule(key=st.sampled_from([b"1", b"2", b"3", b"4", b"5"]))
    def find(self, key: bytes) -> None:
        expected = self.model.get(key)
        if expected is not None and self.now_s - expected[2] >= 10:
            del self.model[key]
            expected = None
        found = self.cache.find(key)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            self.model.move_to_end(key)
            np.testing.assert_array_equal(found["y"], expected[1])

    @rule(owner=st.sampled_from(["v1", "v2"]))
    def drop(self, owner: str) -> None:
        gone = [key for key, item in self.model.items() if item[0] == owner]
        for key in gone:
            del self.model[key]
        assert self.cache.drop(owner) == len(gone)

    @rule(seconds=st.sampled_from([1.0, 9.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def holds_what_it_says(self) -> None:
        stats = self.cache.get_stats()
        assert stats.entries == len(self.model)
        assert stats.size_bytes == sum(item[3] for item in self.model.values()) <= self.capacity


CacheAgainstDict.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestCacheAgainstDict = CacheAgainstDict.TestCase


def test_what_is_found_cannot_be_changed() -> None:
    cache = ResponseCache(1 << 20)
    cache.insert(b"k", "v", {"y": np.zeros(3), "text": np.array(["a"], object)})
    found = cache.find(b"k")
    assert found is not None
    for array in found.values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_hits_misses_and_refusals_are_counted() -> None:
    cache = ResponseCache(16_000)
    cache.find(b"k")
    cache.insert(b"k", "v", {"y": np.zeros(3)})
    cache.find(b"k")
    cache.insert(b"large", "v", {"y": np.zeros(2000)})
    stats = cache.get_stats()
    assert (stats.hits, stats.misses, stats.inserts, stats.refused) == (1, 1, 1, 1)
    assert stats.lookup_ns > 0
    assert stats.insert_ns > 0


def test_a_cache_of_no_size_stores_nothing() -> None:
    cache = ResponseCache(0)
    assert not cache.is_enabled
    assert not cache.insert(b"k", "v", {"y": np.zeros(1)})


def test_many_threads_never_pass_the_bound_or_get_another_answer() -> None:
    cache = ResponseCache(40_000)
    wrong: list[object] = []

    def work(seed: int) -> None:
        for step in range(400):
            number = (seed * 7 + step * 3) % 40
            key = b"%d" % number
            found = cache.find(key)
            if found is None:
                cache.insert(key, "v", {"y": np.full(300, number)})
            elif not (found["y"] == number).all():
                wrong.append(number)
            if cache.get_stats().size_bytes > 40_000:
                wrong.append("bound")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.get_stats()
    assert not wrong
    assert stats.hits + stats.misses == 1600
