"""What a start of a target would be, and why; nothing is loaded, stored or counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stitchcache.api.prewarm import request_for
from stitchcache.api.target import Target
from stitchcache.cache import Cache
from stitchcache.errors import UntrustedEntryError
from stitchcache.explanation import NearestEntry
from stitchcache.nearest import nearest_entries
from stitchcache.pipeline.find import Hit, Wanted, find, find_by_graph, want
from stitchcache.pipeline.miss import changed_beside, changed_sources, graph_differences
from stitchcache.pipeline.request import check_model
from stitchcache.types import Artifact, Factor


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceReport:
    """What tracing a target gave.

    Args:
        graph_hash: Of the fresh trace.
        cached: Whether the cache has its entry.
        refused: Why the trace cannot be looked up directly the next time; ``None`` where it can.
        compared: Graph hash of the entry that it was compared with; ``None`` where there was none.
        differences: Factor of the graph to ``(in that entry, in the trace)``.
    """

    graph_hash: str
    cached: bool
    refused: str | None
    compared: str | None
    differences: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetReport:
    """What a start of a target would be.

    Args:
        name: The target's.
        verdict: ``direct``, ``miss``, or ``off`` where direct lookup is off for it.
        reason: Why it is no direct hit; ``""`` where it is one.
        target_key: 64 hex digits; ``None`` where no key stands for it.
        graph_hash: What the key leads to; ``None`` where it leads nowhere.
        factors: What the key is made of, as far as it got.
        changed: Source file to ``(digest when captured, digest now)``, of the target that the key leads to,
            else of the nearest.
        nearest: Entries whose keys come nearest, where the key leads nowhere.
        seconds: By stage.
        trace: What tracing gave; ``None`` where it was not asked for.
    """

    name: str
    verdict: str
    reason: str
    target_key: str | None
    graph_hash: str | None
    factors: tuple[Factor, ...]
    changed: Mapping[str, tuple[str, str]]
    nearest: tuple[NearestEntry, ...]
    seconds: Mapping[str, float]
    trace: TraceReport | None


def explain_target(target: Target, cache: Cache, *, trace: bool = False, most: int = 3) -> TargetReport:
    """Say what a start of a target would be.

    Args:
        target: What to look up; its model is built.
        cache: Where; one that is opened read-only stays as it is, damage included.
        trace: Whether to trace it too, which takes seconds.
        most: How many of the nearest entries to name.

    Raises:
        TargetError: The model cannot be built.
        OptionError: An option makes no sense.
        CaptureError: It was to be traced, and cannot be.
    """
    request = request_for(target)
    model, args, kwargs = target.made()
    check_model(model, args, kwargs)
    wanted = want(model, args, kwargs, request, cache)
    found = find(wanted)
    record = found.record
    reason, cause = ("", "") if isinstance(found, Hit) else (found.reason, found.cause)
    if isinstance(found, Hit):
        missing = _missing_blob(found.artifact, cache)
        reason, cause = (missing, "piece") if missing is not None else ("", "")
    changed = changed_sources(record) if record is not None and cause == "sources" else {}
    nearest: list[NearestEntry] = []
    site, key = wanted.site, wanted.target
    if record is None:
        nearest = nearest_entries(
            cache.roots, key.factors, label=site.label, most=most, partial=key.key is None
        )
        changed = changed_beside(nearest[0]) if nearest else {}
    leads_to = record.graph_hash if record is not None else None
    compared = leads_to or (nearest[0].graph_hash if nearest else None)
    traced = _traced(wanted, compared) if trace else None
    return TargetReport(
        name=target.name,
        verdict="direct" if not cause else "off" if cause == "unkeyable" else "miss",
        reason=reason,
        target_key=key.key,
        graph_hash=leads_to,
        factors=key.factors,
        changed=changed,
        nearest=tuple(nearest),
        seconds=dict(site.clock.timings),
        trace=traced,
    )


def _missing_blob(artifact: Artifact, cache: Cache) -> str | None:
    for blob in artifact.blobs:
        try:
            if cache.blob_path(blob) is None:
                return f"a piece of entry {artifact.graph_hash[:12]} is missing or damaged"
        except UntrustedEntryError as error:
            return error.message
    return None


def _traced(wanted: Wanted, compared: str | None) -> TraceReport:
    # A report without a trace needs no exporter.
    from stitchcache.pipeline.entry import plan_entry
    from stitchcache.pipeline.source import export_source

    source = export_source(wanted)
    planned = plan_entry(source, wanted.request)
    cache = wanted.site.cache
    cached = isinstance(find_by_graph(planned.graph_hash, cache), Hit)
    other = find_by_graph(compared, cache) if compared is not None and not cached else None
    entry = other.artifact if isinstance(other, Hit) else None
    return TraceReport(
        graph_hash=planned.graph_hash,
        cached=cached,
        refused=source.unsound,
        compared=None if entry is None else entry.graph_hash,
        differences={} if entry is None else graph_differences(entry, planned),
    )
