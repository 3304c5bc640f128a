"""The gate: which source text may be executed.

Code that came from outside is parsed, and every construct in it is compared with what the generators
write, before any of it runs. docs/generated-code.md has the grammar. Nothing is executed here.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Literal

from stitchcache.codegen.allowed import BUILTINS, OPERATOR_METHODS
from stitchcache.codegen.expressions import ExpressionGate, Names, dotted_path, refuse, resolve_op
from stitchcache.errors import EntryFormatError

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


_INLINED = "__vllm_inlined_submods__"
_SUBMODS = "__vllm_submods__"
_ROOTS = ("torch", "operator", "_operator")


@dataclass(frozen=True, slots=True)
class CheckedCode:
    """Code that passed the gate.

    Args:
        tree: Its functions, without the import statements.
        abi: Which of the two shapes it has.
        used: Numbers of the submodules that it uses.
    """

    tree: ast.Module
    abi: Literal["bound", "list"]
    used: frozenset[int]


def check_code(code: str, submods: int, consts: int) -> CheckedCode:
    """Check that source text is nothing but a stitching function.

    Args:
        code: The source.
        submods: How many submodules it will be given.
        consts: How many constants it will be given.

    Returns:
        The parsed code.

    Raises:
        EntryFormatError: It holds anything that the generators do not write, or uses a slot that it
            will not be given; ``field`` names line and construct.
        LinkError: It calls an op that no imported library registers.
    """
    if not isinstance(code, str):
        raise EntryFormatError("The code is not text.", field="code", reason=f"it is a {type(code).__name__}")
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 0
        raise EntryFormatError(
            f"line {line} of the code is not Python: {error}", field=f"code, line {line}", reason=str(error)
        ) from error
    functions = _functions(tree)
    tree.body = list(functions)
    try:
        if len(functions) == 1 and functions[0].name == "bind":
            return CheckedCode(tree, "bound", _check_bound(functions[0], submods, consts))
        return CheckedCode(tree, "list", _check_list(functions, submods, consts))
    except RecursionError as error:
        raise EntryFormatError(
            "The code is nested too deeply.", field="code", reason="nested too deeply"
        ) from error


def _functions(tree: ast.Module) -> list[ast.FunctionDef]:
    functions: list[ast.FunctionDef] = []
    for number, node in enumerate(tree.body):
        if isinstance(node, ast.FunctionDef):
            functions.append(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name not in ("torch", "operator") or alias.asname is not None or functions:
                    refuse(node, f"import {alias.name}")
        elif number or not _is_docstring(node):
            refuse(node, "a statement outside a function")
    if not functions:
        refuse(tree, "no function")
    return functions


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _check_bound(bind: ast.FunctionDef, submods: int, consts: int) -> frozenset[int]:
    _check_header(bind)
    _check_positional(bind, ["__submods__", "__consts__"])
    names = Names(bound=True)
    unpacked: dict[str, int] = {}
    *assigns, function, last = _body(bind, least=2)
    if not isinstance(function, ast.FunctionDef) or function.name != "execution_fn":
        refuse(function, "anything but execution_fn before bind returns")
    if not (
        isinstance(last, ast.Return) and isinstance(last.value, ast.Name) and last.value.id == "execution_fn"
    ):
        refuse(last, "anything but 'return execution_fn' at the end of bind")
    for node in assigns:
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            refuse(node, "anything but a binding in bind")
        target = node.targets[0]
        if isinstance(target, ast.Tuple):
            _bind_slots(node, target, names, unpacked)
        elif isinstance(target, ast.Name):
            _take(target, names)
            names.ops.add(target.id)
            resolve_op(node.value, dotted_path(node.value))
        else:
            refuse(target, "an assignment to anything but names")
    for source, count in (("__submods__", submods), ("__consts__", consts)):
        if unpacked.get(source, 0) != count:
            refuse(bind, f"{unpacked.get(source, 0)} names for {count} {source.strip('_')}")
    gate = ExpressionGate(names)
    _check_function(function, gate, "bound")
    return frozenset(gate.used)


def _bind_slots(node: ast.Assign, target: ast.Tuple, names: Names, unpacked: dict[str, int]) -> None:
    source = node.value.id if isinstance(node.value, ast.Name) else ""
    if source not in ("__submods__", "__consts__") or source in unpacked:
        refuse(node, "unpacking of anything but __submods__ and __consts__, once each")
    for index, name in enumerate(target.elts):
        if not isinstance(name, ast.Name):
            refuse(name, "an assignment to anything but names")
        _take(name, names)
        (names.slots if source == "__submods__" else names.consts)[name.id] = index
    unpacked[source] = len(target.elts)


def _take(target: ast.Name, names: Names) -> None:
    if names.is_outer(target.id) or not _assignable(target.id) or target.id in BUILTINS:
        refuse(target, f"an assignment to {target.id}")


def _assignable(name: str) -> bool:
    if name.startswith("__"):
        # vLLM's code has a local of this name where the graph calls torch.Tensor.__mul__.
        return name in OPERATOR_METHODS
    return name not in _ROOTS


def _check_list(functions: list[ast.FunctionDef], submods: int, consts: int) -> frozenset[int]:
    names = Names(bound=False, submod_count=0, const_count=consts)
    for function in functions[:-1]:
        number = function.name.removeprefix(_INLINED)
        if number == function.name or not (number.isascii() and number.isdecimal()):
            refuse(function, f"a function named {function.name}")
        _check_function(function, ExpressionGate(names), "inlined")
        names.functions.add(function.name)
    names.submod_count = submods
    if functions[-1].name != "execution_fn":
        refuse(functions[-1], f"a last function named {functions[-1].name}")
    gate = ExpressionGate(names)
    _check_function(functions[-1], gate, "list")
    return frozenset(gate.used)


def _check_header(function: ast.FunctionDef) -> None:
    args = function.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    if function.decorator_list or function.returns or getattr(function, "type_params", None):
        refuse(function, "a decorator, annotation or type parameter")
    if args.posonlyargs or any(arg.annotation for arg in every):
        refuse(function, "an annotated or positional-only parameter")


def _check_positional(function: ast.FunctionDef, expected: list[str]) -> None:
    args = function.args
    if (
        [arg.arg for arg in args.args] != expected
        or args.kwonlyargs
        or args.vararg
        or args.kwarg
        or args.defaults
    ):
        refuse(function, f"parameters other than ({', '.join(expected)})")


def _check_function(
    function: ast.FunctionDef, gate: ExpressionGate, kind: Literal["bound", "list", "inlined"]
) -> None:
    _check_header(function)
    args = function.args
    for default in (*args.defaults, *filter(None, args.kw_defaults)):
        gate.check_default(default)
    parameters = [*args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    if kind == "list":
        own = [
            arg for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if arg.arg == _SUBMODS
        ]
        if len(own) != 1 or args.kw_defaults[args.kwonlyargs.index(own[0])] is not None:
            refuse(function, f"no keyword parameter {_SUBMODS}")
        parameters.remove(own[0])
    for parameter in parameters:
        if gate.names.is_outer(parameter.arg) or not _assignable(parameter.arg):
            refuse(parameter, f"a parameter named {parameter.arg}")
        gate.defined.add(parameter.arg)
    *statements, last = _body(function, least=1)
    for statement in statements:
        _check_statement(statement, gate)
    if not isinstance(last, ast.Return):
        refuse(last, "anything but a return at the end of a function")
    if last.value is not None:
        gate.check(last.value)


def _body(function: ast.FunctionDef, least: int) -> list[ast.stmt]:
    body = function.body[1:] if _is_docstring(function.body[0]) else function.body
    if len(body) < least:
        refuse(function, "a function without a return")
    return body


def _check_statement(statement: ast.stmt, gate: ExpressionGate) -> None:
    if isinstance(statement, ast.Assign):
        if len(statement.targets) != 1:
            refuse(statement, "a chained assignment")
        gate.check(statement.value)
        target = statement.targets[0]
        for name in target.elts if isinstance(target, ast.Tuple) else [target]:
            if not isinstance(name, ast.Name):
                refuse(name, "an assignment to anything but names")
            if gate.names.is_outer(name.id) or not _assignable(name.id):
                refuse(name, f"an assignment to {name.id}")
            gate.defined.add(name.id)
    elif isinstance(statement, ast.Delete):
        for name in statement.targets:
            if not isinstance(name, ast.Name) or name.id not in gate.defined:
                refuse(name, "a del of anything but a local name that is defined")
            gate.defined.discard(name.id)
    elif isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant):
        gate.check(statement.value)
    else:
        refuse(statement, f"a {type(statement).__name__} statement")


__all__ = ["CheckedCode", "check_code"]
