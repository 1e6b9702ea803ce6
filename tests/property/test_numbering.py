"""What a console may acknowledge, against a set of numbers as the oracle."""

from hypothesis import given
from hypothesis import strategies as st

from console.numbering import Numbering, Span

spans = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 6)).map(lambda pair: (pair[0], sum(pair))),
    max_size=30,
)


@given(spans)
def test_numbering_is_a_set_of_numbers(given_spans: list[tuple[int, int]]) -> None:
    numbering, known = Numbering(), set[int]()
    for first, last in given_spans:
        new = set(range(first, last + 1))
        assert numbering.add(first, last) == bool(new - known)
        known |= new
        assert all((number in numbering) == (number in known) for number in range(1, 50))
        cumulative = next(number for number in range(1, 60) if number not in known) - 1
        assert numbering.cumulative == cumulative
        missing = {number for span in numbering.holes_up_to(50) for number in range(*_range(span))}
        assert missing == set(range(1, 51)) - known
        above = [number for number in known if number > cumulative]
        hole = Span(cumulative + 1, min(above) - 1) if above else None
        assert numbering.hole == hole


def _range(span: Span) -> tuple[int, int]:
    return span.first, span.last + 1


@given(spans)
def test_stored_numbering_is_the_same(given_spans: list[tuple[int, int]]) -> None:
    numbering = Numbering()
    for first, last in given_spans:
        numbering.add(first, last)
    again = Numbering.from_text(numbering.to_text())
    assert again.to_text() == numbering.to_text()


def test_enormous_gap_costs_nothing() -> None:
    numbering = Numbering()
    numbering.add(2, 10**15)
    numbering.add(1)
    assert numbering.cumulative == 10**15
