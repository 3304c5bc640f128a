"""Names in generated code: which are legal, and how they are made unique."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

RESERVED = frozenset(
    {
        "__consts__",
        "__debug__",
        "__submods__",
        "__vllm_consts__",
        "__vllm_submods__",
        "_",
        "_operator",
        "bind",
        "execution_fn",
        "getattr",
        "operator",
        "torch",
    }
)
"""Names that generated code gives a meaning of its own; no value may take them."""


def is_identifier(name: str) -> bool:
    """Whether ``name`` may stand in source as it is.

    ASCII only: Python folds other identifiers to NFKC, so that two different ones can become equal.
    """
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and name != "__debug__"


def is_dunder(name: str) -> bool:
    """Whether ``name`` has the form ``__name__``."""
    return len(name) > 4 and name.startswith("__") and name.endswith("__")


class Namespace:
    """Hands out the names of one generated function, each once.

    Args:
        reserved: Names that are never handed out.
    """

    def __init__(self, reserved: Iterable[str] = RESERVED) -> None:
        self._taken = set(reserved)
        self._suffix: dict[str, int] = {}

    def take(self, wanted: str) -> str:
        """Take ``wanted``, or the nearest legal name that is free.

        Args:
            wanted: Any string.

        Returns:
            A name that was not handed out before.
        """
        base = wanted
        if not is_identifier(wanted) or wanted == "_" or wanted.startswith("__"):
            base = self._legal(wanted)
        if base not in self._taken:
            self._taken.add(base)
            return base
        # The next number is remembered for each base: a thousand equal names stay linear.
        number = self._suffix.get(base, 0) + 1
        while f"{base}_{number}" in self._taken:
            number += 1
        self._suffix[base] = number
        name = f"{base}_{number}"
        self._taken.add(name)
        return name

    def take_numbered(self, prefix: str) -> str:
        """Take the first free name of the series ``prefix_0``, ``prefix_1``, ...

        Args:
            prefix: An identifier.

        Returns:
            A name that was not handed out before.
        """
        key = f"{prefix}#"
        number = self._suffix.get(key, 0)
        while f"{prefix}_{number}" in self._taken:
            number += 1
        self._suffix[key] = number + 1
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
