"""Cuts the power in a recorded run, starts the box again, and looks what serves.

A boundary is the end of an operation. Every boundary next to a sync is cut at least twice: what is
not synced lasts by chance, and none of it does. Further cuts are by chance over all boundaries.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from agent.errors import AgentError, ModelNotFoundError
from agent.jobs import ENDS
from agent.manifest import read_manifest, verify_files
from tests.conftest import require_binary
from tests.fault.power_cuts.disk import AllDropped, Chance, Fate
from tests.fault.power_cuts.recording import (
    MARKS,
    IncompleteRecordError,
    Kind,
    Operation,
    check_seen,
    compile_recorder,
    iter_entries,
    play,
)
from tests.fault.power_cuts.simulation import open_scratch
from tests.fault.update_cuts.box import QuietBox
from tests.fault.update_cuts.tree import Image, Tree
from tests.harness.clocks import FakeClock
from tests.harness.publishing import Publisher
from worker.errors import WorkerError

RELEASES = (("digits", 4), ("other", 1))
_KEPT_EXAMPLES = 8
_WHATEVER = ("-shm", "-wal-index")
# A publisher's keys are of no use to a box; of its folders the box reads these.
_SOURCE = "source"


@dataclass(frozen=True)
class Recording:
    """A run's operations in order, by paths below the box's folder."""

    operations: list[Operation]


@dataclass
class Figures:
    """What a walk found; the keys of the command's JSON."""

    seed: int
    cuts: int = 0
    boundaries: int = 0
    syncs: int = 0
    syncs_cut: int = 0
    """Syncs with a cut right before and right after them."""
    old: int = 0
    """Cuts after which an update under way came out as the version before it."""
    new: int = 0
    """Cuts after which it came out as the new one, or nothing was under way."""
    bad_cuts: int = 0
    """Cuts after which anything was wrong."""
    examples: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def publish(folder: Path) -> Path:
    """Publish the releases of the run; return the folder of source and root of trust."""
    publisher = Publisher(folder / _SOURCE)
    publisher.now = datetime.now(UTC)
    publisher.sign()
    for model, count in RELEASES:
        for number in range(1, count + 1):
            publisher.release(model, f"{number}.0.0")
    (folder / _SOURCE / "root.json").write_bytes(publisher.root)
    return folder / _SOURCE


def record(folder: Path, source: Path, plant: str | None = None) -> Recording:
    """Play the run in `folder` and return its record.

    Raises:
        IncompleteRecordError: a file was changed past the recorder.
        subprocess.CalledProcessError: the compiler or the run failed.
    """
    root = folder.resolve() / "run"
    root.mkdir()
    library = compile_recorder(folder, require_binary("cc"))
    argv = [sys.executable, "-m", "tests.fault.update_cuts.workload", str(root), str(source)]
    play(argv + (["--plant", plant] if plant else []), root, library, folder / "record")
    operations = []
    for path, operation in iter_entries((folder / "record").read_bytes()):
        name = _name(path, root)
        if name is None or (name == "" and operation.kind is Kind.FOLDER_MADE):
            continue
        if operation.kind in (Kind.RENAMED, Kind.LINKED):
            target = _name(Path(os.fsdecode(operation.data)), root)
            assert target is not None, "something left the box's folder"
            operation = operation._replace(data=target.encode())
        check_seen(operation._replace(name=name))
        operations.append(operation._replace(name=name))
    found = Recording(operations)
    _verify_whole(found, root / "data")
    return found


def _name(path: Path, root: Path) -> str | None:
    if path == root / MARKS:
        return MARKS
    if path.name.endswith(_WHATEVER) or not path.is_relative_to(root / "data"):
        return None
    name = path.relative_to(root / "data").as_posix()
    return "" if name == "." else name


def _verify_whole(recording: Recording, data: Path) -> None:
    """Refuse a record that does not lead to what the run left."""
    tree = Tree()
    for operation in recording.operations:
        if operation.name != MARKS:
            tree.apply(operation)
    image = tree.cut(Fate())
    left = {
        path.relative_to(data).as_posix(): path
        for path in data.rglob("*")
        if not path.name.endswith(_WHATEVER)
    }
    if set(image) != set(left):
        msg = f"the record and the run differ in {sorted(set(image) ^ set(left))[:5]}"
        raise IncompleteRecordError(msg)
    for name, path in left.items():
        content = image[name].content
        is_file = path.is_file() and not path.is_symlink()
        if is_file and content != path.read_bytes():
            msg = f"{name} is not what the record leads to"
            raise IncompleteRecordError(msg)


def walk(
    recording: Recording,
    source: Path,
    seed: int,
    cuts: int,
    on_cut: Callable[[int], None] = lambda _done: None,
    *,
    stops_early: bool = False,
) -> Figures:
    """Cut the power `cuts` times and return what was found.

    Args:
        recording: the run.
        source: of releases, for updates that go on after the cut.
        seed: of all chances.
        cuts: how many.
        on_cut: called with the number of cuts done.
        stops_early: at the first cut after which anything was wrong.
    """
    operations = recording.operations
    plan = _plan(operations, cuts, seed)
    syncs = [n for n, one in enumerate(operations) if one.kind is Kind.SYNCED]
    figures = Figures(seed, boundaries=len(operations) + 1, syncs=len(syncs))
    figures.syncs_cut = sum(bool(plan.get(n)) and bool(plan.get(n + 1)) for n in syncs)
    # While the ledger is being made for the first time nobody has been told anything.
    nothing = {"active": {"digits": [None], "other": [None]}, "ended": [], "is_begun": False}
    promises: list[dict[str, Any]] = [nothing]
    tree = Tree()
    with open_scratch() as folder:
        for boundary in range(len(operations) + 1):
            if boundary:
                operation = operations[boundary - 1]
                if operation.name == MARKS:
                    if operation.kind is Kind.WRITTEN:
                        promises.append({**json.loads(operation.data), "is_begun": True})
                else:
                    tree.apply(operation)
            for fate in plan.get(boundary, ()):
                figures.cuts += 1
                found = _look(tree.cut(fate), folder, source, promises[-1])
                _count(figures, found, boundary, fate, promises[-1])
                on_cut(figures.cuts)
                if stops_early and figures.bad_cuts:
                    return figures
    return figures


