"""Real files for the demo's inbox: whatever a Python installation has lying about.

Owns their choice. Every kind comes with the label that magika gives it, so that the demo
can check the answers.
"""

import importlib.util
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

_MIN_BYTES, _MAX_BYTES = 2_000, 2_000_000
_PER_KIND = 14
"""A few kinds are plenty on any box, and scripts would otherwise be all there is."""


@dataclass(frozen=True)
class RealFile:
    """A file and the label that it should get."""

    path: Path
    label: str


def find_real_files(pictures: Sequence[Path]) -> list[RealFile]:
    """Return files of several kinds, mixed: scripts, libraries, pictures, text.

    Args:
        pictures: PNG files to be among them.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = [
        _take(sorted(stdlib.glob("*.py")), "python"),
        _take(sorted(Path(sysconfig.get_path("platstdlib")).glob("lib-dynload/*.so")), "elf"),
        [RealFile(path, "png") for path in pictures[:_PER_KIND]],
        _take(_data_files("images/*.jpg"), "jpeg"),
        _take(_data_files("data/*.csv"), "csv"),
        _take(_data_files("descr/*.rst"), "rst"),
    ]
    return list(_mix(found))


def _data_files(pattern: str) -> Iterator[Path]:
    """Yield files that scikit-learn, which the demo needs anyway, has beside its data sets."""
    spec = importlib.util.find_spec("sklearn")
    if spec is not None and spec.origin is not None:
        yield from sorted((Path(spec.origin).parent / "datasets").glob(pattern))


def _take(paths: Sequence[Path] | Iterator[Path], label: str) -> list[RealFile]:
    usable = (
        path for path in paths if path.is_file() and _MIN_BYTES <= path.stat().st_size <= _MAX_BYTES
    )
    return [RealFile(path, label) for path in islice(usable, _PER_KIND)]


def _mix(groups: Sequence[Sequence[RealFile]]) -> Iterator[RealFile]:
    """Yield one of each kind in turn, as long as there are any."""
    for round_number in range(_PER_KIND):
        for group in groups:
            yield from group[round_number : round_number + 1]


def drop_file(source: Path, folder: Path) -> None:
    """Copy a file into an inbox so that it is never seen half done: dot-name, then rename."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{source.name}"
    shutil.copyfile(source, part)
    part.rename(folder / source.name)
