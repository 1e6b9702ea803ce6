"""Publishing from the command line, as docs/releases.md walks through it."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.harness.commands import run_edgeward
from tests.harness.publishing import serve

DIGITS = Path(__file__).parents[2] / "console" / "models" / "digits"


def ask(*arguments: object, code: int = 0) -> Any:
    done: subprocess.CompletedProcess[str] = run_edgeward(*arguments, "--json")
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    return json.loads(done.stdout)


def test_release_goes_from_a_folder_to_a_box_over_every_channel(tmp_path: Path) -> None:
    repo, keys = tmp_path / "repo", tmp_path / "keys"
    common = ("--repo", repo, "--keys", keys)
    made = ask("release", "init", repo, "--keys", keys)
    assert made["published"] == {"root": 1, "targets": 1, "snapshot": 1, "timestamp": 1}
    root = made["root"]

    created = ask("release", "create", "digits", "1.0.0", DIGITS, "--repo", repo)
    assert created["state"] == "staged"
    assert ask("release", "sign", *common)["waiting"] == {}
    (listed,) = ask("release", "list", "--repo", repo)
    assert (listed["model"], listed["state"], listed["files"]) == ("digits", "published", 6)

    bundle = tmp_path / "digits.edgeward"
    ask("release", "bundle", "digits", "1.0.0", "-o", bundle, "--repo", repo)
    with serve(repo) as address:
        for source in (repo, bundle, address):
            (look,) = ask("release", "verify", source, "digits", "1.0.0", "--root", root)
            assert (look["blobs_verified"], look["stale"]) == (6, False)

    refused = ask("release", "verify", bundle, "digits", "2.0.0", "--root", root, code=3)
    assert refused["error"]["code"] == "release_unknown"
    bundle.write_bytes(bundle.read_bytes()[:-3000])
    torn = ask("release", "verify", bundle, "digits", "1.0.0", "--root", root, code=1)
    assert torn["error"]["code"] == "bad_bundle"


def test_keys_are_delegated_rotated_and_revoked(tmp_path: Path) -> None:
    repo, keys = tmp_path / "repo", tmp_path / "keys"
    common = ("--repo", repo, "--keys", keys)
    ask("release", "init", repo, "--keys", keys)
    ask("keys", "delegate", "acme", "--models", "acme-*", *common)
    release = ("release", "create", "acme-digits", "1.0.0", DIGITS, "--publisher", "acme")
    assert ask(*release, *common, "--sign")["state"] == "published"

    assert ask("keys", "rotate", "acme", *common)["published"]["acme"] == 3
    keyid = next(item["keys"][0] for item in ask("keys", "list", *common) if item["role"] == "root")
    assert ask("keys", "revoke", "root", keyid[:12], *common)["published"]["root"] == 2
    second = ask("keys", "revoke", "targets", "", *common, code=1)
    assert second["error"]["code"] == "bad_release_repository"

    one = tmp_path / "one"
    one.mkdir()
    (one / "root-2.pem").write_bytes((keys / "root-2.pem").read_bytes())
    half = ask("keys", "rotate", "root", "--repo", repo, "--keys", one, code=5)
    assert (half["published"], "root" in half["waiting"]) == ({}, True)
    (look,) = ask("release", "verify", repo)
    assert look["versions"]["root"] == 2
