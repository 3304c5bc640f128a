"""``stitchcache prewarm``: compile targets ahead of time."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli.output import (
    Column,
    cache_option,
    finding,
    json_option,
    open_cache,
    print_json,
    print_table,
    printable,
    seconds_text,
    size_text,
)
from stitchcache.cli.progress import Display

if TYPE_CHECKING:
    from stitchcache.api.prewarm import PrewarmResult
    from stitchcache.api.target import Target
    from stitchcache.cache import Cache
    from stitchcache.pipeline.request import Progress

_STATUS = {"direct": "hit direct", "graph": "hit graph"}
_COLUMNS = (
    Column("TARGET", flexible=True),
    Column("STATUS"),
    Column("GRAPH"),
    Column("CALLS", right=True),
    Column("DIFFERENT", right=True),
    Column("SIZE", right=True),
    Column("TIME", right=True),
)


@click.command()
@click.argument("references", metavar="REF...", nargs=-1, required=True)
@click.option("--jobs", type=click.IntRange(min=1), help="Pieces to compile at a time.  [default: all cores]")
@click.option("--require", is_flag=True, help="Compile nothing: a target that is not in the cache fails.")
@click.option("--fake", is_flag=True, help="Build models without weights: nothing is loaded or allocated.")
@click.option("-v", "--verbose", is_flag=True, help="Say why each target was a hit or a miss.")
@json_option
@cache_option
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
    targets = _find(references)
    with Display() as shown:
        results = [_prewarm(target, jobs, require, fake, cache, shown) for target in targets]
    if as_json:
        print_json({"root": str(cache.root), "targets": [_record(result) for result in results]})
    else:
        print_table(_COLUMNS, [_row(result) for result in results])
        _print_errors(results)
    if any(result.error is not None for result in results):
        finding()


def _find(references: tuple[str, ...]) -> list[Target]:
    from stitchcache.api.target import check_names, find_targets

    targets = [target for reference in references for target in find_targets(reference)]
    check_names(targets)
    return targets


def _prewarm(
    target: Target, jobs: int | None, require: bool, fake: bool, cache: Cache, shown: Display
) -> PrewarmResult:
    from stitchcache.api import prewarm as api

    def on_progress(progress: Progress) -> None:
        if progress.stage != "done":
            shown.update(target.name, progress.stage, progress.done, progress.total, progress.left)

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
    return result


def _row(result: PrewarmResult) -> list[str]:
    if result.error is not None:
        return [result.name, result.status, "-", "-", "-", "-", seconds_text(result.seconds)]
    return [
        result.name,
        _STATUS.get(result.status, result.status),
        result.graph_hash[:12],
        str(result.pieces),
        str(result.distinct),
        size_text(result.blob_bytes),
        seconds_text(result.seconds),
    ]


def _print_errors(results: list[PrewarmResult]) -> None:
    for result in results:
        if result.error is not None:
            lines = "\n".join(printable(line) for line in result.error.message.splitlines())
            click.echo(f"{printable(result.name)}: {lines}", err=True)


def _record(result: PrewarmResult) -> dict[str, Any]:
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
