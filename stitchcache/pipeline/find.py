"""``find``: what a start can be served from, by target key or by graph hash. Traces nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from stitchcache.cache import Cache
from stitchcache.codegen.execution import CodeObjects
from stitchcache.errors import UntrustedEntryError
from stitchcache.keys.check import check_sources
from stitchcache.keys.target import TargetKey, target_key
from stitchcache.keys.walk import Walk
from stitchcache.pipeline.request import Clock, OnProgress, Request, Site
from stitchcache.runtime.call import misfit
from stitchcache.state import devices_of, state_attributes
from stitchcache.torchside import tree
from stitchcache.types import Artifact, BindingSpec, Change, Factor, TargetRecord

if TYPE_CHECKING:
    from dataclasses import dataclass

    from stitchcache.explanation import MissFacts
else:
    from stitchcache.records import dataclass

log = logging.getLogger("stitchcache")


class Ready(Protocol):
    """What a preload may have made ready. It decides nothing."""

    def artifact(self, graph_hash: str) -> Artifact | None:
        """The entry of a graph hash, read and verified; ``None`` where it is not ready."""

    def take(self, graph_hash: str) -> Mapping[tuple[str, str], Any]:
        """Its loaded CPU pieces, by backend and digest of their bytes."""

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until its thread is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be started: a model, an example call, a request, and the key that stands for them.

    Args:
        model: The model.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        leaves: Their leaves, in tree order.
        paths: How a person writes each leaf, such as ``batch['mask']``.
        tree: The tree of the leaves, written down.
        request: Options.
        site: Where.
        target: The target key.
        walk: What computing the key has digested; checking sources need not digest it again.
        ready: What a preload made ready; taken only where it is what was found.
    """

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    leaves: Sequence[Any]
    paths: Sequence[str]
    tree: str
    request: Request
    site: Site
    target: TargetKey
    walk: Walk
    ready: Ready | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """An entry that may be served.

    Args:
        artifact: The entry.
        record: The target record that led to it; ``None`` where the graph hash did.
        objects: Code objects of its generated source, as far as the record has them.
    """

    artifact: Artifact
    record: TargetRecord | None = None
    objects: CodeObjects | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """Why nothing is served.

    Args:
        reason: For people.
        cause: The same in a word, for the statistics: ``new``, ``unkeyable``, ``sources``, ``entry``,
            ``example``, ``piece``, ``refused`` or ``look``.
        record: The newest target record that the key leads to; ``None`` where it leads nowhere.
        facts: What was found out beyond the reason.
    """

    reason: str
    cause: str
    record: TargetRecord | None = None
    facts: MissFacts | None = None


def want(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    request: Request,
    cache: Cache,
    on_progress: OnProgress | None = None,
    ready: Ready | None = None,
) -> Wanted:
    """Compute the target key of a model with an example call.

    Args:
        model: The model; none of its code is run.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        request: Options.
        cache: Where to look and store.
        on_progress: Gets told what happens.
        ready: What a preload made ready.

    Raises:
        OptionError: One of the options or key factors is no plain value.
    """
    label = request.label or type(model).__qualname__
    clock, walk = Clock(label, on_progress), Walk()
    leaves, spec = tree.flatten((args, dict(kwargs)))
    paths = tree.leaf_paths(model.forward, args, dict(kwargs))
    text = tree.dumps(spec)
    device, devices = devices_of(model, leaves)
    return Wanted(
        model=model,
        args=args,
        kwargs=dict(kwargs),
        leaves=leaves,
        paths=paths,
        tree=text,
        request=request,
        site=Site(cache=cache, label=label, device=device, devices=devices, clock=clock),
        target=clock.timed("key", lambda: key_of(model, leaves, paths, text, request, walk)),
        walk=walk,
        ready=ready,
    )


def key_of(
    model: torch.nn.Module,
    leaves: Sequence[Any],
    paths: Sequence[str],
    tree_text: str,
    request: Request,
    walk: Walk,
) -> TargetKey:
    """The target key of a model with a flattened example; the arguments are as in :class:`Wanted`."""
    return target_key(
        model,
        list(zip(paths, leaves, strict=True)),
        tree_text,
        request.dynamic_shapes,
        request.splitting_ops,
        request.size_ranges,
        request.backend,
        request.backend_options,
        request.key_factors,
        walk,
    )


def find(wanted: Wanted) -> Hit | Miss:
    """The entry that the target key leads to.

    A key may have several records: one model, told apart by a global or an environment variable that no key
    covers. The newest whose sources and globals are what they were is taken; a miss tells of the newest.
    """
    key = wanted.target.key
    wanted.site.clock.tell("lookup")
    if key is None:
        return Miss(reason=wanted.target.reason or "this target has no key", cause="unkeyable")
    records = wanted.site.cache.get_target(key)
    first: Miss | None = None
    looked = wanted.request.checked != "none"
    for record in records:
        found = _find_by_record(wanted, record, looked)
        if isinstance(found, Hit):
            return found
        first = first or found
        refused = record.refused is not None and len(records) > 1
        if refused and check_sources(record, wanted.walk, looked=looked) is None:
            # It is about what is wanted here, so an older record must not be served past it.
            break
    return first or Miss(reason="no entry for this target", cause="new")


