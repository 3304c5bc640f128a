"""Prewarming over a Ray cluster (``pip install 'stitchcache[ray]'``): each target on a node of its kind.

Nodes share no directory. Each compiles into its own cache, and what a target came to travels through Ray to
the caller's cache, which takes it as its own: who runs a Ray cluster trusts its nodes with code anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stitchcache.api import prewarm as api
from stitchcache.api.prewarm import PrewarmReport, PrewarmResult
from stitchcache.artifact.entry import decode_named, decode_signed
from stitchcache.cache import Cache, chosen_cache
from stitchcache.errors import StitchCacheError, TargetError, check_kind
from stitchcache.ext.export import select
from stitchcache.pipeline.find import OnProgress
from stitchcache.store import Area

# Seconds between two looks at what nodes tell.
_LOOKED_EVERY = 0.5


def prewarm(
    references: Iterable[str] | str,
    *,
    cache: Cache | None = None,
    resources: Mapping[str, Any] | Callable[[str], Mapping[str, Any]] | None = None,
    retries: int = 3,
    fake: bool = False,
    on_progress: OnProgress | None = None,
) -> PrewarmReport:
    """Compile targets on the nodes of a Ray cluster, and store them here.

    Args:
        references: Such as ``"pkg.module:name"``; nodes import them too.
        cache: Where to store; the default cache if ``None``. Nodes have default caches of their own.
        resources: Ray's options of a task, such as ``{"num_cpus": 4, "accelerator_type": "H100"}``; or a
            function that gives them for a target's name. ``num_cpus``, one by default, is also how many
            pieces are compiled at a time.
        retries: How often a target starts anew on another node when its node dies.
        fake: Build models without weights.
        on_progress: Called here with a ``stitchcache.Progress`` of any node.

    Returns:
        What became of each target, in their order.

    Raises:
        TargetError: A reference leads nowhere, or two targets have one name.
        OptionError: An argument makes no sense.
    """
    check_kind("references", references, (str, Iterable), "references 'pkg.module:name'")
    check_kind("resources", resources, (Mapping, Callable, NoneType), "a dict, or a function of a name")
    store, board = chosen_cache(cache), None
    listed = [references] if isinstance(references, str) else references
    targets = [(reference, target) for reference in listed for target in api.find_targets(reference)]
    api.check_names([target for _, target in targets])
    if on_progress is not None:
        # On this node, so that it lives as long as who reads it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    waiting = {}
    for reference, target in targets:
        chosen = resources(target.name) if callable(resources) else resources
        how = {"num_cpus": 1, "max_retries": retries, **(chosen or {})}
        words = (reference, target.name, max(1, int(how["num_cpus"] or 1)), fake, board)
        waiting[ray.remote(_compiled).options(**how).remote(*words)] = target.name
    found: dict[str, PrewarmResult] = {}
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=None if board is None else _LOOKED_EVERY)
        while board is not None and not board.empty():
            on_progress(board.get())  # type: ignore[misc]
        for each in done:
            name = waiting.pop(each)
            found[name] = _stored(store, name, each)
    return PrewarmReport(tuple(api.looked_up([found[target.name] for _, target in targets], store)))


def _compiled(
    reference: str, name: str, jobs: int, fake: bool, board: Any
) -> tuple[PrewarmResult, dict[str, bytes]]:
    """On a node: a target's result, and the files that its entries need, by path below a root."""
    cache = Cache()
    targets = [target for target in api.find_targets(reference) if target.name == name]
    tell = None if board is None else board.put
    (result,) = api.prewarm(targets, jobs=jobs, cache=cache, fake=fake, on_progress=tell).results
    if result.error is not None:
        return result, {}
    files: dict[str, bytes] = {}
    for path, content in select(cache, (result.graph_hash, *result.more_graphs)).members.items():
        found = content if isinstance(content, bytes) else cache.blob_path(content)
        # A blob that is gone is missed where the entry is stored.
        if found is not None:
            files[path] = found if isinstance(found, bytes) else found.read_bytes()
    return result, files


def _stored(cache: Cache, name: str, each: Any) -> PrewarmResult:
    """Store what a node came to, each file checked as one that is read; its result, or the error."""
    try:
        result: PrewarmResult
        result, files = ray.get(each)
        # Each comes after what it names.
        for path, data in files.items():
            area, _, key = path.partition(".")[0].split("/")
            if area == Area.BLOBS:
                cache.put_blob(data)
            elif area == Area.ENTRIES:
                cache.put(decode_named(data, key, path))
            else:
                # The oldest first, so that their order stays.
                for record, _ in reversed(decode_signed(data, key, path=path)):
                    cache.put_target(key, record)
    except StitchCacheError as error:
        return PrewarmResult(name=name, status="failed", error=error)
    except RayError as error:
        # The node died too often, or had no memory: Ray says which.
        said = f"target {name!r} was given up on: {(str(error).strip() or repr(error)).splitlines()[-1]}"
        return PrewarmResult(name=name, status="failed", error=TargetError(said, target=name))
    return result
