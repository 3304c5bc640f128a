"""Code objects of generated source, kept so that a warm start neither parses nor compiles it.

A code object is named by a digest over everything that it comes from: the source, the name that tracebacks
show, Python's bytecode version, and this package's version, for that decides what source is accepted at all.
Any difference names another one, and then there is none: the source is read and checked as if nothing had
been kept.
"""

from __future__ import annotations

import hashlib
import marshal
import sys
from collections.abc import Iterable, Iterator
from importlib.util import MAGIC_NUMBER
from types import CodeType

import stitchcache


class CodeObjects:
    """Code objects by their source; lives for one linked model.

    Args:
        kept: Digest and marshalled code object, from bytes whose own digest was checked and that nobody else
            could have written.
    """

    def __init__(self, kept: Iterable[tuple[str, bytes]] = ()) -> None:
        self._kept = dict(kept)

    def get(self, filename: str, source: str) -> CodeType | None:
        """The code object of a source, if it is kept.

        Args:
            filename: What tracebacks show.
            source: The source, and whatever else was settled when it was checked.
        """
        kept = self._kept.get(_digest(filename, source))
        if kept is None:
            return None
        try:
            code = marshal.loads(kept)
        except (ValueError, EOFError, TypeError):
            return None
        return code if isinstance(code, CodeType) else None

    def add(self, filename: str, source: str, code: CodeType) -> None:
        """Keep a code object that was compiled from checked source."""
        self._kept[_digest(filename, source)] = marshal.dumps(code)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Digests and marshalled code objects, to be stored."""
        return iter(self._kept.items())


def _digest(filename: str, source: str) -> str:
    flags = f"{sys.flags.optimize} {sys.implementation.cache_tag} {MAGIC_NUMBER.hex()}"
    text = "\0".join((stitchcache.__version__, flags, filename, source))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
