"""Canonical encoding of labelled bytes into a digest. Imports no torch.

Every part is written with its length in front, so that two different sequences of parts never give
the same bytes (``"ab" + "c"`` is not ``"a" + "bc"``).
"""

from __future__ import annotations

import hashlib

from stitchcache.types import Factor

SHORT = 120
"""Characters of a factor's value that are kept for people."""


class Digest:
    """A sha256 over tagged, length-prefixed parts."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, tag: str, payload: bytes) -> Digest:
        """Add one part; gives itself back, so that calls can be chained."""
        name = tag.encode()
        self._hash.update(b"%d:%s%d:" % (len(name), name, len(payload)))
        self._hash.update(payload)
        return self

    def hexdigest(self) -> str:
        """64 hex digits over everything added so far."""
        return self._hash.hexdigest()


def shorten(text: str, limit: int = SHORT) -> str:
    """Cut a text for display; what is cut off is still in the digest."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def make_factor(name: str, value: str, payload: bytes | None = None) -> Factor:
    """Build a factor.

    Args:
        name: Dotted name, see docs/keys.md.
        value: What a person reads; shortened here.
        payload: The whole value; the readable one where left out.
    """
    data = value.encode("utf-8", "surrogatepass") if payload is None else payload
    return Factor(name=name, value=shorten(value), digest=hashlib.sha256(data).hexdigest())
