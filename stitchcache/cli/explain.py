"""``stitchcache explain``: why a start is warm or cold, and what a key stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli.output import (
    Column,
    age_text,
    cache_option,
    count_text,
    difference_records,
    finding,
    json_option,
    moment_text,
    open_cache,
    print_differences,
    print_heading,
    print_json,
    print_pairs,
    print_table,
    printable,
    seconds_text,
)
from stitchcache.errors import StitchCacheError

if TYPE_CHECKING:
    from stitchcache.explanation import NearestEntry
    from stitchcache.nearest import StoredTarget
    from stitchcache.report.key import KeyReport
    from stitchcache.report.target import TargetReport, TraceReport
    from stitchcache.types import Factor

_MOST = 12
# What a person asked for, as against what the machine and torch are.
_ASKED = ("options.", "user.", "input.", "model.class")
_VERDICTS = {"direct": "direct hit", "miss": "miss", "off": "direct lookup is off"}


@click.command()
@click.argument("what", metavar="TARGET|KEY")
@click.option("--trace", is_flag=True, help="Trace the target too, and look its graph up.")
@click.option("--factors", is_flag=True, help="Show all factors, and all that differ.")
@json_option
@cache_option
def explain(what: str, trace: bool, factors: bool, as_json: bool, root: str | None) -> None:
    """Say why a start is warm or cold, or what a key stands for.

    TARGET is 'pkg.module:name' or 'path/to/file.py:name', as for prewarm: its model is built and looked up,
    and nothing is loaded, stored or counted. KEY is the beginning of a graph hash or of a target key; torch
    is not imported for it.

    Exit status 1 says that a target is no direct hit, or that there is no such key.
    """
    if ":" in what:
        _explain_targets(what, trace, factors, as_json, root)
        return
    from stitchcache.report.key import is_prefix, read_key

    if not is_prefix(what):
        raise click.UsageError(
            f"{what!r} is neither a target, 'pkg.module:name' or 'path/to/file.py:name', nor the beginning "
            "of a key: 1 to 64 hex digits"
        )
    if trace:
        raise click.UsageError("--trace needs a target; a key alone says nothing that could be traced")
    report = read_key(open_cache(root), what)
    if as_json:
        print_json(_key_record(report))
    else:
        _print_key(report, factors)
    if report.problem:
        finding()


def _explain_targets(what: str, trace: bool, factors: bool, as_json: bool, root: str | None) -> None:
    from stitchcache.api.target import find_targets
    from stitchcache.cache import Cache
    from stitchcache.report.target import explain_target

    # Read-only: what is looked at stays as it is, damaged files included.
    cache = Cache(root, read_only=True)
    reports: list[TargetReport] = []
    failed: dict[str, StitchCacheError] = {}
    for target in find_targets(what):
        try:
            reports.append(explain_target(target, cache, trace=trace))
        except StitchCacheError as error:
            # Like one that cannot be prewarmed, it does not stop the others.
            failed[target.name] = error
    if as_json:
        errors = [
            {"name": name, "type": type(why).__name__, "message": why.message} for name, why in failed.items()
        ]
        targets = [_target_record(report) for report in reports]
        print_json({"root": str(cache.root), "targets": targets, "failed": errors})
    else:
        for index, report in enumerate(reports):
            if index:
                click.echo("")
            _print_target(report, factors, str(cache.root))
        for name, why in failed.items():
            click.echo(f"{printable(name)}: {printable(why.message)}", err=True)
    if failed or any(report.verdict != "direct" for report in reports):
        finding()


# -- a target --------------------------------------------------------------------------------------


def _print_target(report: TargetReport, everything: bool, root: str) -> None:
    pairs = [("target", report.name), ("verdict", _VERDICTS[report.verdict])]
    if report.reason:
        pairs.append(("reason", report.reason))
    pairs += [
        ("target key", report.target_key or "none"),
        ("graph hash", report.graph_hash or "unknown without tracing"),
        ("looked up in", f"{seconds_text(sum(report.seconds.get(s, 0.0) for s in ('key', 'sources')))}"),
        ("cache", root),
    ]
    print_pairs(pairs)
    if report.changed:
        print_heading("Changed sources")
        columns = (Column("FILE", flexible=True), Column("WHEN CAPTURED"), Column("NOW"))
        print_table(columns, [[path, old[:12], new[:12]] for path, (old, new) in report.changed.items()])
    _print_nearest(report.nearest, everything, "NOW")
    if report.trace is not None:
        _print_trace(report.trace)
    _print_factors(report.factors, everything)


def _print_trace(trace: TraceReport) -> None:
    print_heading("Traced")
    pairs = [("graph hash", trace.graph_hash), ("in the cache", "yes" if trace.cached else "no")]
    if trace.refused is not None:
        pairs.append(("direct lookup", f"off: {trace.refused}"))
    if trace.compared is not None:
        pairs.append(("compared with", trace.compared[:12]))
    print_pairs(pairs, indent="  ")
    _print_some(trace.differences, True, "THERE", "NOW")


def _target_record(report: TargetReport) -> dict[str, Any]:
    changed = [{"path": path, "old": old, "new": new} for path, (old, new) in sorted(report.changed.items())]
    trace = None
    if report.trace is not None:
        trace = {**asdict(report.trace), "differences": difference_records(report.trace.differences)}
    return {
        "name": report.name,
        "verdict": report.verdict,
        "reason": report.reason,
        "target_key": report.target_key,
        "graph_hash": report.graph_hash,
        "factors": [asdict(factor) for factor in report.factors],
        "changed": changed,
        "nearest": [_nearest_record(entry) for entry in report.nearest],
        "seconds": dict(report.seconds),
        "trace": trace,
    }


# -- a key -----------------------------------------------------------------------------------------


def _print_key(report: KeyReport, everything: bool) -> None:
    artifact = report.entry.artifact if report.entry is not None else None
    pairs = [("target key", report.key)] if report.kind == "target" else []
    pairs.append(("graph hash", report.graph_hash))
    if artifact is not None and report.entry is not None:
        pairs += [
            ("label", artifact.label or "-"),
            ("created", moment_text(artifact.created)),
            (
                "compiled in",
                seconds_text(artifact.compile_seconds) if artifact.compile_seconds else "unknown",
            ),
            ("pieces", count_text(len(artifact.pieces), "call")),
            ("file", report.entry.path),
        ]
    else:
        pairs.append(("entry", report.problem))
    print_pairs(pairs)
    if report.targets:
        print_heading("Targets that lead here")
        columns = (
            Column("KEY"),
            Column("LABEL", flexible=True),
            Column("CREATED"),
            Column("SERVED DIRECTLY"),
        )
        rows = [
            [
                target.key[:12],
                target.record.label or "-",
                age_text(target.record.created),
                "yes" if target.record.refused is None else f"no: {target.record.refused}",
            ]
            for target in report.targets
        ]
        print_table(columns, rows)
    else:
        click.echo("\nNo target leads here: it is found by tracing, or by its graph hash.")
    _print_sources(report.targets)
    _print_nearest(report.nearest, everything, "HERE")
    _print_factors(report.factors, everything)


def _print_sources(targets: Sequence[StoredTarget]) -> None:
    for target in targets[:1]:
        record = target.record
        print_heading(f"What the capture of {target.key[:12]} read")
        columns = (Column("MODULE", flexible=True), Column("BYTES", right=True), Column("DIGEST"))
        print_table(columns, [[s.module, str(s.size), s.digest[:12]] for s in record.sources])
        click.echo(f"and {count_text(len(record.globals), 'global')} and environment variables")


def _key_record(report: KeyReport) -> dict[str, Any]:
    entry = report.entry
    return {
        "kind": report.kind,
        "key": report.key,
        "graph_hash": report.graph_hash,
        "label": None if entry is None else entry.artifact.label,
        "created": None if entry is None else entry.artifact.created,
        "path": None if entry is None else entry.path,
        "problem": report.problem,
        "targets": [_stored_record(target) for target in report.targets],
        "factors": [asdict(factor) for factor in report.factors],
        "nearest": [_nearest_record(near) for near in report.nearest],
    }


def _stored_record(target: StoredTarget) -> dict[str, Any]:
    record = target.record
    return {
        "target_key": target.key,
        "graph_hash": record.graph_hash,
        "label": record.label,
        "created": record.created,
        "refused": record.refused,
        "sources": [{"module": s.module, "bytes": s.size, "digest": s.digest} for s in record.sources],
        "globals": [{"name": name, "digest": digest} for name, digest in record.globals],
        "path": target.path,
    }


# -- both ------------------------------------------------------------------------------------------


def _print_nearest(nearest: Sequence[NearestEntry], everything: bool, here: str) -> None:
    for entry in nearest:
        count = len(entry.differences)
        differs = f"{count_text(count, 'factor')} differ{'s' if count == 1 else ''}"
        # What all differs in a model of another class helps nobody.
        other = "model.class" in entry.differences and not everything
        differs = "another class" if other else differs
        label = f"{entry.label or '-'} {entry.graph_hash[:12]}"
        print_heading(printable(f"Near: {label}, {age_text(entry.created)}, {differs}"))
        if not other:
            _print_some(entry.differences, everything, "THERE", here)


def _print_some(differences: Mapping[str, tuple[str, str]], everything: bool, old: str, new: str) -> None:
    if not differences:
        return
    shown = list(differences.items())[: None if everything else _MOST]
    print_differences(shown, "FACTOR", old, new)
    if len(shown) < len(differences):
        click.echo(f"and {len(differences) - len(shown)} more; --factors shows all")


def _print_factors(factors: Sequence[Factor], everything: bool) -> None:
    shown = factors if everything else [f for f in factors if f.name.startswith(_ASKED)]
    print_heading("Factors")
    if shown:
        columns = (Column("FACTOR", flexible=True), Column("VALUE", flexible=True))
        print_table(columns, [[factor.name, factor.value] for factor in shown])
    if len(shown) < len(factors):
        click.echo(f"and {len(factors) - len(shown)} more; --factors shows all")
    elif not factors:
        click.echo("none recorded")


def _nearest_record(entry: NearestEntry) -> dict[str, Any]:
    names = ("graph_hash", "target_key", "label", "created", "refused")
    return {
        **{name: getattr(entry, name) for name in names},
        "differences": difference_records(entry.differences),
    }
