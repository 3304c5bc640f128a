"""Trying in a directory what the store needs of it, and saying what each answer means for the user."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

from stitchcache.records import dataclass
from stitchcache.store import Area, Files, distrust, words
from stitchcache.store.root import Root

Level = Literal["ok", "note", "problem"]

_LOW_BYTES = 1 << 30
_LOW_INODES = 10_000


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing that was tried."""

    name: str  # such as directory, trust, space, write, lock, exec, lower layer
    level: Level  # a note is worked around; where there is a problem, something is lost
    found: str  # what was seen, in the system's words where it has some
    meaning: str = ""  # for the user, and what to do


def probe(path: str, *, files: Files | None = None, trust: str = "owner") -> list[Trial]:
    """Try a cache's root, or the nearest directory above it that exists; what is made is removed again."""
    files = files or Files()
    asked = place = os.path.abspath(path)
    while not os.path.lexists(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        meaning = "nothing can be stored: move that file away, or set STITCHCACHE_DIR to another directory"
        found = f"{place} is not a directory"
        return [Trial("directory", "problem", found, meaning)]
    found = "exists" if place == asked else f"missing; tried {place} in its place"
    trials = [Trial("directory", "ok", found), _trust(files, asked, trust), _room(files, place)]
    made = os.path.join(place, f".stitchcache-probe-{os.urandom(8).hex()}")
    try:
        for name, level, act, meaning in _ACTS:
            try:
                act(files, made)
                trials.append(Trial(name, "ok", "works"))
            except OSError as error:
                trials.append(Trial(name, level, words(error), meaning))
                if act is _write:
                    # The others are tried on the file that it makes.
                    break
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return trials


def probe_lower(path: str, trust: str = "owner", *, files: Files | None = None) -> Trial:
    """Look at a layer beneath the first, which is only read."""
    if not os.path.isdir(path):
        meaning = "starts do not find what it holds: is it mounted?"
        return Trial("lower layer", "problem", f"{path} is no directory", meaning)
    it = _trust(files or Files(), path, trust)
    return replace(it, name="lower layer", found=it.found if it.meaning else f"{path}: {it.found}")


def _trust(files: Files, place: str, trust: str) -> Trial:
    for path in (place, *(os.path.join(place, area) for area in Area)):
        try:
            reason = files.distrusted_way(path) if path == place else distrust(path, files.lstat(path))
        except FileNotFoundError:
            continue
        except OSError as error:
            reason = f"{path} cannot be looked at ({words(error)})"
        if reason is not None:
            if trust != "owner":
                meaning = "what a trusted key has signed" if trust == "signed" else "all of it"
                return Trial("trust", "note", reason, f"{meaning} is loaded")
            meaning = "entries here are not loaded: compiled pieces are native code"
            return Trial("trust", "problem", reason, meaning)
    return Trial("trust", "ok", "nobody else can write it")


def _room(files: Files, place: str) -> Trial:
    try:
        facts = files.statvfs(place)
    except OSError as error:
        meaning = "how much room is left is not known"
        return Trial("space", "note", words(error), meaning)
    free = facts.f_bavail * facts.f_frsize
    found = f"{free / 1e9:.1f} GB free"
    # Some file systems have no fixed number of inodes and say 0 of 0.
    if facts.f_files:
        found += f", room for {facts.f_favail} files"
    if free >= _LOW_BYTES and (facts.f_files == 0 or facts.f_favail >= _LOW_INODES):
        return Trial("space", "ok", found)
    meaning = "a prewarm may fill the disk: free space, remove small files, or set STITCHCACHE_MAX_SIZE"
    return Trial("space", "problem", found, meaning)


def _write(files: Files, made: str) -> None:
    Root(made, files=files, durable=True, read_only=False).publish(f"{made}/file", b"probe" * 1000)


def _lock(files: Files, made: str) -> None:
    with ExitStack() as stack:
        fds = [stack.enter_context(files.opened(files.open_write(f"{made}/file"))) for _ in range(2)]
        had, clashed = (files.try_lock(fd) for fd in fds)
    if not had or clashed is not False:
        raise OSError("locks do not exclude" if had and clashed else "locks are not supported")


def _exec(files: Files, made: str) -> None:
    # What dlopen does first; a noexec mount refuses it.
    with files.opened(files.open_read(f"{made}/file")) as fd:
        mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()


_NOTHING_STORED = (
    "nothing can be stored here; entries that are here are served. Compile elsewhere and use this as a lower "
    "layer, or set STITCHCACHE_DIR to a writable directory"
)
_NO_LOCKS = (
    "processes that start together may compile the same model twice, and eviction leans on its grace period; "
    "on NFS check the lock service"
)
_NO_EXEC = (
    "compiled pieces cannot be mapped from here (mounted noexec?): each process reads them into memory of "
    "its own, and shares none with others. Remount with exec, or set STITCHCACHE_DIR to another directory"
)
_ACTS: tuple[tuple[str, Level, Callable[[Files, str], None], str], ...] = (
    ("write", "problem", _write, _NOTHING_STORED),
    ("lock", "note", _lock, _NO_LOCKS),
    ("exec", "note", _exec, _NO_EXEC),
)
