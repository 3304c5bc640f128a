"""Run captured graphs of a model that has no data, a few tensors at a time.

Parameters and buffers get random numbers when an op needs them and are dropped after their last use, so
that a model runs in the memory of its activations. Two graphs of one model see the same numbers, because
a name decides them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from stitchcache.graph.effects import written_placeholders
from stitchcache.pieces.check import clone_all
from stitchcache.pieces.stand_ins import stand_in
from stitchcache.torchside.tensors import has_fakes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a graph did.

    Args:
        results: All that it returned, values to write back included.
        written: Name to tensor, for what it wrote into.
    """

    results: list[Any]
    written: dict[str, Any]


def run(gm: GraphModule, bound: Mapping[str, tuple[str, torch.Tensor]], leaves: Mapping[str, Any]) -> Outcome:
    """Run a graph.

    Args:
        gm: A flat graph.
        bound: Placeholder to qualified name and tensor, for what the model feeds.
        leaves: Placeholder to value, for what a call brings; not changed.

    Raises:
        ValueError: A tensor cannot be made up.
    """
    runner = _Runner(gm, bound)
    given = dict(zip(leaves, clone_all(list(leaves.values())), strict=True))
    order = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        results = runner.run(*(given.get(name) for name in order))
    names = {placeholder: name for placeholder, (name, _) in bound.items()}
    written = {names.get(name, f"input {order.index(name) - len(bound)}"): name for name in runner.written}
    values = runner.kept | given
    return Outcome(list(results), {label: values.get(name) for label, name in written.items()})


class _Runner(torch.fx.Interpreter):
    """Makes a bound tensor up when a node reads it."""

    def __init__(self, gm: GraphModule, bound: Mapping[str, tuple[str, torch.Tensor]]) -> None:
        super().__init__(gm)
        self._bound = bound
        self.written = written_placeholders(gm)
        # What is written into must be there for the next reader.
        self.kept: dict[str, torch.Tensor] = {}

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a node, with data."""
        made = {source: self._made(source.name) for source in n.all_input_nodes if source.name in self._bound}
        held = {source: self.env[source] for source in made}
        self.env.update(made)
        try:
            fetched: tuple[tuple[Any, ...], dict[str, Any]] = super().fetch_args_kwargs_from_env(n)
        finally:
            self.env.update(held)
        return fetched

    def _made(self, placeholder: str) -> torch.Tensor:
        if placeholder in self.kept:
            return self.kept[placeholder]
        name, tensor = self._bound[placeholder]
        made = stand_in(tensor, name) if has_fakes([tensor]) else clone_all([tensor])[0]
        if placeholder in self.written:
            self.kept[placeholder] = made
        return made


def names_of(bound: Sequence[Any]) -> dict[str, tuple[str, torch.Tensor]]:
    """Bound tensors of a capture, by placeholder."""
    return {item.placeholder: (item.name, item.tensor) for item in bound}
