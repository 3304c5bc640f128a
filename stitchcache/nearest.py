"""The targets and entries of a cache whose keys come nearest to some factors. Imports no torch.

For explanations only: nothing that is found here is served. Files are read as they lie there, whoever may
write them; nothing is counted as a use, moved or warned of, and what cannot be read is passed over.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from stitchcache.artifact.entry import decode, decode_target, unpack_factors
from stitchcache.errors import EntryFormatError
from stitchcache.explanation import NearestEntry, explain_differences
from stitchcache.store.layout import Area, key_of
from stitchcache.types import Factor, TargetRecord

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass

T = TypeVar("T")

# What a huge store may cost: files whose times are looked at, files that are read, bytes of them.
MOST_LISTED = 4096
MOST_TARGETS = 256
MOST_ENTRIES = 32
MOST_BYTES = 8 << 20

# An entry has these beside, or instead of, the factors of a target key.
_OF_ENTRIES = ("graph.", "request.")
_Factors = dict[str, Factor]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTarget:
    """A target file that was read.

    Args:
        key: The target key.
        path: The file.
        record: The newest that it holds.
    """

    key: str
    path: str
    record: TargetRecord


def nearest_entries(
    roots: Sequence[str | os.PathLike[str]],
    factors: Sequence[Factor],
    *,
    label: str = "",
    most: int = 1,
    partial: bool = False,
    without: Collection[str] = (),
) -> list[NearestEntry]:
    """Find what comes nearest to some factors, among the newest files of a cache.

    Args:
        roots: The cache's root directories.
        factors: Of the key that is to be explained.
        label: The model's; entries with the same are preferred among those equally near.
        most: How many to return.
        partial: Compare only factors that are given: the key could not be computed to its end.
        without: Target keys and graph hashes to leave out.

    Returns:
        Fewest differing factors first, then the same label, then the newest.
    """
    wanted = {factor.name: factor.digest for factor in factors}
    found: list[tuple[int, bool, float, _Seen]] = []
    budget = _Budget()
    led_to: set[str] = set()
    met: set[str] = set()
    for item in _seen(roots, budget, led_to):
        name = item.target_key or item.graph_hash
        if not item.factors or name in met:
            continue
        met.add(name)
        led_to.add(item.graph_hash)
        if item.graph_hash not in without and item.target_key not in without:
            item.factors = _comparable(item.factors, wanted, partial)
            there = {name: factor.digest for name, factor in item.factors.items()}
            distance = sum(there.get(name) != digest for name, digest in wanted.items())
            distance += sum(name not in wanted for name in item.factors)
            found.append((distance, item.label != label, -item.created, item))
    found.sort(key=lambda ranked: ranked[:3])
    return [entry for *_, item in found[:most] if (entry := _explained(item, factors)) is not None]


def stored_targets(
    roots: Sequence[str | os.PathLike[str]], *, prefix: str = "", graph_hash: str | None = None
) -> list[StoredTarget]:
    """All targets of a cache that begin so and lead there, newest first; one of several roots comes once.

    Args:
        roots: The cache's root directories.
        prefix: First digits of the target key.
        graph_hash: The entry that they lead to; ``None`` is any.
    """
    found: dict[str, StoredTarget] = {}
    for root in roots:
        for _, path, key in _newest([root], Area.TARGETS, None):
            if key.startswith(prefix) and key not in found:
                target = _target(key, path)
                if target is not None and graph_hash in (None, target.record.graph_hash):
                    found[key] = target
    return sorted(found.values(), key=lambda target: -target.record.created)


def _comparable(found: _Factors, wanted: dict[str, str], partial: bool) -> _Factors:
    if partial:
        return {name: factor for name, factor in found.items() if name in wanted}
    unasked = tuple(kind for kind in _OF_ENTRIES if not any(name.startswith(kind) for name in wanted))
    return {name: factor for name, factor in found.items() if not name.startswith(unasked)}


def _explained(item: _Seen, factors: Sequence[Factor]) -> NearestEntry | None:
    target = None
    if item.target_key is not None:
        target = _target(item.target_key, item.path)
        if target is None:
            return None
    return NearestEntry(
        graph_hash=item.graph_hash,
        target_key=item.target_key,
        label=item.label,
        created=item.created,
        refused=None if target is None else target.record.refused,
        differences=explain_differences(tuple(item.factors.values()), factors),
        record=None if target is None else target.record,
    )


@dataclass()
class _Seen:
    graph_hash: str
    target_key: str | None
    label: str
    created: float
    factors: _Factors
    path: str


class _Budget:
    """Bytes that may still be read."""

    def __init__(self) -> None:
        self.left = MOST_BYTES

    def allows(self, path: str) -> bool:
        try:
            found = os.stat(path)
        except OSError:
            return False
        self.left -= found.st_size
        # Opening a pipe would wait for somebody to write into it.
        return stat.S_ISREG(found.st_mode) and self.left >= 0


def _seen(
    roots: Sequence[str | os.PathLike[str]], budget: _Budget, led_to: Collection[str]
) -> Iterator[_Seen]:
    """Targets, and then entries that none of these leads to: keyless, old, or made through the engine API."""
    for _, path, key in _newest(roots, Area.TARGETS, MOST_LISTED)[:MOST_TARGETS]:
        item = _tried(_read_target, key, path) if budget.allows(path) else None
        if item is not None:
            yield item
    left = MOST_ENTRIES
    for _, path, key in _newest(roots, Area.ENTRIES, MOST_LISTED):
        if left and key not in led_to and budget.allows(path):
            left -= 1
            item = _tried(_read_entry, key, path)
            if item is not None:
                yield item


def _read_target(key: str, path: str) -> _Seen:
    with open(path, "rb") as file:
        newest, *_ = decode_target(file.read(), key, path=path)
    factors = unpack_factors(newest.factors, path=path)
    return _Seen(newest.graph_hash, key, newest.label, newest.created, _by_name(factors), path)


def _read_entry(key: str, path: str) -> _Seen:
    with open(path, "rb") as file:
        found = decode(file.read(), path=path)
    return _Seen(key, None, found.label, found.created, _by_name(found.factors), path)


def _by_name(factors: Sequence[Factor]) -> _Factors:
    return {factor.name: factor for factor in factors}


def _target(key: str, path: str) -> StoredTarget | None:
    return _tried(_read_stored, key, path) if _Budget().allows(path) else None


def _read_stored(key: str, path: str) -> StoredTarget:
    with open(path, "rb") as file:
        return StoredTarget(key=key, path=path, record=decode_target(file.read(), key, path=path)[0])


def _newest(
    roots: Sequence[str | os.PathLike[str]], area: Area, most: int | None
) -> list[tuple[float, str, str]]:
    """Time of the last noted use, path and key of an area's files, newest first.

    Args:
        roots: The cache's root directories.
        area: Targets or entries.
        most: How many files to look at, beginning with the directories that changed last; ``None`` is all.
    """
    shards: list[tuple[float, str]] = []
    for root in roots:
        listed = _listed(os.path.join(root, area))
        shards += [(_tried(_time, shard) or 0.0, shard.path) for shard in listed if len(shard.name) == 2]
    found: list[tuple[float, str, str]] = []
    for _, directory in sorted(shards, reverse=True):
        if most is not None and len(found) >= most:
            break
        for item in _listed(directory):
            key = key_of(area, item.name)
            if key is not None:
                used = _tried(_time, item)
                if used is not None:
                    found.append((used, item.path, key))
    found.sort(reverse=True)
    return found


def _time(entry: os.DirEntry[str]) -> float:
    return entry.stat().st_mtime


def _tried(read: Callable[..., T], *args: object) -> T | None:
    """What a file holds; ``None`` where it is gone, damaged or not to be read."""
    try:
        return read(*args)
    except (EntryFormatError, OSError):
        return None


def _listed(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as listing:
            return list(listing)
    except OSError:
        # Missing, or not to be seen: nothing here can be near.
        return []
