"""``stitchcache.compile``: the direct road, the traced road, and the cold one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from stitchcache.api.request import OnProgress, Request, check_model, chosen_cache
from stitchcache.api.run import Run
from stitchcache.cache import Cache
from stitchcache.errors import OptionError
from stitchcache.pause import collection_paused
from stitchcache.runtime.model import CompiledModel
from stitchcache.types import SizeRange

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
        key_factors: Anything else that the result depends on, name to plain value.
        options: Inductor options, as ``torch.compile(options=...)`` takes them; also
            ``"stitchcache.jobs"`` (processes) and ``"stitchcache.verify"`` (compare fresh pieces with
            eager; on by default).
        preloaded: What ``stitchcache.preload`` returned. Its cache is used; nothing else depends on it.

    Returns:
        A callable that takes and returns what the model does.

    Raises:
        OptionError: An argument makes no sense.
        CaptureError: The model cannot be captured as one graph.
        SplittingOpNotFoundError: A splitting op is not in the graph.
        BackendError: A piece cannot be compiled, or is wrong.
        CacheMissError: A miss, and ``on_miss="error"`` or ``STITCHCACHE_REQUIRE=1``.
        StaleEntryError: A direct hit that ``STITCHCACHE_AUDIT=1`` found to be wrong.
    """
    request = Request(
        dynamic_shapes=dynamic_shapes,
        splitting_ops=tuple(splitting_ops),
        size_ranges=tuple(size_ranges or ()),
        backend=backend,
        on_miss=on_miss,  # type: ignore[arg-type]
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
    return compile_request(model, args, kwargs or {}, request, chosen_cache(cache), preloaded=preloaded)


def compile_request(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    request: Request,
    cache: Cache,
    on_progress: OnProgress | None = None,
    preloaded: Preloaded | None = None,
) -> CompiledModel:
    """:func:`compile` with its options in one record; see there."""
    check_model(model, args, kwargs)
    with collection_paused():
        run = Run(model, args, dict(kwargs), request, cache, on_progress, preloaded)
        compiled = run.direct()
    if compiled is None:
        if preloaded is not None:
            # Children are forked from here on, and must not inherit locks that its thread holds.
            preloaded.wait()
        # A direct hit must not pay for importing what captures, splits and compiles.
        from stitchcache.api.traced import compile_traced

        compiled = compile_traced(run)
    return compiled
