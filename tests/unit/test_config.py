"""Settings: which source wins, and how a mistake in one is told."""

import os
import re
from pathlib import Path

import pytest

from agent.config import Settings, load_settings
from agent.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("EDGEWARD_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("agent.config.DEFAULT_CONFIG", tmp_path / "none.toml")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "edgeward.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_any_source_the_defaults_hold() -> None:
    settings = load_settings()
    assert (settings.mqtt.host, settings.mqtt.port) == ("127.0.0.1", 1883)
    assert settings.data_dir == Path("/var/lib/edgeward")


def test_flags_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(
        tmp_path,
        'device_id = "of-file"\nlog_level = "debug"\nheartbeat_s = 7\n'
        "[mqtt]\nport = 1001\nkeepalive_s = 11\nwill_delay_s = 5\n",
    )
    monkeypatch.setenv("EDGEWARD_DEVICE_ID", "of-env")
    monkeypatch.setenv("EDGEWARD_LOG_LEVEL", "warning")
    monkeypatch.setenv("EDGEWARD_MQTT__PORT", "1002")
    monkeypatch.setenv("EDGEWARD_MQTT__KEEPALIVE_S", "12")

    settings = load_settings(config, {"device_id": "of-flags", "mqtt": {"port": 1003}})

    assert (settings.device_id, settings.log_level, settings.heartbeat_s) == (
        "of-flags",
        "warning",
        7,
    )
    # Section by section, key by key: a flag does not hide its section's other keys.
    mqtt = settings.mqtt
    assert (mqtt.port, mqtt.keepalive_s, mqtt.will_delay_s) == (1003, 12, 5)


def test_file_may_be_named_in_the_environment_and_a_named_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.toml"
    other.write_text('device_id = "other"\n')
    monkeypatch.setenv("EDGEWARD_CONFIG", str(other))
    assert load_settings().device_id == "other"
    assert load_settings(write(tmp_path, 'device_id = "named"\n')).device_id == "named"


def test_one_load_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "heartbeat_s = 7\n")).heartbeat_s == 7
    assert load_settings().heartbeat_s == 30


@pytest.mark.parametrize(
    ("text", "named", "near"),
    [
        ("heartbeats_s = 1\n", "heartbeats_s", "heartbeat_s"),
        ("[mqtt]\nhots = 'a'\n", "mqtt.hots", "mqtt.host"),
        ("[mqqt]\nhost = 'a'\n", "mqqt", "mqtt"),
        ("prot = 1883\n", "prot", "mqtt.port"),
        ("[inbox]\nsettle = 1\n", "inbox.settle", "inbox.settle_s"),
    ],
)
def test_unknown_key_in_the_file_names_the_nearest(
    tmp_path: Path, text: str, named: str, near: str
) -> None:
    config = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_settings(config)
    assert str(caught.value) == (f"unknown setting {named!r} in {config}; did you mean {near!r}?")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("EDGEWARD_DEVICE", "device_id"),
        ("EDGEWARD_MQTT__HOTS", "mqtt.host"),
        ("EDGEWARD_MQTT_HOST", "mqtt.host"),
        ("EDGEWARD_QUEUE__WINDOW", "queue.window_tasks"),
    ],
)
def test_unknown_key_in_the_environment_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, name: str, near: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=rf"{name}.*did you mean '{re.escape(near)}'"):
        load_settings()


def test_key_like_no_other_points_to_the_documentation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'zzzzqqqq'.*docs/operate\.md"):
        load_settings(write(tmp_path, "zzzzqqqq = 1\n"))


def test_switch_of_the_fault_tests_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEWARD_FAULT", "anything")
    assert load_settings().mqtt.enabled


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[mqtt]\nport = "many"\n', "mqtt.port"),
        ("[mqtt]\nport = 65536\n", "mqtt.port"),
        ("mqtt = 1\n", "mqtt"),
        ('log_level = "loud"\n', "log_level"),
        ("heartbeat_s = 0\n", "heartbeat_s"),
        ('[store]\nsynchronous = "OFF"\n', "store.synchronous"),
        ('device_id = "a/b"\n', "device_id"),
        ('device_id = ""\n', "device_id"),
        (f'device_id = "{"x" * 65}"\n', "device_id"),
    ],
)
def test_bad_value_names_its_setting(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^setting {re.escape(key)}: "):
        load_settings(write(tmp_path, text))


def test_bad_value_in_the_environment_names_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEWARD_MQTT__PORT", "many")
    with pytest.raises(ConfigError, match=r"^setting mqtt\.port: "):
        load_settings()


def test_place_of_the_broadcast_is_no_device() -> None:
    with pytest.raises(ConfigError, match=r"device_id.*broadcast"):
        load_settings(flags={"device_id": "_all"})


@pytest.mark.parametrize("host", ["broker.example", "192.168.1.5", "0.0.0.0"])
def test_plain_mqtt_to_another_machine_needs_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(host)} without TLS.*allow_plain"):
        load_settings(flags={"mqtt": {"host": host}})
    for word in ("allow_plain", "tls"):
        assert load_settings(flags={"mqtt": {"host": host, word: True}}).mqtt.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_plain_mqtt_on_this_machine_needs_none(host: str) -> None:
    assert not load_settings(flags={"mqtt": {"host": host}}).mqtt.tls


def test_client_certificate_and_its_key_go_together() -> None:
    for alone in ("cert_file", "key_file"):
        with pytest.raises(ConfigError, match="cert_file and key_file go together"):
            load_settings(flags={"mqtt": {alone: "/x.pem"}})
    both = {"cert_file": "/c.pem", "key_file": "/k.pem"}
    assert load_settings(flags={"mqtt": both}).mqtt.key_file == Path("/k.pem")


def test_password_comes_from_its_file_before_its_setting(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("of-file\n")
    flags = {"mqtt": {"password": "of-setting", "password_file": secret}}
    assert load_settings(flags=flags).password() == "of-file"
    assert load_settings(flags={"mqtt": {"password": "of-setting"}}).password() == "of-setting"
    assert load_settings().password() is None


def test_password_is_not_shown() -> None:
    settings = load_settings(flags={"mqtt": {"password": "hunter2"}})
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()


def test_missing_password_file_is_named(tmp_path: Path) -> None:
    settings = load_settings(flags={"mqtt": {"password_file": tmp_path / "gone"}})
    with pytest.raises(ConfigError, match=r"mqtt\.password_file .*gone: No such file"):
        settings.password()


def test_missing_settings_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml cannot be read: No such file"):
        load_settings(tmp_path / "gone.toml")


@pytest.mark.parametrize("content", [b"port 1883\n", b"[mqtt\n", b"a = '\xff'\n"])
def test_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML"):
        load_settings(path)


def test_folders_follow_the_data_folder_unless_they_are_named(tmp_path: Path) -> None:
    settings = load_settings(flags={"data_dir": tmp_path})
    assert settings.inbox_dir == tmp_path / "inbox"
    assert settings.outbox_dir == tmp_path / "outbox"
    assert settings.queue_url == f"redis+socket://{tmp_path}/run/queue.sock"
    assert settings.input_roots == (tmp_path / "inbox",)
    moved = load_settings(
        flags={
            "data_dir": tmp_path,
            "inbox": {"path": tmp_path / "in"},
            "limits": {"roots": [tmp_path / "more"]},
        }
    )
    assert moved.input_roots == (tmp_path / "in", tmp_path / "more")


def test_settings_cannot_be_changed_once_loaded() -> None:
    settings: Settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.log_json = True  # type: ignore[misc]
