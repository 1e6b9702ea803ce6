"""What a bundle for a bug report must never show."""

import pytest

from console.secrecy import MASK, Scrubber, find_url_secrets, is_secret_name
from console.settings_view import mask

HIDDEN = "hunter-2"


@pytest.mark.parametrize(
    "text",
    [
        f"redis://:{HIDDEN}@broker:6379/0",
        f"connecting to redis://user:{HIDDEN}@broker:6379/0 failed",
        f"redis://user:{HIDDEN}/with:strange@signs@broker/0",
        f"rediss://broker/0?password={HIDDEN}&db=1",
        f"password={HIDDEN}",
        f"mqtt.password: {HIDDEN}, next",
        f'{{"password": "{HIDDEN}", "host": "h"}}',
        f"{{'api_key': '{HIDDEN} with spaces'}}",
        f"EDGEWARD_MQTT__PASSWORD={HIDDEN}",
        f"X-Auth-Token: {HIDDEN}",
        f"Authorization: Bearer {HIDDEN}{HIDDEN}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{HIDDEN}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{HIDDEN}\ncut off",
    ],
)
def test_what_looks_like_a_secret_is_taken_out(text: str) -> None:
    clean = Scrubber().scrub(text)
    assert HIDDEN not in clean
    assert MASK in clean


def test_known_secret_is_taken_out_wherever_it_stands() -> None:
    scrubber = Scrubber([HIDDEN, "hunter-2-and-more"])
    assert scrubber.scrub(f"a{HIDDEN}b hunter-2-and-more") == f"a{MASK}b {MASK}"
    value = {"deep": [{"x": f"<{HIDDEN}>"}, 7, None, True]}
    assert scrubber.scrub_value(value) == {"deep": [{"x": f"<{MASK}>"}, 7, None, True]}


@pytest.mark.parametrize(
    "text",
    [
        "redis+socket:///run/edgeward/queue.sock",
        "mqtt.password_file=/etc/edgeward/password",
        "01M828YRXD24KGBPQAVBA31ETP succeeded in 12 ms",
        "http://host:8080/path?x=1",
        "user@host said hello",
    ],
)
def test_what_is_no_secret_stays_readable(text: str) -> None:
    assert Scrubber().scrub(text) == text


def test_secret_is_told_by_its_name() -> None:
    assert is_secret_name("EDGEWARD_MQTT__PASSWORD")
    assert not is_secret_name("mqtt.password_file")
    value = {"password": HIDDEN, "password_file": "/etc/x"}
    assert Scrubber().scrub_value(value) == {"password": MASK, "password_file": "/etc/x"}


def test_password_of_a_url_is_found_as_written_and_as_meant() -> None:
    assert find_url_secrets("redis://:p%40ss@h/0") == ["p%40ss", "p@ss"]
    assert find_url_secrets("redis://h/0") == []


def test_shown_setting_hides_a_password_with_strange_signs() -> None:
    assert mask("redis://user:a:b/c@h/0") == f"redis://user:{MASK}@h/0"
