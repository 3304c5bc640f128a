"""``stitchcache report``: a whole cache at a glance."""

from __future__ import annotations

from typing import Any

import click

from stitchcache.cli import output as out

_MOST = 20


@click.command()
@click.option("--all", "everything", is_flag=True, help="Show all entries, not only the largest.")
@out.html_option
@out.reading_options
def report(everything: bool) -> None:
    """Tell what takes space in a cache, what entries share, how often it was hit, and what nobody used.

    A use is noted an hour after the last one at the soonest, so uses in an entry's first hour do not count.
    OWN is what goes with an entry if it alone is removed. HITS is the share of starts that found an entry,
    SAVED the time of compiling that they did without. Starts count where the cache can be written.
    """
    from stitchcache.report.whole import cache_report

    record = cache_report(out.open_cache())
    whole = everything or out.asked("html") is not None
    out.show(record, lambda found: _print_report(found, whole), title=record["root"])


def _print_report(record: out.Record, whole: bool) -> None:
    stats, shared, starts = record["stats"], record["shared"], record["starts"]
    rate = "" if record["hit_rate"] is None else f", {100 * record['hit_rate']:.0f}% hits"
    kept = out.size_text(stats["quarantine_bytes"]) if stats["quarantine_files"] else None
    facts: out.Fields = {
        "cache": "root",
        "size": lambda _: f"{out.size_text(stats['bytes'])} in {out.count_text(stats['files'], 'file')}",
        "entries": lambda _: stats["entries"],
        "shared": lambda _: (
            f"{out.count_text(shared['blobs'], 'blob')}, saving {out.size_text(shared['saved_bytes'])}"
        ),
        "quarantine": lambda _: kept,
        "starts": lambda _: (
            f"{starts}: {record['direct_hits']} direct, {record['graph_hits']} by graph, "
            f"{record['compiled']} compiled{rate}"
            if starts
            else "none counted"
        ),
        "counted since": lambda _: out.moment_text(stats["since"]) if stats["since"] else None,
        "spent in starts": "spent_seconds",
        "saved": lambda _: (
            f"{out.seconds_text(record['saved_seconds'])} of compiling" if record["saved_seconds"] else None
        ),
    }
    out.print_facts(facts, record)
    if record["misses"]:
        out.print_heading("Why starts were no direct hits")
        out.print_pairs([(name, str(count)) for name, count in sorted(record["misses"].items())], indent="  ")
    if record["labels"]:
        out.print_heading("By model")
        columns: dict[str, Any] = {"LABEL": "label", "ENTRIES": "entries", "UNUSED": "unused"}
        columns["STARTS"] = lambda row: row["hits"] + row["compiled"] or None
        columns["HITS"] = lambda row: None if row["hit_rate"] is None else f"{100 * row['hit_rate']:.0f}%"
        columns |= {"SAVED": "saved_seconds", "OWN": "own_bytes", "LAST USED": "last_used"}
        out.print_table(columns, record["labels"])
    for title, found in (
        ("Largest entries", record["entries"]),
        ("No use noted", [entry for entry in record["entries"] if entry["used"] is False]),
    ):
        if found:
            out.print_heading(title)
            columns = {"GRAPH": "graph_hash", "LABEL": "label", "OWN": "own_bytes", "SIZE": "bytes"}
            columns |= {"COMPILED IN": "compile_seconds", "CREATED": "created", "LAST USED": "last_used"}
            digits = out.short_length(entry["graph_hash"] for entry in found)
            out.print_table(columns, found if whole else found[:_MOST], digits)
            if len(found) > _MOST and not whole:
                out.print_line(f"and {len(found) - _MOST} more; --all shows them")
