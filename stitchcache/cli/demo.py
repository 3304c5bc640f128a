"""``stitchcache demo``: one program in fresh processes: no cache, an empty one, a full one."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import click

from stitchcache import errors
from stitchcache.cli.output import (
    Record,
    open_cache,
    print_pairs,
    print_table,
    seconds_text,
    shared_options,
    show,
    size_text,
)
from stitchcache.cli.prewarm import Display, progress_display

# Float32 sums in another order; far above what a right piece shows, far below what a wrong one does.
TOLERANCE = 1e-4
_NAME = "decoder"


@click.command()
@click.option("--layers", type=click.IntRange(1, 256), default=4, show_default=True, help="Blocks.")
@click.option("--width", type=click.IntRange(8, 4096), default=64, show_default=True, help="Of a layer.")
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
@shared_options
def demo(backend: str, runs: int, as_json: bool, root: str | None, **config: int) -> None:
    """Compile a small decoder, start it again in fresh processes, and compare.

    Without --cache it uses a new cache in the directory for temporary files, so that cold is cold; the cache
    is left there to be looked at. All rows are whole processes that do the same but for where the compiled
    model comes from.
    """
    if config["width"] % config["heads"]:
        raise click.UsageError(f"--width {config['width']} is not a multiple of --heads {config['heads']}")
    cache = open_cache(root if root is not None else tempfile.mkdtemp(prefix="stitchcache-demo-"))
    job: Record = {"config": config, "backend": backend, "cache": str(cache.root)}
    with progress_display() as shown:
        # Files that no process has read for a while cost the first one extra, whichever it is: not measured.
        run_child(job, "eager", shown, "a first process, not measured")
        cold = run_child(job, "cached", shown, "cold: an empty cache")
        eager, warm = [], []
        for index in range(runs):
            # Taken in turn, so that what else the machine does falls on both.
            step = f"eager and warm, fresh processes {index + 1} of {runs}"
            eager.append(run_child(job, "eager", shown, step))
            warm.append(run_child(job, "cached", shown, step))
        shown.finish(_NAME, "measured", cold["process_seconds"])
    stats = cache.stats()
    record = {
        "root": str(cache.root),
        "config": config,
        "backend": backend,
        # A cache that was named may hold it already; then the first start is no cold one.
        "rows": [_row("eager", eager), _row("first" if cold["hit"] else "cold", [cold]), _row("warm", warm)],
        "difference": max(run["difference"] for run in [cold, *warm]),
        "hits": [run["hit"] for run in warm],
        "compilers": sorted({name for run in warm for name in run["compilers"]}),
        **{name: cold[name] for name in ("graph_hash", "pieces", "distinct")},
        "bytes": stats.bytes,
        "files": stats.files,
    }
    wrong = record["difference"] > TOLERANCE or set(record["hits"]) != {"direct"}
    show(record, as_json, _print_demo, finding=wrong)


def run_child(job: Record, mode: str, shown: Display, step: str) -> Record:
    """Do a job of ``stitchcache.demo.child`` in a fresh process, and return what it measured.

    Raises:
        StitchCacheError: What stopped the child.
    """
    shown.update(_NAME, step)
    last: Record = {}
    with tempfile.TemporaryFile("w+") as said:
        words = json.dumps({**job, "mode": mode, "spawned": time.time()})
        command = [sys.executable, "-m", "stitchcache.demo.child", words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            for line in process.stdout or ():
                last = json.loads(line)
                progress = last.get("progress", {"stage": "done"})
                if progress["stage"] != "done":
                    shown.update(
                        _NAME, progress["stage"], progress["done"], progress["total"], progress["left"]
                    )
        if "error" in last:
            raise getattr(errors, last["error"]["type"])(last["error"]["message"])
        if "result" not in last:
            said.seek(0)
            raise errors.StitchCacheError(
                f"the demo's process ended with status {process.returncode} and no result; it said:\n"
                f"{said.read()[-4000:]}"
            )
    result: Record = last["result"]
    return result


def _row(name: str, runs: Sequence[Record]) -> Record:
    times = ("process_seconds", "model_seconds", "call_microseconds")
    stages = runs[0]["stages"]
    return {
        "name": name,
        **{time: statistics.median(run[time] for run in runs) for time in times},
        "stages": {stage: statistics.median(run["stages"][stage] for run in runs) for stage in stages},
        "runs": len(runs),
    }


def _print_demo(record: Record) -> None:
    rows = [
        [
            row["name"],
            f"{row['process_seconds']:.2f} s",
            seconds_text(row["model_seconds"]),
            f"{row['call_microseconds']:.0f} us",
            row["runs"],
        ]
        for row in record["rows"]
    ]
    print_table(("", "PROCESS TO FIRST OUTPUT", "MODEL TO FIRST OUTPUT", "ONE CALL", "RUNS"), rows)
    click.echo("")
    hits = ", ".join(hit or "compiled" for hit in dict.fromkeys(record["hits"]))
    stages = record["rows"][-1]["stages"].items()
    print_pairs(
        [
            ("largest difference from eager", f"{record['difference']:.1e}"),
            ("pieces", f"{record['pieces']} calls of {record['distinct']} different ones"),
            ("on disk", f"{size_text(record['bytes'])} in {record['files']} files"),
            ("graph hash", record["graph_hash"]),
            ("warm starts were", f"{hits} hits" if hits in ("direct", "graph") else hits),
            ("a warm start in stages", ", ".join(f"{name} {seconds_text(took)}" for name, took in stages)),
            ("compilers imported by a warm start", ", ".join(record["compilers"]) or "none"),
        ]
    )
    place, graph = shlex.quote(record["root"]), record["graph_hash"][:12]
    click.echo("\nLook further:")
    for words in ("ls", f"inspect {graph}", f"inspect {graph} --code"):
        click.echo(f"  stitchcache {words} --cache {place}")
