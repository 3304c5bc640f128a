"""What a miss finds out beyond its reason: which sources changed, which factors differ, and the error."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stitchcache import explanation
from stitchcache.errors import CacheMissError
from stitchcache.keys import check
from stitchcache.keys.check import find_file, read_file
from stitchcache.keys.walk import main_label
from stitchcache.pipeline.find import Miss, Wanted
from stitchcache.types import Artifact, TargetRecord

if TYPE_CHECKING:
    from stitchcache.pipeline.make import EntryPlan


def with_facts(wanted: Wanted, miss: Miss) -> Miss:
    """A miss with what can be found out about it, before anything is stored by this run."""
    changed, found = changed_and_nearest(wanted, miss.record, miss.cause)
    hint = ""
    if found and "model.class" in found[0].differences:
        hint = "; the newest entries are all of other model classes"
    elif found and found[0].differences:
        differs = explanation.names_text(list(found[0].differences))
        hint = f"; nearest {found[0].graph_hash[:12]} differs in {differs}"
    return replace(miss, changed=changed, nearest=found[0] if found else None, hint=hint)


def changed_and_nearest(
    wanted: Wanted, record: TargetRecord | None, cause: str, most: int = 1
) -> tuple[dict[str, tuple[str, str]], list[explanation.NearestEntry]]:
    """Source files that changed and, where the key leads to no record, entries that come nearest.

    Reads a few hundred files at most.
    """
    if record is not None:
        return changed_sources(record) if cause == "sources" else {}, []
    site, target = wanted.site, wanted.target
    found = explanation.nearest_entries(
        site.cache.roots, target.factors, label=site.label, most=most, partial=target.key is None
    )
    # The code of a model's classes is a factor of its key: an edit of them shows as a factor that differs.
    near = found[0].record if found and "model.class" not in found[0].differences else None
    return {} if near is None else changed_sources(near), found


def changed_sources(record: TargetRecord) -> dict[str, tuple[str, str]]:
    """Each source file, or module that has none now, to its digests when captured and now, if they differ."""
    main = main_label()
    found = {}
    for source in record.sources:
        file, module = find_file(source.module, main)
        try:
            now = explanation.ABSENT if file is None else check.bytes_digest(read_file(file, module))
        except OSError:
            # Gone, or not to be read; the reason says which.
            now = explanation.ABSENT
        if now != source.digest:
            found[file or source.module] = (source.digest, now)
    return found


def graph_differences(artifact: Artifact, traced: EntryPlan) -> dict[str, tuple[str, str]]:
    """Factors of the graph and ``graph.pieces``: name to the value in the entry and in a fresh trace."""
    wanted = {factor.name for factor in traced.factors}
    old = [factor for factor in artifact.factors if factor.name in wanted]
    found = explanation.explain_differences(old, traced.factors)
    before = [piece.key for piece in artifact.pieces]
    planned = [piece for one in traced.plans for piece in one.pieces]
    if before != [piece.key for piece in planned]:
        fresh = [piece.name for piece in planned if piece.key not in before]
        shown = f"{len(planned)} calls, of these new: {explanation.names_text(fresh) or 'none'}"
        found["graph.pieces"] = (f"{len(before)} calls", shown)
    return found


def miss_error(wanted: Wanted, miss: Miss, graph_hash: str | None = None) -> CacheMissError:
    """The error for a miss where misses are forbidden; without a graph hash, tracing is."""
    site = wanted.site
    differences = dict(miss.nearest.differences) if miss.nearest is not None else {}
    detail = ""
    if miss.nearest is not None and differences:
        near = f"{miss.nearest.label or 'entry'} {miss.nearest.graph_hash[:12]}"
        detail = f" It differs from the nearest, {near}, in {explanation.differences_text(differences)}."
    if miss.changed:
        changed = {path: (old[:12], new[:12]) for path, (old, new) in miss.changed.items()}
        detail += f" Changed: {explanation.differences_text(changed)}."
    advice = (
        "Run 'stitchcache prewarm' where compiling is allowed, with the same model and options; "
        "'stitchcache explain' shows all that differs."
    )
    what, reason = f"no direct hit in the cache at {site.cache.root}", miss.reason
    if miss.cause == "refused":
        what = f"the cache at {site.cache.root} cannot be used"
        advice = "Mend that first; another prewarm may meet it too. 'stitchcache doctor' tries the directory."
    elif graph_hash is not None:
        what = f"not in the cache at {site.cache.root}"
        reason = f"{miss.reason}; no entry for graph {graph_hash[:12]} either"
    forbidden = "tracing" if graph_hash is None else "a miss"
    return CacheMissError(
        f"{site.label}: {what} ({reason}), and {forbidden} is an error here.{detail} {advice}",
        target=site.label,
        key=wanted.target.key or "",
        reason=miss.reason,
        differences=differences,
        changed=dict(miss.changed),
    )
