"""vLLM's way to compile and to start warm, without vLLM.

As vLLM 0.33 does it: the graph is split at the attention ops, each piece goes through
``torch._inductor.standalone_compile(aot=True)``, equal pieces are compiled and stored once, and one pickled
bundle holds the pieces, the generated stitching code (submodules out of a list by index) and its names.

Left out, all in favour of this way: its guards and bytecode around the graph, its own passes, the lookup of
the size range that it does at every piece, and its configuration. It loads the distinct pieces one after the
other; vLLM uses threads, which Python's lock makes little of on two cores.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx


def save(program: Any, splitting_ops: Sequence[str], path: Path) -> None:
    """Split, compile each distinct piece, and write the bundle.

    Args:
        program: From ``torch.export``.
        splitting_ops: As ``namespace::name``.
        path: The bundle.
    """
    from torch.export.graph_signature import InputKind

    state: list[tuple[str, Any]] = []
    for item in program.graph_signature.input_specs:
        if item.kind is InputKind.CONSTANT_TENSOR:
            state.append(("constant", program.constants[item.target]))
        elif item.kind is InputKind.USER_INPUT:
            state.append(("input", item.arg.name))
        else:
            state.append(("model", item.target))
    split, compiled_names = _split(program.graph_module, splitting_ops)
    fake_mode = next(
        node.meta["val"].fake_mode
        for node in program.graph_module.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    )
    by_key: dict[str, str] = {}
    blobs: dict[str, bytes] = {}
    pieces: dict[str, str] = {}
    with torch._guards.tracing(torch._guards.TracingContext(fake_mode)), torch.no_grad():
        for name in compiled_names:
            piece = _plain_names(split.get_submodule(name))
            key = _key(piece)
            if key not in by_key:
                data = _compile(piece)
                by_key[key] = hashlib.sha256(data).hexdigest()
                blobs[by_key[key]] = data
            pieces[name] = by_key[key]
    code, names = list_code(split, compiled_names)
    bundle = {"code": code, "submod_names": names, "pieces": pieces, "blobs": blobs, "state": state}
    path.write_bytes(pickle.dumps(bundle))


def load(path: Path, model: torch.nn.Module) -> Callable[..., Any]:
    """A callable over the model's inputs, from a bundle.

    Args:
        path: The bundle.
        model: Whose parameters and buffers to use.
    """
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    bundle = pickle.loads(path.read_bytes())
    with torch._functorch.config.patch("bundled_autograd_cache", True):
        loaded = {digest: AOTCompiledArtifact.deserialize(data) for digest, data in bundle["blobs"].items()}
    submods = [loaded[bundle["pieces"][name]] for name in bundle["submod_names"]]
    scope: dict[str, Any] = {}
    exec(compile(bundle["code"], "<execution_fn>", "exec"), scope)
    function = functools.partial(scope["execution_fn"], __vllm_submods__=submods)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    fixed = [tensors[what] if kind == "model" else what for kind, what in bundle["state"] if kind != "input"]
    names = [what for kind, what in bundle["state"] if kind == "input"]

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*fixed, *args, *(kwargs[name] for name in names[len(args) :]))

    return call


def _split(gm: fx.GraphModule, splitting_ops: Sequence[str]) -> tuple[fx.GraphModule, list[str]]:
    """Split in the graph's own order; names of the submodules that get compiled."""
    from torch.fx.passes.split_module import split_module

    part: dict[fx.Node, int] = {}
    splitting: set[int] = set()
    current = 0
    for node in gm.graph.nodes:
        if node.op in {"placeholder", "output"}:
            continue
        if node.target is operator.getitem and node.args[0] in part:
            part[node] = part[node.args[0]]
        elif _is_op(node, splitting_ops):
            current += 1
            part[node] = current
            splitting.add(current)
            current += 1
        else:
            part[node] = current
    known = "tuple_return" in inspect.signature(split_module).parameters
    more: dict[str, Any] = {"tuple_return": True} if known else {}
    split = split_module(gm, None, part.__getitem__, keep_original_order=True, **more)  # type: ignore[arg-type]
    if not known:
        _return_tuples(split)
    names = [str(node.target) for node in split.graph.nodes if node.op == "call_module"]
    return split, [name for name in names if int(name.removeprefix("submod_")) not in splitting]


def _return_tuples(split: fx.GraphModule) -> None:
    """What ``split_module(tuple_return=True)`` does; torch 2.11 returns a single result bare."""
    for node in list(split.graph.find_nodes(op="call_module")):
        piece: Any = split.get_submodule(str(node.target))
        output = piece.graph.output_node()
        if isinstance(output.args[0], (tuple, list)):
            continue
        with split.graph.inserting_after(node):
            taken = split.graph.call_function(operator.getitem, (node, 0))
        node.replace_all_uses_with(taken, delete_user_cb=lambda user, taken=taken: user is not taken)
        taken.meta = dict(node.meta)
        output.args = ((output.args[0],),)
        piece.recompile()
    split.recompile()


