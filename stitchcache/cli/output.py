"""Printing: JSON, and tables that are plain text everywhere but on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from stitchcache.cli.layout import Column, fit
from stitchcache.cli.words import printable

JSON_SCHEMA = 1


def print_json(record: Mapping[str, Any]) -> None:
    """Print a record, with the version of the schema first."""
    import json

    click.echo(json.dumps({"schema": JSON_SCHEMA, **record}, indent=2, ensure_ascii=False))


def on_terminal() -> bool:
    """Whether a person reads what is printed."""
    return sys.stdout.isatty()


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; a terminal gets bold headings and what fits its width."""
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
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    shown = fit(columns, rows, console.width)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, width in shown:
        column = columns[index]
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            width=width,
            no_wrap=not column.flexible,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(row[index]) for index, _ in shown))
    console.print(table)


def print_pairs(pairs: Sequence[tuple[str, str]], indent: str = "") -> None:
    """Print names and values below each other."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        click.echo(f"{indent}{name:<{width}}  {printable(value)}".rstrip())


def print_heading(text: str) -> None:
    """Print a section's heading."""
    click.echo("")
    click.echo(click.style(text, bold=True))
