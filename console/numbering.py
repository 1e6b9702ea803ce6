"""Which numbered records of one ledger a console has: what it may acknowledge.

Pure. A number counts once its record was received, or once a gap record says that it was
dropped for good. `cumulative` is the highest N such that all of 1..N count; nothing above
a hole is ever acknowledged.

Source: docs/protocol.md, "Outbox".
"""

import json
from bisect import bisect_left
from typing import NamedTuple


class Span(NamedTuple):
    """Numbers from `first` to `last`, both included."""

    first: int
    last: int

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.last - self.first + 1


class Numbering:
    """The numbers that count, as disjoint spans in order.

    Args:
        cumulative: all numbers up to this one count.
        spans: further ones, above it.
    """

    def __init__(self, cumulative: int = 0, spans: list[Span] | None = None) -> None:
        self.cumulative = cumulative
        self._spans: list[Span] = []
        for span in spans or ():
            self.add(*span)

    def __contains__(self, seq: int) -> bool:
        if seq <= self.cumulative:
            return True
        at = bisect_left(self._spans, Span(seq + 1, 0)) - 1
        return at >= 0 and self._spans[at].last >= seq

    def add(self, first: int, last: int | None = None) -> bool:
        """Count the numbers from `first` to `last`; say whether any was new."""
        last = first if last is None else last
        first = max(first, self.cumulative + 1)
        if last < first:
            return False
        # Spans that touch [first, last] become one with it.
        low = bisect_left(self._spans, first - 1, key=lambda span: span.last)
        high = low
        while high < len(self._spans) and self._spans[high].first <= last + 1:
            high += 1
        merged = self._spans[low:high]
        if len(merged) == 1 and merged[0].first <= first and merged[0].last >= last:
            return False
        if merged:
            first, last = min(first, merged[0].first), max(last, merged[-1].last)
        self._spans[low:high] = [Span(first, last)]
        if self._spans[0].first == self.cumulative + 1:
            self.cumulative = self._spans.pop(0).last
        return True

    @property
    def hole(self) -> Span | None:
        """The first numbers that are missing below one that is there, or None."""
        if not self._spans:
            return None
        return Span(self.cumulative + 1, self._spans[0].first - 1)

    def holes_up_to(self, last: int) -> list[Span]:
        """Return the missing numbers up to `last`, in order."""
        holes, expected = [], self.cumulative + 1
        for span in [*self._spans, Span(last + 1, last + 1)]:
            upto = min(span.first - 1, last)
            if expected <= upto:
                holes.append(Span(expected, upto))
            expected = max(expected, span.last + 1)
        return holes

    def to_text(self) -> str:
        """Return it as text for a store."""
        return json.dumps([self.cumulative, *self._spans])

    @classmethod
    def from_text(cls, text: str) -> "Numbering":
        """Return what `to_text` wrote."""
        cumulative, *spans = json.loads(text)
        return cls(cumulative, [Span(*span) for span in spans])
