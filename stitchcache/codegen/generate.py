"""From a stitching graph to the source of the function that runs it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch

from stitchcache.codegen.lower import Lowering, Statement
from stitchcache.codegen.scope import Scope, dotted, literal, variable
from stitchcache.errors import OptionError

_GRAPH_HASH = re.compile(r"[0-9A-Za-z_.:-]*\Z")
_VARIABLE = re.compile("\0([^\0]*)\0")
_INDENT = "    "
_THROWAWAY = "_"


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
    scope = Scope(is_bound=abi == "bound")
    parameters, names = _parameters(split_gm.graph, scope)
    lowering = Lowering(split_gm, scope, boxed)
    output = lowering.run(split_gm.graph, "")
    result = "None" if output is None else scope.text(output, output.args[0], "args[0]")
    graph = f"graph {graph_hash}" if graph_hash else "a graph"
    pieces = len(lowering.pieces)
    title = f'{_INDENT}"""Run {graph}: {pieces} {"piece" if pieces == 1 else "pieces"}."""'
    body = [title, *_body_lines(names, lowering.statements, result)]
    lines = _bound_lines(scope, parameters, body) if scope.is_bound else _list_lines(parameters, body)
    return "\n".join(["import torch", "import operator", "", *lines, ""]), list(scope.slots), scope.consts


def _parameters(graph: torch.fx.Graph, scope: Scope) -> tuple[list[str], list[str]]:
    """Name every placeholder before anything else is named, as callers may use the names."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [scope.take(str(node.target).lstrip("*")) for node in placeholders]
    texts = []
    for node, name in zip(placeholders, names, strict=True):
        scope.define(node, variable(name))
        stars = str(node.target).count("*", 0, 2)
        default = ""
        if node.args:
            # As in Python, a default is one object for all calls.
            default = f"={literal(node.args[0]) or scope.const(node.args[0], node, 'default')}"
        texts.append("*" * stars + name + default)
    return texts, names


def _body_lines(parameters: Sequence[str], statements: Sequence[Statement], result: str) -> list[str]:
    """Write a function's body, freeing each value right after its last use.

    A value takes the variable of one that the same statement uses last: assigning frees the old
    value, at the same point as a ``del`` would and without one. What the return reads is not freed:
    the frame that ends does that.
    """
    needed = set(_VARIABLE.findall(result))
    backwards: list[tuple[Statement, list[bool], list[str]]] = []
    for statement in reversed(statements):
        live = [name in needed for name in statement.targets]
        if not (statement.effect or any(live)):
            continue
        # dict keeps the order of first use, so the text does not depend on hashing.
        used = dict.fromkeys(_VARIABLE.findall(statement.expression))
        last = [name for name in used if name not in needed]
        needed.update(last)
        backwards.append((statement, live, last))
    unused = [name for name in parameters if name not in needed]
    lines = [f"{_INDENT}del {', '.join(unused)}"] if unused else []
    variables = {name: name for name in parameters}
    for statement, live, last in reversed(backwards):
        lines += _statement_lines(statement, live, last, variables)
    return [*lines, f"{_INDENT}return {_placed(result, variables)}"]


def _placed(expression: str, variables: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda mark: variables[mark[1]], expression)


def _statement_lines(
    statement: Statement, live: Sequence[bool], last: Sequence[str], variables: dict[str, str]
) -> list[str]:
    text = _placed(statement.expression, variables)
    freed = [variables.pop(name) for name in last]
    names = []
    for name, alive in zip(statement.targets, live, strict=True):
        if alive:
            variables[name] = freed.pop(0) if freed else name
        names.append(variables[name] if alive else _THROWAWAY)
    if any(live):
        text = f"{_listed(names) if statement.unpack else names[0]} = {text}"
        if not all(live):
            freed.append(_THROWAWAY)
    # Where a value has moved in with another name, the graph's own name stands beside it.
    own = all(place in (name, _THROWAWAY) for name, place in zip(statement.targets, names, strict=True))
    comment = "" if own else f"  # {', '.join(statement.targets)}"
    lines = [f"{_INDENT}{text}{comment}"]
    return [*lines, f"{_INDENT}del {', '.join(freed)}"] if freed else lines


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) + ("," if len(names) == 1 else "")


def _bound_lines(scope: Scope, parameters: Sequence[str], body: Sequence[str]) -> list[str]:
    inside = []
    if scope.slots:
        inside.append(f"{_listed(scope.slots.values())} = __submods__")
    if scope.consts:
        inside.append(f"{_listed(scope.const_texts.values())} = __consts__")
    inside += [f"{name} = {dotted(path)}" for path, name in scope.ops.items()]
    inside += ["", f"def execution_fn({', '.join(parameters)}):", *body, "", "return execution_fn"]
    indented = [f"{_INDENT}{line}" if line else "" for line in inside]
    return ["", "def bind(__submods__, __consts__):", *indented]


def _list_lines(parameters: Sequence[str], body: Sequence[str]) -> list[str]:
    positional = [text for text in parameters if not text.startswith("**")]
    rest = [text for text in parameters if text.startswith("**")]
    if not any(text.startswith("*") for text in positional):
        positional.append("*")
    return [f"def execution_fn({', '.join([*positional, '__vllm_submods__', *rest])}):", *body]
