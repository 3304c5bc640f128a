"""``stitchcache demo``: a small decoder, compiled once and started warm."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli.output import (
    Column,
    cache_option,
    finding,
    json_option,
    open_cache,
    print_json,
    print_pairs,
    print_table,
    seconds_text,
    size_text,
)
from stitchcache.cli.progress import Display

if TYPE_CHECKING:
    from stitchcache.demo.run import DemoReport
    from stitchcache.store.stats import CacheStats

# Float32 sums in another order; far above what a right piece shows, far below what a wrong one does.
TOLERANCE = 1e-4
_NAME = "decoder"


@click.command()
@click.option("--layers", type=click.IntRange(1, 256), default=4, show_default=True, help="Blocks.")
@click.option(
    "--width", type=click.IntRange(8, 4096), default=64, show_default=True, help="Width of a layer."
)
@click.option("--heads", type=click.IntRange(1, 64), default=4, show_default=True, help="Attention heads.")
@click.option("--vocabulary", type=click.IntRange(2, 1 << 20), default=128, show_default=True, help="Tokens.")
@click.option(
    "--backend",
    type=click.Choice(["aoti", "inductor", "eager"]),
    default="aoti",
    show_default=True,
    help="What compiles the pieces.",
)
@click.option("--runs", type=click.IntRange(1, 99), default=3, show_default=True, help="Processes a row.")
@json_option
@cache_option
def demo(
    layers: int,
    width: int,
    heads: int,
    vocabulary: int,
    backend: str,
    runs: int,
    as_json: bool,
    root: str | None,
) -> None:
    """Compile a small decoder, start it again in fresh processes, and compare.

    Without --cache it uses a new cache in the directory for temporary files, so that cold is cold; the cache
    is left there to be looked at. All rows are whole processes that do the same but for where the compiled
    model comes from.
    """
    if width % heads:
        raise click.UsageError(f"--width {width} is not a multiple of --heads {heads}")
    from stitchcache.demo.run import run_demo

    cache = open_cache(root if root is not None else tempfile.mkdtemp(prefix="stitchcache-demo-"))
    config = {"layers": layers, "width": width, "heads": heads, "vocabulary": vocabulary}
    with Display() as shown:

        def on_progress(progress: dict[str, Any]) -> None:
            if progress["stage"] != "done":
                shown.update(_NAME, progress["stage"], progress["done"], progress["total"], progress["left"])

        report = run_demo(
            config, backend, str(cache.root), runs, lambda step: shown.update(_NAME, step), on_progress
        )
        shown.finish(_NAME, "measured", report.rows[1].process_seconds)
    stats = cache.stats()
    if as_json:
        print_json({"root": str(cache.root), "config": config, "backend": backend, **_record(report, stats)})
    else:
        _print(report, stats, str(cache.root))
    if report.difference > TOLERANCE or set(report.hits) != {"direct"}:
        finding()


def _record(report: DemoReport, stats: CacheStats) -> dict[str, Any]:
    return {**asdict(report), "bytes": stats.bytes, "files": stats.files}


def _print(report: DemoReport, stats: CacheStats, root: str) -> None:
    columns = (
        Column(""),
        Column("PROCESS TO FIRST OUTPUT", right=True),
        Column("MODEL TO FIRST OUTPUT", right=True),
        Column("ONE CALL", right=True),
        Column("RUNS", right=True),
    )
    rows = [
        [
            row.name,
            f"{row.process_seconds:.2f} s",
            seconds_text(row.model_seconds),
            f"{row.call_microseconds:.0f} us",
            str(row.runs),
        ]
        for row in report.rows
    ]
    print_table(columns, rows)
    click.echo("")
    hits = ", ".join(hit or "compiled" for hit in dict.fromkeys(report.hits))
    stages = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in report.rows[-1].stages.items())
    print_pairs(
        [
            ("largest difference from eager", f"{report.difference:.1e}"),
            ("pieces", f"{report.pieces} calls of {report.distinct} different ones"),
            ("on disk", f"{size_text(stats.bytes)} in {stats.files} files"),
            ("graph hash", report.graph_hash),
            ("warm starts were", f"{hits} hits" if hits in ("direct", "graph") else hits),
            ("a warm start in stages", stages),
            ("compilers imported by a warm start", ", ".join(report.compilers) or "none"),
        ]
    )
    place = shlex.quote(root)
    click.echo("\nLook further:")
    click.echo(f"  stitchcache ls --cache {place}")
    click.echo(f"  stitchcache inspect {report.graph_hash[:12]} --cache {place}")
    click.echo(f"  stitchcache inspect {report.graph_hash[:12]} --code --cache {place}")
