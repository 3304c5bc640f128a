"""Reading an entry to look at it: nothing is counted as a use, moved or trusted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from stitchcache.artifact.entry import decode_named
from stitchcache.artifact.record import Artifact
from stitchcache.cache import Cache
from stitchcache.errors import GraphHashError, StoreError
from stitchcache.store.layout import LEGACY_SUFFIXES, Area, keyed_path


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry with the file it came from.

    Args:
        artifact: What the file holds.
        path: The file.
        file_bytes: Its length.
    """

    artifact: Artifact
    path: str
    file_bytes: int


def read_entry(cache: Cache, prefix: str) -> Entry:
    """Read the entry that a prefix means, of any format and whoever may write its file.

    Args:
        cache: Where to look.
        prefix: The first digits of its graph hash.

    Raises:
        GraphHashError: It names no entry.
        AmbiguousPrefixError: It names more than one.
        EntryFormatError: The entry is damaged or of a newer format.
        StoreError: Its file cannot be read.
    """
    graph_hash = cache.find(prefix)
    for path in _files(cache, graph_hash):
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            continue
        except OSError as error:
            reason = error.strerror or str(error)
            raise StoreError(
                f"{path}: cannot be read ({reason}); check its owner and mode", path=path
            ) from error
        return Entry(decode_named(data, graph_hash, path), path, len(data))
    raise GraphHashError(f"entry {graph_hash[:12]} was removed from {cache.root} just now", prefix=prefix)


def _files(cache: Cache, graph_hash: str) -> Iterator[str]:
    for root in cache.roots:
        yield keyed_path(str(root), Area.ENTRIES, graph_hash)
        for suffix in LEGACY_SUFFIXES:
            yield os.path.join(root, graph_hash + suffix)
