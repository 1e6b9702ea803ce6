"""The list of fault points and the code that passes them say the same."""

import ast
from collections import Counter

from agent.faults import POINTS, UPDATE_POINTS
from tests.architecture.documents import ROOT

_PRODUCT = ("agent", "worker", "console", "platforms", "converters")


def find_passings() -> list[str]:
    """Return the argument of each call or `partial` of `reach` in the product, as written."""
    found: list[str] = []
    for folder in _PRODUCT:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    found += read_passing(node)
    return found


def read_passing(call: ast.Call) -> list[str]:
    """Return the point that a call passes, or has passed by `partial`."""
    names = [ast.unparse(call.func), *(ast.unparse(item) for item in call.args)]
    if names[0] == "reach":
        return names[1:]
    return names[2:] if names[:2] == ["partial", "reach"] else []


def test_every_point_is_passed_at_one_place_and_every_passing_is_in_the_list() -> None:
    passings = Counter(ast.literal_eval(text) for text in find_passings())
    assert set(passings) == {*POINTS, *UPDATE_POINTS}
    assert [point for point, count in passings.items() if count > 1] == []


def test_no_point_is_listed_twice() -> None:
    assert len(set(POINTS)) == len(POINTS)
