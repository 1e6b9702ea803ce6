"""`edgeward release` and `edgeward keys`: publishing models to boxes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.exits import Exit
from console.invocation import Invocation, command, end_with
from console.output import build_facts, build_table

if TYPE_CHECKING:
    from securesystemslib.signer import Key

    from console.release.keys import KeyRing
    from console.release.repository import ListedRelease, ReleaseRepository
    from console.release.signing import SigningReport
    from console.release.verification import Look

app = typer.Typer(help="Signed releases of models, for boxes to fetch.", no_args_is_help=True)
keys = typer.Typer(help="Keys that sign releases.", no_args_is_help=True)

_SHOWN_KEYID = 16
"""Characters of a key's id in tables; any beginning that only one key has names it."""

RepositoryArgument = Annotated[
    Path, typer.Argument(metavar="REPO", help="The release repository's folder.")
]
RepositoryOption = Annotated[
    Path, typer.Option("--repo", metavar="REPO", help="The release repository's folder.")
]
KeysOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--keys",
        metavar="DIR",
        help="A folder with signing keys, outside of REPO; may be given again.",
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The model's name.")]
VersionArgument = Annotated[str, typer.Argument(metavar="VERSION", help="The release's version.")]
SnapshotDays = Annotated[
    int | None, typer.Option(min=1, help="How long the list of versions holds; else 30.")
]
TimestampDays = Annotated[
    int | None,
    typer.Option(min=1, help="How long a box takes it as news; else 30. Longer for sticks."),
]


def init_repository(
    call: Invocation,
    repo: RepositoryArgument,
    folders: KeysOption = None,
    root_keys: Annotated[int, typer.Option(min=1, help="Keys of the root.")] = 3,
    root_threshold: Annotated[
        int, typer.Option(min=1, help="How many of them must sign a new root.")
    ] = 2,
    root_days: Annotated[int, typer.Option(min=1, help="How long the root holds.")] = 365,
    targets_days: Annotated[int, typer.Option(min=1, help="How long releases hold.")] = 365,
    snapshot_days: SnapshotDays = None,
    timestamp_days: TimestampDays = None,
) -> None:
    """Make an empty release repository; keys that are not there yet are made."""
    repository, ring = _open(repo), _open_ring(folders, repo)
    days = {"root": root_days, "targets": targets_days}
    days |= {"snapshot": snapshot_days or 30, "timestamp": timestamp_days or 30}
    with repository.lock():
        repository.create(ring, root_keys=root_keys, root_threshold=root_threshold, days=days)
        report = _sign(repository, ring, {})
    root = repo / "metadata" / "1.root.json"
    _show_signing(call, report, {"root": str(root)}, [("Root, for the boxes", root)])


def create_release(
    call: Invocation,
    name: NameArgument,
    version: VersionArgument,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A version folder with manifest.json.")
    ],
    repo: RepositoryOption,
    publisher: Annotated[
        str, typer.Option(help="Who signs it: targets, or one from `keys delegate`.")
    ] = "targets",
    sign: Annotated[bool, typer.Option("--sign", help="Sign and publish it at once.")] = False,
    folders: KeysOption = None,
) -> None:
    """Make a release of a version folder; it is published once it is signed."""
    _check_names(name, version)
    repository = _open(repo)
    report: SigningReport | None = None
    with repository.lock():
        listed = repository.add_release(name, version, folder, publisher)
        if sign:
            report = _sign(repository, _open_ring(folders, repo), {})
    document = _describe_release(listed)
    facts = [("Release", f"{name} {version}"), ("Signed by", publisher)]
    if report is None:
        document["state"] = "staged"
        facts.append(("Next", "edgeward release sign"))
        call.out.show(document, lambda: build_facts(facts))
    else:
        document["state"] = "staged" if publisher in report.waiting else "published"
        _show_signing(call, report, document, facts)


def sign_release(
    call: Invocation,
    repo: RepositoryOption,
    folders: KeysOption = None,
    snapshot_days: SnapshotDays = None,
    timestamp_days: TimestampDays = None,
) -> None:
    """Sign what waits, and a new timestamp; run it weekly, or boxes stop taking releases."""
    repository, ring = _open(repo), _open_ring(folders, repo)
    days = {"snapshot": snapshot_days, "timestamp": timestamp_days}
    with repository.lock():
        report = _sign(repository, ring, {role: found for role, found in days.items() if found})
    _show_signing(call, report, {}, [])


