"""Why a start was warm or cold, as a record that can be printed. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING

from stitchcache.keys.differences import printable
from stitchcache.nearest import NearestEntry
from stitchcache.types import Factor

if TYPE_CHECKING:
    from dataclasses import dataclass

    from stitchcache.artifact.record import Artifact
    from stitchcache.keys.target import TargetKey
else:
    from stitchcache.records import dataclass

_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """How a compiled model came about; ``str()`` of it is for people.

    Args:
        label: The model's class or the target's name.
        hit: ``"direct"`` (nothing was traced), ``"graph"`` (traced, pieces from the cache) or ``None``
            (compiled).
        reason: Why there was no direct hit; ``""`` where there was one.
        target_key: 64 hex digits; ``None`` where no key stands for this target, or none was asked for.
        graph_hash: The entry.
        factors: What the target key is made of, as far as it got.
        changed: Each source file that is not what was captured for this target key, or for the nearest: path
            to ``(old digest, new digest)``.
        nearest: The entry whose key came nearest when the target's was not found, with the factors that
            differ; ``None`` where it was found, or nothing was there.
        seconds: By stage.
    """

    label: str
    hit: str | None
    reason: str
    target_key: str | None
    graph_hash: str
    factors: tuple[Factor, ...] = ()
    changed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    nearest: NearestEntry | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        said = f"{self.hit} hit" if self.hit else "compiled"
        total = f" in {self.seconds['total']:.3f} s" if "total" in self.seconds else ""
        lines = [f"{self.label}: {said} {self.graph_hash}{total}"]
        if self.reason:
            lines.append(f"no direct hit: {self.reason}")
        lines += changed_lines(self.changed)
        if self.nearest is not None:
            lines += nearest_lines(self.nearest)
        lines.append(f"target key: {self.target_key or 'none'} ({len(self.factors)} factors)")
        stages = [f"{name} {seconds:.3f}" for name, seconds in self.seconds.items() if name != "total"]
        if stages:
            lines.append(f"seconds: {', '.join(stages)}")
        return "\n".join(printable(line) for line in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class MissFacts:
    """What a miss found out beyond its reason.

    Args:
        changed: As in :class:`Explanation`.
        nearest: Likewise.
        hint: The same in a few words, to follow the reason; may be ``""``.
    """

    changed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    nearest: NearestEntry | None = None
    hint: str = ""


def explained(
    lookup: tuple[str, TargetKey, str, MissFacts | None] | None,
    artifact: Artifact,
    hit: str | None,
    seconds: Mapping[str, float],
) -> Explanation:
    """Put an explanation together from what a start kept.

    Args:
        lookup: Label, target key, why there was no direct hit, what the miss found out; ``None`` where
            nothing was looked up by a target key.
        artifact: What was loaded or compiled.
        hit: The kind of hit.
        seconds: By stage.
    """
    if lookup is None:
        return Explanation(
            label=artifact.label,
            hit=hit,
            reason="it was loaded by its graph hash",
            target_key=None,
            graph_hash=artifact.graph_hash,
            seconds=dict(seconds),
        )
    label, key, reason, facts = lookup
    facts = facts or MissFacts()
    return Explanation(
        label=label,
        hit=hit,
        reason=reason,
        target_key=key.key,
        graph_hash=artifact.graph_hash,
        factors=key.factors,
        changed=facts.changed,
        nearest=facts.nearest,
        seconds=dict(seconds),
    )


def changed_lines(changed: Mapping[str, tuple[str, str]]) -> list[str]:
    """A line for each changed source file."""
    return [f"changed source: {path} ({old[:12]} -> {new[:12]})" for path, (old, new) in changed.items()]


def nearest_lines(nearest: NearestEntry, most: int = _SHOWN) -> list[str]:
    """The nearest entry and the factors that differ, a line each."""
    differences = list(nearest.differences.items())
    count = f"{len(differences)} factor{'' if len(differences) == 1 else 's'}"
    lines = [f"nearest entry: {nearest.label or '-'} {nearest.graph_hash[:12]}, {count} differ"]
    if len(differences) == 1:
        lines[0] += "s"
    lines += [f"  {name}: {old} -> {new}" for name, (old, new) in differences[:most]]
    if len(differences) > most:
        lines.append(f"  and {len(differences) - most} more")
    return lines
