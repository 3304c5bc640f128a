"""``stitchcache prune``: show what would go, and with ``--yes`` let it go."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli.layout import Column
from stitchcache.cli.options import cache_option, finding, json_option, open_cache
from stitchcache.cli.output import print_json, print_table
from stitchcache.cli.removed import print_removed, removed_record
from stitchcache.cli.words import age_text, count_text, short_length, size_text

if TYPE_CHECKING:
    from stitchcache.store.evict import PrunePlan

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def _size(_ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Bytes in a text such as ``10G``."""
    from stitchcache.errors import OptionError
    from stitchcache.store.layout import parse_size

    if value is None:
        return None
    try:
        return parse_size(value, option=param.opts[0])
    except OptionError as error:
        raise click.BadParameter(error.message) from error


def _age(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """Seconds in a text such as ``30d``."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhdw])", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is no age; write a number with s, m, h, d or w, such as 30d")
    return float(match[1]) * _UNITS[match[2]]


@click.command()
@click.option(
    "--max-size",
    callback=_size,
    metavar="SIZE",
    help="Bytes to keep, such as 10G.  [default: STITCHCACHE_MAX_SIZE]",
)
@click.option("--max-files", type=click.IntRange(min=0), help="Files that may stay.")
@click.option("--max-age", callback=_age, metavar="AGE", help="Entries unused for longer go, such as 30d.")
@click.option("--min-free", callback=_size, metavar="SIZE", help="Bytes to be free on the file system.")
@click.option("--yes", is_flag=True, help="Do it.")
@json_option
@cache_option
def command(
    max_size: int | None,
    max_files: int | None,
    max_age: float | None,
    min_free: int | None,
    yes: bool,
    as_json: bool,
    root: str | None,
) -> None:
    """Remove what is over the limits, least recently used first, and what nothing needs any more.

    Prints what would go; nothing is removed without --yes. Entries in use stay.
    """
    cache = open_cache(root)
    plan = cache.plan_prune(max_bytes=max_size, max_files=max_files, max_age=max_age, min_free=min_free)
    if not as_json:
        _print_plan(plan, str(cache.root))
    result = plan.execute() if yes else None
    if as_json:
        done = removed_record(result) if result is not None else None
        print_json({"root": str(cache.root), "plan": _plan_record(plan), "done": done})
    elif result is not None:
        print_removed(result)
    elif plan.items:
        click.echo("Nothing was removed. Repeat with --yes to remove it.")
    if result is not None and (result.failed or result.busy):
        finding()


def _print_plan(plan: PrunePlan, root: str) -> None:
    if plan.entries:
        length = short_length(item.key for item, _ in plan.entries)
        columns = (
            Column("GRAPH"),
            Column("LAST USED"),
            Column("SIZE", right=True),
            Column("WHY", flexible=True),
        )
        rows = [
            [item.key[:length], age_text(item.modified / 1e9), size_text(item.size), reason]
            for item, reason in plan.entries
        ]
        print_table(columns, rows)
    for path in plan.unreadable:
        click.echo(f"{path}: cannot be read here, so no entry and no blob goes", err=True)
    click.echo(
        f"{root} holds {count_text(plan.total_files, 'file')}, {size_text(plan.total_bytes)}; to remove: "
        f"{count_text(len(plan.entries), 'entry', 'entries')}, {count_text(len(plan.blobs), 'blob')}, "
        f"{count_text(plan.files, 'file')} in all, {size_text(plan.bytes)}"
    )


def _plan_record(plan: PrunePlan) -> dict[str, Any]:
    return {
        "entries": [
            {"graph_hash": item.key, "bytes": item.size, "last_used": item.modified / 1e9, "reason": reason}
            for item, reason in plan.entries
        ],
        "blobs": [{"digest": item.key, "bytes": item.size} for item in plan.blobs],
        "targets": [item.key for item in plan.targets],
        "pieces": [item.key for item in plan.pieces],
        "leftovers": [item.path for item in plan.leftovers],
        "files": plan.files,
        "bytes": plan.bytes,
        "total_files": plan.total_files,
        "total_bytes": plan.total_bytes,
        "unreadable": list(plan.unreadable),
    }
