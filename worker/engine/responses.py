"""The response cache: answers to requests that were asked before, byte for byte.

Owns the key of a request, the memory bound, age and order of leaving. Never decides which
models use it, and never runs one.

Invariants: two requests share a key only if model, artifact, wanted outputs and every name,
datatype, shape and byte of their inputs are equal (128-bit BLAKE2b over fields framed by their
lengths: no collision to be expected, where Triton's 64-bit combined hash may answer with
another's result). What is stored is a read-only copy: nobody who gets it can change it for
the next. The sum of all entries is within the capacity at every moment. Thread-safe.
"""

import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from types import MappingProxyType
from typing import Any

import numpy as np

from platforms.runtimes.base import Array

_KEY_BYTES = 16
_LARGEST_SHARE = 8
"""One entry takes an eighth of the capacity at most, or a few answers would push out all."""
_ENTRY_BYTES = 512
"""Price of an entry beside its data: key, dict slots, array headers (sys.getsizeof, 3.11)."""
_OBJECT_BYTES = 57
"""Price of one BYTES element beside its text: a `str` header and its reference."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What the cache has done since its process began, and what is in it."""

    hits: int = 0
    misses: int = 0
    inserts: int = 0
    evicted: int = 0
    """Left for want of room; not those that were too old or whose version went."""
    expired: int = 0
    refused: int = 0
    """Too large for one entry."""
    lookup_ns: int = 0
    """Spent in lookups, hits and misses."""
    insert_ns: int = 0
    entries: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    owner: str
    outputs: Mapping[str, Array]
    size_bytes: int
    stored_at_s: float


class ResponseCache:
    """Answers by key; the one not used for longest leaves first.

    Args:
        capacity_bytes: bound on all entries together; 0 stores nothing.
        ttl_s: age at which an entry is no longer an answer; 0: none.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        capacity_bytes: int,
        ttl_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity_bytes = capacity_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._counters = Counter[str]()
        self._size_bytes = 0
        self._lock = Lock()

    @property
    def is_enabled(self) -> bool:
        """Say whether anything can be in it."""
        return self._capacity_bytes > 0

    def find(self, key: bytes) -> Mapping[str, Array] | None:
        """Return the outputs stored under `key`, read-only; None where there are none."""
        started = time.perf_counter_ns()
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and self._is_expired(entry):
                self._remove(key)
                self._counters["expired"] += 1
                entry = None
            if entry is not None:
                self._entries.move_to_end(key)
            self._counters["misses" if entry is None else "hits"] += 1
            self._counters["lookup_ns"] += time.perf_counter_ns() - started
        return None if entry is None else entry.outputs

    def insert(self, key: bytes, owner: str, outputs: Mapping[str, Array]) -> bool:
        """Store a copy of the outputs under `key`; say whether it was stored.

        Args:
            key: of `compute_key`.
            owner: what `drop` will name, such as the version's folder.
            outputs: the whole answer.
        """
        started = time.perf_counter_ns()
        size_bytes = compute_size(outputs)
        if size_bytes > self._capacity_bytes // _LARGEST_SHARE:
            with self._lock:
                self._counters["refused"] += 1
            return False
        copies = MappingProxyType({name: _copy(array) for name, array in outputs.items()})
        with self._lock:
            self._remove(key)
            while self._size_bytes + size_bytes > self._capacity_bytes:
                self._remove(next(iter(self._entries)))
                self._counters["evicted"] += 1
            self._entries[key] = _Entry(owner, copies, size_bytes, self._clock())
            self._size_bytes += size_bytes
            self._counters["inserts"] += 1
            self._counters["insert_ns"] += time.perf_counter_ns() - started
        return True

    def drop(self, owner: str) -> int:
        """Remove all entries of `owner`; return how many there were."""
        with self._lock:
            keys = [key for key, entry in self._entries.items() if entry.owner == owner]
            for key in keys:
                self._remove(key)
        return len(keys)

    def clear(self) -> None:
        """Remove everything, such as when memory is short."""
        with self._lock:
            self._entries.clear()
            self._size_bytes = 0

    def get_stats(self) -> CacheStats:
        """Return the counters and what is in the cache now."""
        with self._lock:
            return CacheStats(
                **self._counters, entries=len(self._entries), size_bytes=self._size_bytes
            )

    def _is_expired(self, entry: _Entry) -> bool:
        return bool(self._ttl_s) and self._clock() - entry.stored_at_s >= self._ttl_s

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._size_bytes -= entry.size_bytes


def compute_key(
    model: str, sha256: str, wanted: Iterable[str], inputs: Mapping[str, Array]
) -> bytes:
    """Return the key of a request.

    Args:
        model: its name.
        sha256: of the artifact that runs.
        wanted: names of the outputs asked for; none for all.
        inputs: by name; BYTES are `str` or `bytes` objects.
    """
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    names = sorted(set(wanted))
    _add(digest, model.encode())
    _add(digest, sha256.encode())
    _add(digest, b"%d" % len(names))
    for name in names:
        _add(digest, name.encode())
    for name in sorted(inputs):
        array = inputs[name]
        _add(digest, name.encode())
        _add(digest, array.dtype.str.encode())
        _add(digest, repr(array.shape).encode())
        if array.dtype.hasobject:
            for item in array.flat:
                _add(digest, _encode(item))
        else:
            _add(digest, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


def compute_size(outputs: Mapping[str, Array]) -> int:
    """Return the bytes that an entry of these outputs takes."""
    total = _ENTRY_BYTES
    for name, array in outputs.items():
        total += len(name) + array.nbytes
        if array.dtype.hasobject:
            total += sum(_OBJECT_BYTES + len(_encode(item)) for item in array.flat)
    return total


def _add(digest: Any, data: bytes | memoryview) -> None:
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _encode(item: object) -> bytes:
    """Return an element's bytes; text and bytes of the same content stay two things."""
    if isinstance(item, bytes):
        return b"b" + item
    return b"s" + str(item).encode("utf-8", "surrogatepass")


def _copy(array: Array) -> Array:
    copy = array.copy(order="C")
    copy.setflags(write=False)
    return copy
