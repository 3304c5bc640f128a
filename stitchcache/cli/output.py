"""What commands share: options, the cache they name, JSON, tables, and numbers as a person reads them.

A command makes a record, which ``--json`` prints as it is. Views for people are tables and facts of it:
titles, each with the field that it shows, whose name says how the value is written, or with a function.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stitchcache.errors import OptionError, StitchCacheError, printable
from stitchcache.types import is_digest
from stitchcache.words import (
    age_text as age_text,
    count_text as count_text,
    moment_text as moment_text,
    seconds_text as seconds_text,
    size_text as size_text,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from stitchcache.cache import Cache

JSON_SCHEMA = 1
_PAGE = "stitchcache.page"
_ASKED = "stitchcache.asked"
F = TypeVar("F", bound=Callable[..., Any])
Record = dict[str, Any]
Fields = Mapping[str, str | Callable[[Record], object]]

_RIGHT = (
    "BLOBS|CALLS|COMPILED IN|DIFFERENT|ENTRIES|FORMAT|HITS|ONE CALL|OWN|RUNS|SAVED|SHARE|SHARED BY|SIZE|"
    "STARTS|TIME|UNUSED|.* OUTPUT"
)
"""Titles of columns of numbers, as a pattern."""


def shared_options(function: F) -> F:
    """Add ``--json`` and ``--cache``, which nearly every command has."""
    where = (
        "The cache's directory, and layers beneath it that are only read.  [default: STITCHCACHE_DIR, or the "
        "user's cache directory]"
    )
    return json_option(_option("--cache", metavar="DIR[:DIR...]", help=where)(function))


def json_option(function: F) -> F:
    """Add ``--json`` alone."""
    return _option("--json", is_flag=True, help="Print JSON.")(function)


def reading_options(function: F) -> F:
    """``shared_options`` for a command that says what a cache holds: a missing one is no empty one."""
    said = "Take a missing directory for an empty one."
    return shared_options(_option("--allow-missing", is_flag=True, default=False, help=said)(function))


def html_option(function: F) -> F:
    """Add ``--html``."""
    return _option("--html", metavar="FILE", help="Write a page for a browser; '-' prints it.")(function)


def _option(name: str, **settings: Any) -> Callable[[F], F]:
    """An option that is no argument of its command: :func:`asked` gives its value."""

    def keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        ctx.meta[f"{_ASKED}.{param.name}"] = value

    return click.option(name, expose_value=False, callback=keep, **settings)


def asked(name: str) -> Any:
    """The value of a shared option of this command; ``None`` where it was not given, or there is none."""
    return click.get_current_context().meta.get(f"{_ASKED}.{name}")


def one_place(argument: str, value: str | None) -> str | None:
    """What an argument or ``--cache`` names, where both name the same thing."""
    root: str | None = asked("cache")
    if value is not None and root is not None:
        raise click.UsageError(f"{argument} and --cache name the same thing; give one of them")
    return value or root


def complete_entry(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Entries that a shell offers where a command takes the beginning of a graph hash."""
    from click.shell_completion import CompletionItem

    try:
        with ctx.scope(cleanup=False):
            entries = open_cache().entries()
    except StitchCacheError:
        # A shell that completes has no place for messages.
        return []
    digits = short_length(entry.graph_hash for entry in entries)
    found = [entry for entry in entries if entry.graph_hash.startswith(incomplete)]
    shown = [(entry.graph_hash[: max(digits, len(incomplete))], printable(entry.label)) for entry in found]
    return [CompletionItem(prefix, help=label or None) for prefix, label in shown]


def write_page(path: str, text: str) -> None:
    """Write a page to what ``--html`` names, and say so."""
    if path == "-":
        click.echo(text.encode("utf-8", "backslashreplace"), nl=False)
        return
    from stitchcache.report.page import write_page

    write_page(path, text)
    say(f"wrote {path} ({size_text(len(text))})")


def open_cache(
    root: str | None = None, *, remote: str | None = "", exists: bool = False, **how: Any
) -> Cache:
    """The cache at ``root`` or that ``--cache`` names; without a remote, unless ``remote`` says otherwise.

    ``exists`` asks for the directory as ``reading_options`` do; ``how`` goes to the cache.
    """
    from stitchcache.cache import Cache
    from stitchcache.store import split_roots

    root = asked("cache") if root is None else root
    layers = None if root is None else split_roots(root, option="--cache")
    cache = Cache(layers, remote=remote, **how)
    missing = [place for place in cache.paths if not os.path.isdir(place)]
    # A remote is looked after from where there may be no cache.
    if missing and (exists or (remote == "" and asked("allow_missing") is False)):
        raise OptionError(
            f"{missing[0]}: there is no such directory. If it is a mount, mount it; nothing may have been "
            "compiled yet; or name another (--cache, STITCHCACHE_DIR). --allow-missing takes it for empty.",
            option="--cache",
        )
    return cache


def show(record: Record, view: Callable[[Record], None], *, finding: bool = False, title: str = "") -> None:
    """Print what a command found, as JSON or by a view for people; exit status 1 if it is a finding.

    Under a title, what the view prints becomes the page that ``--html`` asks for instead.
    """
    html = asked("html") if title else None
    if html is not None:
        from stitchcache.html import tag
        from stitchcache.report.page import page

        parts = click.get_current_context().meta[_PAGE] = [tag("h1", title)]
        view(record)
        del click.get_current_context().meta[_PAGE]
        write_page(html, page(f"{title} · stitchcache", *parts))
    if asked("json"):
        click.echo(_json_text({"schema": JSON_SCHEMA, **record}))
    elif html is None:
        view(record)
    if finding:
        click.get_current_context().exit(1)


