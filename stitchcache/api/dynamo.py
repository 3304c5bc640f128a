"""The backend of ``torch.compile(model, backend="stitchcache")``.

Dynamo traces in every process; pieces and stitching code come from the cache, by the graph's hash. One call
of the backend is one graph: a model with graph breaks, or with sizes that Dynamo captures apart, has several.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import NoneType
from typing import Any

import torch
from torch.fx import GraphModule

from stitchcache import errors
from stitchcache.cache import Cache
from stitchcache.capture.dynamo import label_of
from stitchcache.pipeline import start_with
from stitchcache.pipeline.find import Hit, Miss, OnProgress, Request, check_model, find_by_graph
from stitchcache.pipeline.make import plan_entry
from stitchcache.pipeline.trace import compile_planned, dynamo_source
from stitchcache.runtime.graph import CompiledGraph
from stitchcache.torchside.dynamo import fix_own_floats, outside_tracing

log = logging.getLogger("stitchcache")

# Options of ours that torch.compile(options=...) may carry beside Inductor's.
_REQUEST = ("splitting_ops", "backend", "on_miss", "key_factors")
# What others may be taken for, and what to do instead.
_FOREIGN = {
    "dynamic_shapes": "use torch.compile(dynamic=True) or torch._dynamo.mark_dynamic",
    "size_ranges": "Dynamo's guards decide which graph a size gets",
    "jobs": "write 'stitchcache.jobs'",
    "verify": "write 'stitchcache.verify'",
    "require": "Dynamo traces in every process, so there are no direct hits",
    "check": "a backend sees only Dynamo's graph",
    "label": "entries are named after the function that Dynamo captured",
}


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> CompiledGraph | Any:
    """Compile one of Dynamo's graphs, or load what an earlier process compiled.

    Args:
        gm: The graph.
        example_inputs: One a placeholder: parameters, buffers, arguments, sizes.
        options: ``torch.compile``'s. ``splitting_ops``, ``backend``, ``cache`` (a directory or a
            :class:`~stitchcache.Cache`), ``on_miss``, ``key_factors`` and ``stitchcache.*`` mean what they
            mean to :func:`stitchcache.compile`; the rest is for Inductor.
        mode: ``torch.compile``'s; there are no modes here.

    Returns:
        What Dynamo calls instead of the graph. It runs without autograd. A graph that cannot be traced or
        written down, or that the compiler gets wrong, is returned as it is, with a warning.

    Raises:
        OptionError: An option makes no sense.
        BackendError: Not called by Dynamo; or a piece cannot be compiled.
        CacheMissError: A miss, and ``on_miss="error"`` or ``STITCHCACHE_REQUIRE=1``.
    """
    request, cache = _read_options(options or {}, mode)
    if not any(node.op in {"call_function", "call_method", "call_module"} for node in gm.graph.nodes):
        return gm.forward
    fix_own_floats(gm)
    request = replace(request, label=label_of(gm))
    if torch.is_grad_enabled() and any(getattr(value, "requires_grad", False) for value in example_inputs):
        log.warning(
            "%s: results will have no gradients, as compiled pieces are for inference. "
            "Call the model under torch.no_grad() or torch.inference_mode().",
            request.label,
        )
    try:
        return _compiled(gm, example_inputs, request, cache)
    except (errors.CaptureError, errors.SplitError, errors.CodegenError, errors.PieceMismatchError) as error:
        log.warning(
            "%s: this graph runs op by op and is not cached: %s. torch.compiler.disable on the part of the "
            "model that it is about leaves the rest to be compiled.",
            request.label,
            str(error).rstrip("."),
        )
        return gm.forward


def compile_graphs(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    request: Request,
    cache: Cache,
    how: Mapping[str, Any],
) -> list[CompiledGraph]:
    """Let ``torch.compile`` capture a model on its example; its graphs, in the order of their capture.

    Raises:
        CaptureError: No graph of it can be stored. Dynamo and the forward raise what they will.
    """
    graphs: list[CompiledGraph] = []

    def backend(gm: GraphModule, inputs: Sequence[Any], **more: Any) -> Any:
        made = compile_graph(gm, inputs, **more)
        graphs.extend([made] if isinstance(made, CompiledGraph) else [])
        return made

    options = {name: getattr(request, name) for name in _REQUEST}
    check_model(model, args, kwargs)
    given = {**options, "cache": cache, **request.options}
    with torch.no_grad():
        torch.compile(model, backend=backend, options=given, **how)(*args, **kwargs)
    if not graphs:
        said = "torch.compile captured no graph that can be compiled and stored; the log says why."
        raise errors.CaptureError(f"{request.label}: {said}", reason="no graph")
    return graphs


def _read_options(options: Mapping[str, Any], mode: str | None) -> tuple[Request, Cache]:
    if mode not in (None, "default"):
        raise errors.OptionError(
            f"mode={mode!r}: backend='stitchcache' has no modes. Leave it out, or give Inductor's options.",
            option="mode",
        )
    left = dict(options)
    for name in _FOREIGN.keys() & left.keys():
        raise errors.OptionError(
            f"options[{name!r}] means nothing to torch.compile(backend='stitchcache'): {_FOREIGN[name]}.",
            option=f"options[{name!r}]",
        )
    ours = {name: left.pop(name) for name in _REQUEST if name in left}
    where = left.pop("cache", None)
    errors.check_kind(
        "options['cache']", where, (Cache, str, os.PathLike, NoneType), "a directory or a stitchcache.Cache"
    )
    cache = where if isinstance(where, Cache) else Cache(where)
    return Request(**ours, options=left), cache


def _compiled(gm: GraphModule, inputs: Sequence[Any], request: Request, cache: Cache) -> CompiledGraph | Any:
    """Capture, plan, and start what the graph leads to, or make it."""
    source = dynamo_source(gm, inputs, request, cache)
    site = source.site
    with outside_tracing():
        planned = plan_entry(source)

        def begin(found: Hit, miss: Miss) -> CompiledGraph:
            def link(pieces: Mapping[str, Any], _constants: Mapping[str, torch.Tensor]) -> CompiledGraph:
                way = None if found.way == "aside" else found.way
                return CompiledGraph(found.artifact, pieces, source.model, gm.forward, way)

            # Dynamo traces in every process: a graph hit is no direct hit that was missed.
            return start_with(link, found, site, None if found.way else miss)

        def refuse(miss: Miss) -> errors.CacheMissError:
            why = f" ({miss.reason})" if miss.cause != "new" else ""
            return errors.CacheMissError(
                f"{site.label}: no entry for graph {planned.graph_hash[:12]} in {cache.root}{why}, and a "
                "miss is an error here. Run the same torch.compile once where compiling is allowed.",
                target=site.label,
                reason=miss.reason,
            )

        def aside(miss: Miss) -> Any:
            # Few choose it.
            from stitchcache.pipeline.eager_first import eager_graph, with_few_jobs

            def work(tell: OnProgress) -> None:
                asking = replace(site, on_progress=tell, asks=True)
                there = replace(source, request=with_few_jobs(request), site=asking)
                with outside_tracing():
                    compile_planned(replace(planned, source=there), miss, begin=begin, refuse=refuse)

            def take() -> Any:
                found = find_by_graph(planned.graph_hash, site)
                if isinstance(found, Miss):
                    raise errors.StoreWriteError(
                        f"{site.label}: entry {planned.graph_hash[:12]} was compiled, and could not be "
                        f"stored in {cache.root}.",
                        path=str(cache.root),
                        reason=found.reason,
                    )
                return begin(replace(found, way="aside"), miss)

            return eager_graph(gm, site.label, request, site.device, work, take)

        return compile_planned(
            planned,
            Miss(reason="no entry for this graph", cause="new"),
            begin=begin,
            refuse=refuse,
            aside=aside if request.eager_first else None,
        )
