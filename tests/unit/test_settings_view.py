from pathlib import Path

import pytest

from agent.config import load_settings
from console.secrecy import MASK
from console.settings_view import SettingLine, find_variable, list_settings, mask


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, SettingLine]:
    config = tmp_path / "edgeward.toml"
    config.write_text(
        'log_level = "debug"\ndevice_id = "from-file"\n'
        '[queue]\nurl = "redis://user:hidden-1@localhost:6379/0"\n'
        '[mqtt]\npassword = "hidden-2"\nport = 1884\n'
    )
    monkeypatch.setenv("EDGEWARD_MQTT__PORT", "1885")
    flags = {"device_id": "from-flag", "mqtt": {"keepalive_s": 30}}
    settings = load_settings(config, flags)
    return {line.key: line for line in list_settings(settings, config, flags)}


@pytest.mark.parametrize(
    ("key", "origin"),
    [
        ("device_id", "flag"),
        ("mqtt.keepalive_s", "flag"),
        ("mqtt.port", "env EDGEWARD_MQTT__PORT"),
        ("log_level", "file"),
        ("queue.url", "file"),
        ("heartbeat_s", "default"),
        ("mqtt.host", "default"),
    ],
)
def test_each_setting_says_where_it_came_from(
    lines: dict[str, SettingLine], key: str, origin: str
) -> None:
    assert lines[key].origin.startswith(origin)


def test_stronger_origin_gives_the_value(lines: dict[str, SettingLine]) -> None:
    assert lines["device_id"].value == "from-flag"
    assert lines["mqtt.port"].value == 1885


def test_secrets_are_masked_wherever_they_stand(lines: dict[str, SettingLine]) -> None:
    assert lines["mqtt.password"].value == MASK
    assert lines["queue.url"].value == f"redis://user:{MASK}@localhost:6379/0"
    assert not any("hidden" in str(line.value) for line in lines.values())


def test_every_setting_has_a_meaning(lines: dict[str, SettingLine]) -> None:
    assert [line.key for line in lines.values() if not line.description] == []


def test_url_without_a_password_stays_as_it_is() -> None:
    assert mask("redis+socket:///run/edgeward/queue.sock") == (
        "redis+socket:///run/edgeward/queue.sock"
    )
    assert mask("redis://localhost:6379/0") == "redis://localhost:6379/0"


def test_password_alone_before_the_host_is_masked() -> None:
    assert mask("redis://:hidden@localhost:6379") == f"redis://:{MASK}@localhost:6379"


def test_section_as_json_in_the_environment_is_found() -> None:
    environ = {"EDGEWARD_MQTT": '{"host": "broker"}'}
    assert find_variable("mqtt.host", environ) == "EDGEWARD_MQTT"
    assert find_variable("mqtt.port", environ) is None


def test_variable_is_found_in_any_case() -> None:
    assert find_variable("mqtt.port", {"edgeward_mqtt__port": "1"}) == "edgeward_mqtt__port"
