"""From a stitching graph to the source of the function that runs it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch

from stitchcache.codegen.arguments import Ref, argument_text
from stitchcache.codegen.bindings import Bindings, dotted
from stitchcache.codegen.liveness import INDENT, body_lines
from stitchcache.codegen.lower import Lowering
from stitchcache.codegen.names import RESERVED, Namespace, literal
from stitchcache.codegen.reach import BUILTINS
from stitchcache.errors import OptionError

_GRAPH_HASH = re.compile(r"[0-9A-Za-z_.:-]*\Z")
_WIDTH = 100


def generate_execution_code(
    split_gm: torch.fx.GraphModule,
    *,
    boxed: Collection[str] = (),
    abi: Literal["bound", "list"] = "bound",
    graph_hash: str = "",
) -> tuple[str, list[str], list[Any]]:
    """Write a Python function that does what a stitching graph does.

    The code is a pure function of the graph and the options. `compile_execution_fn` turns it into a
    callable, in this process or another one.

    Args:
        split_gm: The graph. ``GraphModule`` submodules are inlined, at any depth.
        boxed: Qualified names of submodules whose callables take one list of arguments and return a
            sequence. A ``GraphModule`` named here is called, not inlined.
        abi: ``"bound"`` is ours; ``"list"`` is the form that vLLM's ``compile_execution_fn`` takes.
        graph_hash: Named in the function's docstring.

    Returns:
        The source; the names of the submodules, parameters and buffers that it takes, in order of
        first use; and the constants that it takes.

    Raises:
        CodegenError: A node has no form as source code.
        UnserializableConstError: An argument can neither be written as a literal nor be pickled.
        OptionError: An option has a value that makes no sense.
    """
    if abi not in ("bound", "list"):
        raise OptionError(f"abi is {abi!r}; it must be 'bound' or 'list'.", option="abi")
    if not _GRAPH_HASH.match(graph_hash):
        raise OptionError(f"graph_hash is {graph_hash!r}, which is no hash.", option="graph_hash")
    # Ops are bound to names of ours; only the list ABI calls builtins by their own names.
    namespace = Namespace(RESERVED if abi == "bound" else RESERVED | BUILTINS)
    bindings = Bindings(namespace, abi)
    lowering = Lowering(split_gm, namespace, bindings, boxed=boxed, unpack=abi == "bound")
    parameters, names = _parameters(split_gm.graph, namespace, bindings, lowering)
    output = lowering.run(split_gm.graph, "")
    result, kept = "None", []
    if output is not None:
        scope = lowering.scope(output)
        result, kept = argument_text(output.args[0], scope, "args[0]"), scope.uses
    body = body_lines(names, lowering.statements, result, kept)
    title = _title(graph_hash, len(lowering.pieces))
    text = _bound_text if abi == "bound" else _list_text
    return (
        text(bindings, parameters, [f'{INDENT}"""{title}"""', *body]),
        list(bindings.slots),
        bindings.consts,
    )


def _title(graph_hash: str, pieces: int) -> str:
    graph = f"graph {graph_hash}" if graph_hash else "a graph"
    return f"Run {graph}: {pieces} {'piece' if pieces == 1 else 'pieces'}."


def _parameters(
    graph: torch.fx.Graph, namespace: Namespace, bindings: Bindings, lowering: Lowering
) -> tuple[list[str], list[str]]:
    """Name every placeholder before anything else is named, as callers may use the names."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [namespace.take(str(node.target).lstrip("*")) for node in placeholders]
    texts = []
    for node, name in zip(placeholders, names, strict=True):
        lowering.define(node, Ref(name, local=True))
        stars = str(node.target).count("*", 0, 2)
        default = ""
        if node.args:
            # As in Python, a default is one object for all calls.
            value = node.args[0]
            default = f"={literal(value) or bindings.const(value, node.name, 'default')}"
        texts.append("*" * stars + name + default)
    return texts, names


def _bound_text(bindings: Bindings, parameters: Sequence[str], body: Sequence[str]) -> str:
    lines = ["import torch", "import operator", "", "", "def bind(__submods__, __consts__):"]
    tables = {"__submods__": bindings.slots.values(), "__consts__": bindings.const_text.values()}
    for table, names in tables.items():
        if names:
            lines += [f"{INDENT}{line}" for line in _unpack(list(names), table)]
    lines += [f"{INDENT}{name} = {dotted(path)}" for path, name in bindings.ops.items()]
    lines += ["", f"{INDENT}def execution_fn({', '.join(parameters)}):"]
    lines += [f"{INDENT}{line}" for line in body]
    lines += ["", f"{INDENT}return execution_fn", ""]
    return "\n".join(lines)


def _list_text(bindings: Bindings, parameters: Sequence[str], body: Sequence[str]) -> str:
    positional = [text for text in parameters if not text.startswith("**")]
    rest = [text for text in parameters if text.startswith("**")]
    if not any(text.startswith("*") for text in positional):
        positional.append("*")
    header = f"def execution_fn({', '.join([*positional, '__vllm_submods__', *rest])}):"
    return "\n".join(["import torch", "import operator", "", header, *body, ""])


def _unpack(names: Sequence[str], source: str) -> list[str]:
    line = f"{', '.join(names)}{',' if len(names) == 1 else ''} = {source}"
    if len(line) <= _WIDTH:
        return [line]
    lines, current = ["("], INDENT
    for name in names:
        if len(current) + len(name) > _WIDTH:
            lines.append(current.rstrip())
            current = INDENT
        current += f"{name}, "
    return [*lines, current.rstrip(), f") = {source}"]
