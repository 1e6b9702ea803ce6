"""A disk with folders, that keeps for sure only what was synced.

The rules of `tests.fault.power_cuts.disk`, and for names: a creation, removal, link or renaming
lasts for sure once the folder that it stands in was synced (of a renaming from one folder to
another: either of them, with what came before it in both); until then each is kept or dropped as
a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.fault.power_cuts.disk import Fate, Inode
from tests.fault.power_cuts.recording import Kind, Operation


@dataclass(frozen=True, eq=False)
class Link:
    """A symbolic link."""

    target: str


@dataclass(eq=False)
class Folder:
    """A folder: its names now, and those that last for sure."""

    names: "Names" = field(default_factory=dict)
    durable: "Names" = field(default_factory=dict)


Node = Inode | Folder | Link
Names = dict[str, Node]
View = dict[int, Names]
"""Names of folders, by the folder's identity."""


class Change(NamedTuple):
    """A change of names that is not synced yet."""

    folders: tuple[Folder, ...]
    apply: Callable[[Callable[[Folder], Names]], None]


class Leaf(NamedTuple):
    """What lies at a path after a cut."""

    content: bytes | str | None
    """Of a file; the target of a link, as text; None for a folder."""
    inode: int
    """Equal for names of the same file."""


Image = dict[str, Leaf]


class Tree:
    """One folder on the disk with all below it: feed it operations, ask what a cut leaves."""

    def __init__(self) -> None:
        self._root = Folder()
        self._pending: list[Change] = []

    def apply(self, operation: Operation) -> None:
        """Let the run do its next operation; names are paths below the root."""
        kind, path = operation.kind, operation.name
        match kind:
            case Kind.SYNCED:
                self._sync(path)
            case Kind.CREATED:
                self._put(path, Inode())
            case Kind.FOLDER_MADE:
                self._put(path, Folder())
            case Kind.SYMLINKED:
                self._put(path, Link(operation.data.decode()))
            case Kind.LINKED:
                self._put(operation.data.decode(), self._find(path))
            case Kind.UNLINKED | Kind.FOLDER_REMOVED:
                self._remove(path)
            case Kind.RENAMED:
                self._rename(path, operation.data.decode())
            case _:
                found = self._find_or_none(path)
                # Otherwise a write to a file already removed: nobody will read it.
                if isinstance(found, Inode):
                    found.pending.append(operation)

    def _open(self, path: str) -> tuple[Folder, str]:
        folder, _, name = path.rpartition("/")
        found = self._find(folder)
        assert isinstance(found, Folder), f"{folder} is no folder"
        return found, name

    def _find(self, path: str) -> Node:
        node: Node = self._root
        for part in filter(None, path.split("/")):
            assert isinstance(node, Folder), f"{path}: {part} is in no folder"
            node = node.names[part]
        return node

    def _find_or_none(self, path: str) -> Node | None:
        try:
            return self._find(path)
        except KeyError:
            return None

    def _sync(self, path: str) -> None:
        found = self._find_or_none(path)
        if isinstance(found, Inode):
            found.sync()
        elif isinstance(found, Folder):
            self._keep(found)

    def _keep(self, synced: Folder) -> None:
        """Let a folder's changes last, and what came before them in folders that they touch."""
        ordered = list(enumerate(self._pending))
        last = {
            id(folder): n
            for n, change in ordered
            if synced in change.folders
            for folder in change.folders
        }
        lasting = {
            n
            for n, change in ordered
            if any(n <= last.get(id(folder), -1) for folder in change.folders)
        }
        for n in sorted(lasting):
            self._pending[n].apply(lambda folder: folder.durable)
        self._pending = [change for n, change in ordered if n not in lasting]

    def _change(self, folders: tuple[Folder, ...], apply: Callable[..., None]) -> None:
        apply(lambda folder: folder.names)
        self._pending.append(Change(folders, apply))

    def _put(self, path: str, node: Node) -> None:
        folder, name = self._open(path)
        self._change((folder,), lambda names: names(folder).update({name: node}))

    def _remove(self, path: str) -> None:
        folder, name = self._open(path)
        self._change((folder,), lambda names: names(folder).pop(name, None))

    def _rename(self, old: str, new: str) -> None:
        (source, old_name), (target, new_name) = self._open(old), self._open(new)
        node = source.names[old_name]

        def apply(names: Callable[[Folder], Names]) -> None:
            names(source).pop(old_name, None)
            names(target)[new_name] = node

        self._change((source, target), apply)

    def cut(self, fate: Fate) -> Image:
        """Return what a power cut now leaves."""
        view: View = {}

        def names(folder: Folder) -> Names:
            return view.setdefault(id(folder), dict(folder.durable))

        for change in self._pending:
            if fate.keeps():
                change.apply(names)
        image: Image = {}
        contents: dict[int, bytes] = {}
        self._collect("", self._root, names, fate, contents, image)
        return image

    def _collect(
        self,
        path: str,
        folder: Folder,
        names: Callable[[Folder], Names],
        fate: Fate,
        contents: dict[int, bytes],
        image: Image,
    ) -> None:
        for name, node in sorted(names(folder).items()):
            below = f"{path}/{name}".lstrip("/")
            if isinstance(node, Folder):
                image[below] = Leaf(None, id(node))
                self._collect(below, node, names, fate, contents, image)
            elif isinstance(node, Link):
                image[below] = Leaf(node.target, id(node))
            else:
                if id(node) not in contents:
                    contents[id(node)] = bytes(node.read(fate))
                image[below] = Leaf(contents[id(node)], id(node))
