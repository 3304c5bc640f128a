"""Write out the modes that a forward switches inside itself: gradients and autocast.

``torch.export`` keeps a block under ``torch.no_grad`` or ``torch.autocast`` as a call of a higher-order op
over a graph of its own, which could not be split. Gradients mean nothing in inference, so those blocks are
inlined. Under autocast, also the caller's own, the casts are written out as ops first: calls run without
any.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from stitchcache.errors import CaptureError
from stitchcache.graph.effects import attribute_of, called, place_attribute, target_name
from stitchcache.torchside import fake_mode_of
from stitchcache.torchside.ops import HigherOrderOperator, OpOverload, autocast_has_rule, schema_of

Modes = Mapping[str, torch.dtype]
"""Device type to the dtype that autocast lowers to there; devices without autocast are absent."""

_CASTS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype_layout}
_DATA_DECIDES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def ambient_modes(devices: set[str]) -> Modes:
    """The caller's own autocast."""
    return {d: torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)}


def inline_regions(gm: GraphModule, modes: Modes) -> None:
    """Inline blocks under changed modes, in place, and write out what autocast does in and around them."""
    for node in list(gm.graph.nodes):
        inner = _modes_of(node, modes)
        if inner is not None:
            _inline(gm, node, inner)
        elif node.op == "get_attr":
            for body in called(node):
                if any(_modes_of(user, modes) is None for user in node.users):
                    inline_regions(body, modes)
        elif modes:
            _write_casts(gm.graph, node, modes)
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    gm.recompile()


def _modes_of(node: Node, modes: Modes) -> Modes | None:
    """Modes inside the block that a node calls; ``None`` for any other node."""
    if not isinstance(node.target, HigherOrderOperator):
        return None
    if str(node.target) == "wrap_with_set_grad_enabled":
        return modes
    if str(node.target) != "wrap_with_autocast":
        return None
    device, dtype, enabled = (*node.args, None, None)[:3]
    inside = {kind: lowered for kind, lowered in modes.items() if kind != device}
    if enabled or enabled is None:
        lowered = dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(str(device))
        inside[str(device)] = lowered
    return inside


def _inline(gm: GraphModule, call: Node, modes: Modes) -> None:
    """Replace the call of a block by the block's own nodes."""
    position, body = next(
        (i, body) for i, arg in enumerate(call.args) if isinstance(arg, Node) for body in called(arg)
    )
    inline_regions(body, modes)
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    values: dict[Node, Any] = dict(zip(placeholders, call.args[position + 1 :], strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                values[node] = gm.graph.get_attr(_adopt(gm, body, str(node.target)))
                values[node].meta = dict(node.meta)
            elif node.op not in {"placeholder", "output"}:
                values[node] = gm.graph.node_copy(node, values.__getitem__)
    output = next(node for node in body.graph.nodes if node.op == "output")
    results: Any = torch.fx.map_arg(output.args[0], values.__getitem__)
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise CaptureError(
                f"{user.name} uses all results of {call.name} together; take them one by one.",
                reason=str(call.target),
            )
        replace_by_value(user, results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def replace_by_value(node: Node, value: Any) -> None:
    """Write a plain value, or another node, wherever a node is used; the node stays."""

    def swap(found: Node) -> Any:
        return value if found is node else found

    for user in list(node.users):
        user.args = torch.fx.map_arg(user.args, swap)
        user.kwargs = torch.fx.map_arg(user.kwargs, swap)


def _adopt(gm: GraphModule, body: GraphModule, path: str) -> str:
    """Move an attribute of a block to the graph around it, under a free name."""
    name = base = path.replace(".", "_")
    numbers = itertools.count(1)
    while hasattr(gm, name):
        name = f"{base}_{next(numbers)}"
    place_attribute(gm, name, attribute_of(body, path))
    return name


def _write_casts(graph: Graph, node: Node, modes: Modes) -> None:
    """Cast the inputs of an op as autocast would; leave it alone where autocast would."""
    op = node.target
    if not isinstance(op, OpOverload) or schema_of(op).is_mutable or _DATA_DECIDES & set(op.tags):
        return
    promised = _dtypes(node.meta.get("val"))
    floating = [source for source in node.all_input_nodes if _is_floating(source)]
    if not floating or not any(dtype.is_floating_point for dtype in promised):
        return
    device = floating[0].meta["val"].device.type
    if device not in modes or op in _CASTS:
        return
    # Fake tensors let mixed dtypes pass where the real op refuses them.
    given = {source.meta["val"].dtype for source in floating}
    mixed = len(given) > 1 and autocast_has_rule(op, device)
    fake_mode = fake_mode_of(node.meta["val"] for node in floating) or contextlib.nullcontext()
    with torch.no_grad(), no_autocast(), fake_mode:
        if not mixed and _result_dtypes(node, None) == promised:
            return
        widest = max(given, key=lambda dtype: dtype.itemsize)
        for dtype in dict.fromkeys((modes[device], torch.float32, widest)):
            if _result_dtypes(node, dtype) != promised:
                continue
            for source in floating:
                if source.meta["val"].dtype != dtype:
                    with graph.inserting_before(node):
                        cast = graph.call_function(torch.ops.aten.to.dtype, (source, dtype))
                    cast.meta["val"] = source.meta["val"].to(dtype)
                    node.replace_input_with(source, cast)
            return
    raise CaptureError(
        f"autocast gives {target_name(op)} results of {promised[0]}, and no cast of its inputs "
        "does. Convert the model with .to(dtype) instead of running it under autocast.",
        reason=f"autocast of {target_name(op)}",
    )


def _is_floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _dtypes(value: Any) -> list[torch.dtype]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [item.dtype for item in items if isinstance(item, torch.Tensor)]


def _result_dtypes(node: Node, dtype: torch.dtype | None) -> list[torch.dtype] | None:
    """Dtypes that an op returns without autocast when its inputs are cast; ``None`` if it refuses."""

    def value(source: Node) -> Any:
        fake: Any = source.meta.get("val")
        return fake.to(dtype) if dtype is not None and _is_floating(source) else fake

    args, kwargs = torch.fx.map_arg(node.args, value), torch.fx.map_arg(node.kwargs, value)
    try:
        return _dtypes(node.target(*args, **kwargs))  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError):
        return None


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """What runs a captured graph: its casts are written out."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
