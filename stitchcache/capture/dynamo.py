"""Take over a graph that ``torch.compile`` captured.

It is traced once more, down to the ops that ``torch.export`` would give, so that splitting ops have the same
names on both roads and equal pieces are shared between them. Dynamo guards what its graph relies on, also
what this trace adds to it, so there is no contract to check on a call.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from stitchcache.capture.contract import input_spec
from stitchcache.capture.export import BoundTensor, Capture
from stitchcache.capture.regions import replace_by_value
from stitchcache.errors import CaptureError
from stitchcache.graph import symbols
from stitchcache.graph.effects import attribute_of, attributes_of
from stitchcache.graph.symbols import SymbolNames
from stitchcache.pieces import FAILURES
from stitchcache.torchside import dynamo, is_fake, is_transformed, is_wrapper, tree
from stitchcache.torchside.dynamo import fake_inputs, fake_mode, make_fx
from stitchcache.types import OutputSpec


def capture_graph(gm: GraphModule, example_inputs: Sequence[Any]) -> Capture:
    """Bring a graph of ``torch.compile`` into the form that is planned; a CaptureError if that fails."""
    tensors = [value for value in example_inputs if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        if is_wrapper(tensor):
            raise _unusual(f"an argument that is a {type(tensor).__qualname__}")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise _unusual("a sparse, quantized or opaque argument")
        if tensor.device.type == "meta":
            raise _unusual("an argument on the meta device")
    mode = fake_mode()
    autocast = any(map(torch.is_autocast_enabled, {tensor.device.type for tensor in tensors}))
    traced = _trace(gm, example_inputs, mode, autocast)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    inputs, values = [node.name for node in placeholders], [node.meta.get("val") for node in placeholders]
    _bake_numbers(traced)
    bound = _lift_tensors(traced, mode)
    results = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    names, paths = SymbolNames(), [f"args[{index}]" for index in range(len(inputs))]
    call = tree.dumps(tree.flatten((tuple(example_inputs), {}))[1])
    return Capture(
        gm=traced,
        bound=tuple(bound),
        user_inputs=tuple(inputs),
        input_spec=input_spec(traced, inputs, paths, values, call, names),
        output_spec=OutputSpec(tree=tree.dumps(tree.flatten(tuple(results))[1]), count=len(results)),
        example=tuple(symbols.example_of(value) for value in example_inputs),
        names=names,
    )


def label_of(gm: GraphModule) -> str:
    """What to call a graph of Dynamo's in listings: the function that it is of, if that is known."""
    for node in gm.graph.nodes:
        frame = re.search(r'File "([^"]*)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
        if frame is not None:
            return f"{frame[3]} at {os.path.basename(frame[1])}:{frame[2]} (torch.compile)"
    return "torch.compile"


def _trace(gm: GraphModule, example_inputs: Sequence[Any], mode: Any, autocast: bool) -> GraphModule:
    """Trace a graph of Dynamo's down to aten, in Dynamo's own fake mode."""
    # Traced below autocast and below torch.func, what they do becomes ops; that takes composite ops such
    # as attention apart too.
    plain, lowered = drop_modes(gm, autocast)
    try:
        fakes = fake_inputs(mode, example_inputs)
        before = [_layout(fake) for fake in fakes]
        with mode, torch.inference_mode(False), torch.no_grad():
            traced = make_fx(plain, pre_dispatch=not lowered)(*fakes)
            if not lowered and any(map(is_transformed, _values(traced))):
                if before != [_layout(fake) for fake in fakes]:
                    raise CaptureError(
                        "a graph that torch.compile captured uses torch.func and changes the shape of an "
                        "argument; only one of them can be traced.",
                        reason="torch.func and a changed shape",
                    )
                traced = make_fx(plain)(*fakes)
    except CaptureError:
        raise
    except FAILURES as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CaptureError(
            f"a graph that torch.compile captured cannot be traced: {type(error).__name__}: {reason[:500]}",
            reason=f"{type(error).__name__}: {reason}",
        ) from error
    for body in traced.modules():
        if any(map(is_fake, [*vars(body).values(), *body.buffers(recurse=False)])):
            raise CaptureError(
                "a graph of torch.compile uses a tensor that is neither an input nor made in the graph.",
                reason="untraced tensor",
            )
    for value in _values(traced):
        if is_wrapper(value):
            raise _unusual(f"a {type(value).__qualname__} in it")
    return traced


def _unusual(what: str) -> CaptureError:
    return CaptureError(
        f"a graph that torch.compile captured has {what}; only plain tensors with strides can be passed to "
        "compiled pieces. stitchcache.compile takes models with quantized weights.",
        reason=what,
    )


def _layout(value: Any) -> Any:
    return (value.shape, value.stride()) if isinstance(value, torch.Tensor) else None


def _nodes(gm: GraphModule) -> Iterator[Node]:
    """Nodes of a graph and of those that it passes to higher-order ops."""
    for body in gm.modules():
        if isinstance(body, GraphModule):
            yield from body.graph.nodes


def _values(gm: GraphModule) -> Iterator[Any]:
    for node in _nodes(gm):
        yield from tree.flatten(node.meta.get("val"))[0]


def _bake_numbers(gm: GraphModule) -> None:
    """Write sizes and numbers that Dynamo guards as literals, where it passes them all the same."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and symbols.expression(value).is_Integer:
            value = int(value)
        if node.op == "placeholder" and isinstance(value, (int, float, str)):
            replace_by_value(node, value)


def _lift_tensors(gm: GraphModule, mode: Any) -> list[BoundTensor]:
    """Make placeholders of the tensors that a graph holds: they are bound when it is linked, not hashed."""
    found: dict[str, tuple[Node, BoundTensor]] = {}
    first = next(iter(gm.graph.nodes))
    for node in list(gm.graph.nodes):
        path = str(node.target)
        tensor = attribute_of(gm, path) if node.op == "get_attr" else None
        if not isinstance(tensor, torch.Tensor):
            continue
        if path not in found:
            item = BoundTensor(f"held_{len(found)}", f"held.{len(found)}", "buffer", tensor)
            with gm.graph.inserting_before(first):
                placeholder = gm.graph.placeholder(item.placeholder)
            value = node.meta.get("val")
            fake = isinstance(value, torch.Tensor)
            placeholder.meta["val"] = value if fake else mode.from_tensor(tensor, static_shapes=True)
            found[path] = (placeholder, item)
        node.replace_all_uses_with(found[path][0])
        gm.graph.erase_node(node)
    gm.recompile()
    return [item for _, item in found.values()]


def drop_modes(gm: GraphModule, autocast: bool) -> tuple[GraphModule, bool]:
    """A copy without calls that switch modes which the graph is not in when it runs.

    And whether it must be traced below autocast (``autocast`` is the caller's own) and the transforms of
    ``torch.func``, because a part of it is in one of them.
    """
    nodes = list(_nodes(gm))
    autocast = autocast or any(_name(node) == dynamo.ENTER_AUTOCAST and _enables(node) for node in nodes)
    transforms = any(dynamo.is_transform(node) for node in nodes)
    # A derivative is taken in gradient mode, also where results have no gradients.
    gone = dynamo.INFERENCE_CALLS | (frozenset() if transforms else dynamo.GRAD_CALLS)
    gone |= frozenset() if autocast else dynamo.AUTOCAST_CALLS
    return _without(gm, gone), autocast or transforms


def _without(gm: GraphModule, gone: frozenset[str]) -> GraphModule:
    graph = deepcopy(gm.graph)
    for node in reversed(list(graph.nodes)):
        if _name(node) in gone:
            graph.erase_node(node)
        elif _name(node) == dynamo.CHECKPOINT_CALL:
            _call_plainly(graph, node)
        elif _name(node) == dynamo.DATA_CALL:
            # Tracing does not see what comes of .data.
            node.op, node.target = "call_method", "detach"
    held = attributes_of(gm, graph.nodes).items()
    attributes = {
        path: _without(value, gone) if isinstance(value, GraphModule) else value for path, value in held
    }
    left = GraphModule(attributes, graph)
    left.meta.update(gm.meta)
    return left


def _call_plainly(graph: Graph, node: Node) -> None:
    """Have a checkpointed block called as any other."""
    body = node.args[0]
    if isinstance(body, Node) and body.op == "get_attr":
        node.op, node.target, node.args, node.kwargs = "call_module", str(body.target), node.args[1:], {}
        if not body.users:
            graph.erase_node(body)


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _enables(enter: Node) -> bool:
    """Whether an ``_enter_autocast(device, dtype, enabled, cache_enabled)`` switches autocast on."""
    enabled = enter.args[2] if len(enter.args) > 2 else enter.kwargs.get("enabled", True)
    return enabled is not False
