"""The store: where things lie under a root, and what arguments and environment say about roots and limits.

Only checked keys become paths. What makes no sense is an ``OptionError``.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

from stitchcache.errors import OptionError, StoreError
from stitchcache.types import is_digest

TAG_NAME = "CACHEDIR.TAG"
TAG_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This file says that the directory is a cache: backups may leave it out, and it can be deleted.\n"
    b"# stitchcache keeps compiled PyTorch models here.\n"
)


class Area(StrEnum):
    """A directory of a root."""

    ENTRIES = "entries"
    TARGETS = "targets"
    PIECES = "pieces"
    BLOBS = "blobs"
    QUARANTINE = "quarantine"
    LOCKS = "locks"
    STATS = "stats"
    TMP = "tmp"


# Most bytes that a file can have; asked before it is read.
CAP = {Area.ENTRIES: 2 << 30, Area.TARGETS: 64 << 20, Area.PIECES: 64 << 20, Area.STATS: 1 << 20}
KEYED = (Area.ENTRIES, Area.TARGETS, Area.PIECES, Area.BLOBS)
_SUFFIX = {Area.ENTRIES: ".stitch"}
LEGACY_SUFFIXES = (".msgpack", ".pkl")


def check_key(key: str) -> str:
    """The key itself, when it may become a path."""
    if not is_digest(key):
        raise OptionError(f"{key!r} is no key: 64 lowercase hex digits are needed", option="key")
    return key


def keyed_path(root: str, area: Area, key: str) -> str:
    """The file of a key."""
    check_key(key)
    return f"{root}/{area}/{key[:2]}/{key}{_SUFFIX.get(area, '')}"


def possible_paths(root: str, area: Area, key: str) -> list[str]:
    """Files that may hold what a key names: for an entry those of older formats too."""
    suffixes = LEGACY_SUFFIXES if area is Area.ENTRIES else ()
    return [keyed_path(root, area, key), *(f"{root}/{key}{suffix}" for suffix in suffixes)]


def key_of(area: Area, name: str) -> str | None:
    """The key in a file's name; ``None`` for a foreign file."""
    key = name.removesuffix(_SUFFIX.get(area, ""))
    return key if is_digest(key) and name == key + _SUFFIX.get(area, "") else None


# -- settings ------------------------------------------------------------------------------------

CHECKS = ("example", "background", "none")
"""When a hit is compared with the model itself; the first is the default."""

Roots = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def root_paths(root: Roots | None) -> list[str]:
    """Absolute paths of the roots that an argument names, or of the default; a file is a ``StoreError``."""
    if root is None:
        paths = [default_root()]
    else:
        roots = [root] if isinstance(root, (str, os.PathLike)) else list(root)
        if not roots or any(not os.fspath(path) for path in roots):
            raise OptionError("root: a cache needs a directory, and got an empty name", option="root")
        paths = [_absolute(os.fspath(path)) for path in roots]
    for path in paths:
        try:
            is_directory = stat.S_ISDIR(os.stat(path).st_mode)
        except OSError:
            # Missing, or not to be seen: reads will miss, and writes will say why they cannot.
            continue
        if not is_directory:
            raise StoreError(
                f"{path}: is not a directory, so it cannot be a cache: move that file away, or name another "
                "directory (root=..., or STITCHCACHE_DIR)",
                path=path,
            )
    return paths


def default_root() -> str:
    """The directory that is used where none is named: ``STITCHCACHE_DIR``, or the user's cache directory."""
    configured = os.environ.get("STITCHCACHE_DIR")
    if configured:
        return _absolute(configured)
    import platformdirs

    return str(platformdirs.user_cache_dir("stitchcache", appauthor=False))


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _setting(name: str) -> str:
    return os.environ.get(name, "").strip().lower()


def flag(name: str, *, also: str = "") -> bool:
    """An environment variable that is on or off; missing is off."""
    value = _setting(name)
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise OptionError(f"{name}={value!r}: use 1 or 0{also}", option=name)


def choice(name: str, known: Sequence[str]) -> str:
    """An environment variable that names one of several things; missing is the first."""
    value = _setting(name) or known[0]
    if value not in known:
        raise OptionError(f"{name}={value!r}: use {', '.join(known)}", option=name)
    return value


def required() -> Literal["nothing", "hit", "direct"]:
    """``STITCHCACHE_REQUIRE``: 1 makes a compilation an error, ``direct`` a trace too."""
    if _setting("STITCHCACHE_REQUIRE") == "direct":
        return "direct"
    return "hit" if flag("STITCHCACHE_REQUIRE", also=" or direct") else "nothing"


def max_size() -> int | None:
    """``STITCHCACHE_MAX_SIZE`` in bytes; ``None`` where it is not set."""
    text = _setting("STITCHCACHE_MAX_SIZE")
    return parse_size(text, option="STITCHCACHE_MAX_SIZE") if text else None


def parse_size(text: str, *, option: str = "size") -> int:
    """Bytes in a text such as ``10G``, ``500 MiB`` or ``1048576``; units are powers of 1024."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise OptionError(f"{option}={text!r}: use a number with K, M, G or T, such as 10G", option=option)
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))
