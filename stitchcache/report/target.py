"""What a start of a target would be, and why; nothing is loaded, stored or counted."""

from __future__ import annotations

from dataclasses import asdict

from stitchcache.api.prewarm import Target, request_for
from stitchcache.cache import Cache
from stitchcache.errors import TargetError, UntrustedEntryError
from stitchcache.pipeline.find import Hit, Wanted, check_model, find, find_by_graph, want
from stitchcache.pipeline.miss import changed_and_nearest, graph_differences
from stitchcache.report.entry import Record, difference_records, near_records
from stitchcache.types import Artifact


def explain_target(target: Target, cache: Cache, *, trace: bool = False, most: int = 3) -> Record:
    """What a start of a target would be, as ``explain --json`` prints it; its model is built.

    The verdict is ``direct``, ``miss``, or ``off`` where direct lookup is off. Where the key leads nowhere,
    ``most`` of the nearest entries are named. In a cache that is opened read-only even damage stays.
    """
    if target.torch_compile is not None:
        raise TargetError(
            f"target {target.name!r} goes through torch.compile, which traces at every start: there is "
            "no direct hit to explain. 'stitchcache prewarm --require' looks its graphs up.",
            target=target.name,
        )
    request = request_for(target)
    model, args, kwargs = target.made()
    check_model(model, args, kwargs)
    wanted = want(model, args, kwargs, request, cache)
    key = wanted.target
    found = find(wanted)
    record = found.record
    if isinstance(found, Hit):
        reason = _missing_blob(found.artifact, cache)
        cause = "piece" if reason else ""
    else:
        reason, cause = found.reason, found.cause
    changed, nearest = changed_and_nearest(wanted, record, cause, most)
    leads_to = None if record is None else record.graph_hash
    compared = leads_to or (nearest[0].graph_hash if nearest else None)
    return {
        "name": target.name,
        "verdict": "direct" if not cause else "off" if cause == "unkeyable" else "miss",
        "reason": reason,
        "target_key": key.key,
        "graph_hash": leads_to,
        "factors": [asdict(factor) for factor in key.factors],
        "changed": [{"path": path, "old": old, "new": new} for path, (old, new) in sorted(changed.items())],
        "nearest": near_records(nearest),
        "seconds": dict(wanted.site.timings),
        "trace": _traced(wanted, compared) if trace else None,
    }


def _missing_blob(artifact: Artifact, cache: Cache) -> str:
    for blob in artifact.blobs:
        try:
            if cache.blob_path(blob) is None:
                return f"a piece of entry {artifact.graph_hash[:12]} is missing or damaged"
        except UntrustedEntryError as error:
            return error.message
    return ""


def _traced(wanted: Wanted, compared: str | None) -> Record:
    """What tracing gave, beside the entry of a graph hash where the cache has not what was traced."""
    # A report without a trace needs no exporter.
    from stitchcache.pipeline.make import plan_entry
    from stitchcache.pipeline.trace import export_source

    source = export_source(wanted)
    planned = plan_entry(source)
    cached = isinstance(find_by_graph(planned.graph_hash, wanted.site), Hit)
    other = find_by_graph(compared, wanted.site) if compared is not None and not cached else None
    entry = other.artifact if isinstance(other, Hit) else None
    return {
        "graph_hash": planned.graph_hash,
        "cached": cached,
        "refused": source.unsound,
        "compared": None if entry is None else entry.graph_hash,
        "differences": [] if entry is None else difference_records(graph_differences(entry, planned)),
    }
