"""``stitchcache.load``: an entry by its graph hash, whatever led to it."""

from __future__ import annotations

import os

import torch

from stitchcache.cache import Cache
from stitchcache.errors import BindError, GraphHashError, OptionError
from stitchcache.keys.model import model_factors
from stitchcache.pipeline.find import Miss, bound_attributes, find_by_graph, first_change
from stitchcache.pipeline.request import Clock, Site, chosen_cache
from stitchcache.pipeline.start import Way, start
from stitchcache.runtime.environment import check_environment
from stitchcache.runtime.model import CompiledModel, refuse_change
from stitchcache.state import devices_of
from stitchcache.types import Artifact, Change


def load(
    source: str | os.PathLike[str],
    model: torch.nn.Module,
    *,
    cache: Cache | None = None,
    trust_model: bool = False,
) -> CompiledModel:
    """Load an entry for a model, without looking at arguments or sources.

    Args:
        source: A graph hash, or a prefix of one that is unique in the cache.
        model: Its parameters and buffers are bound by name; it must be the kind of model that was
            compiled.
        cache: Where to look; the default cache if ``None``.
        trust_model: Take the model although nothing shows that it is the kind that was compiled: it holds
            something that no key can stand for, or the entry does not say what it was compiled from.

    Returns:
        The callable.

    Raises:
        GraphHashError: No entry has that hash.
        AmbiguousPrefixError: More than one entry begins with it.
        EntryDamagedError: The entry or one of its pieces is damaged or gone.
        EnvironmentMismatchError: It was compiled for another processor, GPU, libc or torch.
        BindError: The model is not the kind that was compiled, or cannot be compared.
        UntrustedEntryError: Others could have written the entry.
    """
    if not isinstance(model, torch.nn.Module):
        raise OptionError(f"model is a {type(model).__qualname__}, not a torch.nn.Module.", option="model")
    label = type(model).__qualname__
    clock = Clock(label)
    store = chosen_cache(cache)
    found = find_by_graph(store.find(os.fspath(source)), store)
    if isinstance(found, Miss):
        raise GraphHashError(
            f"entry {os.fspath(source)[:12]} in {store.root} cannot be read. Compile the model again.",
            prefix=os.fspath(source),
        )
    artifact = found.artifact
    _refuse_graphs_of_dynamo(artifact)
    check_environment(artifact, f"entry {artifact.graph_hash[:12]}")

    def changed(other: torch.nn.Module) -> Change | None:
        """Without an example, the factors of the model alone tell."""
        now = model_factors(other)
        unknown = now.unsound
        if unknown is None and not any(factor.name == "model.class" for factor in artifact.factors):
            unknown = "the entry does not say what it was compiled from"
        if unknown is not None:
            return Change(name="model", was="", now=unknown, unknown=True)
        return first_change(
            artifact.factors, now.factors, ("model.",), bound_attributes(other, artifact.bindings)
        )

    refuse_change(clock.timed("key", lambda: changed(model)), artifact, model, trusted=trust_model)
    device, devices = devices_of(model)
    site = Site(cache=store, label=label, device=device, devices=devices, clock=clock)
    compiled = start(artifact, Way(hit="load"), model, site)
    compiled.changed = changed
    return compiled


def _refuse_graphs_of_dynamo(artifact: Artifact) -> None:
    captured = next((factor.value for factor in artifact.factors if factor.name == "graph.capture"), None)
    if captured is not None:
        raise BindError(
            f"entry {artifact.graph_hash[:12]} is of a graph that torch.compile captured, whose arguments "
            'only Dynamo knows. Run torch.compile(model, backend="stitchcache") again; it will hit.',
            name="graph.capture",
            expected="an entry of stitchcache.compile",
            actual=captured,
        )
