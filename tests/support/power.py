"""What a disk holds after a power cut: a model of flushed files and flushed folders, fed by the operations of durable.py."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamahome import durable

Tree = dict[str, bytes | None]
"""Relative path -> content, or None for a folder."""


class Disk:
    """Follows a folder through every operation, and keeps two disks for a power cut before each of them.

    `images` holds (operation, tree): once with nothing but what was flushed, and once with every name of that moment, but files that were
    not flushed are empty, as file systems leave them that order names before contents.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: list[tuple[str, Tree]] = []
        self.removed: list[Path] = []
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._pending: tuple[str, Path] | None = None
        for folder, _, names in os.walk(root):
            self._flushed("flush folder", Path(folder))
            for name in names:
                self._flushed("flush", Path(folder, name))

    @contextmanager
    def watching(self) -> Iterator["Disk"]:
        """Observe the operations within the block."""
        durable.observer = self._observe
        try:
            yield self
        finally:
            durable.observer = None
            self._settle("the end")

    def _observe(self, operation: str, path: Path, source: Path | None) -> None:
        self._settle(f"{operation} {path.name}")
        if operation == "remove":
            self.removed.append(path)
        self._pending = (operation, path)

    def _settle(self, label: str) -> None:
        """Count the operation before this one as done, and keep the disks of this moment."""
        if self._pending is not None and self._pending[1].exists():
            self._flushed(*self._pending)
        self._pending = None
        alive = {self.root.stat().st_ino} | {path.stat().st_ino for path in self.root.rglob("*")}
        self._contents = {inode: content for inode, content in self._contents.items() if inode in alive}
        self._names = {inode: names for inode, names in self._names.items() if inode in alive}
        flushed: Tree = {}
        self._collect(self.root.stat().st_ino, "", flushed)
        self.images += [(f"before {label}", flushed), (f"before {label}, with all names", self._with_all_names())]

    def _flushed(self, operation: str, path: Path) -> None:
        if operation == "flush":
            self._contents[path.stat().st_ino] = path.read_bytes()
        elif operation == "flush folder":
            self._names[path.stat().st_ino] = {each.name: each.stat().st_ino for each in path.iterdir()}

    def _collect(self, folder: int, prefix: str, tree: Tree) -> None:
        for name, inode in self._names.get(folder, {}).items():
            is_folder = inode in self._names
            tree[prefix + name] = None if is_folder else self._contents.get(inode, b"")
            if is_folder:
                self._collect(inode, f"{prefix}{name}/", tree)

    def _with_all_names(self) -> Tree:
        tree: Tree = {}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            tree[name] = None if path.is_dir() else self._contents.get(path.stat().st_ino, b"")
        return tree


def write_tree(tree: Tree, folder: Path) -> None:
    """Write the disk of `Disk.images` into an empty folder."""
    for name, content in sorted(tree.items()):
        if content is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
