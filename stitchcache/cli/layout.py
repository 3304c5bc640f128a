"""How wide the columns of a table are on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_GAP = 2
_NARROWEST = 12


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column.

    Args:
        title: Its heading.
        right: Whether it is aligned to the right.
        flexible: Whether its cells may be folded where the terminal is narrow.
        optional: Whether it may be left out there.
    """

    title: str
    right: bool = False
    flexible: bool = False
    optional: bool = False


def fit(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[tuple[int, int]]:
    """Choose columns for a width.

    Args:
        columns: All columns.
        rows: Their cells.
        width: Characters that there are.

    Returns:
        Index and width of each column to show. They may still be too wide together: where nothing more can be
        left out or folded, it is for the terminal to wrap.
    """
    natural = [max(len(c.title), *(len(row[i]) for row in rows), 1) for i, c in enumerate(columns)]
    least = [
        min(size, max(_NARROWEST, len(column.title))) if column.flexible else size
        for size, column in zip(natural, columns, strict=True)
    ]
    shown = list(range(len(columns)))
    while _total([least[i] for i in shown]) > width and any(columns[i].optional for i in shown):
        shown.remove(max(i for i in shown if columns[i].optional))
    sizes = {i: natural[i] for i in shown}
    while (excess := _total(list(sizes.values())) - width) > 0:
        widest = max(shown, key=lambda i: sizes[i] - least[i])
        if sizes[widest] == least[widest]:
            break
        # Down to the next in size at once would be quicker; tables are small.
        sizes[widest] -= min(excess, max(1, (sizes[widest] - least[widest]) // 4))
    return list(sizes.items())


def _total(sizes: Sequence[int]) -> int:
    return sum(sizes) + _GAP * (len(sizes) - 1)
