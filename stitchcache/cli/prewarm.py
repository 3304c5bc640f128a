"""``stitchcache prewarm``: compile targets ahead of time."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli import output as out

if TYPE_CHECKING:
    from stitchcache.api.prewarm import PrewarmResult

_STATUS = {"direct": "hit direct", "graph": "hit graph"}


def _shard(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    index, slash, count = value.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise click.BadParameter(f"{value!r}: write I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


@click.command()
@click.argument("references", metavar="REF...", nargs=-1, required=True)
@click.option("--jobs", type=click.IntRange(min=1), help="Pieces to compile at a time.  [default: all cores]")
@click.option("--require", is_flag=True, help="Compile nothing: a target that is not in the cache fails.")
@click.option("--fake", is_flag=True, help="Build models without weights: nothing is loaded or allocated.")
@click.option("--shard", callback=_shard, metavar="I/N", help="Compile pieces of shard I of N; I from 0.")
@click.option("--keep-sources", is_flag=True, help="Keep the C++ or Triton of pieces for inspect --source.")
@click.option("-v", "--verbose", is_flag=True, help="Say why each target was a hit or a miss.")
@out.shared_options
def prewarm(references: tuple[str, ...], require: bool, verbose: bool, **how: Any) -> None:
    """Compile targets that are not in the cache yet.

    REF is 'pkg.module:name' or 'path/to/file.py:name', where name is a stitchcache.Target, a list of them, or
    a function that returns either. A target that fails does not stop the others; exit status 1 says that one
    did, or that one is not stored.

    With --shard each of N processes compiles pieces that no other does. Then the same command without
    --shard, in a cache that has the pieces of all, stores the entries.
    """
    cache = out.open_cache(remote=None)
    if verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("stitchcache").setLevel(logging.INFO)
    from stitchcache.api import prewarm as api
    from stitchcache.api.prewarm import check_names, find_targets, looked_up
    from stitchcache.api.progress import bar
    from stitchcache.pipeline.find import Progress
    from stitchcache.store.sources import unkept

    targets = [target for reference in references for target in find_targets(reference)]
    check_names(targets)
    how["on_miss"] = "error" if require else "compile"
    found = []
    with bar() as told:
        for target in targets:
            told(Progress(target=target.name, stage="build"))
            (result,) = api.prewarm(target, cache=cache, on_progress=told, **how).results
            status = _STATUS.get(result.status, result.status)
            told(Progress(target=target.name, stage=f"{status} in {out.seconds_text(result.seconds)}"))
            found.append(result)
    records = [_record(result) for result in looked_up(found, cache)]
    stored = [each["graph_hash"] for each in records if how["keep_sources"] and each["stored"]]
    for artifact in map(cache.get, stored):
        if artifact is not None and unkept(artifact, cache):
            short = artifact.graph_hash[:12]
            out.say(f"{artifact.label}: compiled before without its source; 'stitchcache rm {short}' first")
    failed = any(target["error"] is not None for target in records)
    out.show({"root": cache.paths[0], "targets": records}, _print_targets, finding=failed)


def _record(result: PrewarmResult) -> out.Record:
    record = {field.name: getattr(result, field.name) for field in fields(result)}
    record["timings"] = dict(result.timings or {})
    if result.error is not None:
        record["error"] = {"type": type(result.error).__name__, "message": result.error.message}
    return record


def _print_targets(record: out.Record) -> None:
    columns: out.Fields = {
        "TARGET": "name",
        "STATUS": lambda one: _STATUS.get(one["status"], one["status"]),
        "STORED": "stored",
        "GRAPH": "graph_hash",
        "CALLS": "pieces",
        "DIFFERENT": "distinct",
        "SIZE": "blob_bytes",
        "TIME": "seconds",
    }
    out.print_table(columns, record["targets"])
    for found in record["targets"]:
        if found["error"] is not None:
            out.say(f"{found['name']}: {found['error']['message']}")
