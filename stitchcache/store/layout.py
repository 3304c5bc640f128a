"""Where things lie under a root, and how large they may be. Only checked keys become paths."""

from __future__ import annotations

import os
from enum import StrEnum

from stitchcache.errors import OptionError

TAG_NAME = "CACHEDIR.TAG"
TAG_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This file says that the directory is a cache: backups may leave it out, and it can be deleted.\n"
    b"# stitchcache keeps compiled PyTorch models here.\n"
)

_HEX = frozenset("0123456789abcdef")


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


MAX_ENTRY = 2 << 30
MAX_RECORD = 64 << 20
MAX_LEGACY = 256 << 20

KEYED = (Area.ENTRIES, Area.TARGETS, Area.PIECES, Area.BLOBS)
LEGACY_SUFFIXES = (".msgpack", ".pkl")
SUFFIX = {Area.ENTRIES: ".stitch", Area.LOCKS: ".lock"}


def is_key(text: object) -> bool:
    """Whether a text is 64 lowercase hex digits."""
    return type(text) is str and len(text) == 64 and _HEX.issuperset(text)


def check_key(key: str) -> str:
    """The key itself, when it may become a path.

    Raises:
        OptionError: It is not 64 lowercase hex digits.
    """
    if not is_key(key):
        raise OptionError(f"{key!r} is no key: 64 lowercase hex digits are needed", option="key")
    return key


def keyed_path(root: str, area: Area, key: str) -> str:
    """The file of a key.

    Raises:
        OptionError: The key is not 64 lowercase hex digits.
    """
    check_key(key)
    return f"{root}{os.sep}{area}{os.sep}{key[:2]}{os.sep}{key}{SUFFIX.get(area, '')}"


def key_of(area: Area, name: str) -> str | None:
    """The key in a file's name; ``None`` for a foreign file."""
    suffix = SUFFIX.get(area, "")
    key = name.removesuffix(suffix) if suffix else name
    return key if is_key(key) and name == key + suffix else None
