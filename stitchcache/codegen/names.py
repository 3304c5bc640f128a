"""Names and literals in generated code: which are legal, and how names are made unique."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterable

# fmt: off
RESERVED = frozenset({
    "__consts__", "__debug__", "__submods__", "__vllm_consts__", "__vllm_submods__", "_", "_operator", "bind",
    "execution_fn", "getattr", "operator", "torch",
})
# fmt: on
"""Names that generated code gives a meaning of its own; no value may take them."""


def is_identifier(name: str) -> bool:
    """Whether ``name`` may stand in source as it is.

    ASCII only: Python folds other identifiers to NFKC, so that two different ones can become equal.
    """
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and name != "__debug__"


def is_dunder(name: str) -> bool:
    """Whether ``name`` has the form ``__name__``."""
    return len(name) > 4 and name.startswith("__") and name.endswith("__")


# repr of an int beyond this many bits may hit the interpreter's limit on decimal digits; hex never does.
_DECIMAL_BITS = 128


def literal(value: object) -> str | None:
    """Write a scalar as source text.

    Only exact builtin types qualify: a subclass (an enum, ``numpy.float64``) has a ``repr`` of its own
    and a type that matters. Floats must be finite, as ``inf`` and ``nan`` are names and not literals.
    The text is ASCII, so that it does not depend on the interpreter's Unicode tables.

    Args:
        value: Anything.

    Returns:
        Source text that evaluates to an equal value of the same type, or ``None``.
    """
    kind = type(value)
    if value is None or value is Ellipsis or kind is bool:
        return "..." if value is Ellipsis else repr(value)
    if isinstance(value, int) and kind is int:
        return repr(value) if value.bit_length() <= _DECIMAL_BITS else hex(value)
    if isinstance(value, float) and kind is float:
        return repr(value) if math.isfinite(value) else None
    if kind is str or kind is bytes:
        return ascii(value)
    return None


class Namespace:
    """Hands out the names of one generated function, each once.

    Args:
        reserved: Names that are never handed out.
    """

    def __init__(self, reserved: Iterable[str] = RESERVED) -> None:
        self._taken = set(reserved)
        self._next: dict[str, int] = {}

    def take(self, wanted: str) -> str:
        """Take ``wanted``, or the nearest legal name that was not handed out before."""
        base = wanted
        if not is_identifier(wanted) or wanted == "_" or wanted.startswith("__"):
            base = self._legal(wanted)
        if base not in self._taken:
            self._taken.add(base)
            return base
        return self._numbered(base, base, 1)

    def take_numbered(self, prefix: str) -> str:
        """Take the first free name of the series ``prefix_0``, ``prefix_1``, ..."""
        return self._numbered(prefix, f"{prefix}#", 0)

    def _numbered(self, prefix: str, series: str, first: int) -> str:
        # The next number is remembered for each series: a thousand equal names stay linear.
        number = self._next.get(series, first)
        while f"{prefix}_{number}" in self._taken:
            number += 1
        self._next[series] = number + 1
        name = f"{prefix}_{number}"
        self._taken.add(name)
        return name

    @staticmethod
    def _legal(wanted: str) -> str:
        name = re.sub(r"[^A-Za-z0-9_]+", "_", wanted)
        # Two underscores in front are the ABI's own.
        if name.startswith("__") or name in ("", "_"):
            name = name.strip("_") or "value"
        if name[0].isdigit():
            name = f"_{name}"
        return name if is_identifier(name) else f"{name}_"
