"""``stitchcache.load``: an entry by its graph hash, whatever led to it."""

from __future__ import annotations

import os

import torch

from stitchcache.artifact.record import Artifact
from stitchcache.cache import Cache
from stitchcache.errors import BindError, GraphHashError, OptionError
from stitchcache.keys.module_tree import model_factors
from stitchcache.pipeline.find import Miss, find_by_graph
from stitchcache.pipeline.request import Clock, Site, chosen_cache
from stitchcache.pipeline.start import start
from stitchcache.runtime.environment import check_environment
from stitchcache.runtime.model import CompiledModel
from stitchcache.state import devices_of


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
    check_environment(artifact, f"entry {artifact.graph_hash[:12]}")
    clock.timed("key", lambda: _check_kind(model, artifact, trust_model))
    device, devices = devices_of(model)
    site = Site(cache=store, label=label, device=device, devices=devices, clock=clock)
    return start(artifact, model, site, hit="load")


def _check_kind(model: torch.nn.Module, artifact: Artifact, trusted: bool) -> None:
    """Class, tree and attributes decide what a graph computes; they must be those of the capture."""
    name, stored = artifact.graph_hash[:12], {factor.name: factor for factor in artifact.factors}
    if "graph.capture" in stored:
        raise BindError(
            f"entry {name} is of a graph that torch.compile captured, whose arguments only Dynamo "
            'knows. Run torch.compile(model, backend="stitchcache") again; it will hit.',
            name="graph.capture",
            expected="an entry of stitchcache.compile",
            actual=stored["graph.capture"].value,
        )
    now = model_factors(model)
    differing = next((f for f in now.factors if f.name in stored and stored[f.name].digest != f.digest), None)
    if differing is not None:
        was = stored[differing.name].value
        raise BindError(
            f"entry {name} was compiled from another model: {differing.name} was {was!r} and is "
            f"{differing.value!r}. Compile this model instead.",
            name=differing.name,
            expected=was,
            actual=differing.value,
        )
    unknown = now.unsound or ("" if "model.class" in stored else "the entry does not say what its model was")
    if unknown and not trusted:
        raise BindError(
            f"nothing shows that {type(model).__qualname__} is what entry {name} was compiled from: "
            f"{unknown}. Compile the model instead, or pass trust_model=True if you know that it is.",
            name="model.class",
            expected="a model that can be compared",
            actual=unknown,
        )
