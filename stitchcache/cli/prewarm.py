"""``stitchcache prewarm``: compile targets ahead of time; and how far compilations have come."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from stitchcache.cli.output import (
    Record,
    left_text,
    open_cache,
    print_table,
    say,
    seconds_text,
    shared_options,
    show,
    size_text,
)
from stitchcache.explanation import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Live
    from rich.progress import TaskID

    from stitchcache.api.prewarm import PrewarmResult
    from stitchcache.pipeline.find import Progress

_STATUS = {"direct": "hit direct", "graph": "hit graph"}


@click.command()
@click.argument("references", metavar="REF...", nargs=-1, required=True)
@click.option("--jobs", type=click.IntRange(min=1), help="Pieces to compile at a time.  [default: all cores]")
@click.option("--require", is_flag=True, help="Compile nothing: a target that is not in the cache fails.")
@click.option("--fake", is_flag=True, help="Build models without weights: nothing is loaded or allocated.")
@click.option("-v", "--verbose", is_flag=True, help="Say why each target was a hit or a miss.")
@shared_options
def prewarm(
    references: tuple[str, ...],
    jobs: int | None,
    require: bool,
    fake: bool,
    verbose: bool,
    as_json: bool,
    root: str | None,
) -> None:
    """Compile targets that are not in the cache yet.

    REF is 'pkg.module:name' or 'path/to/file.py:name', where name is a stitchcache.Target, a list of them, or
    a function that returns either. A target that fails does not stop the others; exit status 1 says that one
    did.
    """
    cache = open_cache(root)
    if verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("stitchcache").setLevel(logging.INFO)
    # Not at the top: it imports torch, and the help page answers without it.
    from stitchcache.api import prewarm as api
    from stitchcache.api.prewarm import check_names, find_targets

    targets = [target for reference in references for target in find_targets(reference)]
    check_names(targets)
    found = []
    with progress_display() as shown:
        for target in targets:

            def on_progress(progress: Progress, name: str = target.name) -> None:
                if progress.stage != "done":
                    shown.update(name, progress.stage, progress.done, progress.total, progress.left)

            shown.update(target.name, "build")
            (result,) = api.prewarm(
                target,
                jobs=jobs,
                cache=cache,
                on_miss="error" if require else "compile",
                on_progress=on_progress,
                fake=fake,
            ).results
            shown.finish(target.name, _STATUS.get(result.status, result.status), result.seconds)
            found.append(_record(result))
    failed = any(target["error"] is not None for target in found)
    show({"root": str(cache.root), "targets": found}, as_json, _print_targets, finding=failed)


def _record(result: PrewarmResult) -> Record:
    error = result.error
    return {
        "name": result.name,
        "status": result.status,
        "graph_hash": result.graph_hash,
        "pieces": result.pieces,
        "distinct": result.distinct,
        "blob_bytes": result.blob_bytes,
        "seconds": result.seconds,
        "timings": dict(result.timings or {}),
        "error": None if error is None else {"type": type(error).__name__, "message": error.message},
    }


def _print_targets(record: Record) -> None:
    rows = []
    for found in record["targets"]:
        facts = ["-"] * 4
        if found["error"] is None:
            calls, distinct = str(found["pieces"]), str(found["distinct"])
            facts = [found["graph_hash"][:12], calls, distinct, size_text(found["blob_bytes"])]
        status = _STATUS.get(found["status"], found["status"])
        rows.append([found["name"], status, *facts, seconds_text(found["seconds"])])
    print_table(("TARGET", "STATUS", "GRAPH", "CALLS", "DIFFERENT", "SIZE", "TIME"), rows)
    for found in record["targets"]:
        if found["error"] is not None:
            say(f"{found['name']}: {found['error']['message']}")


# -- progress --------------------------------------------------------------------------------------


class Display:
    """Says on stderr how far compilations have come: live lines on a terminal, plain ones elsewhere.

    Args:
        live: What redraws a terminal's lines; ``None`` elsewhere.
    """

    def __init__(self, live: Live | None) -> None:
        self._live = live
        self._tasks: dict[str, TaskID] = {}
        self._last = ""

    def update(self, name: str, stage: str, done: int = 0, total: int = 0, left: float | None = None) -> None:
        """Say where a target is, and how many seconds it will still take if anybody knows."""
        about = [] if left is None else [left_text(left)]
        if self._live is not None:
            count = ", ".join([f"{done}/{total} pieces", *about]) if total else ""
            self._draw(self._live, name, stage, count, done, total or None)
            return
        line = f"{name}: {stage}" + (f" {done}/{total}" if total else "")
        # A log has one line for each change of stage or count, whatever the estimate says meanwhile.
        if line != self._last:
            say(", ".join([line, *about]))
            self._last = line

    def finish(self, name: str, status: str, seconds: float) -> None:
        """Say what became of a target; its clock stops."""
        if self._live is None:
            say(f"{name}: {status} in {seconds_text(seconds)}")
        else:
            self._live.stop_task(self._draw(self._live, name, status, "", 1, 1))

    def _draw(self, live: Live, name: str, stage: str, count: str, done: int, total: int | None) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = live.add_task(printable(name), total=None, stage="", count="")
        live.update(self._tasks[name], stage=stage, count=count, completed=done, total=total)
        return self._tasks[name]


@contextmanager
def progress_display() -> Iterator[Display]:
    """Shows one line a target; a terminal's lines are redrawn in place by rich."""
    if not sys.stderr.isatty():
        yield Display(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    # Names are foreign text: no markup in any column.
    with Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[stage]}", markup=False),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
    ) as live:
        yield Display(live)
