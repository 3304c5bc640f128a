"""``stitchcache verify``, ``prune``, ``rm``, ``clear``, ``migrate``, ``stats``: looking after a cache."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli import output as out
from stitchcache.errors import OptionError
from stitchcache.store import parse_size

if TYPE_CHECKING:
    from stitchcache.store.evict import PrunePlan

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_NOT_DONE = "Nothing was removed. Repeat with --yes to remove it."


@click.command()
@click.option("--repair", is_flag=True, help="Move damaged files to quarantine; remove what leads nowhere.")
@click.option("--require-signature", is_flag=True, help="Report what no trusted key has signed.")
@out.reading_options
def verify(repair: bool, require_signature: bool) -> None:
    """Check every byte of a cache.

    Exit status 1 says that something is wrong and was not repaired. What went to quarantine is compiled
    again when it is next asked for.
    """
    cache = out.open_cache()
    report = cache.verify(repair=repair, require_signature=require_signature)
    record = {"root": cache.paths[0], "clean": report.clean, **asdict(report)}
    out.show(record, _print_findings, finding=not report.clean)


def _print_findings(record: out.Record) -> None:
    findings = record["findings"]
    if findings:
        columns: out.Fields = {"PROBLEM": "problem", "REPAIRED": "repaired", "FILE": "path"}
        columns = {**columns, "DETAIL": lambda found: found["detail"].removeprefix(f"{found['path']}: ")}
        out.print_table(columns, findings)
    kinds = {"entries": "entry", "blobs": "blob", "targets": "target", "pieces": "piece"}
    seen = ", ".join(out.count_text(record[name], kind) for name, kind in kinds.items())
    verdict = out.count_text(len(findings), "finding") if findings else "all sound"
    click.echo(f"{seen}, {out.size_text(record['bytes'])} read: {verdict}")


def _size(_ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value, option=param.opts[0])
    except OptionError as error:
        raise click.BadParameter(error.message) from error


def age(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
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
@click.option("--max-age", callback=age, metavar="AGE", help="Entries unused for longer go, such as 30d.")
@click.option("--remote", is_flag=True, help="Prune the remote instead, by time of upload; lists all of it.")
@click.option("--yes", is_flag=True, help="Do it.")
@out.reading_options
def prune(remote: bool, yes: bool, **limits: Any) -> None:
    """Remove what is over the limits, least recently used first, and what nothing needs any more.

    Prints what would go; nothing is removed without --yes. Entries in use stay, and of a remote what was
    uploaded within the last day.
    """
    if remote:
        from stitchcache.remote.prune import planned

        cache = out.open_cache(remote=None)
        with planned(cache.tier, dry_run=not yes, **limits) as plan:
            _carry_out(cache.remote, plan, yes)
    else:
        cache = out.open_cache()
        _carry_out(cache.paths[0], cache.plan_prune(**limits), yes)


def _carry_out(place: str, plan: PrunePlan, yes: bool) -> None:
    record: out.Record = {"root": place, "plan": _plan_record(plan)}
    record["done"] = asdict(plan.execute()) if yes else None
    out.show(record, _print_pruned, finding=_incomplete(record))


def _plan_record(plan: PrunePlan) -> out.Record:
    return {
        "entries": [
            {"graph_hash": item.key, "bytes": item.size, "last_used": item.modified / 1e9, "reason": reason}
            for item, reason in plan.entries
        ],
        "blobs": [{"digest": item.key, "bytes": item.size} for item in plan.blobs],
        "targets": [item.key for item in plan.targets],
        "pieces": [item.key for item in plan.pieces],
        "leftovers": [item.path for item in plan.leftovers],
        "unreadable": list(plan.unreadable),
        **{name: getattr(plan, name) for name in ("files", "bytes", "total_files", "total_bytes")},
    }


def _print_pruned(record: out.Record) -> None:
    plan = record["plan"]
    if plan["entries"]:
        digits = out.short_length(entry["graph_hash"] for entry in plan["entries"])
        columns = {"GRAPH": "graph_hash", "LAST USED": "last_used", "SIZE": "bytes", "WHY": "reason"}
        out.print_table(columns, plan["entries"], digits)
    for path in plan["unreadable"]:
        out.say(f"{path}: cannot be read here, so no entry and no blob is removed")
    held = f"{out.count_text(plan['total_files'], 'file')}, {out.size_text(plan['total_bytes'])}"
    parts = f"{out.count_text(len(plan['entries']), 'entry')}, {out.count_text(len(plan['blobs']), 'blob')}"
    whole = f"{out.count_text(plan['files'], 'file')} in all, {out.size_text(plan['bytes'])}"
    click.echo(f"{record['root']} holds {held}; to remove: {parts}, {whole}")
    if record["done"] is not None:
        _print_removed(record)
    elif plan["files"]:
        click.echo(_NOT_DONE)


@click.command()
@click.option("--yes", is_flag=True, help="Do it.")
@out.reading_options
def clear(yes: bool) -> None:
    """Remove everything from a cache but what is in use. Nothing is removed without --yes."""
    cache = out.open_cache()
    _carry_out(cache.paths[0], cache.plan_prune(max_bytes=0, max_files=0, grace_seconds=0.0), yes)


def _incomplete(record: out.Record) -> bool:
    done = record["done"]
    return done is not None and bool(done["failed"] or done["busy"])


def _print_removed(record: out.Record) -> None:
    done = record["done"]
    if done["busy"]:
        out.say("another process is pruning this cache; nothing was removed")
        return
    for path, reason in done["failed"]:
        out.say(f"{path}: cannot be removed ({reason})")
    in_use = f"; {out.count_text(len(done['in_use']), 'entry')} in use stayed" if done["in_use"] else ""
    files = f"{out.count_text(done['files'], 'file')} in all, {out.size_text(done['bytes'])}"
    click.echo(f"removed {out.count_text(len(done['entries']), 'entry')}, {files}{in_use}")


@click.command()
@click.argument("prefixes", metavar="PREFIX...", nargs=-1, required=True, shell_complete=out.complete_entry)
@out.shared_options
def rm(prefixes: tuple[str, ...]) -> None:
    """Remove entries, by the beginnings of their graph hashes, and what nothing needs any more then.

    That is the targets that lead to no other entry, and blobs and pieces that no other entry has. Nothing is
    removed where one PREFIX names no entry, or several. Entries in use stay.
    """
    cache = out.open_cache()
    wanted = dict.fromkeys(map(cache.find, prefixes))
    done = cache.remove(list(wanted))
    record: out.Record = {"root": cache.paths[0], "done": asdict(done)}
    left = [key for key in wanted if key not in done.entries]
    why = "a file of it cannot be removed" if done.failed else "it is in a lower layer"
    for key in () if done.busy else left:
        out.say(f"entry {key[:12]} stayed: {'it is in use' if key in done.in_use else why}")
    out.show(record, _print_removed, finding=bool(left) or _incomplete(record))


@click.command()
@out.reading_options
def migrate() -> None:
    """Rewrite entries of older formats; each old file goes once its successor is stored."""
    cache = out.open_cache()
    done = cache.migrate()
    said = f"rewrote {out.count_text(len(done), 'entry')} in {cache.root}"
    out.show({"root": cache.paths[0], "migrated": done}, lambda _: out.print_keys(done, said))


@click.command()
@click.option("--prometheus", is_flag=True, help="Print Prometheus' text format.")
@click.option("--remote", is_flag=True, help="Show what the remote holds instead; lists all of it.")
@out.reading_options
def stats(prometheus: bool, remote: bool) -> None:
    """Show what a cache holds, and its hits and misses."""
    if prometheus and (out.asked("json") or remote):
        raise click.UsageError("--prometheus goes neither with --json, which is another format, nor --remote")
    if remote:
        _remote_stats()
        return
    cache = out.open_cache()
    found = cache.stats()
    if prometheus:
        click.echo(found.prometheus(), nl=False)
    else:
        out.show({"root": cache.paths[0], **asdict(found)}, _print_stats)


def _remote_stats() -> None:
    """Objects and bytes of a remote, by area."""
    cache, areas = out.open_cache(remote=None), dict[str, list[int]]()
    remote = cache.tier.remote
    for each in remote.now(remote.listed, "") or ():
        areas.setdefault(each["path"].partition("/")[0], []).append(each["size"])
    rows = [{"area": name, "objects": len(some), "bytes": sum(some) or None} for name, some in areas.items()]
    columns: out.Fields = {"AREA": "area", "ENTRIES": "objects", "SIZE": "bytes"}
    out.show({"remote": cache.remote, "areas": rows}, lambda _: out.print_table(columns, rows))


def _print_stats(record: out.Record) -> None:
    kept = record["quarantine_files"]
    quarantine = f"{out.count_text(kept, 'file')}, {out.size_text(record['quarantine_bytes'])}"
    fields: out.Fields = {
        "cache": "root",
        **{name: name for name in ("entries", "blobs", "targets", "pieces", "files")},
        "size": "bytes",
        "quarantine": lambda _: quarantine if kept else None,
    }
    out.print_facts(fields, record)
    if record["counters"]:
        out.print_heading(f"Counted since {out.moment_text(record['since'])}")
        pairs = [_counter(name, number) for name, number in sorted(record["counters"].items())]
        out.print_pairs(pairs, indent="  ")


def _counter(name: str, number: int) -> tuple[str, str]:
    if name.startswith("microseconds."):
        return name.removeprefix("micro"), out.seconds_text(number / 1e6)
    return name, out.size_text(number) if name.endswith(".bytes") else str(number)
