"""Why a start was warm or cold, and what tells two keys apart, as records and text. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING

from stitchcache.types import Check, Factor, TargetRecord

if TYPE_CHECKING:
    from dataclasses import dataclass

    from stitchcache.keys.target import TargetKey
    from stitchcache.types import Artifact
else:
    from stitchcache.records import dataclass

ABSENT = "(absent)"
"""Stands for the value of a factor that a key does not have."""


def explain_differences(old: Sequence[Factor], new: Sequence[Factor]) -> dict[str, tuple[str, str]]:
    """Say which factors differ between two keys.

    Args:
        old: Factors of the stored key.
        new: Factors of the key that was looked up.

    Returns:
        Factor name to ``(old value, new value)``, in the new key's order; ``"(absent)"`` for one that a key
        does not have. Values that read alike are told apart by the start of their digests.
    """
    before = {factor.name: factor for factor in old}
    after = {factor.name: factor for factor in new}
    found = {}
    for name in [*after, *(name for name in before if name not in after)]:
        one, two = before.get(name), after.get(name)
        if one is not None and two is not None:
            if one.digest == two.digest:
                continue
            if one.value == two.value:
                found[name] = (f"{one.value} [{one.digest[:8]}]", f"{two.value} [{two.digest[:8]}]")
                continue
        found[name] = (one.value if one else ABSENT, two.value if two else ABSENT)
    return found


def differences_text(differences: Mapping[str, tuple[str, str]], most: int = 3) -> str:
    """The first few differences in one line, such as ``env.torch (2.12.0 -> 2.13.0) and 2 more``."""
    shown = [f"{name} ({old} -> {new})" for name, (old, new) in list(differences.items())[:most]]
    rest = len(differences) - len(shown)
    return _and(shown, rest)


def names_text(names: Sequence[str], most: int = 3) -> str:
    """The first few names in one line, such as ``env.torch, env.cpu and 2 more``."""
    return _and(list(names[:most]), len(names) - most)


def _and(shown: list[str], rest: int) -> str:
    text = ", ".join(shown)
    return printable(f"{text} and {rest} more" if rest > 0 else text)


def printable(text: str) -> str:
    """Text from a file, with nothing in it that a terminal or a log would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestEntry:
    """An entry, or the target that leads to it, beside some factors.

    Args:
        graph_hash: The entry.
        target_key: The target key that leads to it; ``None`` where only the entry is known.
        label: The model's class or the target's name.
        created: Unix seconds.
        refused: Why the target is not served without tracing; ``None`` where it is.
        differences: Factor name to ``(value there, value here)``.
        record: What the target key leads to; ``None`` where only the entry is known.
    """

    graph_hash: str
    target_key: str | None
    label: str
    created: float
    refused: str | None = None
    differences: dict[str, tuple[str, str]] = field(default_factory=dict)
    record: TargetRecord | None = field(default=None, repr=False)


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
        check: How the look at the model itself stood when this was asked for.
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
    check: Check | None = None

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
        if self.check is not None:
            lines.append(f"look: {self.check.state}{f' ({self.check.reason})' if self.check.reason else ''}")
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
    check: Check,
) -> Explanation:
    """Put an explanation together from what a start kept.

    Args:
        lookup: Label, target key, why there was no direct hit, what the miss found out; ``None`` where
            nothing was looked up by a target key.
        artifact: What was loaded or compiled.
        hit: The kind of hit.
        seconds: By stage.
        check: How the look stands.
    """
    if lookup is None:
        return Explanation(
            label=artifact.label,
            hit=hit,
            reason="it was loaded by its graph hash",
            target_key=None,
            graph_hash=artifact.graph_hash,
            seconds=dict(seconds),
            check=check,
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
        check=check,
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
