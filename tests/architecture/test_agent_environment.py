"""The agent's processes begin with one environment, whoever starts them."""

from pathlib import Path

from console.up import AGENT_ENVIRONMENT

UNIT = Path(__file__).parents[2] / "systemd" / "edgeward-agent.service"


def test_unit_and_up_give_the_agent_the_same_environment() -> None:
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    found = dict(
        line.removeprefix("Environment=").split("=", 1)
        for line in lines
        if line.startswith("Environment=")
    )
    assert found == AGENT_ENVIRONMENT
