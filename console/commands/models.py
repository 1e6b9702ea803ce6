"""`edgeward models`: the model repository of this box."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.errors import InputFileError, UnsignedError
from console.invocation import Invocation, command, end_with
from console.output import build_table
from platforms.artifact import Precision

if TYPE_CHECKING:
    from agent.repository import ModelRepository, ModelVersion

app = typer.Typer(help="Models on this box.", no_args_is_help=True)

_SHOWN_FROM_BYTES = 64 << 20
"""A smaller copy is over before a person has seen a bar."""
_POLL_S = 0.1


class ExportForm(StrEnum):
    """Layouts that a model is written in."""

    TRITON = "triton"


NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The model's name.")]


def add_model(
    call: Invocation,
    name: NameArgument,
    path: Annotated[
        Path,
        typer.Argument(
            help="A folder with manifest.json, a Triton model's, or a bare model: .onnx, .xml "
            "with its .bin, .tflite, .pt2, a SavedModel's folder."
        ),
    ],
    activate: Annotated[
        bool, typer.Option(help="Whether to make it the active version at once.")
    ] = True,
    release: Annotated[
        str | None, typer.Option(help="The version's name, for a bare model.")
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the weights, for a bare model.")
    ] = Precision.FP32,
) -> None:
    """Add a version of a model that nobody signed, and make it the active one.

    For development, and for boxes that have one person: a fleet gets signed releases.
    """
    import tempfile

    if not call.settings.updates.allow_unsigned:
        raise UnsignedError(
            "updates.allow_unsigned is false: this box takes signed releases only "
            "(edgeward models update, or a bundle file)"
        )

    from console.file_import import find_format, write_file_version

    repository = _open(call)
    if (path / "manifest.json").exists():
        found = _copy(call, repository, path, name, activate=activate)
    elif find_format(path) is not None:
        _check_name(name)
        with tempfile.TemporaryDirectory(prefix="edgeward-import-") as folder:
            write_file_version(path, Path(folder), name, release=release, precision=precision)
            found = _copy(call, repository, Path(folder), name, activate=activate)
    elif path.is_dir():
        found = _add_triton(call, repository, path, name, activate=activate, precision=precision)
    else:
        msg = f"{path} is neither a folder with manifest.json nor a model file"
        raise InputFileError(msg)
    _show(call, found)


def _add_triton(
    call: Invocation,
    repository: "ModelRepository",
    path: Path,
    name: str,
    *,
    activate: bool,
    precision: Precision,
) -> "ModelVersion":
    """Add all versions of a Triton model; the one that `latest` names, or the newest, is last."""
    import tempfile

    from agent.platformfile import find_platform
    from console.triton_import import find_latest, find_versions, write_triton_version
    from platforms.spec import AcceleratorKind

    _check_name(name)
    versions = find_versions(path)
    if not versions:
        msg = f"{path} has neither a manifest.json nor a Triton model's version folders"
        raise InputFileError(msg)
    latest = find_latest(path) or versions[-1].release
    box = find_platform(call.settings.data_dir)
    # What nobody has looked for yet may be there; the load will say.
    has_gpu = box is None or box.has_accelerator(AcceleratorKind.NVIDIA_GPU)
    with tempfile.TemporaryDirectory(prefix="edgeward-import-") as folder:
        staged: list[tuple[str, Path]] = []
        for version in versions:
            target = Path(folder) / version.folder.name
            target.mkdir()
            write_triton_version(path, version, target, name, precision=precision, has_gpu=has_gpu)
            staged.append((version.release, target))
        added = {
            release: _copy(call, repository, target, name, activate=False)
            for release, target in staged
        }
    number = str(added[latest].number)
    return repository.activate(name, number) if activate else added[latest]


def export_model(
    call: Invocation,
    name: NameArgument,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="The model's new folder is in it.")],
    form: Annotated[
        ExportForm, typer.Option(help="triton: config.pbtxt and numeric version folders.")
    ] = ExportForm.TRITON,
    version: Annotated[
        str | None, typer.Option(help="Number or release; else the active version.")
    ] = None,
) -> None:
    """Write a version of a model as another server reads it."""
    from console.triton_import import export_triton

    del form
    found = _open(call).get_version(name, version)
    written = export_triton({found.number: found.folder}, path / name)
    document = {"model": name, "version": found.number, "files": [str(file) for file in written]}
    call.out.show(document, lambda: "\n".join(str(file) for file in written))


def _check_name(name: str) -> None:
    """Refuse a name that no manifest may have, before the work.

    Raises:
        typer.BadParameter: it is none.
    """
    import re

    from agent.manifest import NAME_PATTERN

    if not re.match(NAME_PATTERN, name):
        raise typer.BadParameter(f"{name!r} does not match {NAME_PATTERN}", param_hint="NAME")


def _copy(
    call: Invocation, repository: "ModelRepository", source: Path, name: str, *, activate: bool
) -> "ModelVersion":
    total = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    if total < _SHOWN_FROM_BYTES:
        return repository.add(source, name, activate=activate)
    with _watch_copy(call, call.settings.models_dir / ".blobs", total):
        return repository.add(source, name, activate=activate)


@contextmanager
def _watch_copy(call: Invocation, blobs: Path, total: int) -> Iterator[None]:
    """Show how the blobs grow while the block runs."""

    def measure() -> int:
        return sum(path.stat().st_size for path in blobs.glob("*") if path.is_file())

    with call.out.progress("MB") as progress:
        if progress is None:
            yield
            return
        task = progress.add_task("copying", total=total / 1e6)
        before, over = measure(), threading.Event()

        def follow() -> None:
            while not over.wait(_POLL_S):
                progress.update(task, completed=(measure() - before) / 1e6)

        follower = threading.Thread(target=follow, name="progress", daemon=True)
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()


def list_models(call: Invocation) -> None:
    """List models and their versions; the active one is marked."""
    repository = _open(call)
    versions = [
        item for name in repository.list_models() for item in repository.list_versions(name)
    ]
    rows = [
        (item.name, item.number, item.release, _word_role(item), str(item.folder))
        for item in versions
    ]
    call.out.show(
        [_to_document(item) for item in versions],
        lambda: (
            build_table(("Model", "Version", "Release", "", "Folder"), rows)
            if rows
            else "no models yet: edgeward models add NAME PATH"
        ),
    )


def _word_role(version: "ModelVersion") -> str:
    if version.is_active:
        return "active"
    return "previous" if version.is_previous else " "


def activate_version(
    call: Invocation,
    name: NameArgument,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Number or release.")],
) -> None:
    """Make a version the active one."""
    _show(call, _open(call).activate(name, version))


def roll_back(call: Invocation, name: NameArgument) -> None:
    """Go back to the version that was active before."""
    _show(call, _open(call).roll_back(name))


def remove_version(
    call: Invocation,
    name: NameArgument,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="Else the whole model.")
    ] = None,
) -> None:
    """Remove a version, or a whole model."""
    removed = _open(call).remove(name, version)
    numbers = ", ".join(map(str, removed))
    call.out.show({"model": name, "removed": removed}, lambda: f"removed {name} {numbers}")


def _open(call: Invocation) -> "ModelRepository":
    from agent.repository import ModelRepository

    return ModelRepository(call.settings.models_dir)


def _show(call: Invocation, found: "ModelVersion") -> None:
    role = "active" if found.is_active else "not active"
    call.out.show(
        _to_document(found),
        lambda: f"{found.name}: version {found.number} (release {found.release}) is {role}",
    )


def _to_document(version: "ModelVersion") -> dict[str, Any]:
    return {
        "model": version.name,
        "version": version.number,
        "release": version.release,
        "active": version.is_active,
        "previous": version.is_previous,
        "folder": str(version.folder),
    }


def update_model(
    call: Invocation,
    name: NameArgument,
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="The version's name.")],
    probation_s: Annotated[
        float | None,
        typer.Option("--probation", min=0, metavar="S", help="How long it is watched."),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=0, help="Answers it must have given before it is committed.")
    ] = 0,
    canary: Annotated[
        str | None, typer.Option(metavar="P,P", help="Shares of the traffic first, such as 10,50.")
    ] = None,
    shadow_s: Annotated[
        float, typer.Option("--shadow", min=0, metavar="S", help="See copies first for so long.")
    ] = 0.0,
    max_slowdown: Annotated[
        float | None, typer.Option(min=0.01, help="p95 over the active version's that is allowed.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Try again what failed here before.")
    ] = False,
    wait_s: Annotated[
        float, typer.Option("--wait", min=0, metavar="S", help="How long to wait for the end.")
    ] = 86_400.0,
) -> None:
    """Bring a release into service: fetch, stage, switch, watch; and go back where it fails."""
    from console.exits import Exit
    from console.update import build_update, run_update

    params: dict[str, Any] = {
        "probation": {"duration_s": probation_s, "requests": requests},
        "rollout": {"shadow_s": shadow_s, "canary": _read_shares(canary)},
        "force": force,
    }
    if max_slowdown is not None:
        params["policy"] = {"max_slowdown": max_slowdown}
        params["probation"]["max_slowdown"] = max_slowdown
    command_ = build_update(name, release, params)
    began = time.monotonic()

    def tell(words: str) -> None:
        call.out.note(f"  {time.monotonic() - began:6.1f} s  {words}")

    document = run_update(call.settings, command_, wait_s, tell)
    reason = document["reason"] or {}
    call.out.show(
        document,
        lambda: f"{name} {release}: {document['state']}: {reason.get('message', '')}",
    )
    if document["state"] != "succeeded":
        is_open = document["state"] in (None, "queued", "running")
        end_with(Exit.TIMED_OUT if is_open else Exit.NOT_AS_ASKED)


def _read_shares(text: str | None) -> list[float]:
    """Return `10,50` as numbers.

    Raises:
        typer.BadParameter: they are none.
    """
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is no list of shares", param_hint="--canary") from exc


def pin_model(call: Invocation, name: NameArgument) -> None:
    """Keep a model as it is, whatever the console wants, until `unpin`."""
    _open(call).pin(name)
    call.out.show({"model": name, "pinned": True}, lambda: f"{name} stays as it is")


def unpin_model(call: Invocation, name: NameArgument) -> None:
    """Let the console decide about a model again."""
    _open(call).unpin(name)
    call.out.show({"model": name, "pinned": False}, lambda: f"{name} follows the console again")


def measure_version(
    call: Invocation,
    name: NameArgument,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="Number or release; else the active.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what was measured before.")
    ] = False,
) -> None:
    """Try every artifact of a version on every runtime of this box, and keep the best.

    Each trial has a process of its own. A worker that has the version loaded takes the choice.
    """
    from rich.console import Group

    from agent.platformfile import load_platform
    from console.staging_view import render_record, stage_version

    found = _open(call).get_version(name, version)
    with call.out.spinner("looking at this box"):
        spec = load_platform(call.settings.data_dir)
    record = stage_version(call.settings, spec, found.folder, call.out, is_fresh=fresh)
    call.out.show(record.to_json(), lambda: Group(*render_record(record)))


def trust_version(
    call: Invocation,
    name: NameArgument,
    version: Annotated[str, typer.Argument(help="Number or release.")],
) -> None:
    """Serve a version again that is in quarantine for its crashes."""
    from console.dropbox import drop_command
    from console.submission import build_trust

    found = _open(call).get_version(name, version)
    drop_command(call.settings, build_trust(name, str(found.number)))
    document = {"model": name, "version": found.number, "asked": True}
    call.out.show(document, lambda: f"The agent is asked to serve {name} {found.number} again.")


command(app, "add")(add_model)
command(app, "export")(export_model)
command(app, "list")(list_models)
command(app, "activate")(activate_version)
command(app, "rollback")(roll_back)
command(app, "remove")(remove_version)
command(app, "update")(update_model)
command(app, "pin")(pin_model)
command(app, "unpin")(unpin_model)
command(app, "measure")(measure_version)
command(app, "trust")(trust_version)
