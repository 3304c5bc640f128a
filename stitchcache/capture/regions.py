"""Write out the modes that a forward switches inside itself: gradients and autocast.

``torch.export`` keeps a block under ``torch.no_grad`` or ``torch.autocast`` as a call of a
higher-order op over a graph of its own. Such a block could neither be split nor run without torch's
dispatcher in the right mode. Gradients mean nothing in inference, so those blocks are inlined. Under
autocast the casts are written out as ops, and then the block is inlined too. The caller's own autocast
at the time of the capture is written out in the same way: calls run without any.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from stitchcache.errors import CaptureError
from stitchcache.graph.effects import called, target_name
from stitchcache.torchside.ops import HigherOrderOperator, OpOverload, autocast_has_rule, schema_of
from stitchcache.torchside.tensors import fake_mode_of

Modes = Mapping[str, torch.dtype]
"""Device type to the dtype that autocast lowers to there; devices without autocast are absent."""


def ambient_modes(devices: set[str]) -> dict[str, torch.dtype]:
    """The caller's own autocast."""
    return {
        device: torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)
    }


def inline_regions(gm: GraphModule, modes: Modes) -> None:
    """Inline blocks under changed modes, and write out what autocast does in them.

    Args:
        gm: A graph as exported; changed in place.
        modes: Autocast that was on around the whole of it.

    Raises:
        CaptureError: What autocast does to an op cannot be written out.
    """
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
    name = str(node.target)
    if name == "wrap_with_set_grad_enabled":
        return modes
    if name != "wrap_with_autocast":
        return None
    device, dtype, enabled = (*node.args, None, None)[:3]
    inside = {kind: lowered for kind, lowered in modes.items() if kind != device}
    if enabled or enabled is None:
        inside[str(device)] = (
            dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(str(device))
        )
    return inside


def _inline(gm: GraphModule, call: Node, modes: Modes) -> None:
    """Replace the call of a block by the block's own nodes."""
    position = next(i for i, arg in enumerate(call.args) if isinstance(arg, Node) and _body(arg) is not None)
    source = call.args[position]
    body = _body(source) if isinstance(source, Node) else None
    if body is None:
        raise CaptureError(f"{call.name} calls no graph.", reason=str(call.target))
    inline_regions(body, modes)
    values: dict[Node, Node] = {}
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    values.update(zip(placeholders, call.args[position + 1 :], strict=True))  # type: ignore[arg-type]
    results: Any = ()
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "output":
                results = torch.fx.map_arg(node.args[0], values.__getitem__)
            elif node.op == "get_attr":
                path = _adopt(gm, body, str(node.target))
                values[node] = gm.graph.get_attr(path)
                values[node].meta = dict(node.meta)
            elif node.op != "placeholder":
                values[node] = gm.graph.node_copy(node, values.__getitem__)
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise CaptureError(
                f"{user.name} uses the results of {call.name} as one.", reason=str(call.target)
            )
        result = results[user.args[1]]
        if isinstance(result, Node):
            user.replace_all_uses_with(result)
        else:
            replace_by_value(user, result)
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def replace_by_value(node: Node, value: Any) -> None:
    """Write a plain value wherever a node is used; the node stays."""
    for user in list(node.users):

        def swap(found: Node) -> Any:
            return value if found is node else found

        user.args = torch.fx.map_arg(user.args, swap)
        user.kwargs = torch.fx.map_arg(user.kwargs, swap)


def _body(node: Node) -> GraphModule | None:
    return next(called(node), None)


def _adopt(gm: GraphModule, body: GraphModule, path: str) -> str:
    """Move an attribute of a block to the graph around it, under a free name."""
    value: Any = body
    for part in path.split("."):
        value = getattr(value, part)
    name, number = path.replace(".", "_"), 0
    while hasattr(gm, name):
        number += 1
        name = f"{path.replace('.', '_')}_{number}"
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        gm.register_buffer(name, value)
    else:
        setattr(gm, name, value)
    return name


def _write_casts(graph: Graph, node: Node, modes: Modes) -> None:
    """Cast the inputs of an op as autocast would; leave it alone where autocast would."""
    if not isinstance(node.target, OpOverload) or schema_of(node.target).is_mutable:
        return
    if {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(node.target.tags):
        return
    promised = _dtypes(node.meta.get("val"))
    floating = [n for n in node.all_input_nodes if _is_floating(n)]
    if not floating or not any(dtype.is_floating_point for dtype in promised):
        return
    device = floating[0].meta["val"].device.type
    if device not in modes or node.target in _CASTS:
        return
    # Fake tensors let mixed dtypes pass where the real op refuses them.
    mixed = len({n.meta["val"].dtype for n in floating}) > 1 and autocast_has_rule(node.target, device)
    if not mixed and _result_dtypes(node, None) == promised:
        return
    lowered = modes[device]
    widest = max((n.meta["val"].dtype for n in floating), key=lambda dtype: dtype.itemsize)
    for dtype in dict.fromkeys((lowered, torch.float32, widest)):
        if _result_dtypes(node, dtype) == promised:
            _cast_inputs(graph, node, dtype)
            return
    raise CaptureError(
        f"autocast gives {target_name(node.target)} results of {promised[0]}, and no cast of its inputs "
        "does. Convert the model with .to(dtype) instead of running it under autocast.",
        reason=f"autocast of {target_name(node.target)}",
    )


_CASTS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype_layout}


def _is_floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _dtypes(value: Any) -> list[torch.dtype]:
    if isinstance(value, torch.Tensor):
        return [value.dtype]
    if isinstance(value, (list, tuple)):
        return [item.dtype for item in value if isinstance(item, torch.Tensor)]
    return []


def _result_dtypes(node: Node, dtype: torch.dtype | None) -> list[torch.dtype] | None:
    """Dtypes that an op returns without autocast when its inputs are cast; ``None`` if it refuses."""

    def value(source: Node) -> Any:
        fake: Any = source.meta.get("val")
        return fake.to(dtype) if dtype is not None and _is_floating(source) else fake

    args, kwargs = torch.fx.map_arg(node.args, value), torch.fx.map_arg(node.kwargs, value)
    with _quiet(_fake_mode(node)):
        try:
            return _dtypes(node.target(*args, **kwargs))  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError):
            return None


def _cast_inputs(graph: Graph, node: Node, dtype: torch.dtype) -> None:
    casts: dict[Node, Node] = {}
    with graph.inserting_before(node), _quiet(_fake_mode(node)):
        for source in node.all_input_nodes:
            if _is_floating(source) and source.meta["val"].dtype != dtype:
                casts[source] = graph.call_function(torch.ops.aten.to.dtype, (source, dtype))
                casts[source].meta["val"] = source.meta["val"].to(dtype)
    for source, cast in casts.items():
        node.replace_input_with(source, cast)


def _fake_mode(node: Node) -> Any:
    values = (source.meta.get("val") for source in node.all_input_nodes)
    return fake_mode_of(values) or contextlib.nullcontext()


@contextlib.contextmanager
def _quiet(fake_mode: Any) -> Iterator[None]:
    """No autograd and no autocast, on fake tensors."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(fake_mode)
        yield
