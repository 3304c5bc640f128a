"""Whether a model still is what a compiled model was compiled from: ``rebind``, ``is_current``, ``load``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from stitchcache.keys.check import check_sources
from stitchcache.keys.digest import make_factor
from stitchcache.keys.environment import SCHEMA_VERSION
from stitchcache.keys.model import model_factors
from stitchcache.keys.walk import Walk
from stitchcache.pipeline.find import Wanted, key_of
from stitchcache.state import state_attributes
from stitchcache.types import BindingSpec, Change, Factor, TargetRecord


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
    names = [name for binding in bindings for name in (binding.name, *binding.aliases)]
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
        state = state_attributes(model, names)
        found = _first_change(target.factors, now.factors, ("model.", "code.", "torch."), state)
        if found is None and (reason := check_sources(record, walk)) is not None:
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


def changed_from_entry(
    factors: Sequence[Factor], bindings: Sequence[BindingSpec]
) -> Callable[[torch.nn.Module], Change | None]:
    """What tells a model from the one that an entry was compiled from, by the entry's factors alone."""
    names = [name for binding in bindings for name in (binding.name, *binding.aliases)]

    # Another schema writes values in another way; names of classes are the same in all.
    schema = make_factor("env.schema", str(SCHEMA_VERSION))
    alike = all(factor.digest == schema.digest for factor in factors if factor.name == schema.name)

    def changed(model: torch.nn.Module) -> Change | None:
        now = model_factors(model)
        unknown = now.unsound
        if unknown is None and not any(factor.name == "model.class" for factor in factors):
            unknown = "the entry does not say what it was compiled from"
        if unknown is not None:
            return Change(name="model", was="", now=unknown, unknown=True)
        state = state_attributes(model, names)
        return _first_change(factors, now.factors, ("model.",) if alike else ("model.class",), state)

    return changed


def _first_change(
    before: Iterable[Factor], now: Iterable[Factor], prefixes: tuple[str, ...], state: Collection[str]
) -> Change | None:
    old = {factor.name: factor for factor in before if factor.name.startswith(prefixes)}
    new = {factor.name: factor for factor in now if factor.name.startswith(prefixes)}
    for name in dict.fromkeys([*old, *new]):
        if name.startswith("model.attributes.") and name.rpartition(".")[2] in state:
            continue
        was, is_now = old.get(name), new.get(name)
        if was is None or is_now is None or was.digest != is_now.digest:
            return Change(name=name, was=_value(was), now=_value(is_now))
    return None


def _value(factor: Factor | None) -> str:
    return "not there" if factor is None else repr(factor.value)
