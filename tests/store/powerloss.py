"""A model of a disk that loses power: what was not synced may be dropped, reordered or torn.

The log has every change to files and names. A state is built for a moment in the log: what had been synced by
then is there; of the rest each name change may or may not be, and each file may have any prefix of its
unsynced bytes, zeros in their place, or nothing.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stitchcache.store import Files


@dataclass
class Op:
    kind: str
    path: str = ""
    inode: int = 0
    offset: int = 0
    data: bytes = b""


class Recording(Files):
    """Does the calls, and writes down those that change something."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.log: list[Op] = []
        self._inodes: dict[int, int] = {}
        self._next = 0
        self._offsets: dict[int, int] = {}

    def mark(self, what: str) -> None:
        self.log.append(Op("mark", what))

    def _inode(self, fd: int) -> int:
        # Inode numbers are used again; a name of its own for each file is not.
        return self._inodes[os.fstat(fd).st_ino]

    def _opened(self, path: str, fd: int, new: bool) -> int:
        number = os.fstat(fd).st_ino
        if new:
            self._next += 1
            self._inodes[number] = self._next
            self.log.append(Op("name", path, self._next))
        self._offsets[fd] = 0
        return fd

    def create(self, path: str, mode: int = 0o644) -> int:
        return self._opened(path, super().create(path, mode), True)

    def open_or_create(self, path: str, mode: int = 0o600) -> int:
        new = not os.path.exists(path)
        return self._opened(path, super().open_or_create(path, mode), new)

    def write(self, fd: int, data: Any) -> int:
        done = super().write(fd, data)
        self.log.append(Op("write", "", self._inode(fd), self._offsets[fd], bytes(data[:done])))
        self._offsets[fd] += done
        return done

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self.log.append(Op("sync", "", self._inode(fd)))

    def fsync_dir(self, path: str) -> None:
        super().fsync_dir(path)
        self.log.append(Op("sync dir", path))

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        super().mkdir(path, mode)
        self.log.append(Op("mkdir", path))

    def rename(self, source: str, target: str) -> None:
        inode = self._inodes[os.lstat(source).st_ino]
        super().rename(source, target)
        self.log.append(Op("name", target, inode))
        self.log.append(Op("unname", source))

    def link(self, source: str, target: str) -> None:
        super().link(source, target)
        self.log.append(Op("name", target, self._inodes[os.lstat(source).st_ino]))

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self.log.append(Op("unname", path))


@dataclass
class _Disk:
    durable: dict[str, int | None] = field(default_factory=dict)  # path -> inode; None is a directory
    pending: list[tuple[str, int | None, bool]] = field(
        default_factory=list
    )  # path, inode, whether it is removed
    synced: dict[int, bytes] = field(default_factory=dict)
    current: dict[int, bytes] = field(default_factory=dict)

    def apply(self, op: Op) -> None:
        if op.kind in ("name", "mkdir"):
            self.pending.append((op.path, op.inode if op.kind == "name" else None, False))
            self.current.setdefault(op.inode, b"")
        elif op.kind == "unname":
            self.pending.append((op.path, None, True))
        elif op.kind == "write":
            old = self.current[op.inode]
            old = old.ljust(op.offset, b"\0")
            self.current[op.inode] = old[: op.offset] + op.data + old[op.offset + len(op.data) :]
        elif op.kind == "sync":
            self.synced[op.inode] = self.current[op.inode]
        elif op.kind == "sync dir":
            inside = [change for change in self.pending if os.path.dirname(change[0]) == op.path]
            self.pending = [change for change in self.pending if os.path.dirname(change[0]) != op.path]
            self._change(self.durable, inside)

    @staticmethod
    def _change(names: dict[str, int | None], changes: list[tuple[str, int | None, bool]]) -> None:
        for path, inode, removed in changes:
            if removed:
                names.pop(path, None)
            else:
                names[path] = inode

    def lose_power(self, rng: random.Random) -> dict[str, bytes | None]:
        names = dict(self.durable)
        style = rng.random()
        keep = 0.0 if style < 0.15 else 1.0 if style < 0.4 else rng.random()
        changes = [change for change in self.pending if rng.random() < keep]
        if rng.random() < 0.3:
            # Changes to different names reach the disk in any order.
            order = list(dict.fromkeys(path for path, _, _ in changes))
            rng.shuffle(order)
            changes.sort(key=lambda change: order.index(change[0]))
        self._change(names, changes)
        state: dict[str, bytes | None] = {}
        torn = rng.choice([0.0, 0.2, 1.0])
        for path, inode in names.items():
            state[path] = None if inode is None else self._content(inode, rng, torn)
        return state

    def _content(self, inode: int, rng: random.Random, torn: float) -> bytes:
        synced, current = self.synced.get(inode, b""), self.current[inode]
        if synced == current or rng.random() >= torn:
            return current
        choice = rng.randrange(5)
        if choice == 0:
            return synced
        if choice == 1:
            return current
        cut = rng.randint(0, len(current))
        if choice == 2:
            return current[:cut]
        if choice == 3:
            return current[:cut].ljust(len(current), b"\0")
        start = rng.randint(0, cut)
        return current[:start] + b"\0" * (cut - start) + current[cut:]


def states(log: list[Op], number: int, rng: random.Random):
    """Yield the marks that had been passed, and the files that are there, for random moments and losses."""
    moments = sorted(rng.randrange(len(log) + 1) for _ in range(number))
    disk, marks, at = _Disk(), [], 0
    for moment in moments:
        while at < moment:
            if log[at].kind == "mark":
                marks.append(log[at].path)
            else:
                disk.apply(log[at])
            at += 1
        yield list(marks), disk.lose_power(rng)


def build(state: dict[str, bytes | None], old: str, new: Path) -> None:
    """Make a state real in another place; what is in a directory that did not survive is lost."""
    new.mkdir()
    present = {old}
    for path in sorted(state):
        if path == old or os.path.dirname(path) not in present:
            continue
        place = str(new) + path[len(old) :]
        content = state[path]
        if content is None:
            os.mkdir(place)
            present.add(path)
        else:
            with open(place, "wb") as file:
                file.write(content)
