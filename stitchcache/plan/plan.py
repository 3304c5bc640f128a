"""Decide what is compiled: split, make pieces self-contained, hash. Compiles nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule

from stitchcache.backends import Backend
from stitchcache.errors import SplitError
from stitchcache.graph import graph_hash, split_graph
from stitchcache.graph.aliasing import alias_hazards
from stitchcache.graph.binding import bind_placeholders, drop_placeholders
from stitchcache.graph.boundary import pin_strides
from stitchcache.graph.sizes import lower_sizes
from stitchcache.graph.split import check_splitting_ops, submodule
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
    pieces = [i.submod_name for i in items if not i.is_splitting_graph and not _is_trivial(i.graph)]
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
    pin_strides(split_gm, pieces)
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
    for node in piece.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            schema = node.target._schema
            views = [
                r.alias_info for r in schema.returns if r.alias_info is not None and not r.alias_info.is_write
            ]
            if not views and not str(node.target).split(".")[1].startswith(_FREE):
                return False
        elif node.op in {"call_method", "call_module"}:
            return False
    return True
