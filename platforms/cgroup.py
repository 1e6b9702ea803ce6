"""The control groups this process lives in: where they are and what they allow.

Reads v1, v2 and the hybrid of both, every level from the process's own group up
to the mounted root, because the tightest limit of all levels is the one that
counts. Returns the kernel's own texts; `detect` draws the conclusions. A file
that is absent is a limit that is absent, never an error.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNIFIED = ""
"""The name under which `/proc/self/cgroup` lists the v2 hierarchy."""


@dataclass(frozen=True)
class CgroupFacts:
    """Limits of every level, the process's own group first, as the kernel writes them."""

    version: int | None = None
    cpu_max: tuple[str, ...] = ()
    """`<quota µs> <period µs>`, the quota being `max` (v2) or `-1` (v1) where there is none."""
    memory_max: tuple[str, ...] = ()
    """Bytes, or `max`; v1 writes a number near 2⁶³ where there is no limit."""
    cpuset: str | None = None
    """The CPUs allowed, in the kernel's list form such as `0-2,5`."""


def read_text(path: Path) -> str | None:
    """Return the stripped text of a proc or sysfs file, or None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n\t ")
    except OSError:
        return None


def find_group_dirs(controller: str, root: Path = Path("/")) -> tuple[Path, ...]:
    """Return the existing folders of one controller, own group first, mounted root last.

    `controller` is a v1 controller's name, or `UNIFIED` for v2. In a container that
    sees the host's group path but not the host's tree, only the mounted root exists,
    and that root carries the container's limits.
    """
    mount = _find_mount(controller, root)
    if mount is None:
        return ()
    group = _read_membership(root).get(controller, "/")
    relative = PurePosixPath(group.lstrip("/"))
    # A group outside our cgroup namespace is shown as `/../…` and cannot be reached.
    levels = [] if ".." in relative.parts else [relative, *relative.parents]
    folders = [mount.joinpath(*level.parts) for level in levels] or [mount]
    return tuple(folder for folder in folders if folder.is_dir())


def probe_cgroup(root: Path = Path("/")) -> CgroupFacts:
    """Read CPU, memory and cpuset limits of every level above this process."""
    if (root / "sys/fs/cgroup/cgroup.controllers").exists():
        return _probe_v2(root)
    if _find_mount("cpu", root) or _find_mount("memory", root):
        return _probe_v1(root)
    return CgroupFacts()


def _probe_v2(root: Path) -> CgroupFacts:
    folders = find_group_dirs(UNIFIED, root)
    return CgroupFacts(
        version=2,
        cpu_max=_read_levels(folders, "cpu.max"),
        memory_max=_read_levels(folders, "memory.max"),
        cpuset=_read_first(folders, "cpuset.cpus.effective"),
    )


def _probe_v1(root: Path) -> CgroupFacts:
    quotas = []
    for folder in find_group_dirs("cpu", root):
        quota = read_text(folder / "cpu.cfs_quota_us")
        period = read_text(folder / "cpu.cfs_period_us")
        if quota and period:
            quotas.append(f"{quota} {period}")
    cpusets = find_group_dirs("cpuset", root)
    return CgroupFacts(
        version=1,
        cpu_max=tuple(quotas),
        memory_max=_read_levels(find_group_dirs("memory", root), "memory.limit_in_bytes"),
        cpuset=_read_first(cpusets, "cpuset.effective_cpus") or _read_first(cpusets, "cpuset.cpus"),
    )


def _find_mount(controller: str, root: Path) -> Path | None:
    """Return the folder where a hierarchy is mounted."""
    base = root / "sys/fs/cgroup"
    if controller == UNIFIED:
        return base if (base / "cgroup.controllers").exists() else None
    joint = "cpu,cpuacct" if controller == "cpu" else controller
    return next((base / name for name in (controller, joint) if (base / name).is_dir()), None)


def _read_membership(root: Path) -> dict[str, str]:
    """Return this process's group path by controller."""
    groups: dict[str, str] = {}
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        for controller in controllers.split(","):
            groups[controller] = group
    return groups


def _read_levels(folders: tuple[Path, ...], name: str) -> tuple[str, ...]:
    texts = (read_text(folder / name) for folder in folders)
    return tuple(text for text in texts if text)


def _read_first(folders: tuple[Path, ...], name: str) -> str | None:
    return next(iter(_read_levels(folders, name)), None)
