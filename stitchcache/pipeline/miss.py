"""What a miss finds out beyond its reason: which sources changed, which factors differ, and the error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stitchcache.errors import CacheMissError
from stitchcache.explanation import (
    ABSENT,
    MissFacts,
    NearestEntry,
    differences_text,
    explain_differences,
    names_text,
    nearest_entries,
)
from stitchcache.keys import check
from stitchcache.keys.origins import find_file, main_label, read_file
from stitchcache.pipeline.find import Miss, Wanted
from stitchcache.types import Artifact, TargetRecord

if TYPE_CHECKING:
    from stitchcache.pipeline.make import EntryPlan

_FEW = 3


def miss_facts(wanted: Wanted, miss: Miss) -> MissFacts:
    """Look at what there is, before anything is stored by this run; reads a few hundred files at most."""
    if miss.record is not None:
        return MissFacts(changed=changed_sources(miss.record) if miss.cause == "sources" else {})
    site, target = wanted.site, wanted.target
    found = nearest_entries(site.cache.roots, target.factors, label=site.label, partial=target.key is None)
    if not found:
        return MissFacts()
    nearest, hint = found[0], ""
    if "model.class" in nearest.differences:
        hint = ", nor one of this model's class nearby"
    elif nearest.differences:
        differs = names_text(list(nearest.differences), _FEW)
        hint = f"; nearest {nearest.graph_hash[:12]} differs in {differs}"
    return MissFacts(changed=changed_beside(nearest), nearest=nearest, hint=hint)


def changed_beside(nearest: NearestEntry) -> dict[str, tuple[str, str]]:
    """Source files that are not what the nearest entry was captured from; none where it is another model's.

    The code of a model's classes is a factor of its key, so an edit of them shows as a factor that differs.
    """
    if nearest.record is None or "model.class" in nearest.differences:
        return {}
    return changed_sources(nearest.record)


def changed_sources(record: TargetRecord) -> dict[str, tuple[str, str]]:
    """Every source file that is not what was captured.

    Returns:
        File, or the module's name where it has none now, to ``(digest when captured, digest now)``.
    """
    main = main_label()
    found = {}
    for source in record.sources:
        file, module = find_file(source.module, main)
        try:
            now = ABSENT if file is None else check.bytes_digest(read_file(file, module))
        except OSError:
            # Gone, or not to be read; the reason says which.
            now = ABSENT
        if now != source.digest:
            found[file or source.module] = (source.digest, now)
    return found


def graph_differences(artifact: Artifact, traced: EntryPlan) -> dict[str, tuple[str, str]]:
    """What tells a fresh trace from an entry.

    Returns:
        Name to ``(in the entry, in the trace)``: factors of the graph, and ``graph.pieces`` for the pieces
        that are others.
    """
    wanted = {factor.name for factor in traced.factors}
    old = [factor for factor in artifact.factors if factor.name in wanted]
    found = explain_differences(old, traced.factors)
    before = [piece.key for piece in artifact.pieces]
    planned = [piece for _, one in traced.plans for piece in one.pieces]
    if before != [piece.key for piece in planned]:
        fresh = [piece.name for piece in planned if piece.key not in before]
        shown = f"{len(planned)} calls, of these new: {names_text(fresh, _FEW) or 'none'}"
        found["graph.pieces"] = (f"{len(before)} calls", shown)
    return found


def miss_error(wanted: Wanted, miss: Miss, graph_hash: str | None = None) -> CacheMissError:
    """The error for a miss where misses are forbidden; without a graph hash, tracing is."""
    site, facts = wanted.site, miss.facts or MissFacts()
    differences = dict(facts.nearest.differences) if facts.nearest is not None else {}
    detail = ""
    if facts.nearest is not None and differences:
        near = f"{facts.nearest.label or 'entry'} {facts.nearest.graph_hash[:12]}"
        detail = f" From the nearest, {near}, it differs in {differences_text(differences, _FEW)}."
    if facts.changed:
        changed = {path: (old[:12], new[:12]) for path, (old, new) in facts.changed.items()}
        detail += f" Changed: {differences_text(changed, _FEW)}."
    if graph_hash is None:
        what = (
            f"no direct hit in the cache at {site.cache.root} ({miss.reason}), and tracing is an error here."
        )
    else:
        what = (
            f"not in the cache at {site.cache.root} ({miss.reason}; no entry for graph {graph_hash[:12]} "
            "either), and a miss is an error here."
        )
    return CacheMissError(
        f"{site.label}: {what}{detail} "
        "Run 'stitchcache prewarm' where compiling is allowed, with the same model and options; "
        "'stitchcache explain' shows all that differs.",
        target=site.label,
        key=wanted.target.key or "",
        reason=miss.reason,
        differences=differences,
        changed=dict(facts.changed),
    )
