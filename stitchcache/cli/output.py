"""What commands share: options, the cache they name, JSON, tables, and numbers as a person reads them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from stitchcache.cache import Cache

JSON_SCHEMA = 1
F = TypeVar("F", bound=Callable[..., Any])


def cache_option(function: F) -> F:
    """Add ``--cache``."""
    return click.option(
        "--cache",
        "root",
        metavar="DIR",
        help="The cache's directory.  [default: STITCHCACHE_DIR, or the user's cache directory]",
    )(function)


def json_option(function: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def open_cache(root: str | None, *, read_only: bool = False) -> Cache:
    """The cache that ``--cache`` names.

    Raises:
        OptionError: An environment variable makes no sense.
        StoreError: The directory is something else.
    """
    # Not at the top: the help pages answer without it.
    from stitchcache.cache import Cache

    return Cache(root, read_only=True) if read_only else Cache(root)


def finding() -> None:
    """End the command with exit status 1."""
    click.get_current_context().exit(1)


# -- printing --------------------------------------------------------------------------------------


def print_json(record: Mapping[str, Any]) -> None:
    """Print a record, with the version of the schema first."""
    import json

    click.echo(json.dumps({"schema": JSON_SCHEMA, **record}, indent=2, ensure_ascii=False))


def on_terminal() -> bool:
    """Whether a person reads what is printed."""
    return sys.stdout.isatty()


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column.

    Args:
        title: Its heading.
        right: Whether it is aligned to the right.
        flexible: Whether its cells may be folded where the terminal is narrow.
    """

    title: str
    right: bool = False
    flexible: bool = False


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: plain text in full, or with bold headings and folded to the width of a terminal."""
    clean = [[printable(cell) for cell in row] for row in rows]
    if on_terminal():
        _print_rich(columns, clean)
        return
    titles = [column.title for column in columns]
    widths = [max(len(row[i]) for row in [titles, *clean]) for i in range(len(columns))]
    for row in [titles, *clean]:
        cells = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _print_rich(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    # Not at the top: rich takes longer to import than most commands take to answer into a pipe.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        justify: Any = "right" if column.right else "left"
        # Keys and numbers are cut where there is no room; a cell that may fold is read in full.
        table.add_column(column.title, justify=justify, no_wrap=not column.flexible, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def print_pairs(pairs: Sequence[tuple[str, str]], indent: str = "") -> None:
    """Print names and values below each other."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        click.echo(f"{indent}{name:<{width}}  {printable(value)}".rstrip())


def print_heading(text: str) -> None:
    """Print a section's heading."""
    click.echo("")
    click.echo(click.style(text, bold=True))


def print_differences(
    differences: Iterable[tuple[str, tuple[str, str]]], name: str, old: str, new: str
) -> None:
    """Print what differs between two things as a table."""
    columns = (Column(name, flexible=True), Column(old, flexible=True), Column(new, flexible=True))
    print_table(columns, [[what, *pair] for what, pair in differences])


def difference_records(differences: Mapping[str, tuple[str, str]]) -> list[dict[str, str]]:
    """Differences as JSON."""
    return [{"name": name, "old": old, "new": new} for name, (old, new) in differences.items()]


# -- words -----------------------------------------------------------------------------------------


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
    if one.endswith("y") and not many:
        many = one[:-1] + "ies"
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