def verify_release(
    call: Invocation,
    source: Annotated[
        str, typer.Argument(metavar="REPO", help="A repository's folder, https://…, or a bundle.")
    ],
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Else all of a folder's.")] = (
        None
    ),
    version: Annotated[str | None, typer.Argument(metavar="VERSION")] = None,
    root: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The root a box was given; else a folder's first."),
    ] = None,
    allow_plain: Annotated[
        bool, typer.Option("--allow-plain", help="Take http:// to another machine, too.")
    ] = False,
) -> None:
    """Verify releases as a new box would, blobs included."""
    from datetime import UTC, datetime

    from console.release.verification import verify_releases
    from worker.update.sources import open_release_source

    if (name is None) != (version is None):
        raise typer.BadParameter("NAME and VERSION go together", param_hint="VERSION")
    opened = open_release_source(source, allow_plain=allow_plain)
    trusted = _read_root(source, root)
    if name is not None and version is not None:
        wanted = [(name, version)]
    else:
        found = _open(Path(source)).list_releases()
        wanted = [(item.name, item.version) for item in found if not item.is_staged]
    looks = list(verify_releases(opened, trusted, wanted, datetime.now(UTC)))
    call.out.show([_describe_look(look) for look in looks], lambda: _render_looks(looks))


def bundle_release(
    call: Invocation,
    name: NameArgument,
    version: VersionArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Ends with .edgeward.")
    ],
    repo: RepositoryOption,
) -> None:
    """Write a published release as one file, for a box without a network."""
    from agent.release import BUNDLE_SUFFIX
    from console.release.bundle import write_bundle

    if output.suffix != BUNDLE_SUFFIX:
        raise typer.BadParameter(f"must end with {BUNDLE_SUFFIX}", param_hint="--output")
    write_bundle(_open(repo), name, version, output)
    size = output.stat().st_size
    document = {"model": name, "version": version, "file": str(output), "size_bytes": size}
    call.out.show(document, lambda: f"{name} {version} is in {output} ({size / 1e6:.1f} MB)")


def list_releases(call: Invocation, repo: RepositoryOption) -> None:
    """List the releases of a repository."""
    found = _open(repo).list_releases()
    rows = [
        (
            item.name,
            item.version,
            item.publisher,
            len(item.document.files),
            f"{_sum_bytes(item) / 1e6:.1f} MB",
            "waits for signatures" if item.is_staged else "published",
        )
        for item in found
    ]
    headers = ("Model", "Version", "Publisher", "Files", "Size", "")
    call.out.show(
        [_describe_release(item) for item in found],
        lambda: build_table(headers, rows) if rows else "no releases yet: edgeward release create",
    )


def create_key(
    call: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the key's files.")],
    folders: KeysOption = None,
) -> None:
    """Make a key pair: NAME.pem, which signs, and NAME.pub, which may be handed on."""
    key = _open_ring(folders, None).create(name)
    call.out.show({"name": name, "keyid": key.keyid}, lambda: f"{name} is key {key.keyid}")


def list_keys(call: Invocation, repo: RepositoryOption, folders: KeysOption = None) -> None:
    """List who signs what, how many must, and until when it holds."""
    here = {keyid: name for name, keyid in _open_ring(folders, repo).list_keys().items()}
    roles = list(_iter_roles(_open(repo)))
    rows = [
        (
            role["role"],
            f"{role['threshold']} of {len(role['keys'])}",
            role["expires_at"],
            role["models"] or "",
            ", ".join(here.get(keyid, keyid[:_SHOWN_KEYID]) for keyid in role["keys"]),
        )
        for role in roles
    ]
    headers = ("Role", "Must sign", "Holds until", "Models", "Keys")
    call.out.show(roles, lambda: build_table(headers, rows))


