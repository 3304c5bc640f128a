"""Run a split graph op by op on real tensors, and keep what each distinct piece was fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.node import Argument, Target

from stitchcache.graph.effects import mutates
from stitchcache.pieces.check import clone_all
from stitchcache.plan.plan import Plan


def piece_inputs(plan: Plan, leaves: Sequence[Any], wanted: Mapping[str, str]) -> dict[str, list[Any]]:
    """Record real inputs for pieces.

    The model's own tensors are left as they were: where anything in the graph writes, it runs on
    copies.

    Args:
        plan: What was split.
        leaves: Arguments of the stitching graph, in order.
        wanted: Submodule name to piece key, one name for each key.

    Returns:
        Piece key to the inputs of its first call, before that call.
    """
    recorder = _Recorder(plan.split_gm, wanted)
    with torch.no_grad():
        recorder.run(*recorder.prepare(list(leaves)))
    return recorder.inputs


class _Recorder(torch.fx.Interpreter):
    """An interpreter that looks over its own shoulder."""

    def __init__(self, split_gm: GraphModule, wanted: Mapping[str, str]) -> None:
        super().__init__(split_gm)
        self._wanted = wanted
        self._copies: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, list[Any]] = {}
        graphs = [m.graph for m in split_gm.modules() if isinstance(m, GraphModule)]
        self._writes = any(mutates(graph) for graph in graphs)

    def prepare(self, leaves: list[Any]) -> list[Any]:
        """Copy arguments and bound tensors together, so that what was shared stays shared."""
        if not self._writes:
            return leaves
        names = [str(node.target) for node in self.graph.nodes if node.op == "get_attr"]
        bound = [self.fetch_attr(name) for name in names]
        copies = clone_all([*bound, *leaves])
        self._copies = dict(zip(names, copies, strict=False))
        return copies[len(bound) :]

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        name = str(target)
        return self._copies[name] if name in self._copies else super().get_attr(target, args, kwargs)

    def call_module(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        key = self._wanted.get(str(target))
        if key is not None:
            self.inputs[key] = clone_all(args) if self._writes else list(args)
        return super().call_module(target, args, kwargs)
