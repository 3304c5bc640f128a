"""What a graph hash or a target key stands for: its entry, the targets that lead to it, its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from stitchcache.artifact.entry import unpack_factors
from stitchcache.cache import Cache
from stitchcache.errors import AmbiguousPrefixError, EntryFormatError, GraphHashError
from stitchcache.explanation import NearestEntry
from stitchcache.nearest import StoredTarget, nearest_entries, stored_targets
from stitchcache.report.entry import Entry, read_entry
from stitchcache.types import Factor


@dataclass(frozen=True, slots=True)
class KeyReport:
    """What a key stands for.

    Args:
        kind: ``entry`` or ``target``: what the key names.
        key: In full.
        graph_hash: The entry.
        entry: The entry itself; ``None`` where a target leads to one that is gone or damaged.
        problem: Why there is none; ``""`` where there is one.
        targets: Targets that lead to the entry, the newest first; a target that was asked for alone.
        factors: Of the target that was asked for, else of the entry.
        nearest: What comes nearest to it in the cache.
    """

    kind: str
    key: str
    graph_hash: str
    entry: Entry | None
    problem: str
    targets: tuple[StoredTarget, ...]
    factors: tuple[Factor, ...]
    nearest: tuple[NearestEntry, ...]


def read_key(cache: Cache, prefix: str, *, most: int = 3) -> KeyReport:
    """Find what a prefix means.

    Args:
        cache: Where to look.
        prefix: First digits of a graph hash or of a target key.
        most: How many neighbours to name.

    Raises:
        GraphHashError: It names neither, or is no hex.
        AmbiguousPrefixError: It names more than one.
        EntryFormatError: It names an entry that is damaged.
        StoreError: A file cannot be read.
    """
    wanted = prefix.lower()
    if not is_prefix(wanted):
        raise GraphHashError(f"{prefix!r} is no key: 1 to 64 hex digits", prefix=prefix)
    try:
        entries = [cache.find(wanted)]
    except AmbiguousPrefixError as error:
        entries = list(error.candidates)
    except GraphHashError:
        entries = []
    targets = stored_targets(cache.roots, prefix=wanted)
    candidates = [*entries, *(target.key for target in targets)]
    if not candidates:
        raise GraphHashError(f"no entry and no target in {cache.root} begins with {prefix}", prefix=prefix)
    if len(candidates) > 1:
        labels = {target.key: f"target of {target.record.label}" for target in targets}
        lines = [f"  {key}  {labels.get(key, 'entry')}" for key in candidates]
        message = f"{prefix} is the beginning of {len(lines)} keys; give more digits:"
        raise AmbiguousPrefixError("\n".join([message, *lines]), prefix=prefix, candidates=candidates)
    return _of_target(cache, targets[0], most) if targets else _of_entry(cache, entries[0], most)


def is_prefix(text: str) -> bool:
    """Whether a text could be the beginning of a key."""
    return 0 < len(text) <= 64 and set(text.lower()) <= set("0123456789abcdef")


def _of_target(cache: Cache, target: StoredTarget, most: int) -> KeyReport:
    record = target.record
    entry, problem = None, ""
    try:
        entry = read_entry(cache, record.graph_hash)
    except (GraphHashError, EntryFormatError) as error:
        problem = error.message
    factors = unpack_factors(record.factors, path=target.path)
    near = nearest_entries(cache.roots, factors, label=record.label, most=most, without={target.key})
    return KeyReport("target", target.key, record.graph_hash, entry, problem, (target,), factors, tuple(near))


def _of_entry(cache: Cache, graph_hash: str, most: int) -> KeyReport:
    entry = read_entry(cache, graph_hash)
    artifact = entry.artifact
    targets = stored_targets(cache.roots, graph_hash=graph_hash)
    # A target's factors can be compared with those of other targets, an entry's only with entries'.
    known = next((target for target in targets if target.record.factors), None)
    factors = artifact.factors if known is None else unpack_factors(known.record.factors, path=known.path)
    near = (
        nearest_entries(
            cache.roots, _of_target_key(factors), label=artifact.label, most=most, without={graph_hash}
        )
        if factors
        else []
    )
    return KeyReport(
        "entry", graph_hash, graph_hash, entry, "", tuple(targets), artifact.factors, tuple(near)
    )


def _of_target_key(factors: tuple[Factor, ...]) -> list[Factor]:
    return [factor for factor in factors if not factor.name.startswith("graph.")]