def rotate_keys(
    call: Invocation,
    role: Annotated[str, typer.Argument(help="root, targets, snapshot, timestamp, a publisher.")],
    repo: RepositoryOption,
    folders: KeysOption = None,
    replace: Annotated[
        list[str] | None, typer.Option(metavar="KEYID", help="Only these keys; else all.")
    ] = None,
    public: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A new key made elsewhere; else it is made here."),
    ] = None,
    threshold: Annotated[
        int | None, typer.Option(min=1, help="How many must sign from now on.")
    ] = None,
) -> None:
    """Replace keys of a role, and sign anew what they had signed."""
    from console.release.keys import read_public_key

    repository, ring = _open(repo), _open_ring(folders, repo)
    with repository.lock():
        present = _get_keyids(repository, role)
        old = [_complete_keyid(present, keyid) for keyid in replace or present]
        given = [read_public_key(path) for path in public or ()]
        new: list[Key] = given or [ring.create_next(role) for _ in old]
        repository.change_keys(role, add=new, remove=old, threshold=threshold)
        report = _sign(repository, ring, {})
    made = [key.keyid for key in new]
    document = {"role": role, "added": made, "removed": old}
    _show_signing(call, report, document, [("New keys", ", ".join(made))])


def revoke_key(
    call: Invocation,
    role: Annotated[str, typer.Argument(help="root, targets, snapshot, timestamp, a publisher.")],
    keyid: Annotated[str, typer.Argument(metavar="KEYID", help="Or its beginning.")],
    repo: RepositoryOption,
    folders: KeysOption = None,
) -> None:
    """Take a key away from a role, as many as must sign being left."""
    repository, ring = _open(repo), _open_ring(folders, repo)
    with repository.lock():
        gone = _complete_keyid(_get_keyids(repository, role), keyid)
        repository.change_keys(role, add=[], remove=[gone])
        report = _sign(repository, ring, {})
    _show_signing(call, report, {"role": role, "removed": [gone]}, [("Revoked", gone)])


def delegate_models(
    call: Invocation,
    publisher: Annotated[str, typer.Argument(metavar="PUBLISHER", help="The new role's name.")],
    models: Annotated[
        str, typer.Option(metavar="PATTERN", help="The models it signs, such as 'acme-*'.")
    ],
    repo: RepositoryOption,
    folders: KeysOption = None,
    public: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The publisher's .pub; else a key is made here."),
    ] = None,
) -> None:
    """Let a publisher sign the releases of some models with a key of its own."""
    from console.release.keys import read_public_key

    _check_pattern(models)
    _check_names(publisher, publisher)
    repository, ring = _open(repo), _open_ring(folders, repo)
    with repository.lock():
        key = ring.get_or_create(publisher) if public is None else read_public_key(public)
        repository.delegate(publisher, models, key)
        report = _sign(repository, ring, {})
    document = {"publisher": publisher, "models": models, "keyid": key.keyid}
    _show_signing(call, report, document, [("Publisher", f"{publisher} signs {models}")])


def _open(folder: Path) -> "ReleaseRepository":
    from console.release.repository import ReleaseRepository

    return ReleaseRepository(folder)


def _open_ring(folders: list[Path] | None, repo: Path | None) -> "KeyRing":
    from console.release.keys import KeyRing

    return KeyRing(folders or [], repo)


def _sign(
    repository: "ReleaseRepository", ring: "KeyRing", days: Mapping[str, int]
) -> "SigningReport":
    from console.release.signing import sign_repository

    return sign_repository(repository, ring, days)


def _show_signing(
    call: Invocation,
    report: "SigningReport",
    document: dict[str, Any],
    facts: list[tuple[str, Any]],
) -> None:
    """Show what was signed; ends with 5 where something waits for more signatures."""
    published = ", ".join(f"{role} {version}" for role, version in report.published.items())
    rows = [*facts, ("Published", published)]
    rows += [(f"Waits: {role}", text) for role, text in report.waiting.items()]
    found = {**document, "published": dict(report.published), "waiting": dict(report.waiting)}
    call.out.show(found, lambda: build_facts(rows))
    end_with(Exit.NOT_AS_ASKED if report.waiting else Exit.OK)


def _check_names(*names: str) -> None:
    """Refuse what no name of a model, version or publisher may be.

    Raises:
        typer.BadParameter: one is none.
    """
    import re

    from agent.manifest import NAME_PATTERN

    for name in names:
        if not re.fullmatch(NAME_PATTERN, name):
            raise typer.BadParameter(f"{name!r} does not match {NAME_PATTERN}")
        if name == "latest":
            raise typer.BadParameter("'latest' names no version: a release has one of its own")


