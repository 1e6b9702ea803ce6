"""Which calls go the short way to the agent."""

import pytest

from console.entry import find_agent_options


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["agent"], {}),
        (["--data-dir", "d", "agent"], {"data_dir": "d"}),
        (["agent", "--device=box", "--config", "c"], {"device_id": "box", "config": "c"}),
    ],
)
def test_plain_agent_call_is_recognised(argv: list[str], options: dict[str, str]) -> None:
    assert find_agent_options(argv) == options


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["agent", "--help"],
        ["agent", "more"],
        ["agent", "--config"],
        ["agent", "--device="],
        ["status"],
        ["--json", "agent"],
        ["worker", "--lane", "agent"],
    ],
)
def test_everything_else_is_typers(argv: list[str]) -> None:
    assert find_agent_options(argv) is None
