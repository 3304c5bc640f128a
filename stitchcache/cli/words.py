"""Numbers, times and foreign text as a person reads them."""

from __future__ import annotations

import time
from collections.abc import Iterable


def size_text(size: int) -> str:
    """Bytes, in powers of 1024: ``1.4 MiB``."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """A duration: ``350 us``, ``12 ms``, ``4.2 s``, ``3 min 5 s``."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def left_text(seconds: float) -> str:
    """An estimate, no finer than it is: ``about 20 s left``, ``about 3 min left``."""
    if seconds < 60:
        return f"about {max(1, round(seconds / 5) * 5 if seconds > 10 else round(seconds))} s left"
    return f"about {round(seconds / 60)} min left"


def age_text(created: float, now: float | None = None) -> str:
    """How long ago: ``5 min ago``; ``unknown`` for 0, which old formats have."""
    if created <= 0:
        return "unknown"
    age = (time.time() if now is None else now) - created
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if age >= length:
            return f"{int(age // length)} {unit} ago"
    return "just now"


def moment_text(created: float) -> str:
    """A moment in local time; ``unknown`` for 0."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created)) if created > 0 else "unknown"


def count_text(number: int, one: str, many: str = "") -> str:
    """``1 entry``, ``2 entries``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def printable(text: str) -> str:
    """Text from outside, with nothing in it that a terminal would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short_length(keys: Iterable[str], shortest: int = 12) -> int:
    """How many digits of keys to show so that all of them stay different."""
    distinct = set(keys)
    length = shortest
    while length < 64 and len({key[:length] for key in distinct}) < len(distinct):
        length += 1
    return length
