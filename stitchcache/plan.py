"""Decide what is compiled: split a captured graph, make pieces self-contained, hash. Compiles nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from stitchcache.errors import SplitError
from stitchcache.graph.canonical import graph_hash
from stitchcache.graph.effects import alias_hazards, attribute_of, called, mutates, target_name
from stitchcache.graph.split import split_graph
from stitchcache.graph.stitching import bind_placeholders, lower_sizes, pin_strides
from stitchcache.pieces import Backend, Piece
from stitchcache.pieces.check import clone_all
from stitchcache.state import drawn_back
from stitchcache.torchside.ops import HigherOrderOperator, OpOverload, is_view
from stitchcache.torchside.state import has_fakes
from stitchcache.types import Factor

# What runs a piece op by op.
_FALLBACK = "eager"
_FREE = ("empty", "new_empty", "sym_size", "sym_numel")


@dataclass(frozen=True, slots=True)
class Plan:
    """A split graph, ready to be compiled.

    Args:
        split_gm: The stitching graph with its pieces; ``structure`` is its hash.
        pieces: In order of first use; several may have one key.
        attributes: Attribute path in ``split_gm`` to the tensor's name in the model.
    """

    split_gm: GraphModule
    pieces: tuple[Piece, ...]
    attributes: dict[str, str]
    structure: str


def plan(
    gm: GraphModule,
    bound: dict[str, tuple[str, torch.Tensor]],
    constants: Sequence[str],
    splitting_ops: Sequence[str],
    backend: Backend,
    factors: Sequence[Factor],
) -> Plan:
    """Plan the compilation of a captured graph, which is not changed.

    Args:
        gm: Flat graph.
        bound: Placeholder to name and tensor, for what the model feeds.
        constants: Placeholders of leaves that the capture baked in.
        splitting_ops: As the user gave them.
        backend: Compiles the pieces, but for those whose meaning it would change.
        factors: What distinguishes compiled pieces beyond their graph.

    Raises:
        SplitError: The graph cannot be split so that pieces are self-contained, or lacks a splitting op.
    """
    split_gm, items = split_graph(gm, (*splitting_ops, *sorted(backend.foreign_ops(gm))))
    splitting = [node.target for item in items if item.is_splitting_graph for node in item.graph.graph.nodes]
    for op in splitting:
        if isinstance(op, HigherOrderOperator):
            raise SplitError(
                f"splitting op {target_name(op)!r} calls graphs of its own and can only run inside a piece. "
                "Leave it out of splitting_ops."
            )
    compute = [item for item in items if not item.is_splitting_graph]
    # Allocating and making views is not worth a compiled call.
    passive = [item.submod_name for item in compute if all(map(_is_free, item.graph.graph.nodes))]
    names = [item.submod_name for item in compute if item.submod_name not in passive]
    attributes = bind_placeholders(split_gm, bound, constants)
    uncompiled = {*alias_hazards(split_gm, names), *lower_sizes(split_gm, names)}
    pin_strides(split_gm, names, passive, [name for name in names if name in uncompiled])
    pieces = []
    for name in names:
        graph, chosen = attribute_of(split_gm, name), _FALLBACK if name in uncompiled else backend.name
        key = graph_hash(graph, [*factors, Factor(name="piece.backend", value=chosen, digest=chosen)])
        pieces.append(Piece(name=name, key=key, gm=graph, backend=chosen))
    return Plan(split_gm, tuple(pieces), attributes, graph_hash(split_gm))


def _is_free(node: Node) -> bool:
    if node.op in {"placeholder", "output", "get_attr"}:
        return next(called(node), None) is None
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload):
        # Arithmetic on sizes, and taking results apart.
        return not isinstance(node.target, HigherOrderOperator)
    return is_view(node.target) or str(node.target).split(".")[1].startswith(_FREE)


def examples_for(planned: Plan, missing: Sequence[Piece], leaves: Sequence[Any]) -> dict[str, list[Any]]:
    """Record real inputs for pieces: by key, those of the piece's call, before that call; none without data.

    The model's own tensors are left as they were: where anything in the graph writes, it runs on copies.
    """
    split_gm = planned.split_gm
    nodes = [node for node in split_gm.graph.nodes if node.op == "get_attr"]
    tensors = {str(node.target): attribute_of(split_gm, str(node.target)) for node in nodes}
    if has_fakes([*leaves, *tensors.values()]):
        return {}
    writes = any(mutates(module.graph) for module in split_gm.modules() if isinstance(module, GraphModule))
    if writes:
        # Together, so that what was shared stays shared.
        copies = clone_all([*tensors.values(), *leaves])
        tensors, leaves = dict(zip(tensors, copies, strict=False)), copies[len(tensors) :]
    inputs: dict[str, list[Any]] = {}
    keys = {piece.name: piece.key for piece in missing}

    class Recorder(Interpreter):
        """Runs the split graph, and keeps what it gives to pieces."""

        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            return tensors[str(target)]

        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target in keys:
                inputs[keys[str(target)]] = clone_all(args) if writes else list(args)
            return super().call_module(target, args, kwargs)

    devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
    with torch.no_grad(), drawn_back(devices):
        Recorder(split_gm).run(*leaves)
    return inputs