def _is_op(node: fx.Node, ops: Sequence[str]) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in ops


def _plain_names(piece: fx.GraphModule) -> fx.GraphModule:
    """The same piece with names that do not tell its layer: equal pieces then have equal keys."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(piece.graph.nodes):
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], values.__getitem__))
            continue
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        target = f"v{index}" if node.op == "placeholder" else node.target
        values[node] = graph.create_node(node.op, target, args, kwargs, name=f"v{index}")
        values[node].meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    return fx.GraphModule(piece, graph)


def _fakes(piece: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in piece.graph.nodes if node.op == "placeholder"]


def _key(piece: fx.GraphModule) -> str:
    """What Inductor's own cache would see of a piece: its code and the metadata of its inputs."""
    inputs = [
        (str(v.dtype), str(tuple(v.shape)), str(v.stride())) if isinstance(v, torch.Tensor) else str(v)
        for v in _fakes(piece)
    ]
    return hashlib.sha256(f"{piece.code}{inputs}".encode()).hexdigest()


def _compile(piece: fx.GraphModule) -> bytes:
    artifact = torch._inductor.standalone_compile(
        piece, _fakes(piece), dynamic_shapes="from_tracing_context", aot=True
    )
    with torch._functorch.config.patch("bundled_autograd_cache", True):
        return artifact.serialize()  # type: ignore[attr-defined, no-any-return]


def list_code(split: fx.GraphModule, compiled: Sequence[str]) -> tuple[str, list[str]]:
    """Stitching code in the form of vLLM's generator, and the submodules' names in the list's order."""
    lines: list[str] = []
    nodes = list(split.graph.nodes)
    index = {name: place for place, name in enumerate(compiled)}
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last[source] = node
    for node in nodes:
        if node.op == "call_module" and str(node.target) in index:
            arguments = ", ".join(_source(a) for a in node.args)
            lines.append(f"{node.name} = __vllm_submods__[{index[str(node.target)]}]({arguments})")
        elif node.op == "call_module":
            lines += _inlined(split.get_submodule(str(node.target)), node)  # type: ignore[arg-type]
        elif node.op == "call_function" and node.target is operator.getitem:
            lines.append(f"{node.name} = {_source(node.args[0])}[{node.args[1]}]")
        elif node.op == "call_function":
            lines.append(f"{node.name} = {_called(node, _source)}")
        elif node.op == "output":
            lines.append(f"return {_source(node.args[0])}")
        elif node.op != "placeholder":
            raise ValueError(f"{node.op} {node.target} in a stitching graph")
        dead = [source.name for source, user in last.items() if user is node]
        if dead and node.op != "output":
            lines.append(f"del {', '.join(dead)}")
    names = ", ".join(node.name for node in nodes if node.op == "placeholder")
    head = f"import torch\nimport operator\n\ndef execution_fn({names}, *, __vllm_submods__):\n    "
    return head + "\n    ".join(lines) + "\n", list(compiled)


def _inlined(piece: fx.GraphModule, call: fx.Node) -> list[str]:
    """A splitting op stands in the stitching code itself."""
    outer = iter(call.args)
    names: dict[fx.Node, str] = {}
    lines = []

    def source(value: Any) -> str:
        return _source(value, names)

    for node in piece.graph.nodes:
        if node.op == "placeholder":
            names[node] = _source(next(outer))
        elif node.op == "output":
            lines += [f"{call.name} = {source(node.args[0])}"] if call.users else []
        else:
            names[node] = f"{call.name}_{node.name}"
            value = f"{source(node.args[0])}[{node.args[1]}]" if node.target is operator.getitem else None
            lines.append(f"{names[node]} = {value or _called(node, source)}")
    # Temporaries of the inlined op die with it.
    inner = [name for node, name in names.items() if node.op != "placeholder"]
    return [*lines, f"del {', '.join(inner)}"] if inner else lines


def _called(node: fx.Node, source: Callable[[Any], str]) -> str:
    arguments = [source(a) for a in node.args] + [f"{k}={source(v)}" for k, v in node.kwargs.items()]
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = f"torch.ops.{target}"
    else:
        name = f"{target.__module__.lstrip('_')}.{target.__name__}"  # type: ignore[union-attr]
    return f"{name}({', '.join(arguments)})"


def _source(value: Any, names: dict[fx.Node, str] | None = None) -> str:
    if isinstance(value, fx.Node):
        return names[value] if names and value in names else value.name
    if isinstance(value, (tuple, list)):
        inner = "".join(f"{_source(item, names)}, " for item in value)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise ValueError(f"{value!r} in a stitching graph")
