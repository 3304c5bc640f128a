"""Why a start was warm or cold: what tells two keys apart, and which stored keys are near. Imports no torch.

For explanations only: nothing that is found here is served. Files are read as they lie there, whoever may
write them; nothing is counted as a use, moved or warned of, and what cannot be read is passed over.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, replace

from stitchcache.artifact.entry import decode, decode_target, unpack_factors
from stitchcache.errors import EntryFormatError, printable
from stitchcache.records import dataclass
from stitchcache.store import Area, Files
from stitchcache.store.root import Item, Root
from stitchcache.types import Check, Factor, TargetRecord

ABSENT = "(absent)"
"""Stands for the value of a factor that a key does not have."""

Roots = Sequence[str | os.PathLike[str]]
Differences = Mapping[str, tuple[str, str]]

# What a huge store may cost: files that are read, bytes of them.
MOST_TARGETS = 256
MOST_ENTRIES = 32
MOST_BYTES = 8 << 20
# An entry has these beside, or instead of, the factors of a target key.
_OF_ENTRIES = ("graph.", "request.")
_SHOWN = 12


def explain_differences(old: Sequence[Factor], new: Sequence[Factor]) -> dict[str, tuple[str, str]]:
    """Which factors differ between two keys: name to old and new value, in the new key's order.

    ``"(absent)"`` stands for one that a key does not have. Values that read alike are told apart by the start
    of their digests.
    """
    before = {factor.name: factor for factor in old}
    after = {factor.name: factor for factor in new}
    found = {}
    for name in after | before:
        one, two = before.get(name), after.get(name)
        values = (one.value if one else ABSENT, two.value if two else ABSENT)
        if one is not None and two is not None:
            if one.digest == two.digest:
                continue
            values = apart(*values)
            if one.value == two.value:
                values = (f"{one.value} [{one.digest[:8]}]", f"{two.value} [{two.digest[:8]}]")
        found[name] = values
    return found


def apart(old: str, new: str) -> tuple[str, str]:
    """Two containers, as factors show them, cut to the first item that differs, with where it is."""
    if old[:1] not in ("{", "[") or old[:1] != new[:1]:
        return old, new
    # Of each container that is open where they part: what stands before it, and the number of its item.
    where: list[tuple[str, int]] = []
    begin = number = 0
    more = ""
    for place, (char, other) in enumerate(zip(old, new, strict=False)):
        if char != other:
            if char in "}])," and other in "}]),":
                # One container ends where the other goes on.
                begin, number, more = place + 1, number + 1, old if char == "," else new
            break
        if char in "{[(":
            label = old[begin:place].strip(" :'\"")
            where.append((label or str(number), number))
            begin, number = place + 1, 0
        elif char in "}])" and where:
            begin, number = place + 1, where.pop()[1]
        elif char == ",":
            begin, number = place + 1, number + 1

    def item(text: str) -> str:
        depth = 0
        if more and text is not more:
            return ABSENT
        for end, char in enumerate(text[begin:], begin):
            depth += (char in "{[(") - (char in "}])")
            if depth < 0 or (char == "," and depth == 0):
                return text[begin:end].strip() or ABSENT
        return text[begin:].strip()

    path = [label for label, _ in where[1:]] or [f"item {number}"] * (old[0] == "[")
    return ": ".join([*path, item(old)]), ": ".join([*path, item(new)])


def differences_text(differences: Differences, most: int = 3) -> str:
    """The first few differences in one line, such as ``env.torch (2.12.0 -> 2.13.0) and 2 more``."""
    return names_text([f"{name} ({old} -> {new})" for name, (old, new) in differences.items()], most)


def names_text(names: Sequence[str], most: int = 3) -> str:
    """The first few names in one line, such as ``env.torch, env.cpu and 2 more``."""
    text = ", ".join(names[:most])
    return printable(f"{text} and {len(names) - most} more" if len(names) > most else text)


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestEntry:
    """An entry, or the target that leads to it, beside some factors."""

    graph_hash: str
    target_key: str | None  # ``None``, as ``record``, where only the entry is known
    label: str
    created: float
    refused: str | None = None  # why the target is not served without tracing
    differences: dict[str, tuple[str, str]] = field(default_factory=dict)  # factor to values there and here
    record: TargetRecord | None = field(default=None, repr=False)  # what the target key leads to


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """How a compiled model came about; ``str()`` of it is for people."""

    label: str  # the model's class or the target's name
    hit: str | None  # ``"direct"`` (not traced), ``"graph"`` (pieces from the cache), or ``None`` (compiled)
    reason: str  # why there was no direct hit; ``""`` where there was one
    target_key: str | None  # ``None`` where no key stands for this target, or none was asked for
    graph_hash: str
    factors: tuple[Factor, ...] = ()  # what the target key is made of, as far as it got
    # Source files that are not as captured for this target key, or for the nearest: path to both digests.
    changed: Differences = field(default_factory=dict)
    nearest: NearestEntry | None = None  # whose key came nearest, where the target's was not found
    seconds: Mapping[str, float] = field(default_factory=dict)  # by stage
    check: Check | None = None  # how the look at the model itself stood when this was asked for
    status: str = "compiled"  # as of the compiled model: what serves calls now
    mismatches: Mapping[str, int] = field(default_factory=dict)  # calls that the model served, by argument

    def __str__(self) -> str:
        said = f"{self.hit} hit" if self.hit else self.status
        total = f" in {self.seconds['total']:.3f} s" if "total" in self.seconds else ""
        lines = [f"{self.label}: {said} {self.graph_hash}{total}"]
        if self.reason:
            lines.append(f"no direct hit: {self.reason}")
        for path, (old, new) in self.changed.items():
            lines.append(f"changed source: {path} ({old[:12]} -> {new[:12]})")
        if self.nearest is not None:
            near, differences = self.nearest, list(self.nearest.differences.items())
            count = "1 factor differs" if len(differences) == 1 else f"{len(differences)} factors differ"
            lines.append(f"nearest entry: {near.label or '-'} {near.graph_hash[:12]}, {count}")
            lines += [f"  {name}: {old} -> {new}" for name, (old, new) in differences[:_SHOWN]]
            if len(differences) > _SHOWN:
                lines.append(f"  and {len(differences) - _SHOWN} more")
        lines.append(f"target key: {self.target_key or 'none'} ({len(self.factors)} factors)")
        if self.check is not None:
            lines.append(f"look: {self.check.state}{f' ({self.check.reason})' if self.check.reason else ''}")
        for argument, calls in self.mismatches.items():
            lines.append(f"served by the model itself, as {argument} did not fit: {calls} calls")
        stages = [f"{name} {seconds:.3f}" for name, seconds in self.seconds.items() if name != "total"]
        if stages:
            lines.append(f"seconds: {', '.join(stages)}")
        return "\n".join(printable(line) for line in lines)


def nearest_entries(
    roots: Roots,
    factors: Sequence[Factor],
    *,
    label: str = "",
    most: int = 1,
    partial: bool = False,
    without: Collection[str] = (),
) -> list[NearestEntry]:
    """What comes nearest to some factors, among the newest files of a cache.

    Those with the fewest differing factors come first, then those of the same label, then the newest.
    ``partial`` compares only factors that are given: the key could not be computed to its end.
    """
    wanted = {factor.name for factor in factors}
    unasked = tuple(kind for kind in _OF_ENTRIES if not any(name.startswith(kind) for name in wanted))
    found = []
    for entry, all_there in _stored(roots):
        if entry.graph_hash in without or entry.target_key in without:
            continue
        there = [f for f in all_there if f.name in wanted or not (partial or f.name.startswith(unasked))]
        found.append(replace(entry, differences=explain_differences(there, factors)))
    found.sort(key=lambda entry: (len(entry.differences), entry.label != label, -entry.created))
    return found[:most]


def stored_targets(
    roots: Roots, *, prefix: str = "", graph_hash: str | None = None
) -> list[tuple[str, str, TargetRecord]]:
    """Targets of a cache by the beginning of their keys, or by entry: key, file and newest record."""
    found: dict[str, tuple[str, str, TargetRecord]] = {}
    for at in roots:
        for root, item in _newest([at], Area.TARGETS, prefix):
            if item.key not in found:
                with suppress(EntryFormatError, OSError):
                    data = _read(root, item, Area.TARGETS)
                    # A record has the hash as text: without it in sight, thousands need not be decoded.
                    if (graph_hash or "").encode() not in data:
                        continue
                    record = decode_target(data, item.key, path=item.path)[0]
                    if graph_hash in (None, record.graph_hash):
                        found[item.key] = (item.key, item.path, record)
    return sorted(found.values(), key=lambda target: -target[2].created)


def _stored(roots: Roots) -> Iterator[tuple[NearestEntry, Sequence[Factor]]]:
    """Targets, and then entries that none of these leads to: keyless, old, or made through the engine API."""
    left = MOST_BYTES
    met: set[str] = set()
    for area, most in ((Area.TARGETS, MOST_TARGETS), (Area.ENTRIES, MOST_ENTRIES)):
        files = [(root, item) for root, item in _newest(roots, area) if item.key not in met]
        for root, item in files[:most]:
            left -= item.size
            if left < 0 or item.key in met:
                continue
            with suppress(EntryFormatError, OSError):
                found, factors = _found(area, item, _read(root, item, area))
                if factors:
                    met |= {item.key, found.graph_hash}
                    yield found, factors


def _found(area: Area, item: Item, data: bytes) -> tuple[NearestEntry, Sequence[Factor]]:
    if area is Area.ENTRIES:
        entry = decode(data, path=item.path)
        found = NearestEntry(graph_hash=item.key, target_key=None, label=entry.label, created=entry.created)
        return found, entry.factors
    record = decode_target(data, item.key, path=item.path)[0]
    names = ("graph_hash", "label", "created", "refused")
    facts = {name: getattr(record, name) for name in names}
    return NearestEntry(target_key=item.key, record=record, **facts), unpack_factors(record.factors)


def _read(root: Root, item: Item, area: Area) -> bytes:
    """A file's bytes; none where it is gone, which no decoder takes."""
    found = root.read(item.path, area)
    return b"" if found is None else found[0]


def _newest(roots: Roots, area: Area, prefix: str = "") -> list[tuple[Root, Item]]:
    """Files of an area whose keys begin so, last used first."""
    found = []
    for path in roots:
        root = Root(os.fspath(path), files=Files(), durable=False, read_only=True)
        with suppress(OSError):
            found += [(root, item) for item in root.items(area, prefix)]
    return sorted(found, key=lambda one: one[1].modified, reverse=True)
