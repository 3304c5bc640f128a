"""``stitchcache.load``: an entry by its graph hash, whatever led to it."""

from __future__ import annotations

import os
import time

import torch

from stitchcache.api.open import open_artifact
from stitchcache.api.request import chosen_cache
from stitchcache.cache import Cache
from stitchcache.errors import BindError, EntryDamagedError, GraphHashError, OptionError
from stitchcache.keys.module_tree import model_factors
from stitchcache.runtime.model import CompiledModel


def load(
    source: str | os.PathLike[str], model: torch.nn.Module, *, cache: Cache | None = None
) -> CompiledModel:
    """Load an entry for a model, without looking at arguments or sources.

    Args:
        source: A graph hash, or a prefix of one that is unique in the cache.
        model: Its parameters and buffers are bound by name; it must be the kind of model that was
            compiled.
        cache: Where to look; the default cache if ``None``.

    Returns:
        The callable.

    Raises:
        GraphHashError: No entry has that hash.
        AmbiguousPrefixError: More than one entry begins with it.
        EntryDamagedError: The entry or one of its pieces is damaged or gone.
        BindError: The model is not the kind that was compiled.
        UntrustedEntryError: Others could have written the entry.
    """
    if not isinstance(model, torch.nn.Module):
        raise OptionError(f"model is a {type(model).__qualname__}, not a torch.nn.Module.", option="model")
    began = time.perf_counter()
    store = chosen_cache(cache)
    graph_hash = store.find(os.fspath(source))
    artifact = store.get(graph_hash)
    if artifact is None:
        raise GraphHashError(
            f"entry {graph_hash[:12]} in {store.root} cannot be read. Compile the model again.",
            prefix=graph_hash,
        )
    _check_kind(model, {f.name: (f.digest, f.value) for f in artifact.factors}, graph_hash)
    device = next((str(p.device) for p in model.parameters() if p.device.type != "cpu"), "cpu")
    with store.hold(artifact):
        opened = open_artifact(artifact, store, device)
    if opened is None:
        raise EntryDamagedError(
            f"a piece of entry {graph_hash[:12]} in {store.root} is missing or damaged. "
            "Compile the model again.",
            path=str(store.root),
            field="pieces",
            reason="missing or damaged",
        )
    pieces, constants = opened
    timings = {"total": time.perf_counter() - began}
    return CompiledModel(artifact, model, pieces, constants, cache_hit="graph", timings=timings)


def _check_kind(model: torch.nn.Module, stored: dict[str, tuple[str, str]], graph_hash: str) -> None:
    """Class, tree and attributes decide what a graph computes; they must be those of the capture."""
    if "graph.capture" in stored:
        raise BindError(
            f"entry {graph_hash[:12]} is of a graph that torch.compile captured, whose arguments only Dynamo "
            'knows. Run torch.compile(model, backend="stitchcache") again; it will hit.',
            name="graph.capture",
            expected="an entry of stitchcache.compile",
            actual=stored["graph.capture"][1],
        )
    for factor in model_factors(model).factors:
        if factor.name in stored and stored[factor.name][0] != factor.digest:
            raise BindError(
                f"entry {graph_hash[:12]} was compiled from another model: {factor.name} was "
                f"{stored[factor.name][1]!r} and is {factor.value!r}. Compile this model instead.",
                name=factor.name,
                expected=stored[factor.name][1],
                actual=factor.value,
            )
