"""``stitchcache verify``, ``prune``, ``clear`` and ``migrate``: looking after a cache's files."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli.output import (
    Column,
    age_text,
    cache_option,
    count_text,
    finding,
    json_option,
    open_cache,
    print_json,
    print_table,
    short_length,
    size_text,
)

if TYPE_CHECKING:
    from stitchcache.store.evict import PrunePlan, PruneResult

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_NOT_DONE = "Nothing was removed. Repeat with --yes to remove it."


@click.command()
@click.option("--repair", is_flag=True, help="Move damaged files to quarantine; remove what leads nowhere.")
@json_option
@cache_option
def verify(repair: bool, as_json: bool, root: str | None) -> None:
    """Check every byte of a cache.

    Exit status 1 says that something is wrong and was not repaired. What went to quarantine is compiled
    again when it is next asked for.
    """
    cache = open_cache(root)
    report = cache.verify(repair=repair)
    if as_json:
        print_json({"root": str(cache.root), "clean": report.clean, **asdict(report)})
    else:
        if report.findings:
            columns = (Column("PROBLEM"), Column("REPAIRED"), Column("FILE"), Column("DETAIL", flexible=True))
            rows = [[f.problem, "yes" if f.repaired else "no", f.path, f.detail] for f in report.findings]
            print_table(columns, rows)
        seen = (
            f"{count_text(report.entries, 'entry')}, {count_text(report.blobs, 'blob')}, "
            f"{count_text(report.targets, 'target')}, {count_text(report.pieces, 'piece')}"
        )
        verdict = "all sound" if not report.findings else count_text(len(report.findings), "finding")
        click.echo(f"{seen}, {size_text(report.bytes)} read: {verdict}")
    if not report.clean:
        finding()


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
def prune(
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
        done = asdict(result) if result is not None else None
        print_json({"root": str(cache.root), "plan": _plan_record(plan), "done": done})
    elif result is None and plan.items:
        click.echo(_NOT_DONE)
    _end(result, as_json)


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
        f"{count_text(len(plan.entries), 'entry')}, {count_text(len(plan.blobs), 'blob')}, "
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


@click.command()
@click.option("--yes", is_flag=True, help="Do it.")
@json_option
@cache_option
def clear(yes: bool, as_json: bool, root: str | None) -> None:
    """Remove everything from a cache but what is in use. Nothing is removed without --yes."""
    cache = open_cache(root)
    result = cache.clear() if yes else None
    if as_json or result is None:
        held = result if result is not None else cache.stats()
        done = asdict(result) if result is not None else None
        if as_json:
            print_json({"root": str(cache.root), "files": held.files, "bytes": held.bytes, "done": done})
        else:
            entries = count_text(cache.stats().entries, "entry")
            size = size_text(held.bytes)
            click.echo(f"{cache.root} holds {entries}, {count_text(held.files, 'file')} in all, {size}.")
            click.echo(_NOT_DONE)
    _end(result, as_json)


def _end(result: PruneResult | None, as_json: bool) -> None:
    """Say what a removal did, and end with status 1 if it could not do all of it."""
    if result is None:
        return
    if not as_json and result.busy:
        click.echo("another process is pruning this cache; nothing was removed", err=True)
    elif not as_json:
        for path, reason in result.failed:
            click.echo(f"{path}: cannot be removed ({reason})", err=True)
        in_use = f"; {count_text(len(result.in_use), 'entry')} in use stayed" if result.in_use else ""
        click.echo(
            f"removed {count_text(len(result.entries), 'entry')}, {count_text(result.files, 'file')} in all, "
            f"{size_text(result.bytes)}{in_use}"
        )
    if result.failed or result.busy:
        finding()


@click.command()
@json_option
@cache_option
def migrate(as_json: bool, root: str | None) -> None:
    """Rewrite entries of older formats; each old file goes once its successor is stored."""
    cache = open_cache(root)
    done = cache.migrate()
    if as_json:
        print_json({"root": str(cache.root), "migrated": done})
        return
    for graph_hash in done:
        click.echo(graph_hash)
    click.echo(f"rewrote {count_text(len(done), 'entry')} in {cache.root}", err=True)