def _check_pattern(pattern: str) -> None:
    import re

    if not re.fullmatch(r"[A-Za-z0-9_.*?-]{1,64}", pattern):
        msg = f"{pattern!r} is no pattern of model names, such as 'acme-*'"
        raise typer.BadParameter(msg, param_hint="--models")


def _read_root(source: str, root: Path | None) -> bytes:
    if root is not None:
        return root.read_bytes()
    first = Path(source) / "metadata" / "1.root.json"
    if "://" not in source and first.is_file():
        return first.read_bytes()
    msg = "name the root that boxes were given: REPO/metadata/1.root.json of the publisher"
    raise typer.BadParameter(msg, param_hint="--root")


def _get_delegator(repository: "ReleaseRepository", role: str) -> Any:
    from console.release.repository import TOP_ROLES

    return repository.get_current("root" if role in TOP_ROLES else "targets").metadata.signed


def _get_keyids(repository: "ReleaseRepository", role: str) -> list[str]:
    from console.errors import ReleaseRepositoryError

    try:
        return list(_get_delegator(repository, role).get_delegated_role(role).keyids)
    except ValueError as exc:
        raise ReleaseRepositoryError(f"there is no role or publisher {role!r}") from exc


def _complete_keyid(present: list[str], beginning: str) -> str:
    from console.errors import SigningKeyError

    found = [keyid for keyid in present if keyid.startswith(beginning)]
    if len(found) != 1:
        msg = f"{beginning!r} names {len(found)} keys of the role, and should name one"
        raise SigningKeyError(msg)
    return found[0]


def _iter_roles(repository: "ReleaseRepository") -> Any:
    from console.release.repository import TOP_ROLES, find_delegations

    delegations = find_delegations(repository.get_current("targets"))
    for role in (*TOP_ROLES, *delegations):
        found = _get_delegator(repository, role).get_delegated_role(role)
        published = repository.find_published(role)
        patterns = [path.split("/")[0] for path in getattr(found, "paths", None) or ()]
        yield {
            "role": role,
            "threshold": found.threshold,
            "keys": list(found.keyids),
            "version": None if published is None else published.version,
            "expires_at": None
            if published is None
            else published.metadata.signed.expires.isoformat(),
            "models": ", ".join(patterns) or None,
            "waits": role in repository.list_staged(),
        }


def _sum_bytes(item: "ListedRelease") -> int:
    return sum(file.size_bytes for file in item.document.files)


def _describe_release(item: "ListedRelease") -> dict[str, Any]:
    return {
        "model": item.name,
        "version": item.version,
        "publisher": item.publisher,
        "state": "staged" if item.is_staged else "published",
        "files": len(item.document.files),
        "size_bytes": _sum_bytes(item),
    }


def _describe_look(look: "Look") -> dict[str, Any]:
    release = look.release
    return {
        "model": release.document.name,
        "version": release.document.version,
        "files": [file.path for file in release.document.files],
        "blobs_verified": look.blobs,
        "expires_at": release.expires_at.isoformat(),
        "signed_at": release.signed_at and release.signed_at.isoformat(),
        "stale": release.is_stale,
        "versions": dict(release.floors.versions),
    }


def _render_looks(looks: "list[Look]") -> Any:
    rows = [
        (
            look.release.document.name,
            look.release.document.version,
            look.blobs,
            f"{look.release.expires_at:%Y-%m-%d %H:%M} UTC",
            "stale: nobody has signed for a month" if look.release.is_stale else "fresh",
        )
        for look in looks
    ]
    headers = ("Model", "Version", "Blobs verified", "Holds until", "")
    return build_table(headers, rows) if rows else "no release is published"


command(app, "init")(init_repository)
command(app, "create")(create_release)
command(app, "sign")(sign_release)
command(app, "verify")(verify_release)
command(app, "bundle")(bundle_release)
command(app, "list")(list_releases)
command(keys, "create")(create_key)
command(keys, "list")(list_keys)
command(keys, "rotate")(rotate_keys)
command(keys, "revoke")(revoke_key)
command(keys, "delegate")(delegate_models)
