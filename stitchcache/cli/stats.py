"""``stitchcache stats``: what a cache holds, and what it did."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from stitchcache.cli.output import (
    cache_option,
    json_option,
    moment_text,
    open_cache,
    print_heading,
    print_json,
    print_pairs,
    seconds_text,
    size_text,
)

if TYPE_CHECKING:
    from stitchcache.store.stats import CacheStats

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
@json_option
@cache_option
def stats(prometheus: str | None, zero: bool, as_json: bool, root: str | None) -> None:
    """Show what a cache holds, and its hits and misses."""
    if prometheus and as_json:
        raise click.UsageError("--prometheus and --json are two formats; choose one")
    cache = open_cache(root)
    stats = cache.stats()
    if prometheus is not None:
        _write(prometheus, stats.prometheus())
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
                [(_WORDS.get(name, name), _value(name, stats.counters[name])) for name in _ordered(stats)],
                indent="  ",
            )
    if zero:
        cache.zero_stats()


def _ordered(stats: CacheStats) -> list[str]:
    """Counters' names, those that are known first, in the order of their words."""
    known = [name for name in _WORDS if name in stats.counters]
    return known + [name for name in stats.counters if name not in _WORDS]


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
