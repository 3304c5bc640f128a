"""Numbers as a person reads them."""

from __future__ import annotations

import time


def size_text(size: int) -> str:
    """Bytes, in powers of 1024: ``1.4 MiB``."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.1f} {' KMGT'[power]}iB"


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


def count_text(number: int, one: str) -> str:
    """``1 entry``, ``2 entries``."""
    many = one[:-1] + "ies" if one.endswith("y") and one[-2] not in "aeiou" else one + "s"
    return f"{number} {one if number == 1 else many}"
