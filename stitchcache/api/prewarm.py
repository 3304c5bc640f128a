"""``stitchcache.prewarm``: compile many targets ahead of time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stitchcache.api.compile import compile_request
from stitchcache.api.target import Target, check_names, find_targets
from stitchcache.cache import Cache
from stitchcache.errors import StitchCacheError
from stitchcache.pipeline.request import OnProgress, Request, chosen_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class PrewarmResult:
    """What became of one target.

    Args:
        name: The target's.
        status: ``direct`` or ``graph`` (it was there), ``compiled``, or ``failed``.
        graph_hash: Its entry; empty if it failed.
        pieces: Calls of compiled pieces.
        distinct: Different pieces.
        blob_bytes: Size of the different pieces.
        seconds: What it took, the building of the model not counted.
        timings: Seconds by stage.
        error: Why it failed; ``None`` if it did not.
    """

    name: str
    status: str
    graph_hash: str = ""
    pieces: int = 0
    distinct: int = 0
    blob_bytes: int = 0
    seconds: float = 0.0
    timings: Mapping[str, float] | None = None
    error: StitchCacheError | None = None


@dataclass(frozen=True, slots=True)
class PrewarmReport:
    """What became of all targets, in their order.

    Args:
        results: One a target.
    """

    results: tuple[PrewarmResult, ...]

    @property
    def failed(self) -> tuple[PrewarmResult, ...]:
        """Targets that could not be compiled."""
        return tuple(result for result in self.results if result.error is not None)

    @property
    def ok(self) -> bool:
        """Whether every target is in the cache now."""
        return not self.failed


def prewarm(
    targets: Iterable[Target | str] | Target | str,
    *,
    jobs: int | None = None,
    cache: Cache | None = None,
    on_progress: OnProgress | None = None,
    on_miss: str = "compile",
    fake: bool = False,
) -> PrewarmReport:
    """Compile targets that are not in the cache yet.

    A target that fails does not stop the others.

    With ``fake`` no weights are needed, and none take any memory: models are built with tensors that
    have no data. Keys are those of the real model, which then gets a direct hit. Pieces are compared
    with eager execution on random inputs, each for itself.

    Args:
        targets: Targets, or references such as ``"pkg.module:name"``.
        jobs: Pieces to compile at a time; ``None`` takes one a core.
        cache: Where to store; the default cache if ``None``.
        on_progress: Called with a :class:`~stitchcache.pipeline.request.Progress` as things happen.
        on_miss: ``"compile"``, or ``"error"`` to check that everything is there already.
        fake: Call each target's ``build`` where every tensor that it makes has no data.

    Returns:
        What became of each.

    Raises:
        TargetError: A reference leads nowhere, or two targets have one name.
        OptionError: ``jobs`` is below 1.
    """
    given = [targets] if isinstance(targets, (Target, str)) else list(targets)
    found = [t for item in given for t in (find_targets(item) if isinstance(item, str) else [item])]
    check_names(found)
    # Not of one target, so it is no failure of each: refused before any model is built.
    Request(options={"stitchcache.jobs": jobs} if jobs is not None else {})
    store = chosen_cache(cache)
    return PrewarmReport(tuple(_one(target, jobs, on_miss, fake, store, on_progress) for target in found))


def _one(
    target: Target,
    jobs: int | None,
    on_miss: str,
    fake: bool,
    cache: Cache,
    on_progress: OnProgress | None,
) -> PrewarmResult:
    began = time.perf_counter()
    try:
        request = request_for(target, jobs, on_miss)
        model, args, kwargs = target.made(fake=fake)
        began = time.perf_counter()
        compiled = compile_request(model, args, kwargs, request, cache, on_progress)
    except StitchCacheError as error:
        return PrewarmResult(
            name=target.name, status="failed", seconds=time.perf_counter() - began, error=error
        )
    blobs = {piece.blob.digest: piece.blob.size for piece in compiled.artifact.pieces}
    return PrewarmResult(
        name=target.name,
        status=compiled.cache_hit or "compiled",
        graph_hash=compiled.graph_hash,
        pieces=len(compiled.artifact.pieces),
        distinct=len({piece.key for piece in compiled.artifact.pieces}),
        blob_bytes=sum(blobs.values()),
        seconds=time.perf_counter() - began,
        timings=compiled.timings,
    )


def request_for(target: Target, jobs: int | None = None, on_miss: str = "compile") -> Request:
    """A target's options in one record.

    Raises:
        OptionError: One makes no sense.
    """
    options: dict[str, Any] = dict(target.options or {})
    if jobs is not None:
        options["stitchcache.jobs"] = jobs
    request = Request(
        dynamic_shapes=target.dynamic_shapes,
        splitting_ops=tuple(target.splitting_ops),
        size_ranges=tuple(target.size_ranges or ()),
        backend=target.backend,
        on_miss=on_miss,  # type: ignore[arg-type]
        key_factors=dict(target.key_factors or {}),
        options=options,
    )
    return replace(request, label=target.name)
