"""``stitchcache stats``: what a cache holds, and what it did."""

from __future__ import annotations

from dataclasses import asdict

import click

from stitchcache.cli.options import cache_option, json_option, open_cache
from stitchcache.cli.output import print_heading, print_json, print_pairs
from stitchcache.cli.words import moment_text, seconds_text, size_text


@click.command()
@click.option("--prometheus", is_flag=True, help="Print Prometheus' text format.")
@click.option("--zero", is_flag=True, help="Print, and then forget what was counted.")
@json_option
@cache_option
def command(prometheus: bool, zero: bool, as_json: bool, root: str | None) -> None:
    """Show what a cache holds, and its hits and misses."""
    if prometheus and as_json:
        raise click.UsageError("--prometheus and --json are two formats; choose one")
    cache = open_cache(root)
    stats = cache.stats()
    if prometheus:
        click.echo(stats.prometheus(), nl=False)
    elif as_json:
        print_json({"root": str(cache.root), **asdict(stats)})
    else:
        held = [
            ("cache", str(cache.root)),
            ("entries", str(stats.entries)),
            ("blobs", str(stats.blobs)),
            ("targets", str(stats.targets)),
            ("pieces", str(stats.pieces)),
            ("files", str(stats.files)),
            ("size", size_text(stats.bytes)),
        ]
        if stats.quarantine_files:
            held.append(
                ("quarantine", f"{stats.quarantine_files} files, {size_text(stats.quarantine_bytes)}")
            )
        print_pairs(held)
        if stats.counters:
            print_heading(f"Counted since {moment_text(stats.since)}")
            print_pairs(
                [(name, _value(name, number)) for name, number in stats.counters.items()], indent="  "
            )
    if zero:
        cache.zero_stats()


def _value(name: str, number: int) -> str:
    if name.startswith("microseconds."):
        return seconds_text(number / 1e6)
    return size_text(number) if name.endswith(".bytes") else str(number)
