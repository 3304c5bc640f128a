"""Which values may be written into source as they are."""

from __future__ import annotations

import math

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
