"""The backend of ``torch.compile(model, backend="stitchcache")``.

Dynamo traces in every process; pieces and stitching code come from the cache, by the graph's hash. One call
of the backend is one graph: a model with graph breaks, or with sizes that Dynamo captures apart, has several.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from stitchcache.api.cold import compile_pieces
from stitchcache.api.open import open_artifact
from stitchcache.api.request import Request, devices_of
from stitchcache.api.trace import Traced, fact, trace
from stitchcache.api.traced import environment_of, unique_factors
from stitchcache.artifact.record import Artifact
from stitchcache.cache import Cache
from stitchcache.capture.dynamo import capture_graph, label_of
from stitchcache.errors import (
    BackendError,
    BindError,
    CacheMissError,
    CaptureError,
    CodegenError,
    EntryFormatError,
    LinkError,
    OptionError,
    PieceMismatchError,
    SplitError,
    UntrustedEntryError,
)
from stitchcache.graph.opnames import matches
from stitchcache.graph.symbols import without_guards
from stitchcache.runtime.graph import CompiledGraph, held_tensors
from stitchcache.torchside.dynamo import fix_own_floats, outside_tracing
from stitchcache.types import BlobRef

log = logging.getLogger("stitchcache")

# Options of ours that torch.compile(options=...) may carry beside Inductor's.
_REQUEST = ("splitting_ops", "backend", "on_miss", "key_factors")
# What others may be taken for, and what to do instead.
_FOREIGN = {
    "dynamic_shapes": "use torch.compile(dynamic=True) or torch._dynamo.mark_dynamic",
    "size_ranges": "Dynamo's guards decide which graph a size gets",
    "jobs": "write 'stitchcache.jobs'",
    "verify": "write 'stitchcache.verify'",
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
    request = replace(request, label=request.label or label_of(gm))
    try:
        run = _GraphRun(gm, list(example_inputs), request, cache)
        _warn_of_gradients(request.label, example_inputs)
        with outside_tracing():
            return run.by_graph() or run.compiled()
    except (CaptureError, SplitError, CodegenError, PieceMismatchError) as error:
        log.warning(
            "%s: this graph runs op by op and is not cached: %s. torch.compiler.disable on the part of the "
            "model that it is about leaves the rest to be compiled.",
            request.label,
            str(error).rstrip("."),
        )
        return gm.forward


def _read_options(options: Mapping[str, Any], mode: str | None) -> tuple[Request, Cache]:
    if mode not in (None, "default"):
        raise OptionError(
            f"mode={mode!r}: backend='stitchcache' has no modes. Leave it out, or give Inductor's options.",
            option="mode",
        )
    left = dict(options)
    for name in _FOREIGN:
        if name in left:
            raise OptionError(
                f"options[{name!r}] means nothing to torch.compile(backend='stitchcache'): {_FOREIGN[name]}.",
                option=f"options[{name!r}]",
            )
    ours = {name: left.pop(name) for name in _REQUEST if name in left}
    where = left.pop("cache", None)
    if not isinstance(where, (Cache, str, os.PathLike, type(None))):
        raise OptionError(
            f"options['cache'] is a {type(where).__qualname__}: give a directory or a stitchcache.Cache.",
            option="options['cache']",
        )
    ops = ours.get("splitting_ops", ())
    if not isinstance(ops, (list, tuple, set, frozenset)):
        raise OptionError(
            f"splitting_ops is a {type(ops).__qualname__}: give a list of names.", option="splitting_ops"
        )
    ours["splitting_ops"] = tuple(sorted(ops) if isinstance(ops, (set, frozenset)) else ops)
    cache = where if isinstance(where, Cache) else Cache(where)
    return Request(**ours, options=left), cache


def _warn_of_gradients(label: str, example_inputs: Sequence[Any]) -> None:
    wanted = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )
    if wanted:
        log.warning(
            "%s: results will have no gradients, as compiled pieces are for inference. "
            "Call the model under torch.no_grad() or torch.inference_mode().",
            label,
        )


class _GraphRun:
    """One graph; lives for one call of the backend."""

    def __init__(self, gm: GraphModule, example_inputs: list[Any], request: Request, cache: Cache) -> None:
        self._began = time.perf_counter()
        self._gm, self._cache = gm, cache
        captured = capture_graph(gm, example_inputs)
        present = [
            op
            for op in request.splitting_ops
            if any(matches(node.target, op) for node in captured.gm.graph.nodes if node.op == "call_function")
        ]
        if len(present) < len(request.splitting_ops):
            absent = sorted(set(request.splitting_ops).difference(present))
            # No error: another graph of the model may have them.
            log.info("%s: this graph has no %s to split at", request.label, ", ".join(absent))
        self.request = replace(request, splitting_ops=tuple(present))
        self._held = held_tensors([item.tensor.detach() for item in captured.bound])
        self._device, self._devices = devices_of(self._held, example_inputs)
        self._environment = environment_of(self.request, self._devices, request.label)
        with outside_tracing():
            self._traced: Traced = trace(
                self._held,
                captured,
                [(None, captured)],
                self.request,
                self._environment,
                entry_only=(fact("graph.capture", "torch.compile", "torch.compile"),),
            )

    def by_graph(self) -> CompiledGraph | None:
        """Load from the cache; ``None`` is a miss."""
        label, key = self.request.label, self._traced.graph_hash
        try:
            artifact = self._cache.get(key)
            if artifact is None:
                return None
            with self._cache.hold(artifact):
                opened = open_artifact(artifact, self._cache, self._device)
            return None if opened is None else self._finish(artifact, opened[0], hit="graph")
        except (UntrustedEntryError, EntryFormatError, LinkError, BindError, BackendError) as error:
            log.warning("%s: entry %s is not used: %s", label, key[:12], error)
        except OSError as error:
            log.warning("%s: entry %s cannot be loaded: %s", label, key[:12], error)
        return None

    def compiled(self) -> CompiledGraph:
        """Compile, with other processes kept from doing the same."""
        key = self._traced.graph_hash
        if self.request.miss_is_error:
            raise CacheMissError(
                f"{self.request.label}: no entry for graph {key[:12]} in {self._cache.root}, and a miss is "
                "an error here. Run the same torch.compile once where compiling is allowed.",
                target=self.request.label,
                reason="no entry for this graph",
            )
        with self._cache.lock(key):
            return self.by_graph() or self._cold()

    def _cold(self) -> CompiledGraph:
        with without_guards(self._traced.capture.gm.graph):
            artifact, pieces, _ = compile_pieces(
                self._traced,
                self.request,
                self._cache,
                device=self._device,
                devices=self._devices,
                factors=unique_factors((*self._environment, *self._traced.factors)),
                label=self.request.label,
                tell=lambda _stage, _done, _total, _left: None,
            )
        return self._finish(artifact, pieces, hit=None)

    def _finish(self, artifact: Artifact, pieces: Mapping[str, Any], hit: str | None) -> CompiledGraph:
        compiled = CompiledGraph(
            artifact, pieces, self._held, cache_hit=hit, read_blob=self._read_blob, eager=self._gm.forward
        )
        seconds = time.perf_counter() - self._began
        for event in ("hit.graph",) if hit else ("compiled", "miss.new"):
            self._cache.count(event)
        self._cache.count("microseconds.spent", int(seconds * 1e6))
        if hit:
            saved = max(0, int((artifact.compile_seconds - seconds) * 1e6))
            self._cache.count("microseconds.saved", saved)
        said = "graph hit" if hit else "compiled"
        log.info("%s: %s %s in %.3f s", self.request.label, said, artifact.graph_hash[:12], seconds)
        return compiled

    def _read_blob(self, blob: BlobRef) -> bytes:
        path = self._cache.blob_path(blob)
        if path is None:
            raise BackendError(
                f"{self.request.label}: piece {blob.digest[:12]} is not in {self._cache.root} any more, so "
                "the graph cannot be saved. Compile it again with a cache that can be written.",
                backend=self.request.backend,
            )
        return path.read_bytes()