def _plan(operations: list[Operation], cuts: int, seed: int) -> dict[int, list[Fate]]:
    """Return the cuts of each boundary."""
    chance = random.Random(seed)
    near = sorted(
        {n + side for n, one in enumerate(operations) if one.kind is Kind.SYNCED for side in (0, 1)}
    )
    plan: dict[int, list[Fate]] = {}
    order = chance.sample(near, len(near))
    for number in range(cuts):
        turn, place = divmod(number, len(order))
        if turn == 0:
            plan.setdefault(order[place], []).append(Chance(f"{seed}:{number}"))
        elif turn == 1:
            plan.setdefault(order[place], []).append(AllDropped())
        else:
            boundary = chance.randrange(len(operations) + 1)
            plan.setdefault(boundary, []).append(Chance(f"{seed}:{number}"))
    return plan


def _count(
    figures: Figures, found: str | list[str], boundary: int, fate: Fate, promise: Mapping[str, Any]
) -> None:
    if isinstance(found, str):
        figures.bad_cuts += 1
        if len(figures.examples) < _KEPT_EXAMPLES:
            kind = type(fate).__name__
            figures.examples.append(f"boundary {boundary}, {kind}, {promise}: {found}"[:500])
        return
    is_old = any(len(may) > 1 and may[0] in found for may in promise["active"].values())
    figures.old += is_old
    figures.new += not is_old


def _look(image: Image, folder: Path, source: Path, promise: Mapping[str, Any]) -> str | list[Any]:
    """Start a box on what a cut has left; return what is wrong, or the releases that serve."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    _lay_out(image, folder / "run" / "data")
    try:
        box = QuietBox(folder / "run", source, FakeClock(boot=5_000, boot_name="boot-2"))
    except (AgentError, SQLAlchemyError) as exc:
        return f"the ledger does not open: {type(exc).__name__}: {exc}"
    try:
        return _go_on(box, promise)
    except (AgentError, WorkerError, SQLAlchemyError, OSError) as exc:
        return f"{type(exc).__name__}: {exc}"
    finally:
        box.close()


def _lay_out(image: Image, data: Path) -> None:
    data.mkdir(parents=True)
    inodes: dict[int, Path] = {}
    for name, leaf in image.items():
        path = data / name
        if leaf.content is None:
            path.mkdir()
        elif isinstance(leaf.content, str):
            path.symlink_to(leaf.content)
        elif leaf.inode in inodes:
            os.link(inodes[leaf.inode], path)
        else:
            path.write_bytes(leaf.content)
            inodes[leaf.inode] = path


def _go_on(box: QuietBox, promise: Mapping[str, Any]) -> str | list[Any]:
    if box.damage is not None and promise["is_begun"]:
        return f"the ledger is taken for damaged: {box.damage}"
    first = _find_fault(box, promise["active"])
    if first:
        return f"at the start: {first}"
    box.begin()
    for job in box.list_jobs():
        # What had no outcome yet is dispatched again, and done again.
        if job["state"] not in ENDS and not _is_deployed(box, job["job_id"]):
            _redo(box, job)
    if not box.finish():
        return "an update does not come to its end"
    for job_id in promise["ended"]:
        job = box.read_job(job_id)
        if job is None or job["state"] not in ENDS:
            return f"the end of {job_id} was told, and is lost"
    last = _find_fault(box, promise["active"])
    if last:
        return f"in the end: {last}"
    return [_find_active(box, model) for model in promise["active"]]


def _is_deployed(box: QuietBox, job_id: str) -> bool:
    return any(one["job_id"] == job_id for one in box.list_deployments())


def _redo(box: QuietBox, job: Mapping[str, Any]) -> None:
    job_id = job["job_id"]
    if job["task_id"] is not None:
        lost = [job["task_id"]]
        box.requeue(lost)
    box.dispatch(job_id)
    box.work(job_id, job["model"], job["version"])


def _find_active(box: QuietBox, model: str) -> str | None:
    try:
        return box.repository.get_version(model).release
    except ModelNotFoundError:
        return None


def _find_fault(box: QuietBox, active: Mapping[str, list[str | None]]) -> str:
    """Return what is wrong with the repository; nothing where every version is whole."""
    for model, allowed in active.items():
        found = _find_active(box, model)
        if found not in allowed:
            return f"{found} of {model} is active, one of {allowed} may be"
        if model not in box.repository.list_models():
            continue
        for version in box.repository.list_versions(model):
            try:
                manifest = read_manifest(version.folder)
                verify_files(manifest, version.folder)
            except AgentError as exc:
                return f"version {version.number} of {model}: {exc}"
            if manifest.version != version.release:
                return f"version {version.number} of {model} is a mixture"
    return ""
