"""``stitchcache.compile``: the direct road, the traced road, and the cold one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from stitchcache import collection_paused
from stitchcache.cache import Cache
from stitchcache.codegen.execution import CodeObjects
from stitchcache.errors import OptionError
from stitchcache.pipeline.find import Hit, Miss, Ready, Wanted, changed_from, find, want
from stitchcache.pipeline.request import OnProgress, Request, check_model, chosen_cache
from stitchcache.pipeline.start import Way, start, started_or_miss
from stitchcache.runtime.model import CompiledModel
from stitchcache.store.layout import flag
from stitchcache.types import Check, SizeRange, TargetRecord

if TYPE_CHECKING:
    from stitchcache.api.preload import Preloaded


def compile(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    splitting_ops: Sequence[str] = (),
    size_ranges: Sequence[SizeRange] | None = None,
    backend: str = "aoti",
    cache: Cache | None = None,
    on_miss: str = "compile",
    require: str | None = None,
    check: str | None = None,
    key_factors: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    preloaded: Preloaded | None = None,
) -> CompiledModel:
    """Compile a model, or load what an earlier process compiled.

    A direct hit traces nothing: the target key (model, arguments, options, environment) leads to an
    entry, provided that every source file that ran during capture is unchanged. Without one the model
    is traced and looked up by its graph. Only if that misses too, its distinct pieces are compiled.

    Args:
        model: In evaluation mode. Its parameters and buffers are bound by reference.
        args: Example positional arguments, any pytree of tensors and plain values.
        kwargs: Example keyword arguments.
        dynamic_shapes: Which sizes may vary, as for ``torch.export.export``.
        splitting_ops: Ops to split at, such as ``"aten::scaled_dot_product_attention"``.
        size_ranges: Ranges of a dynamic size that get pieces of their own.
        backend: ``"aoti"``, ``"inductor"`` or ``"eager"``.
        cache: Where to look and store; the default cache if ``None``.
        on_miss: ``"compile"``, or ``"error"`` to raise instead.
        require: ``"direct"`` raises unless there is a direct hit: the model is never traced.
        check: When the result is compared with the model itself, run once on the example: ``"example"``
            before it is returned, ``"background"`` in a thread, ``"none"`` never. ``None`` takes
            ``STITCHCACHE_CHECK``, or else ``"example"``.
        key_factors: Anything else that the result depends on, name to plain value.
        options: Inductor options, as ``torch.compile(options=...)`` takes them; also
            ``"stitchcache.jobs"`` (processes), ``"stitchcache.verify"`` (compare fresh pieces with
            eager; on by default) and ``"stitchcache.effects"`` (names of ops, with whether they write
            what their schemas do not show).
        preloaded: What ``stitchcache.preload`` returned. Its cache is used; nothing else depends on it.

    Returns:
        A callable that takes and returns what the model does.

    Raises:
        OptionError: An argument makes no sense.
        CaptureError: The model cannot be captured as one graph.
        ModelMismatchError: What was captured does something else than the model, on the example.
        SplittingOpNotFoundError: A splitting op is not in the graph.
        BackendError: A piece cannot be compiled, or is wrong.
        CacheMissError: A miss, and ``on_miss="error"`` or ``STITCHCACHE_REQUIRE=1``; or no direct hit, and
            ``require="direct"`` or ``STITCHCACHE_REQUIRE=direct``.
        StaleEntryError: A direct hit that ``STITCHCACHE_AUDIT=1`` found to be wrong.
    """
    request = Request(
        dynamic_shapes=dynamic_shapes,
        splitting_ops=tuple(splitting_ops),
        size_ranges=tuple(size_ranges or ()),
        backend=backend,
        on_miss=on_miss,  # type: ignore[arg-type]
        require=require,  # type: ignore[arg-type]
        check=check,  # type: ignore[arg-type]
        key_factors=dict(key_factors or {}),
        options=dict(options or {}),
    )
    if preloaded is not None and cache is None:
        cache = preloaded.cache
    elif preloaded is not None and cache is not preloaded.cache:
        raise OptionError(
            "cache and preloaded name two Cache objects: give the same one to preload() and compile().",
            option="preloaded",
        )
    return compile_request(model, args, kwargs or {}, request, chosen_cache(cache), ready=preloaded)


def compile_request(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    request: Request,
    cache: Cache,
    on_progress: OnProgress | None = None,
    ready: Ready | None = None,
) -> CompiledModel:
    """:func:`compile` with its options in one record; see there."""
    check_model(model, args, kwargs)
    with collection_paused():
        wanted = want(model, args, kwargs, request, cache, on_progress, ready)
        found = find(wanted)
        served = found if isinstance(found, Miss) else _serve(wanted, found)
    if not isinstance(served, Miss):
        return served
    if ready is not None:
        # Children are forked from here on, and must not inherit locks that its thread holds.
        ready.wait()
    # A direct hit must not pay for importing what captures, splits and compiles.
    from stitchcache.pipeline.trace import compile_traced

    return compile_traced(wanted, served)


def _serve(wanted: Wanted, hit: Hit) -> CompiledModel | Miss:
    """Start a direct hit; one that cannot be used, or that the look refuses, is a miss."""
    if flag("STITCHCACHE_AUDIT"):
        # An audit traces, which a direct hit has no use for otherwise.
        from stitchcache.pipeline.trace import audit

        audit(wanted, hit)
    record, look = hit.record, None
    if wanted.request.checked != "none":
        # A start without a look has no use for what compares.
        from stitchcache.pipeline.look import looker

        look = looker(wanted, on_mismatch=lambda reason: _refuse(wanted, record, reason))
    served = started_or_miss(
        hit.artifact,
        wanted.site,
        lambda: start(
            hit.artifact,
            Way(hit="direct"),
            wanted.model,
            wanted.site,
            target=wanted.target,
            objects=CodeObjects(record.code if record is not None else ()),
            ready=wanted.ready,
            look=look,
        ),
    )
    if not isinstance(served, Miss):
        if look is None:
            served.check = Check(state="unchecked", reason="check='none'")
        if record is not None:
            served.changed = changed_from(wanted, record, hit.artifact.bindings)
        return served
    return replace(served, record=record)


def _refuse(wanted: Wanted, record: TargetRecord | None, reason: str) -> None:
    """Nobody is served by a record again before a trace has replaced it."""
    if record is None or wanted.target.key is None:
        return
    # Rare, and it brings in all that traces.
    from stitchcache.pipeline.trace import store_target

    store_target(wanted, wanted.target.key, replace(record, refused=reason))
