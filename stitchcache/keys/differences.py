"""What tells two keys apart. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stitchcache.types import Factor

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
