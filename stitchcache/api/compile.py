"""``stitchcache.compile``: the direct road, the traced road, and the cold one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from stitchcache import tree
from stitchcache.api.cold import compile_pieces
from stitchcache.api.open import open_artifact
from stitchcache.api.request import (
    OnProgress,
    Progress,
    Request,
    check_model,
    device_of,
    devices_of,
)
from stitchcache.api.trace import Traced, fact, trace
from stitchcache.artifact.record import Artifact
from stitchcache.cache import Cache
from stitchcache.errors import CacheMissError, StoreWriteError, UntrustedEntryError
from stitchcache.keys.environment import environment_factors
from stitchcache.keys.sources import SourceRecorder, check_sources
from stitchcache.keys.target import TargetKey, target_key
from stitchcache.keys.torch_state import torch_state_factors
from stitchcache.runtime.model import CompiledModel
from stitchcache.types import Factor, SizeRange, TargetRecord

log = logging.getLogger("stitchcache")

T = TypeVar("T")


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

    Returns:
        A callable that takes and returns what the model does.

    Raises:
        OptionError: An argument makes no sense.
        CaptureError: The model cannot be captured as one graph.
        SplittingOpNotFoundError: A splitting op is not in the graph.
        BackendError: A piece cannot be compiled, or is wrong.
        CacheMissError: A miss, and ``on_miss="error"`` or ``STITCHCACHE_REQUIRE=1``.
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
    return compile_request(model, args, kwargs or {}, request, cache or Cache())


def compile_request(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    request: Request,
    cache: Cache,
    on_progress: OnProgress | None = None,
) -> CompiledModel:
    """:func:`compile` with its options in one record; see there."""
    check_model(model, args, kwargs)
    run = _Run(model, args, dict(kwargs), request, cache, on_progress)
    return run.direct() or run.traced()


class _Run:
    """One compilation; lives for one call."""

    def __init__(
        self,
        model: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        request: Request,
        cache: Cache,
        on_progress: OnProgress | None,
    ) -> None:
        self._began = time.perf_counter()
        self._model, self._args, self._kwargs = model, args, kwargs
        self._request, self._cache, self._on_progress = request, cache, on_progress
        self._timings: dict[str, float] = {}
        self._label = request.label or type(model).__qualname__
        leaves, spec = tree.flatten((args, kwargs))
        paths = tree.leaf_paths(model.forward, args, kwargs)
        self._device = device_of(model, leaves)
        self._devices = devices_of(model, leaves)
        self._target = self._timed(
            "key", lambda: self._target_key(list(zip(paths, leaves, strict=True)), tree.dumps(spec))
        )
        self._reason = self._target.reason or "no entry for this target"

    def direct(self) -> CompiledModel | None:
        """Load without tracing; ``None`` is a miss, and ``_reason`` says why."""
        self._tell("lookup")
        key = self._target.key
        record = self._cache.get_target(key) if key is not None else None
        if record is None:
            return None
        changed = self._timed("sources", lambda: check_sources(record))
        if changed is not None:
            self._reason = changed
            return None
        artifact = self._get(record.graph_hash)
        if artifact is None:
            self._reason = f"the entry {record.graph_hash[:12]} is gone or damaged"
            return None
        return self._open(artifact, "direct")

    def traced(self) -> CompiledModel:
        """Trace; load by graph hash, or compile."""
        self._tell("capture")
        environment = self._environment()
        with SourceRecorder() as recorder:
            traced = self._timed(
                "trace", lambda: trace(self._model, self._args, self._kwargs, self._request, environment)
            )
        record = None
        if self._target.key is not None and recorder.unsound is None:
            record = TargetRecord(
                graph_hash=traced.graph_hash,
                sources=recorder.sources,
                globals=recorder.globals,
                label=self._label,
                created=time.time(),
            )
        elif recorder.unsound is not None:
            self._reason = recorder.unsound
        compiled = self._by_graph(traced)
        if compiled is None and self._request.miss_is_error:
            raise self._miss(traced)
        if compiled is None:
            with self._lock(traced.graph_hash):
                compiled = self._by_graph(traced) or self._cold(traced)
        if record is not None and self._target.key is not None:
            self._store(lambda: self._cache.put_target(str(self._target.key), record))
        return compiled

    def _by_graph(self, traced: Traced) -> CompiledModel | None:
        artifact = self._get(traced.graph_hash)
        return None if artifact is None else self._open(artifact, "graph")

    def _cold(self, traced: Traced) -> CompiledModel:
        began = time.perf_counter()
        factors = (*self._target.factors, *traced.factors)
        artifact, pieces, constants = compile_pieces(
            traced,
            self._args,
            self._kwargs,
            self._request,
            self._cache,
            device=self._device,
            devices=self._devices,
            factors=_unique(factors),
            label=self._label,
            tell=self._tell,
        )
        self._timings["compile"] = time.perf_counter() - began
        return self._finish(artifact, pieces, constants, None)

    def _open(self, artifact: Artifact, hit: str) -> CompiledModel | None:
        try:
            opened = self._timed("load", lambda: open_artifact(artifact, self._cache, self._device))
        except UntrustedEntryError as error:
            log.warning("%s", error)
            opened = None
        if opened is None:
            self._reason = f"a piece of entry {artifact.graph_hash[:12]} is missing, damaged or not trusted"
            return None
        pieces, constants = opened
        return self._finish(artifact, pieces, constants, hit)

    def _finish(
        self, artifact: Artifact, pieces: Mapping[str, Any], constants: Mapping[str, Any], hit: str | None
    ) -> CompiledModel:
        compiled = self._timed(
            "link", lambda: CompiledModel(artifact, self._model, pieces, constants, cache_hit=hit)
        )
        self._timings["total"] = time.perf_counter() - self._began
        compiled.timings = dict(self._timings)
        said = f"{hit} hit" if hit else "compiled"
        because = f" (no direct hit: {self._reason})" if hit != "direct" else ""
        log.info(
            "%s: %s %s in %.3f s%s",
            self._label,
            said,
            artifact.graph_hash[:12],
            self._timings["total"],
            because,
        )
        self._tell("done")
        return compiled

    def _get(self, graph_hash: str) -> Artifact | None:
        try:
            return self._cache.get(graph_hash)
        except UntrustedEntryError as error:
            log.warning("%s", error)
            return None

    def _store(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except StoreWriteError as error:
            log.warning("%s: compiled but not stored: %s", self._label, error)

    def _lock(self, graph_hash: str) -> Any:
        return self._cache.lock(graph_hash)

    def _target_key(self, leaves: list[tuple[str, Any]], tree_text: str) -> TargetKey:
        request = self._request
        return target_key(
            self._model,
            leaves,
            tree_text,
            request.dynamic_shapes,
            request.splitting_ops,
            request.size_ranges,
            request.backend,
            request.backend_options,
            request.key_factors,
        )

    def _environment(self) -> tuple[Factor, ...]:
        request = self._request
        return (
            *environment_factors(request.backend, self._devices),
            *torch_state_factors(),
            fact("request.backend", request.backend, request.backend),
            fact(
                "request.options",
                f"{len(request.backend_options)} set",
                repr(sorted(request.backend_options.items())),
            ),
            fact(
                "request.caller", f"{len(request.key_factors)} set", repr(sorted(request.key_factors.items()))
            ),
        )

    def _miss(self, traced: Traced) -> CacheMissError:
        return CacheMissError(
            f"{self._label}: not in the cache at {self._cache.root} ({self._reason}; "
            f"no entry for graph {traced.graph_hash[:12]} either), and a miss is an error here. "
            "Run 'stitchcache prewarm' where compiling is allowed, with the same model and options.",
            target=self._label,
            key=self._target.key or "",
            reason=self._reason,
        )

    def _timed(self, stage: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return work()
        finally:
            self._timings[stage] = self._timings.get(stage, 0.0) + time.perf_counter() - began

    def _tell(self, stage: str, done: int = 0, total: int = 0) -> None:
        if self._on_progress is not None:
            seconds = time.perf_counter() - self._began
            self._on_progress(
                Progress(target=self._label, stage=stage, done=done, total=total, seconds=seconds)
            )


def _unique(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    return tuple({factor.name: factor for factor in factors}.values())
