"""``stitchcache explain``: why a start is warm or cold, and what a key stands for."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli import output as out
from stitchcache.errors import StitchCacheError

if TYPE_CHECKING:
    from stitchcache.cache import Cache

_MOST = 12
# What a person asked for, as against what the machine and torch are.
_ASKED = ("options.", "user.", "input.", "model.class")
_VERDICTS = {"direct": "direct hit", "miss": "miss", "off": "direct lookup is off"}


@click.command()
@click.argument("what", metavar="TARGET|KEY", shell_complete=out.complete_entry)
@click.option("--trace", is_flag=True, help="Trace the target too, and look its graph up.")
@click.option("--factors", is_flag=True, help="Show all factors, and all that differ.")
@out.html_option
@out.shared_options
def explain(what: str, trace: bool, factors: bool) -> None:
    """Say why a start is warm or cold, or what a key stands for.

    TARGET is 'pkg.module:name' or 'path/to/file.py:name', as for prewarm: its model is built and looked up,
    and nothing is loaded, stored or counted. KEY is the beginning of a graph hash or of a target key; torch
    is not imported for it.

    Exit status 1 says that a target is no direct hit, or that there is no such key.
    """
    everything = factors or out.asked("html") is not None
    if ":" in what:
        # Read-only: what is looked at stays as it is, damaged files included.
        record = _explain_targets(what, trace, out.open_cache(read_only=True))
        wrong = bool(record["failed"]) or any(found["verdict"] != "direct" for found in record["targets"])
        out.show(record, partial(_print_targets, everything=everything), finding=wrong, title=what)
        return
    from stitchcache.report.entry import explain_key

    if not re.fullmatch("[0-9a-fA-F]{1,64}", what):
        raise click.UsageError(
            f"{what!r} is neither a target, 'pkg.module:name' or 'path/to/file.py:name', nor the beginning "
            "of a key: 1 to 64 hex digits"
        )
    if trace:
        raise click.UsageError("--trace needs a target: a key cannot be traced")
    record = explain_key(out.open_cache(), what)
    show_key = partial(_print_key, everything=everything)
    title = f"{record['label'] or record['kind']} {record['key'][:12]}"
    out.show(record, show_key, finding=bool(record["problem"]), title=title)


def _explain_targets(reference: str, trace: bool, cache: Cache) -> out.Record:
    from stitchcache.api.prewarm import find_targets
    from stitchcache.report.target import explain_target

    reports, failed = [], []
    for target in find_targets(reference):
        try:
            reports.append(explain_target(target, cache, trace=trace))
        except StitchCacheError as error:
            # Like one that cannot be prewarmed, it does not stop the others.
            failed.append({"name": target.name, "type": type(error).__name__, "message": error.message})
    return {"root": cache.paths[0], "targets": reports, "failed": failed}


def _print_targets(record: out.Record, everything: bool) -> None:
    for index, target in enumerate(record["targets"]):
        if index:
            out.print_line("")
        _print_target(target, everything)
    for failed in record["failed"]:
        out.say(f"{failed['name']}: {failed['message']}")


def _print_target(target: out.Record, everything: bool) -> None:
    seconds, trace = target["seconds"], target["trace"]
    facts: out.Fields = {
        "target": "name",
        "verdict": lambda found: _VERDICTS[found["verdict"]],
        "reason": "reason",
        "target key": "target_key",
        "graph hash": "graph_hash",
        "looked up in": lambda _: out.seconds_text(seconds.get("key", 0.0) + seconds.get("sources", 0.0)),
    }
    out.print_facts(facts, target)
    if target["changed"]:
        out.print_heading("Changed sources")
        out.print_table({"FILE": "path", "WHEN CAPTURED": "old", "NOW": "new"}, target["changed"])
    _print_nearest(target["nearest"], everything, "NOW")
    if trace is not None:
        out.print_heading("Traced")
        facts = {"graph hash": "graph_hash", "in the cache": "cached", "direct lookup is off": "refused"}
        out.print_facts({**facts, "compared with": "compared"}, trace, indent="  ")
        if trace["differences"]:
            out.print_table({"FACTOR": "name", "THERE": "old", "NOW": "new"}, trace["differences"])
    _print_factors(target["factors"], everything)


def _print_key(record: out.Record, everything: bool) -> None:
    facts: out.Fields = {
        "target key": lambda found: found["key"] if found["kind"] == "target" else None,
        "graph hash": "graph_hash",
        "entry": "problem",
        "label": "label",
        "created": "created",
        "file": "path",
        "calls that did not fit": lambda found: (
            ", ".join(f"{count} by {argument}" for argument, count in found["mismatches"].items()) or None
        ),
    }
    out.print_facts(facts, record)
    targets = record["targets"]
    if targets:
        out.print_heading("Targets that lead here")
        columns: dict[str, Any] = {"KEY": "target_key", "LABEL": "label", "CREATED": "created"}
        columns["SERVED DIRECTLY"] = lambda found: f"no: {found['refused']}" if found["refused"] else "yes"
        out.print_table(columns, targets)
        out.print_heading(f"What the capture of {targets[0]['target_key'][:12]} read")
        out.print_table({"MODULE": "module", "SIZE": "bytes", "DIGEST": "digest"}, targets[0]["sources"])
        count = out.count_text(len(targets[0]["globals"]), "global")
        out.print_line(f"and {count} and environment variables")
    else:
        out.print_line("No target leads here: it is found by tracing, or by its graph hash.")
    _print_nearest(record["nearest"], everything, "HERE")
    _print_factors(record["factors"], everything)


def _print_nearest(nearest: list[out.Record], everything: bool, here: str) -> None:
    for entry in nearest:
        differences = entry["differences"]
        # What all differs in a model of another class helps nobody.
        other = not everything and any(found["name"] == "model.class" for found in differences)
        count = f"{out.count_text(len(differences), 'factor')} differ{'s' if len(differences) == 1 else ''}"
        near = f"{entry['label'] or '-'} {entry['graph_hash'][:12]}, {out.age_text(entry['created'])}"
        out.print_heading(f"Near: {near}, {'another class' if other else count}")
        if differences and not other:
            fields = {"FACTOR": "name", "THERE": "old", here: "new"}
            _print_some(fields, differences, differences if everything else differences[:_MOST])


def _print_factors(factors: list[out.Record], everything: bool) -> None:
    out.print_heading("Factors")
    asked = [factor for factor in factors if factor["name"].startswith(_ASKED)]
    _print_some({"FACTOR": "name", "VALUE": "value"}, factors, factors if everything else asked)
    if not factors:
        out.print_line("none recorded")


def _print_some(fields: out.Fields, found: list[out.Record], shown: list[out.Record]) -> None:
    if shown:
        out.print_table(fields, shown)
    if len(shown) < len(found):
        out.print_line(f"and {len(found) - len(shown)} more; --factors shows all")
