"""What commands share: options, the cache they name, JSON, tables, and numbers as a person reads them."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stitchcache.explanation import printable

if TYPE_CHECKING:
    from stitchcache.cache import Cache

JSON_SCHEMA = 1
F = TypeVar("F", bound=Callable[..., Any])
Record = dict[str, Any]
"""What a command found, as ``--json`` prints it; the views for people are made from it."""

# Columns of numbers.
_RIGHT = re.compile(
    "BLOBS|BYTES|CALLS|COMPILED IN|DIFFERENT|FORMAT|ONE CALL|RUNS|SHARED BY|SIZE|TIME|.* TO FIRST OUTPUT"
)


def shared_options(function: F) -> F:
    """Add ``--json`` and ``--cache``, which every command has."""
    cache = click.option(
        "--cache",
        "root",
        metavar="DIR",
        help="The cache's directory.  [default: STITCHCACHE_DIR, or the user's cache directory]",
    )
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(cache(function))


def open_cache(root: str | None, *, read_only: bool = False) -> Cache:
    """The cache that ``--cache`` names.

    Raises:
        OptionError: An environment variable makes no sense.
        StoreError: The directory is something else.
    """
    # Not at the top: the help pages answer without it.
    from stitchcache.cache import Cache

    return Cache(root, read_only=read_only)


def show(record: Record, as_json: bool, view: Callable[[Record], None], *, finding: bool = False) -> None:
    """Print what a command found, and end with exit status 1 if it is a finding.

    Args:
        record: What was found.
        as_json: Whether to print the record itself, with the version of the schema first.
        view: Prints it for people.
        finding: Whether something is wrong.
    """
    if as_json:
        import json

        click.echo(json.dumps({"schema": JSON_SCHEMA, **record}, indent=2, ensure_ascii=False))
    else:
        view(record)
    if finding:
        click.get_current_context().exit(1)


# -- printing --------------------------------------------------------------------------------------


def on_terminal() -> bool:
    """Whether a person reads what is printed."""
    return sys.stdout.isatty()


def say(text: str) -> None:
    """Print a line that is no result on stderr."""
    click.echo("\n".join(map(printable, text.splitlines())), err=True)


def print_table(titles: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table: plain text in full, or with bold headings and folded to the width of a terminal."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if on_terminal():
        _print_rich(titles, cells)
        return
    lines = [list(titles), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        aligned = [
            cell.rjust(width) if _RIGHT.fullmatch(title) else cell.ljust(width)
            for title, cell, width in zip(titles, line, widths, strict=True)
        ]
        click.echo("  ".join(aligned).rstrip())


def _print_rich(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    # Not at the top: rich takes longer to import than most commands take to answer into a pipe.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, justify="right" if _RIGHT.fullmatch(title) else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def print_pairs(pairs: Iterable[tuple[str, object]], indent: str = "") -> None:
    """Print names and values below each other."""
    found = list(pairs)
    width = max((len(name) for name, _ in found), default=0)
    for name, value in found:
        click.echo(f"{indent}{printable(name):<{width}}  {printable(str(value))}".rstrip())


def print_heading(text: str) -> None:
    """Print a section's heading."""
    click.echo("")
    click.echo(click.style(printable(text), bold=True))


def print_differences(differences: Sequence[Record], titles: Sequence[str]) -> None:
    """Print what differs between two things, as ``difference_records`` gives it."""
    print_table(titles, [[found["name"], found["old"], found["new"]] for found in differences])


# -- words -----------------------------------------------------------------------------------------


def size_text(size: int) -> str:
    """Bytes, in powers of 1024: ``1.4 MiB``."""
    if size < 1024:
        return f"{size} B"
    amount = size / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.1f} {unit}"
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


def count_text(number: int, one: str) -> str:
    """``1 entry``, ``2 entries``."""
    many = one[:-1] + "ies" if one.endswith("y") else one + "s"
    return f"{number} {one if number == 1 else many}"


def short_length(keys: Iterable[str], shortest: int = 12) -> int:
    """How many digits of keys to show so that all of them stay different."""
    distinct = set(keys)
    length = shortest
    while length < 64 and len({key[:length] for key in distinct}) < len(distinct):
        length += 1
    return length
