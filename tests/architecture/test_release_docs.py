"""The table of threats names tests that exist."""

import re

from tests.architecture.documents import ROOT, find_section, iter_rows, read_document


def test_every_threat_has_a_test_that_exists() -> None:
    attacks = (ROOT / "tests" / "integration" / "test_release_attacks.py").read_text("utf-8")
    section = find_section(read_document("releases.md"), "## Threats")
    _, _, *rows = iter_rows(section)

    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row[2])
        assert named, row
        assert [name for name in named if f"def {name}(" not in attacks] == []
