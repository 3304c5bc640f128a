"""``stitchcache.compile`` and ``stitchcache.load``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

import torch

from stitchcache import collection_paused
from stitchcache.cache import Cache, chosen_cache
from stitchcache.encoding import UnkeyableError
from stitchcache.errors import BindError, GraphHashError, OptionError, check_kind
from stitchcache.keys.model import model_factors
from stitchcache.options import CudaGraphs, SizeRange
from stitchcache.pipeline import changed_from, first_change, start, started_or_miss
from stitchcache.pipeline.find import (
    Hit,
    Miss,
    OnProgress,
    Request,
    Site,
    Wanted,
    check_model,
    find,
    find_by_graph,
    want,
)
from stitchcache.runtime.model import CompiledModel, check_environment, refuse_change
from stitchcache.state import devices_of, taken_apart
from stitchcache.store import flag
from stitchcache.types import Change, Check, is_digest

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
    on_mismatch: str = "error",
    require: str | None = None,
    check: str | None = None,
    key_factors: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    cuda_graphs: CudaGraphs | None = None,
    preloaded: Preloaded | None = None,
    on_progress: OnProgress | Literal["bar"] | None = None,
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
        on_miss: ``"compile"``; ``"error"`` to raise instead; or ``"eager"`` to run the model as it is until
            a child process has compiled it, see ``CompiledModel.status``, ``wait`` and ``on_ready``.
        on_mismatch: ``"error"`` raises ``InputMismatchError`` for a call outside of what was captured;
            ``"eager"`` runs the model instead, and counts it in ``CompiledModel.mismatches``.
        require: ``"direct"`` raises unless there is a direct hit: the model is never traced.
        check: When the result is compared with the model itself, run once on the example: ``"example"``
            before it is returned, ``"background"`` in a thread, ``"none"`` never. ``None`` takes
            ``STITCHCACHE_CHECK``, or else ``"example"``.
        key_factors: Anything else that the result depends on, name to plain value.
        options: Inductor options, as ``torch.compile(options=...)`` takes them; also
            ``"stitchcache.jobs"`` (processes), ``"stitchcache.nice"`` (priority of what compiles for
            ``on_miss="eager"``, 0 to 19; by default only cores that are idle), ``"stitchcache.verify"``
            (compare fresh pieces with eager; on by default) and ``"stitchcache.effects"`` (names of ops,
            with whether they write what their schemas do not show).
        cuda_graphs: How calls are recorded into CUDA graphs; ``None`` records none. In no key.
        preloaded: What ``stitchcache.preload`` returned. Its cache is used; nothing else depends on it.
        on_progress: Called with a ``stitchcache.Progress`` as things happen; ``"bar"`` shows them on stderr,
            live on a terminal or in a notebook.

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
    given: dict[str, Any] = {
        "dynamic_shapes": dynamic_shapes,
        "splitting_ops": splitting_ops,
        "size_ranges": size_ranges,
        "backend": backend,
        "on_miss": on_miss,
        "on_mismatch": on_mismatch,
        "require": require,
        "check": check,
        "key_factors": key_factors,
        "options": options,
        "cuda_graphs": cuda_graphs,
    }
    request = Request(**given)
    if preloaded is not None:
        # Whoever has one has imported this.
        from stitchcache.api.preload import Preloaded

        check_kind("preloaded", preloaded, Preloaded, "what stitchcache.preload() returned")
        if cache is not None and cache is not preloaded.cache:
            said = "cache and preloaded name two Cache objects: give the same one to preload() and compile()."
            raise OptionError(said, option="preloaded")
        cache = preloaded.cache
    work = partial(
        compile_request, model, args, {} if kwargs is None else kwargs, request, chosen_cache(cache)
    )
    if on_progress == "bar":
        # Whoever shows nothing needs nothing for it.
        from stitchcache.api.progress import bar

        with bar() as told:
            return work(told, preloaded)
    check_kind("on_progress", on_progress, (Callable, NoneType), "a function of one argument, or 'bar'")
    return work(on_progress, preloaded)


def compile_request(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    request: Request,
    cache: Cache,
    on_progress: OnProgress | None = None,
    ready: Preloaded | None = None,
) -> CompiledModel:
    """:func:`compile` with its options in one record; see there."""
    check_model(model, args, kwargs)
    if isinstance(model, CompiledModel):
        raise OptionError("model is compiled already. Give the model that it was made of.", option="model")
    with collection_paused():
        wanted = want(model, args, kwargs, request, cache, on_progress, ready)
        found = find(wanted)
        served = found if isinstance(found, Miss) else _serve(wanted, found)
    if isinstance(served, Miss):
        served = _compile(wanted, served)
    if request.on_mismatch == "eager":
        served.leave_misfits(wanted.site.device, partial(_count_misfit, served, cache))
    return served


def _compile(wanted: Wanted, miss: Miss) -> CompiledModel:
    if wanted.site.ready is not None:
        # Children are forked from here on, and must not inherit locks that its thread holds.
        wanted.site.ready.wait()
    # A direct hit must not pay for importing what captures, splits and compiles.
    if wanted.request.eager_first:
        from stitchcache.pipeline.eager_first import EagerFirst

        return EagerFirst(wanted, miss)
    from stitchcache.pipeline.trace import compile_traced

    return compile_traced(wanted, miss)


def _count_misfit(compiled: CompiledModel, cache: Cache, argument: str) -> None:
    # A counter's name has no space, quote or "=".
    name = "".join(c if c.isalnum() or c in "_.[]" else "_" for c in argument)
    cache.count(f"mismatch.{compiled.graph_hash[:12]}.{name}")


def _serve(wanted: Wanted, hit: Hit) -> CompiledModel | Miss:
    """Start a direct hit; one that cannot be used, or that the look refuses, is a miss."""
    if flag("STITCHCACHE_AUDIT"):
        # An audit traces, which a direct hit has no use for otherwise.
        from stitchcache.pipeline.trace import audit

        audit(wanted, hit)
    record, look, graphs = hit.record, None, wanted.request.cuda_graphs
    if wanted.request.checked != "none":
        # A start without a look has no use for what compares.
        from stitchcache.pipeline.look import looker

        look = looker(wanted, record=record)
    served = started_or_miss(
        hit.artifact,
        wanted.site,
        lambda: start(hit, wanted.model, wanted.site, target=wanted.target, look=look, cuda_graphs=graphs),
    )
    if isinstance(served, Miss):
        return replace(served, record=record)
    if look is None:
        served.check = Check(state="unchecked", reason="check='none'")
    if record is not None:
        served.changed = changed_from(wanted, record, hit.artifact.bindings)
    return served


def load(
    source: str | os.PathLike[str],
    model: torch.nn.Module,
    *,
    cache: Cache | None = None,
    trust_model: bool = False,
    cuda_graphs: CudaGraphs | None = None,
) -> CompiledModel:
    """Load an entry for a model, without looking at arguments or sources.

    Args:
        source: A graph hash, a prefix of one that is unique in the cache, or the path of a bundle with one
            entry, which is imported first.
        model: Its parameters and buffers are bound by name; it must be the kind of model that was
            compiled.
        cache: Where to look; the default cache if ``None``.
        trust_model: Take the model although nothing shows that it is the kind that was compiled: it holds
            something that no key can stand for, or the entry does not say what it was compiled from.
        cuda_graphs: How calls are recorded into CUDA graphs, at their use; ``None`` records none.

    Returns:
        The callable.

    Raises:
        OptionError: An argument is of a wrong type.
        GraphHashError: No entry has that hash.
        AmbiguousPrefixError: More than one entry begins with it.
        EntryDamagedError: The entry or one of its pieces is damaged or gone.
        EnvironmentMismatchError: It was compiled for another processor, GPU, libc or torch.
        BindError: The model is not the kind that was compiled, or cannot be compared.
        UntrustedEntryError: Others could have written the entry.
    """
    check_kind("source", source, (str, os.PathLike), "a graph hash, or the beginning of one")
    check_kind("model", model, torch.nn.Module, "a torch.nn.Module")
    check_kind("cuda_graphs", cuda_graphs, (CudaGraphs, NoneType), "a stitchcache.CudaGraphs(...)")
    prefix, store, (device, devices) = os.fspath(source), chosen_cache(cache), devices_of(model)
    site = Site(cache=store, label=type(model).__qualname__, device=device, devices=devices)
    if os.path.isfile(prefix) and not set(prefix) <= set("0123456789abcdef"):
        # By name: an extra, which is not a part of other starts.
        entries = importlib.import_module("stitchcache.ext.bundle").import_bundle(store, prefix).entries
        if len(entries) != 1:
            said = f"it has {len(entries)} entries, which are imported now: load one by its graph hash"
            raise OptionError(f"{prefix}: {said}", option="source")
        (prefix,) = entries
    # The remote can be asked for a whole hash only.
    found = find_by_graph(prefix if store.remote and is_digest(prefix) else store.find(prefix), site)
    if isinstance(found, Miss):
        raise GraphHashError(
            f"entry {prefix[:12]} in {store.root} cannot be read. Compile the model again.", prefix=prefix
        )
    artifact = found.artifact
    name = f"entry {artifact.graph_hash[:12]}"
    if artifact.input_spec is None:
        raise BindError(
            f"{name} was stored by an engine, or is a legacy entry, and belongs to no model. Load it with "
            f"stitchcache.load_execution({artifact.graph_hash[:12]!r}, submod_callables).",
            name="input_spec",
            expected="an entry of stitchcache.compile",
            actual=f"format {artifact.format_version}, no contract",
        )
    captured = next((factor.value for factor in artifact.factors if factor.name == "graph.capture"), None)
    if captured is not None:
        raise BindError(
            f"{name} is of a graph that torch.compile captured, whose arguments only Dynamo knows. "
            'Run torch.compile(model, backend="stitchcache") again; it will hit.',
            name="graph.capture",
            expected="an entry of stitchcache.compile",
            actual=captured,
        )
    check_environment(artifact, name)

    def changed(other: torch.nn.Module) -> Change | None:
        """Without an example, the factors of the model alone tell."""
        other = taken_apart(other)
        try:
            now = model_factors(other)
        except UnkeyableError as error:
            return Change(name="model", was="", now=str(error), unknown=True)
        if not any(factor.name == "model.class" for factor in artifact.factors):
            unknown = "the entry does not say what it was compiled from"
            return Change(name="model", was="", now=unknown, unknown=True)
        return first_change(artifact.factors, now, ("model.",), other, artifact.bindings)

    refuse_change(site.timed("key", lambda: changed(model)), artifact, model, trusted=trust_model)
    compiled = start(replace(found, way="load"), model, site, cuda_graphs=cuda_graphs)
    compiled.changed = changed
    return compiled
