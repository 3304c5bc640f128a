"""Piece backends: compile one graph into a file, and load that file as a callable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stitchcache.errors import OptionError

if TYPE_CHECKING:
    from stitchcache.pieces.backends import Backend

NAMES = ("aoti", "inductor", "eager")

FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
)
"""What code that is not ours may raise on values that it was never meant for."""

COMPILER_OPTIONS = {"fallback_random": True}
"""Options that compiled pieces get unless the user says otherwise. Random ops draw eager's numbers under
eager's seed; Inductor's own generator is quicker and draws others."""


def get_backend(name: str) -> Backend:
    """Find a backend by name.

    Args:
        name: ``aoti``, ``inductor`` or ``eager``.

    Raises:
        OptionError: No such backend.
    """
    # Imported one by one: a warm start loads pieces of one backend only.
    if name == "aoti":
        from stitchcache.pieces.backends import AotiBackend

        return AotiBackend()
    if name == "inductor":
        from stitchcache.pieces.backends import InductorBackend

        return InductorBackend()
    if name == "eager":
        from stitchcache.pieces.eager import EagerBackend

        return EagerBackend()
    raise OptionError(f"backend={name!r}: there is {', '.join(NAMES)}.", option="backend")


__all__ = ["COMPILER_OPTIONS", "FAILURES", "NAMES", "get_backend"]
