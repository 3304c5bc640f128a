"""Decide what is compiled: split, make pieces self-contained, hash. Compiles nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, Target

from stitchcache.errors import SplitError
from stitchcache.graph.canonical import graph_hash
from stitchcache.graph.effects import alias_hazards, attribute_of, called, mutates, target_name
from stitchcache.graph.split import check_splitting_ops, split_graph, submodule
from stitchcache.graph.stitching import bind_placeholders, drop_placeholders, lower_sizes, pin_strides
from stitchcache.pieces.backends import Backend
from stitchcache.pieces.build import Examples
from stitchcache.pieces.check import clone_all
from stitchcache.state import drawn_back
from stitchcache.torchside.ops import HigherOrderOperator, OpOverload, is_view
from stitchcache.torchside.tensors import has_fakes
from stitchcache.types import Factor


@dataclass(frozen=True, slots=True)
class PlannedPiece:
    """One call of a piece in the stitching graph.

    Args:
        name: Submodule name.
        key: Equal for equal pieces, in this model or another.
        gm: Its graph.
        backend: ``eager`` where the wanted backend cannot keep its meaning.
    """

    name: str
    key: str
    gm: GraphModule
    backend: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A split graph, ready to be compiled.

    Args:
        split_gm: The stitching graph with its pieces.
        pieces: In order of first use; several may have one key.
        attributes: Attribute path in ``split_gm`` to the tensor's name in the model.
        splitting_ops: Ops that it was split at, those that the backend cannot compile included.
        structure: Hash of the split graph alone.
    """

    split_gm: GraphModule
    pieces: tuple[PlannedPiece, ...]
    attributes: dict[str, str]
    splitting_ops: tuple[str, ...]
    structure: str


def plan(
    gm: GraphModule,
    bound: dict[str, tuple[str, torch.Tensor]],
    constants: Sequence[str],
    splitting_ops: Sequence[str],
    backend: Backend,
    fallback: Backend,
    factors: Sequence[Factor],
) -> Plan:
    """Plan the compilation of a captured graph.

    Args:
        gm: Flat graph; not changed.
        bound: Placeholder to name and tensor, for what the model feeds.
        constants: Placeholders of leaves that the capture baked in.
        splitting_ops: As the user gave them.
        backend: Compiles the pieces.
        fallback: Runs pieces that ``backend`` would change the meaning of.
        factors: What distinguishes compiled pieces beyond their graph.

    Returns:
        The plan.

    Raises:
        SplittingOpNotFoundError: A splitting op is not in the graph.
        SplitError: The graph cannot be split so that pieces are self-contained.
    """
    check_splitting_ops(gm, splitting_ops)
    ops = (*splitting_ops, *sorted(backend.foreign_ops(gm)))
    split_gm, items = split_graph(gm, ops)
    for item in items:
        if item.is_splitting_graph:
            _refuse_control_flow(item.graph)
    compute = [item for item in items if not item.is_splitting_graph]
    passive = [item.submod_name for item in compute if _is_trivial(item.graph)]
    pieces = [item.submod_name for item in compute if item.submod_name not in passive]
    attributes = bind_placeholders(split_gm, bound)
    used = drop_placeholders(split_gm, list(constants))
    if used:
        raise SplitError(
            f"the graph computes with {', '.join(used)}, which the capture should have baked in. "
            "Give these arguments as part of dynamic_shapes, or as tensors."
        )
    backends = dict.fromkeys(pieces, backend)
    for name in alias_hazards(split_gm, pieces):
        backends[name] = fallback
    for name in lower_sizes(split_gm, pieces):
        backends[name] = fallback
    uncompiled = [name for name in pieces if backends[name] is not backend]
    pin_strides(split_gm, pieces, passive, uncompiled)
    planned = []
    for name in pieces:
        graph = submodule(split_gm, name)
        chosen = backends[name]
        named = [*factors, Factor(name="piece.backend", value=chosen.name, digest=chosen.name)]
        planned.append(PlannedPiece(name, graph_hash(graph, named), graph, chosen.name))
    return Plan(split_gm, tuple(planned), attributes, ops, graph_hash(split_gm))


_FREE = ("empty", "new_empty", "sym_size", "sym_numel")


def _is_trivial(piece: GraphModule) -> bool:
    """Whether a piece only allocates and makes views: not worth a compiled call."""
    return all(_is_free(node) for node in piece.graph.nodes)


def _is_free(node: Node) -> bool:
    if node.op in {"placeholder", "output", "get_attr"}:
        return next(called(node), None) is None
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload):
        # Arithmetic on sizes, and taking results apart.
        return not isinstance(node.target, HigherOrderOperator)
    return is_view(node.target) or str(node.target).split(".")[1].startswith(_FREE)


def _refuse_control_flow(item: GraphModule) -> None:
    for node in item.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise SplitError(
                f"splitting op {target_name(node.target)!r} calls graphs of its own and can only run "
                "inside a piece. Leave it out of splitting_ops."
            )


def examples_for(plan: Plan, missing: Sequence[PlannedPiece], leaves: Sequence[Any]) -> Examples:
    """Record real inputs for pieces, where there are any.

    The model's own tensors are left as they were: where anything in the graph writes, it runs on
    copies.

    Args:
        plan: What was split.
        missing: One piece for each key.
        leaves: Arguments of the stitching graph, in order.

    Returns:
        The inputs of each piece's first call, before that call. None where the arguments or the model's
        tensors have no data.
    """
    nodes = plan.split_gm.graph.nodes
    bound = [attribute_of(plan.split_gm, str(node.target)) for node in nodes if node.op == "get_attr"]
    if has_fakes([*leaves, *bound]):
        return Examples({}, made_up=True)
    recorder = _Recorder(plan.split_gm, {piece.name: piece.key for piece in missing})
    devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
    with torch.no_grad(), drawn_back(devices):
        recorder.run(*recorder.prepare(list(leaves)))
    return Examples(recorder.inputs)


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
