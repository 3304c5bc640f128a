"""Trying in a directory what the store needs of it, and saying what each answer means for the user."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from stitchcache.store.files import Files, close_quietly, distrust, words, write_all
from stitchcache.store.layout import Area
from stitchcache.store.locks import try_lock

_LOW_BYTES = 1 << 30
_LOW_INODES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One thing that was tried.

    Args:
        name: What: ``directory``, ``trust``, ``create``, ``rename``, ``link``, ``times``, ``fsync``,
            ``lock``, ``exec``, ``space`` or ``inodes``.
        level: ``ok``; ``note`` where the store works around it; ``problem`` where something is lost.
        found: What was seen, in the system's words where it has some.
        meaning: What it means for the user, and what to do.
    """

    name: str
    level: Literal["ok", "note", "problem"]
    found: str
    meaning: str


def probe(path: str, *, files: Files | None = None) -> list[Trial]:
    """Try a directory; what is made is removed again, and the directory itself is not made.

    Args:
        path: A cache's root, existing or not: then the nearest directory above it is tried.
        files: File-system calls.

    Returns:
        One trial each, in the order they were tried.
    """
    work = _Probe(files or Files(), _existing(os.path.abspath(path)), os.path.abspath(path))
    return work.run()


def _existing(path: str) -> str:
    while not os.path.lexists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


class _Probe:
    def __init__(self, files: Files, place: str, asked: str) -> None:
        self.files = files
        self.place = place
        self.asked = asked
        self.trials: list[Trial] = []
        self.stem = os.path.join(place, f".stitchcache-probe-{os.urandom(8).hex()}")

    def run(self) -> list[Trial]:
        if not self._directory():
            return self.trials
        self._trust()
        self._space()
        if self._create():
            try:
                for trial in (self._rename, self._link, self._times, self._fsync, self._lock, self._exec):
                    trial()
            finally:
                for suffix in ("", ".renamed", ".linked"):
                    self._remove(self.stem + suffix)
        return self.trials

    def _add(self, name: str, level: Literal["ok", "note", "problem"], found: str, meaning: str = "") -> None:
        self.trials.append(Trial(name=name, level=level, found=found, meaning=meaning))

    def _remove(self, path: str) -> None:
        try:
            self.files.unlink(path)
        except OSError:
            pass

    def _attempt(
        self,
        name: str,
        act: Callable[[], object],
        bad: Literal["note", "problem"],
        meaning: str,
    ) -> bool:
        try:
            act()
        except OSError as error:
            self._add(name, bad, words(error), meaning)
            return False
        self._add(name, "ok", "works")
        return True

    def _directory(self) -> bool:
        if not os.path.isdir(self.place):
            self._add(
                "directory",
                "problem",
                f"{self.place} is not a directory",
                "nothing can be stored: move that file away, or set STITCHCACHE_DIR to another directory",
            )
            return False
        found = "exists" if self.place == self.asked else f"missing; tried {self.place} in its place"
        self._add("directory", "ok", found)
        return True

    def _trust(self) -> None:
        if self.place != self.asked:
            self._add("trust", "ok", "not made yet")
            return
        for name in ("", *Area):
            path = os.path.join(self.place, name) if name else self.place
            try:
                reason = distrust(path, self.files.lstat(path) if name else self.files.stat(path))
            except FileNotFoundError:
                continue
            except OSError as error:
                reason = f"{path} cannot be looked at ({words(error)})"
            if reason is not None:
                meaning = "entries here are not loaded: compiled pieces are native code"
                self._add("trust", "problem", reason, meaning)
                return
        self._add("trust", "ok", "nobody else can write it")

    def _space(self) -> None:
        try:
            facts = self.files.statvfs(self.place)
        except OSError as error:
            self._add("space", "note", words(error), "how much room is left is not known")
            return
        free = facts.f_bavail * facts.f_frsize
        low = free < _LOW_BYTES
        advice = "a prewarm may fill the disk: free space, or set STITCHCACHE_MAX_SIZE"
        self._add("space", "problem" if low else "ok", f"{free / 1e9:.1f} GB free", advice if low else "")
        # Some file systems have no fixed number of inodes and say 0 of 0.
        low = facts.f_files > 0 and facts.f_favail < _LOW_INODES
        found = f"{facts.f_favail} free" if facts.f_files else "not limited"
        advice = "new files fail although bytes are free: remove small files, or use another file system"
        self._add("inodes", "problem" if low else "ok", found, advice if low else "")

    def _create(self) -> bool:
        def create() -> None:
            fd = self.files.create(self.stem)
            try:
                write_all(self.files, fd, b"probe" * 1000)
            finally:
                self.files.close(fd)

        return self._attempt(
            "create",
            create,
            "problem",
            "nothing can be stored here; entries that are here are served. Compile elsewhere and use this "
            "as a lower layer, or set STITCHCACHE_DIR to a writable directory",
        )

    def _rename(self) -> None:
        def rename() -> None:
            self.files.rename(self.stem, self.stem + ".renamed")
            self.files.rename(self.stem + ".renamed", self.stem)

        self._attempt("rename", rename, "problem", "nothing can be stored: publishing needs an atomic rename")

    def _link(self) -> None:
        self._attempt(
            "link",
            lambda: self.files.link(self.stem, self.stem + ".linked"),
            "note",
            "no hard links: blobs are published by rename, which is as safe",
        )

    def _times(self) -> None:
        def times() -> None:
            before = time.time_ns() - 7_000_000_000
            self.files.utime(self.stem, before)
            if self.files.stat(self.stem).st_mtime_ns != before:
                raise OSError("times are coarse")

        self._attempt("times", times, "note", "last uses are not exact; eviction leans on its grace period")

    def _fsync(self) -> None:
        def fsync() -> None:
            fd = self.files.open_write(self.stem)
            try:
                self.files.fsync(fd)
            finally:
                close_quietly(self.files, fd)
            self.files.fsync_dir(self.place)

        self._attempt(
            "fsync", fsync, "problem", "a put is not known to survive a crash: use durability='fast' here"
        )

    def _lock(self) -> None:
        meaning = (
            "processes that start together may compile the same model twice, and eviction leans on its grace "
            "period; on NFS check the lock service"
        )
        first = second = None
        try:
            first, second = self.files.open_write(self.stem), self.files.open_write(self.stem)
            had, clashed = try_lock(self.files, first), try_lock(self.files, second)
        except OSError as error:
            self._add("lock", "note", words(error), meaning)
            return
        finally:
            for fd in (first, second):
                if fd is not None:
                    close_quietly(self.files, fd)
        if had and clashed is False:
            self._add("lock", "ok", "works")
        else:
            found = "locks do not exclude" if had and clashed else "locks are not supported"
            self._add("lock", "note", found, meaning)

    def _exec(self) -> None:
        def map_executable() -> None:
            # What dlopen does first; a noexec mount refuses it.
            fd = self.files.open_read(self.stem)
            try:
                mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
            finally:
                close_quietly(self.files, fd)

        self._attempt(
            "exec",
            map_executable,
            "problem",
            "compiled pieces cannot be loaded from here (mounted noexec?): remount with exec, or set "
            "STITCHCACHE_DIR to another directory",
        )
