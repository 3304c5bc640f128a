"""``STITCHCACHE_AUDIT``: a direct hit is traced all the same, and must be the graph that it says."""

from __future__ import annotations

import logging

from stitchcache.api.miss import graph_differences
from stitchcache.api.run import Run
from stitchcache.api.trace import Traced
from stitchcache.api.traced import trace_run
from stitchcache.artifact.record import Artifact
from stitchcache.errors import StaleEntryError
from stitchcache.keys.differences import differences_text
from stitchcache.store.layout import Area, keyed_path

log = logging.getLogger("stitchcache")


def audit(run: Run, artifact: Artifact) -> None:
    """Trace a model that has a direct hit, and compare.

    Args:
        run: Its compilation.
        artifact: What the target key led to.

    Raises:
        StaleEntryError: The model's graph is another one.
        CaptureError: The model cannot be captured any more.
    """
    traced, _ = trace_run(run)
    if traced.graph_hash == artifact.graph_hash:
        run.cache.count("audit.right")
        log.info("%s: audit: the graph is %s as the key says", run.label, artifact.graph_hash[:12])
        return
    run.cache.count("audit.wrong")
    raise _stale(run, artifact, traced)


def _stale(run: Run, artifact: Artifact, traced: Traced) -> StaleEntryError:
    differences = graph_differences(artifact, traced)
    differs = differences_text(differences, len(differences)) or "what pieces depend on beside the graph"
    key = run.target.key or ""
    return StaleEntryError(
        f"{run.label}: target key {key[:12]} led to entry {artifact.graph_hash[:12]}, and the model's graph "
        f"is {traced.graph_hash[:12]}. Nothing is served. They differ in {differs}. The model depends on "
        "something that no key sees (see 'What is not seen' in docs/keys.md): name it in key_factors. Until "
        f"then remove {keyed_path(str(run.cache.root), Area.TARGETS, key)}.",
        expected=artifact.graph_hash,
        actual=traced.graph_hash,
        differences=differences,
    )
