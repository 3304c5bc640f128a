"""``stitchcache verify``, ``prune``, ``clear``, ``migrate`` and ``stats``: looking after a cache's files."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from stitchcache.cli.output import (
    Record,
    age_text,
    count_text,
    moment_text,
    open_cache,
    print_heading,
    print_pairs,
    print_table,
    say,
    seconds_text,
    shared_options,
    short_length,
    show,
    size_text,
)
from stitchcache.errors import OptionError
from stitchcache.store.layout import parse_size

if TYPE_CHECKING:
    from stitchcache.store.evict import PrunePlan

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_NOT_DONE = "Nothing was removed. Repeat with --yes to remove it."


# -- verify ----------------------------------------------------------------------------------------


@click.command()
@click.option("--repair", is_flag=True, help="Move damaged files to quarantine; remove what leads nowhere.")
@shared_options
def verify(repair: bool, as_json: bool, root: str | None) -> None:
    """Check every byte of a cache.

    Exit status 1 says that something is wrong and was not repaired. What went to quarantine is compiled
    again when it is next asked for.
    """
    cache = open_cache(root)
    report = cache.verify(repair=repair)
    record = {"root": str(cache.root), "clean": report.clean, **asdict(report)}
    show(record, as_json, _print_findings, finding=not report.clean)


def _print_findings(record: Record) -> None:
    findings = record["findings"]
    if findings:
        rows = [[f["problem"], "yes" if f["repaired"] else "no", f["path"], f["detail"]] for f in findings]
        print_table(("PROBLEM", "REPAIRED", "FILE", "DETAIL"), rows)
    kinds = {"entries": "entry", "blobs": "blob", "targets": "target", "pieces": "piece"}
    seen = ", ".join(count_text(record[name], kind) for name, kind in kinds.items())
    verdict = count_text(len(findings), "finding") if findings else "all sound"
    click.echo(f"{seen}, {size_text(record['bytes'])} read: {verdict}")


# -- prune and clear -------------------------------------------------------------------------------


def _size(_ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value, option=param.opts[0])
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
    "max_bytes",
    callback=_size,
    metavar="SIZE",
    help="Bytes to keep, such as 10G.  [default: STITCHCACHE_MAX_SIZE]",
)
@click.option("--max-files", type=click.IntRange(min=0), help="Files that may stay.")
@click.option("--max-age", callback=_age, metavar="AGE", help="Entries unused for longer go, such as 30d.")
@click.option("--yes", is_flag=True, help="Do it.")
@shared_options
def prune(
    max_bytes: int | None,
    max_files: int | None,
    max_age: float | None,
    yes: bool,
    as_json: bool,
    root: str | None,
) -> None:
    """Remove what is over the limits, least recently used first, and what nothing needs any more.

    Prints what would go; nothing is removed without --yes. Entries in use stay.
    """
    cache = open_cache(root)
    plan = cache.plan_prune(max_bytes=max_bytes, max_files=max_files, max_age=max_age)
    record: Record = {"root": str(cache.root), "plan": _plan_record(plan)}
    record["done"] = asdict(plan.execute()) if yes else None
    show(record, as_json, _print_pruned, finding=_incomplete(record))


def _plan_record(plan: PrunePlan) -> Record:
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


def _print_pruned(record: Record) -> None:
    plan = record["plan"]
    if plan["entries"]:
        length = short_length(entry["graph_hash"] for entry in plan["entries"])
        rows = [
            [
                entry["graph_hash"][:length],
                age_text(entry["last_used"]),
                size_text(entry["bytes"]),
                entry["reason"],
            ]
            for entry in plan["entries"]
        ]
        print_table(("GRAPH", "LAST USED", "SIZE", "WHY"), rows)
    for path in plan["unreadable"]:
        say(f"{path}: cannot be read here, so no entry and no blob goes")
    held = f"{count_text(plan['total_files'], 'file')}, {size_text(plan['total_bytes'])}"
    parts = f"{count_text(len(plan['entries']), 'entry')}, {count_text(len(plan['blobs']), 'blob')}"
    whole = f"{count_text(plan['files'], 'file')} in all, {size_text(plan['bytes'])}"
    click.echo(f"{record['root']} holds {held}; to remove: {parts}, {whole}")
    if record["done"] is not None:
        _print_removed(record)
    elif plan["files"]:
        click.echo(_NOT_DONE)


@click.command()
@click.option("--yes", is_flag=True, help="Do it.")
@shared_options
def clear(yes: bool, as_json: bool, root: str | None) -> None:
    """Remove everything from a cache but what is in use. Nothing is removed without --yes."""
    cache = open_cache(root)
    held = cache.stats()
    done = asdict(cache.clear()) if yes else None
    record = {"root": str(cache.root), "files": held.files, "bytes": held.bytes, "done": done}

    def view(found: Record) -> None:
        if done is not None:
            _print_removed(found)
            return
        files = f"{count_text(held.files, 'file')} in all, {size_text(held.bytes)}"
        click.echo(f"{cache.root} holds {count_text(held.entries, 'entry')}, {files}.")
        click.echo(_NOT_DONE)

    show(record, as_json, view, finding=_incomplete(record))


def _incomplete(record: Record) -> bool:
    done = record["done"]
    return done is not None and bool(done["failed"] or done["busy"])


def _print_removed(record: Record) -> None:
    done = record["done"]
    if done["busy"]:
        say("another process is pruning this cache; nothing was removed")
        return
    for path, reason in done["failed"]:
        say(f"{path}: cannot be removed ({reason})")
    in_use = f"; {count_text(len(done['in_use']), 'entry')} in use stayed" if done["in_use"] else ""
    click.echo(
        f"removed {count_text(len(done['entries']), 'entry')}, {count_text(done['files'], 'file')} in all, "
        f"{size_text(done['bytes'])}{in_use}"
    )


@click.command()
@shared_options
def migrate(as_json: bool, root: str | None) -> None:
    """Rewrite entries of older formats; each old file goes once its successor is stored."""
    cache = open_cache(root)
    done = cache.migrate()

    def view(_record: Record) -> None:
        for graph_hash in done:
            click.echo(graph_hash)
        say(f"rewrote {count_text(len(done), 'entry')} in {cache.root}")

    show({"root": str(cache.root), "migrated": done}, as_json, view)


# -- stats -----------------------------------------------------------------------------------------

_WORDS = {
    "hit.direct": "loaded without tracing",
    "hit.graph": "loaded after tracing",
    "hit.load": "loaded by graph hash",
    "compiled": "compiled",
    "hit.piece": "pieces found while compiling",
    "miss.new": "traced: no entry for the target",
    "miss.sources": "traced: a source file or global changed",
    "miss.example": "traced: the example does not fit",
    "miss.unkeyable": "traced: the model has no target key",
    "miss.entry": "traced: the entry was gone or damaged",
    "miss.piece": "traced: a piece was gone or damaged",
    "miss.refused": "traced: the entry cannot be used here",
    "miss.look": "traced: the look found that the hit was wrong",
    "look.agreed": "looks that agreed with the model",
    "look.mismatch": "looks that found something else: please report it",
    "look.unchecked": "starts that could not be compared",
    "audit.right": "audits that found the direct hit right",
    "audit.wrong": "audits that found it wrong",
    "piece.compiled.aoti": "pieces compiled by aoti",
    "microseconds.piece.aoti": "time in them, one by one",
    "piece.compiled.inductor": "pieces compiled by inductor",
    "microseconds.piece.inductor": "time in them, one by one",
    "piece.compiled.eager": "pieces stored as eager code",
    "microseconds.piece.eager": "time in them, one by one",
    "put": "entries stored",
    "put.bytes": "bytes stored",
    "microseconds.spent": "time spent on starts",
    "microseconds.saved": "time saved by loading",
    "corrupt": "damaged files met",
    "evicted": "entries evicted",
}


@click.command()
@click.option(
    "--prometheus",
    metavar="[FILE]",
    is_flag=False,
    flag_value="-",
    help="Print Prometheus' text format, or replace a file with it at once, as its text collector needs.",
)
@click.option("--zero", is_flag=True, help="Print, and then forget what was counted.")
@shared_options
def stats(prometheus: str | None, zero: bool, as_json: bool, root: str | None) -> None:
    """Show what a cache holds, and its hits and misses."""
    if prometheus and as_json:
        raise click.UsageError("--prometheus and --json are two formats; choose one")
    cache = open_cache(root)
    found = cache.stats()
    if prometheus is not None:
        _write(prometheus, found.prometheus())
    else:
        show({"root": str(cache.root), **asdict(found)}, as_json, _print_stats)
    if zero:
        cache.zero_stats()


def _print_stats(record: Record) -> None:
    held = [("cache", record["root"])]
    held += [(name, str(record[name])) for name in ("entries", "blobs", "targets", "pieces", "files")]
    held.append(("size", size_text(record["bytes"])))
    if record["quarantine_files"]:
        size = size_text(record["quarantine_bytes"])
        held.append(("quarantine", f"{count_text(record['quarantine_files'], 'file')}, {size}"))
    print_pairs(held)
    counters = record["counters"]
    if counters:
        print_heading(f"Counted since {moment_text(record['since'])}")
        # Counters of a newer stitchcache are shown too, after those that are known here.
        names = [name for name in [*_WORDS, *(counters.keys() - _WORDS.keys())] if name in counters]
        print_pairs([(_WORDS.get(name, name), _value(name, counters[name])) for name in names], indent="  ")


def _value(name: str, number: int) -> str:
    if name.startswith("microseconds."):
        return seconds_text(number / 1e6)
    return size_text(number) if name.endswith(".bytes") else str(number)


def _write(path: str, text: str) -> None:
    if path == "-":
        click.echo(text, nl=False)
        return
    # Collectors read at any moment; a rename shows them the old file or the new one.
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise click.ClickException(f"{path}: cannot be written ({error.strerror})") from error