def _find_by_record(wanted: Wanted, record: TargetRecord, looked: bool) -> Hit | Miss:
    if record.refused is not None:
        return Miss(reason=record.refused, cause="unkeyable", record=record)
    changed = wanted.site.clock.timed("sources", lambda: check_sources(record, wanted.walk, looked=looked))
    if changed is not None:
        return Miss(reason=changed, cause="sources", record=record)
    found = find_by_graph(record.graph_hash, wanted.site.cache, wanted.ready)
    if isinstance(found, Miss) or found.artifact.input_spec is None:
        reason = f"the entry {record.graph_hash[:12]} is gone or damaged"
        return Miss(reason=reason, cause="entry", record=record)
    # torch.export may tie two sizes together by the example's; another example is another target.
    objects = CodeObjects(record.code)
    wrong = misfit(found.artifact, wanted.model.forward, wanted.args, wanted.kwargs, objects)
    if wrong is not None:
        reason = f"the example does not fit what was captured: {wrong}"
        return Miss(reason=reason, cause="example", record=record)
    return Hit(artifact=found.artifact, record=record, objects=objects)


def find_by_graph(graph_hash: str, cache: Cache, ready: Ready | None = None) -> Hit | Miss:
    """The entry of a graph hash; one that cannot be trusted is a miss and a warning."""
    artifact = ready.artifact(graph_hash) if ready is not None else None
    if artifact is None:
        try:
            artifact = cache.get(graph_hash)
        except UntrustedEntryError as error:
            log.warning("%s", error)
    if artifact is None:
        return Miss(reason=f"no entry for graph {graph_hash[:12]}", cause="new")
    return Hit(artifact=artifact)


def changed_from(
    wanted: Wanted, record: TargetRecord, bindings: Sequence[BindingSpec]
) -> Callable[[torch.nn.Module], Change | None]:
    """What tells whether a trace of a model may be another one than the trace that was compiled.

    The model's code and attributes count, torch's settings, and what the capture read beside them. Example
    and options are those of then, and so is the machine.

    Args:
        wanted: What was started. Neither its model nor its tensors are kept.
        record: The sources and globals that its capture read.
        bindings: Tensors that were bound. An attribute that leads to one is not compared, as calls change
            what it holds.
    """
    target, request, paths, tree = wanted.target, wanted.request, wanted.paths, wanted.tree
    unknown = target.reason or record.refused
    leaves = without_data(wanted.leaves) if unknown is None else []

    def changed(model: torch.nn.Module) -> Change | None:
        if unknown is not None:
            return Change(name="model", was="", now=unknown, unknown=True)
        walk = Walk()
        now = key_of(model, leaves, paths, tree, request, walk)
        if now.key is None:
            return Change(name="model", was="", now=now.reason or "", unknown=True)
        # Of the other factors, the example's and the options' are fixed, and a process keeps its machine.
        state = bound_attributes(model, bindings)
        found = first_change(target.factors, now.factors, ("model.", "code.", "torch."), state)
        # A model that was called has warm caches, and is the same model.
        if found is None and (reason := check_sources(record, walk, looked=True)) is not None:
            found = Change(name="sources", was="as captured", now=reason)
        return found

    return changed


def without_data(leaves: Sequence[Any]) -> list[Any]:
    """Leaves with each tensor replaced by one that has its metadata and takes no memory.

    A tensor that occurs twice stays one tensor, as that is part of a key.
    """
    replaced = {
        id(leaf): torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
        for leaf in leaves
        if isinstance(leaf, torch.Tensor)
    }
    return [replaced.get(id(leaf), leaf) for leaf in leaves]


def bound_attributes(model: torch.nn.Module, bindings: Sequence[BindingSpec]) -> Collection[str]:
    """Attributes that lead to tensors which are bound: what they hold is state, and calls change it."""
    return state_attributes(model, [name for item in bindings for name in (item.name, *item.aliases)])


def first_change(
    before: Iterable[Factor], now: Iterable[Factor], prefixes: tuple[str, ...], state: Collection[str]
) -> Change | None:
    """The most telling factor that differs, of those whose names begin so; ``None`` where none does."""
    old = {factor.name: factor for factor in before if factor.name.startswith(prefixes)}
    new = {factor.name: factor for factor in now if factor.name.startswith(prefixes)}
    # An attribute more changes the order of attributes too, and its own factor names it.
    for name in sorted(dict.fromkeys([*old, *new]), key=lambda name: name.endswith("_order")):
        if name.startswith("model.attributes.") and name.rpartition(".")[2] in state:
            continue
        was, is_now = old.get(name), new.get(name)
        if was is None or is_now is None or was.digest != is_now.digest:
            return Change(name=name, was=_value(was), now=_value(is_now))
    return None


def _value(factor: Factor | None) -> str:
    return "not there" if factor is None else repr(factor.value)