def _json_text(record: Record) -> str:
    """A record as JSON; an item of a list has a line, however much there is to it."""
    import json

    # Without an indent it is made by C code: there may be thousands of items.
    item_text = json.JSONEncoder(ensure_ascii=False).encode
    parts = []
    for name, value in record.items():
        if isinstance(value, (list, tuple)) and value:
            text = "[\n    " + ",\n    ".join(map(item_text, value)) + "\n  ]"
        else:
            text = json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(name)}: {text}")
    lines = ("{\n" + ",\n".join(parts) + "\n}").split("\n")
    # JSON escapes only some of what a terminal acts on. Most lines have nothing of it.
    return "\n".join(
        line if line.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
        for line in lines
    )


def _on_page(part: str, *content: Any, **attributes: str) -> bool:
    """Add what a function of ``stitchcache.html`` makes to the page; False where a view prints."""
    context = click.get_current_context(silent=True)
    page = None if context is None else context.meta.get(_PAGE)
    if page is None:
        return False
    from stitchcache import html

    page.append(getattr(html, part)(*content, **attributes))
    return True


def print_line(text: str, colour: str | None = None) -> None:
    """Print a line of text."""
    if colour is None:
        done = _on_page("tag", "p", text)
    else:
        kind = {"green": "line add", "red": "line del", "cyan": "line at"}.get(colour, "line")
        done = _on_page("tag", "code", text or " ", class_=kind)
    if not done:
        click.echo(click.style(printable(text), fg=colour))


def print_keys(keys: Iterable[str], said: str) -> None:
    """Print a key a line, and on stderr what was done with them."""
    for key in keys:
        click.echo(key)
    say(said)


def on_terminal() -> bool:
    """Whether a person reads what is printed."""
    return sys.stdout.isatty()


def say(text: str) -> None:
    """Print lines that are no result on stderr."""
    click.echo("\n".join(map(printable, text.splitlines())), err=True)


def print_heading(text: str) -> None:
    """Print a section's heading."""
    if not _on_page("tag", "h2", text):
        click.echo("\n" + click.style(printable(text), bold=True))


def print_facts(fields: Fields, record: Record, indent: str = "") -> None:
    """Print facts of one record below each other; empty ones are left out."""
    cells = ((title, *column(field, [record], 64)) for title, field in fields.items())
    print_pairs([(title, text) for title, text in cells if text != "-"], indent)


def print_pairs(pairs: Sequence[tuple[str, str]], indent: str = "") -> None:
    """Print names and values below each other."""
    if _on_page("facts", pairs):
        return
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        click.echo(f"{indent}{printable(name):<{width}}  {printable(value)}")


def print_table(fields: Fields, records: Iterable[Record], digits: int = 12) -> None:
    """Print a line a record: plain text in full, or bold titles and lines that fit the terminal."""
    rows = [*records]
    columns = [column(field, rows, digits) for field in fields.values()]
    lines = [*zip(*columns, strict=True)]
    if _on_page("table", list(fields), lines):
        return
    if on_terminal():
        _print_rich(list(fields), lines)
        return
    lines.insert(0, tuple(fields))
    widths = [max(map(len, (title, *some))) for title, some in zip(fields, columns, strict=True)]
    sides = [">" if re.fullmatch(_RIGHT, title) else "<" for title in fields]
    layout = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    # At once: each echo is flushed.
    click.echo("\n".join(layout.format(*line).rstrip() for line in lines))


def _print_rich(titles: list[str], lines: list[tuple[str, ...]]) -> None:
    # Not at the top: rich takes longer to import than most commands take to answer into a pipe.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, justify="right" if re.fullmatch(_RIGHT, title) else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    Console(highlight=False).print(table)


def column(field: str | Callable[[Record], object], records: list[Record], digits: int) -> list[str]:
    """A field of each record in words, with this many digits of a key; ``-`` for nothing."""
    name = field if isinstance(field, str) else ""
    values = map(itemgetter(name) if isinstance(field, str) else field, records)
    # There may be thousands of records, and few different values.
    in_words = lru_cache(None, typed=True)(partial(_in_words, name, digits))
    return [in_words(tuple(value) if isinstance(value, list) else value) for value in values]


def _in_words(name: str, digits: int, value: Any) -> str:
    if value is None:
        text = ""
    elif isinstance(value, str):
        text = value[:digits] if is_digest(value) else value
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, tuple):
        text = ", ".join(map(str, value))
    elif name in ("created", "last_used"):
        text = age_text(value)
    elif name.endswith("seconds"):
        text = seconds_text(value) if value else ""
    elif name.endswith("bytes"):
        text = size_text(value)
    else:
        text = str(value)
    return printable(text) or "-"


def short_length(keys: Iterable[str], shortest: int = 12) -> int:
    """How many digits of keys to show so that all of them stay different."""
    distinct = set(keys)
    length = shortest
    while length < 64 and len({key[:length] for key in distinct}) < len(distinct):
        length += 1
    return length
