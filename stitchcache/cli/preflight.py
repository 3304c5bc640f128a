"""``stitchcache machine`` and ``check``: will it hit there?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from stitchcache.cli import output as out
from stitchcache.errors import StitchCacheError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stitchcache.report.preflight import Machine

_DIFFERENCES = {"FACTOR": "name", "ENTRY": "old", "MACHINE": "new"}


@click.command()
def machine() -> None:
    """Print what keys know of this machine, as JSON for 'check --machine'.

    Run it where models will start, in the same image, on the same kind of node: stitchcache machine >
    node.json. There is no host, user, path or address in it.
    """
    from stitchcache.report.preflight import machine_record

    click.echo(json.dumps({"schema": out.JSON_SCHEMA, **machine_record()}, indent=1))


@click.command()
@click.argument("source", required=False, type=click.Path())
@click.option("--machine", "node", type=click.Path(), required=True, help="What 'machine' printed there.")
@click.option(
    "--target", "target", metavar="TARGET", help="Check the direct hit of such targets; imports torch."
)
@out.shared_options
def check(source: str | None, node: str, target: str | None) -> None:
    """Say for each entry whether it will hit on another machine, and which factor stands in the way.

    SOURCE is a cache's directory or a bundle.  [default: the cache]

    TARGET is 'pkg.module:name' or 'path/to/file.py:name', as for prewarm. Without it neither torch nor a GPU
    nor the model is needed. Exit status 1 says that something will not hit there.
    """
    from stitchcache.report.preflight import preflight, read_machine

    place, there = out.one_place("SOURCE", source), read_machine(node)
    if target is not None:
        found = list(_check_targets(target, there, place))
    else:
        found = preflight(source or out.open_cache(read_only=True, exists=True), there)
    missed = sum(not each["hit"] for each in found)
    kind, view = ("entries", _print_entries) if target is None else ("targets", _print_targets)
    out.show({kind: found, "missed": missed}, view, finding=missed > 0 or not found)


def _check_targets(reference: str, there: Machine, root: str | None) -> Iterator[out.Record]:
    from stitchcache.api.prewarm import find_targets
    from stitchcache.report.preflight import check_target

    cache = out.open_cache(root, read_only=True, exists=True)
    for each in find_targets(reference):
        try:
            yield check_target(each, cache, there)
        except StitchCacheError as error:
            # Like one that cannot be prewarmed, it does not stop the others.
            found: out.Record = {"name": each.name, "hit": False, "reason": error.message}
            yield {**found, "graph_hash": None, "nearest": []}


def _print_entries(record: out.Record) -> None:
    columns: out.Fields = {
        "ENTRY": lambda found: found["graph_hash"][:12],
        "LABEL": "label",
        "THERE": lambda found: "hit" if found["hit"] else "miss",
        "IN THE WAY": lambda found: [each["name"] for each in found["differences"]] or None,
        "SET BY THE PROGRAM": lambda found: [each["name"] for each in found["settings"]] or None,
    }
    out.print_table(columns, record["entries"])
    # Each once: most entries of a cache have the same.
    every = [each for found in record["entries"] for each in (*found["differences"], *found["settings"])]
    if every:
        out.print_heading("Differences")
        out.print_table(_DIFFERENCES, {tuple(each.values()): each for each in every}.values())
    count, verdict = out.count_text(len(record["entries"]), "entry"), "all hit there"
    if record["missed"] or not record["entries"]:
        verdict = f"{record['missed']} will not hit there" if record["entries"] else "nothing will hit there"
    out.say(f"{count}, {verdict}")


def _print_targets(record: out.Record) -> None:
    columns: out.Fields = {
        "TARGET": "name",
        "THERE": lambda found: "direct hit" if found["hit"] else "miss",
        "ENTRY": lambda found: (found["graph_hash"] or "")[:12] or None,
        "REASON": "reason",
    }
    out.print_table(columns, record["targets"])
    for found in record["targets"]:
        for near in found["nearest"][:1]:
            out.print_heading(f"{found['name']}: near is {near['graph_hash'][:12]}")
            out.print_table(_DIFFERENCES, near["differences"])
