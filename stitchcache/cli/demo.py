"""``stitchcache demo``: one program in fresh processes: no cache, an empty one, a full one."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

import click

from stitchcache.cli import output as out

# Float32 sums in another order; far above what a right piece shows, far below what a wrong one does.
TOLERANCE = 1e-4
_HEADS = 4


@click.command()
@click.option("--layers", type=click.IntRange(1, 256), default=4, show_default=True, help="Blocks.")
@click.option("--width", type=click.IntRange(8, 4096), default=64, show_default=True, help="A multiple of 4.")
@click.option(
    "--backend",
    type=click.Choice(["aoti", "inductor", "eager"]),
    default="aoti",
    show_default=True,
    help="What compiles the pieces.",
)
@click.option("--runs", type=click.IntRange(1, 99), default=3, show_default=True, help="Processes a row.")
@out.shared_options
def demo(backend: str, runs: int, **config: int) -> None:
    """Compile a small decoder, start it again in fresh processes, and compare.

    Without --cache it uses a new cache in the directory for temporary files, so that cold is cold; the cache
    is left there to be looked at. All rows are whole processes that do the same but for where the compiled
    model comes from.
    """
    if config["width"] % _HEADS:
        raise click.UsageError(f"--width {config['width']} is no multiple of {_HEADS}, the number of heads")
    named = out.asked("cache") is not None
    cache = out.open_cache(None if named else tempfile.mkdtemp(prefix="stitchcache-demo-"))
    config |= {"heads": _HEADS, "vocabulary": 128}
    job: out.Record = {"config": config, "backend": backend, "cache": cache.paths[0]}
    # Files that no process has read for a while cost the first one extra, whichever it is: not measured.
    run_child(job, "eager", "a first process, not measured")
    cold = run_child(job, "cached", "cold: an empty cache", progress=True)
    eager, warm = [], []
    for index in range(runs):
        # Taken in turn, so that what else the machine does falls on both.
        eager.append(run_child(job, "eager", f"eager, fresh process {index + 1} of {runs}"))
        warm.append(run_child(job, "cached", f"warm, fresh process {index + 1} of {runs}"))
    stats = cache.stats()
    record = {
        "root": cache.paths[0],
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
    out.show(record, _print_demo, finding=wrong)


def run_child(job: out.Record, mode: str, step: str, *, progress: bool = False) -> out.Record:
    """Do a job of ``stitchcache.demo.child`` in a fresh process, which says itself what stops it."""
    out.say(f"decoder: {step}")
    words = json.dumps({**job, "mode": mode, "progress": progress, "spawned": time.time()})
    command = [sys.executable, "-m", "stitchcache.demo.child", words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise click.exceptions.Exit(1)
    result: out.Record = json.loads(done.stdout)
    return result


def _row(name: str, runs: list[out.Record]) -> out.Record:
    times = ("process_seconds", "model_seconds", "call_microseconds")
    row: out.Record = {"name": name, "runs": len(runs)}
    row |= {what: statistics.median(run[what] for run in runs) for what in times}
    row["stages"] = runs[-1].get("stages", {})
    return row


def _print_demo(record: out.Record) -> None:
    columns: out.Fields = {
        "": "name",
        "PROCESS TO FIRST OUTPUT": "process_seconds",
        "MODEL TO FIRST OUTPUT": "model_seconds",
        "ONE CALL": lambda row: f"{row['call_microseconds']:.0f} us",
        "RUNS": "runs",
    }
    out.print_table(columns, record["rows"])
    click.echo("")
    hits = ", ".join(hit or "compiled" for hit in dict.fromkeys(record["hits"]))
    stages = record["rows"][-1]["stages"].items()
    facts: out.Fields = {
        "largest difference from eager": lambda _: f"{record['difference']:.1e}",
        "pieces": lambda _: f"{record['pieces']} calls of {record['distinct']} different ones",
        "on disk": lambda _: f"{out.size_text(record['bytes'])} in {record['files']} files",
        "graph hash": "graph_hash",
        "warm starts were": lambda _: f"{hits} hits" if hits in ("direct", "graph") else hits,
        "a warm start in stages": lambda _: [f"{name} {out.seconds_text(took)}" for name, took in stages],
        "compilers imported by a warm start": lambda _: record["compilers"] or "none",
    }
    out.print_facts(facts, record)
    place, graph = shlex.quote(record["root"]), record["graph_hash"][:12]
    click.echo("\nLook further:")
    for words in ("ls", f"inspect {graph}", f"inspect {graph} --code"):
        click.echo(f"  stitchcache {words} --cache {place}")
