"""``stitchcache explain``: why a start is warm or cold, and what a key stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from stitchcache.cli.output import (
    Record,
    age_text,
    count_text,
    moment_text,
    open_cache,
    print_differences,
    print_heading,
    print_pairs,
    print_table,
    say,
    seconds_text,
    shared_options,
    show,
)
from stitchcache.errors import StitchCacheError

if TYPE_CHECKING:
    from stitchcache.cache import Cache

_MOST = 12
# What a person asked for, as against what the machine and torch are.
_ASKED = ("options.", "user.", "input.", "model.class")
_VERDICTS = {"direct": "direct hit", "miss": "miss", "off": "direct lookup is off"}


@click.command()
@click.argument("what", metavar="TARGET|KEY")
@click.option("--trace", is_flag=True, help="Trace the target too, and look its graph up.")
@click.option("--factors", is_flag=True, help="Show all factors, and all that differ.")
@shared_options
def explain(what: str, trace: bool, factors: bool, as_json: bool, root: str | None) -> None:
    """Say why a start is warm or cold, or what a key stands for.

    TARGET is 'pkg.module:name' or 'path/to/file.py:name', as for prewarm: its model is built and looked up,
    and nothing is loaded, stored or counted. KEY is the beginning of a graph hash or of a target key; torch
    is not imported for it.

    Exit status 1 says that a target is no direct hit, or that there is no such key.
    """
    if ":" in what:
        # Read-only: what is looked at stays as it is, damaged files included.
        record = _targets(what, trace, open_cache(root, read_only=True))
        cold = any(target["verdict"] != "direct" for target in record["targets"])
        show(
            record,
            as_json,
            lambda found: _print_targets(found, factors),
            finding=cold or bool(record["failed"]),
        )
        return
    from stitchcache.report.entry import explain_key, is_prefix

    if not is_prefix(what):
        raise click.UsageError(
            f"{what!r} is neither a target, 'pkg.module:name' or 'path/to/file.py:name', nor the beginning "
            "of a key: 1 to 64 hex digits"
        )
    if trace:
        raise click.UsageError("--trace needs a target; a key alone says nothing that could be traced")
    record = explain_key(open_cache(root), what)
    show(record, as_json, lambda found: _print_key(found, factors), finding=bool(record["problem"]))


def _targets(reference: str, trace: bool, cache: Cache) -> Record:
    # Not at the top: they import torch, which a key does without.
    from stitchcache.api.prewarm import find_targets
    from stitchcache.report.target import explain_target

    reports, failed = [], []
    for target in find_targets(reference):
        try:
            reports.append(explain_target(target, cache, trace=trace))
        except StitchCacheError as error:
            # Like one that cannot be prewarmed, it does not stop the others.
            failed.append({"name": target.name, "type": type(error).__name__, "message": error.message})
    return {"root": str(cache.root), "targets": reports, "failed": failed}


def _print_targets(record: Record, everything: bool) -> None:
    for index, target in enumerate(record["targets"]):
        if index:
            click.echo("")
        _print_target(target, everything, record["root"])
    for failed in record["failed"]:
        say(f"{failed['name']}: {failed['message']}")


def _print_target(target: Record, everything: bool, root: str) -> None:
    looked_up = sum(target["seconds"].get(stage, 0.0) for stage in ("key", "sources"))
    print_pairs(
        [
            ("target", target["name"]),
            ("verdict", _VERDICTS[target["verdict"]]),
            *([("reason", target["reason"])] if target["reason"] else []),
            ("target key", target["target_key"] or "none"),
            ("graph hash", target["graph_hash"] or "unknown without tracing"),
            ("looked up in", seconds_text(looked_up)),
            ("cache", root),
        ]
    )
    if target["changed"]:
        print_heading("Changed sources")
        rows = [[file["path"], file["old"][:12], file["new"][:12]] for file in target["changed"]]
        print_table(("FILE", "WHEN CAPTURED", "NOW"), rows)
    _print_nearest(target["nearest"], everything, "NOW")
    trace = target["trace"]
    if trace is not None:
        print_heading("Traced")
        refused, compared = trace["refused"], trace["compared"]
        print_pairs(
            [
                ("graph hash", trace["graph_hash"]),
                ("in the cache", "yes" if trace["cached"] else "no"),
                *([("direct lookup", f"off: {refused}")] if refused is not None else []),
                *([("compared with", compared[:12])] if compared is not None else []),
            ],
            indent="  ",
        )
        if trace["differences"]:
            print_differences(trace["differences"], ("FACTOR", "THERE", "NOW"))
    _print_factors(target["factors"], everything)


def _print_key(record: Record, everything: bool) -> None:
    print_pairs(
        [
            *([("target key", record["key"])] if record["kind"] == "target" else []),
            ("graph hash", record["graph_hash"]),
            *(
                [("entry", record["problem"])]
                if record["problem"]
                else [
                    ("label", record["label"] or "-"),
                    ("created", moment_text(record["created"])),
                    ("file", record["path"]),
                ]
            ),
        ]
    )
    if record["targets"]:
        print_heading("Targets that lead here")
        rows = [
            [
                target["target_key"][:12],
                target["label"] or "-",
                age_text(target["created"]),
                "yes" if target["refused"] is None else f"no: {target['refused']}",
            ]
            for target in record["targets"]
        ]
        print_table(("KEY", "LABEL", "CREATED", "SERVED DIRECTLY"), rows)
        newest = record["targets"][0]
        print_heading(f"What the capture of {newest['target_key'][:12]} read")
        sources = [[found["module"], found["bytes"], found["digest"][:12]] for found in newest["sources"]]
        print_table(("MODULE", "BYTES", "DIGEST"), sources)
        click.echo(f"and {count_text(len(newest['globals']), 'global')} and environment variables")
    else:
        click.echo("\nNo target leads here: it is found by tracing, or by its graph hash.")
    _print_nearest(record["nearest"], everything, "HERE")
    _print_factors(record["factors"], everything)


def _print_nearest(nearest: Sequence[Record], everything: bool, here: str) -> None:
    for entry in nearest:
        differences = entry["differences"]
        # What all differs in a model of another class helps nobody.
        other = not everything and any(found["name"] == "model.class" for found in differences)
        count = f"{count_text(len(differences), 'factor')} differ{'s' if len(differences) == 1 else ''}"
        label = f"{entry['label'] or '-'} {entry['graph_hash'][:12]}"
        print_heading(f"Near: {label}, {age_text(entry['created'])}, {'another class' if other else count}")
        if differences and not other:
            shown = differences if everything else differences[:_MOST]
            print_differences(shown, ("FACTOR", "THERE", here))
            _print_rest(differences, shown)


def _print_factors(factors: Sequence[Record], everything: bool) -> None:
    shown = factors if everything else [f for f in factors if f["name"].startswith(_ASKED)]
    print_heading("Factors")
    if shown:
        print_table(("FACTOR", "VALUE"), [[factor["name"], factor["value"]] for factor in shown])
    elif not factors:
        click.echo("none recorded")
    _print_rest(factors, shown)


def _print_rest(found: Sequence[Record], shown: Sequence[Record]) -> None:
    if len(shown) < len(found):
        click.echo(f"and {len(found) - len(shown)} more; --factors shows all")
