"""The documents say what the code says."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from agent.config import load_settings
from agent.jobs import JobState
from agent.manifest import parse_manifest
from agent.topics import DEVICE_PATTERN, Topics
from tests.architecture.documents import (
    EXAMPLE_SETTINGS,
    ROOT,
    build_settings_rows,
    extract_walk_through,
    find_section,
    iter_rows,
    iter_settings,
    read_document,
)

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SETTING = re.compile(r"^#?([a-z_]+) = ", re.M)


def find_documents() -> list[Path]:
    folders = ("docs", "systemd", "tests", "benchmarks")
    below = (path for folder in folders for path in (ROOT / folder).rglob("*.md"))
    return sorted([*ROOT.glob("*.md"), *below])


def make_anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as code hosts make them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def uncomment(text: str) -> str:
    return re.sub(r"^#([a-z_]+ = )", r"\1", text, flags=re.M)


def iter_keys_of(document: dict[str, Any], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, value in document.items():
        if isinstance(value, dict):
            keys |= iter_keys_of(value, f"{prefix}{name}.")
        else:
            keys.add(prefix + name)
    return keys


@pytest.fixture
def environment_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EDGEWARD_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("path", find_documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_of_a_document_leads_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    broken = []
    for link in _LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        found = target.exists()
        if found and anchor:
            found = anchor in make_anchors(target.read_text(encoding="utf-8"))
        if not found:
            broken.append(link)
    assert not broken


def test_settings_table_is_what_the_code_says() -> None:
    section = find_section(read_document("operate.md"), "## Settings")
    rows = [row for row in iter_rows(section) if row[0].startswith("`")]

    assert rows == build_settings_rows()


def test_every_setting_has_a_meaning() -> None:
    assert [key for key, found in iter_settings() if not found.description] == []


def test_example_settings_name_every_setting_once() -> None:
    text = EXAMPLE_SETTINGS.read_text(encoding="utf-8")
    known = {key for key, _ in iter_settings()}

    assert iter_keys_of(tomllib.loads(uncomment(text))) == known
    assert len(_SETTING.findall(text)) == len(known)


@pytest.mark.usefixtures("environment_without_settings")
def test_example_settings_load_as_they_are_and_uncommented(tmp_path: Path) -> None:
    text = EXAMPLE_SETTINGS.read_text(encoding="utf-8")
    for name, content in (("shipped", text), ("uncommented", uncomment(text))):
        file = tmp_path / f"{name}.toml"
        file.write_text(content, encoding="utf-8")
        settings = load_settings(file)

        assert settings.run_dir == Path("/run/edgeward"), name


@pytest.mark.usefixtures("environment_without_settings")
def test_example_settings_show_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "uncommented.toml"
    file.write_text(uncomment(EXAMPLE_SETTINGS.read_text(encoding="utf-8")), encoding="utf-8")
    settings = load_settings(file)

    different = []
    for key, found in iter_settings():
        value: Any = settings
        for part in key.split("."):
            value = getattr(value, part)
        has_default = found.default is not None and found.default_factory is None
        if has_default and value != found.default:
            different.append(key)
    assert different == []


def test_protocol_names_the_topics_that_the_code_uses() -> None:
    section = find_section(read_document("protocol.md"), "## Topics")
    rows = [row for row in iter_rows(section) if row[0].startswith("`edgeward/")]
    named = [row[0].strip("`") for row in rows]

    topics = Topics("{dev}")
    device_prefix = topics.status.removesuffix("d2c/status")
    spelled = {
        topics.submit("{job_id}"),
        topics.cancel("{job_id}"),
        topics.command("{name}"),
        device_prefix + "c2d/desired",
        device_prefix + "c2d/ack",
        device_prefix + "c2d/sync",
        topics.subscriptions[1].replace("+", "{name}"),
        topics.status,
        topics.info,
        topics.reported,
        topics.heartbeat,
        topics.state("{job_id}"),
        topics.result("{job_id}"),
        topics.progress("{job_id}"),
        topics.event("{type}"),
        topics.sync,
        topics.reply_prefix + "{any}",
    }

    assert len(named) == len(set(named))
    assert set(named) == spelled
    assert f"`{DEVICE_PATTERN.pattern}`" in section


def test_every_command_topic_of_the_protocol_is_understood() -> None:
    section = find_section(read_document("protocol.md"), "## Topics")
    job_id = "01M8288FGR6NREGQZ1YWRZG80J"
    values = {"dev": "box", "job_id": job_id, "name": "ping"}
    topics = Topics("box")
    for row in iter_rows(section):
        topic = row[0].strip("`")
        if "/c2d/" in topic:
            assert topics.find_address(topic.format(**values)) is not None, topic


def test_protocol_lists_every_job_state() -> None:
    section = find_section(read_document("protocol.md"), "### Rules")
    header = next(iter_rows(section))

    assert header[1:] == [state.value for state in JobState]


def test_manifest_example_is_a_manifest() -> None:
    blocks = re.findall(r"^```json\n(.*?)^```$", read_document("manifest.md"), re.M | re.S)

    assert parse_manifest(blocks[0]).name == "digits"


def test_walk_through_is_one_valid_shell_script() -> None:
    script = extract_walk_through()
    checked = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True, timeout=10)

    assert checked.returncode == 0, checked.stderr
    assert "mosquitto_pub" in script
    assert "mosquitto_sub" in script
