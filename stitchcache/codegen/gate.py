"""The gate: which source text may be executed.

Source from outside is parsed and compared with the grammar in docs/generated-code.md before any of it runs.
What no rule names is refused: there is no list of what is dangerous. Nothing is executed here.
"""

from __future__ import annotations

import ast
from typing import Literal, NoReturn

from stitchcache.codegen import reach
from stitchcache.errors import EntryFormatError

_ROOTS = ("torch", "operator", "_operator")
# What an expression may be made of beside expressions.
_OPERATORS = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult, ast.BitAnd, ast.BitOr,
    ast.BitXor, ast.LShift, ast.RShift, ast.USub, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
    ast.Load,
)  # fmt: skip
_IN_DEFAULTS = (ast.Constant, ast.UnaryOp, ast.USub, ast.Tuple, ast.List, ast.Dict, ast.Load)
# What an expression stands for: a variable of the function, a submodule or a constant that the caller
# supplies, or an op (in the list ABI also a function that was defined above).
_Kind = Literal["local", "submod", "const", "op"]
# Names that stand for the caller's tables: unpacked in the bound ABI, indexed in the list ABI.
_UNPACKED: dict[str, _Kind] = {"__submods__": "submod", "__consts__": "const"}
_INDEXED: dict[str, _Kind] = {"__vllm_submods__": "submod", "__vllm_consts__": "const"}


def check_code(code: str, submods: int, consts: int) -> tuple[ast.Module, bool, set[int]]:
    """Check that source text is nothing but a stitching function over so many submodules and constants.

    Returns:
        Its functions, whether it is in the bound ABI, and the numbers of the submodules that it uses.

    Raises:
        EntryFormatError: It has anything else; ``field`` names line and construct.
        LinkError: It calls an op that no imported library registers.
    """
    try:
        tree = ast.parse(code)
        functions = _functions(tree)
        # Imports are not run: what they would bind is put into the globals.
        tree.body = list(functions)
        is_bound = len(functions) == 1 and functions[0].name == "bind"
        gate = _Gate(is_bound, submods, consts)
        gate.bind(functions[0]) if is_bound else gate.list_module(functions)
    except EntryFormatError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 0
        said = f"line {line} of the code cannot be read: {error}"
        raise EntryFormatError(said, field=f"code, line {line}", reason=str(error)) from error
    return tree, is_bound, gate.used


def _refuse(node: ast.AST, construct: str) -> NoReturn:
    line = getattr(node, "lineno", 1)
    raise EntryFormatError(
        f"line {line} of the code has {construct}, which generated code never has. "
        "The entry was changed or made by something else; it is not run.",
        field=f"code, line {line}, {type(node).__name__}",
        reason=construct,
    )


def _functions(tree: ast.Module) -> list[ast.FunctionDef]:
    functions = []
    for node in _statements(tree):
        if isinstance(node, ast.FunctionDef):
            functions.append(node)
        elif functions or not isinstance(node, ast.Import):
            _refuse(node, "a statement outside a function")
        elif any(name.name not in ("torch", "operator") or name.asname for name in node.names):
            _refuse(node, "an import of anything but torch and operator")
    return functions or _refuse(tree, "no function")


def _statements(node: ast.Module | ast.FunctionDef) -> list[ast.stmt]:
    """The statements of a module or function, without its docstring."""
    documented = ast.get_docstring(node, clean=False) is not None
    return node.body[1:] if documented else node.body


class _Gate:
    """Checks the functions of one source text, in the order in which they run."""

    def __init__(self, is_bound: bool, submods: int, consts: int) -> None:
        self._is_bound = is_bound
        self._counts: dict[_Kind, int] = {"submod": submods, "const": consts}
        # What each name stands for at this point, with the number of a submodule.
        self._names: dict[str, tuple[_Kind, int]] = {}
        self.used: set[int] = set()

    def bind(self, bind: ast.FunctionDef) -> None:
        """``bind``: slots and ops get names, then ``execution_fn`` is defined and returned."""
        if self._parameters(bind) != ["__submods__", "__consts__"] or bind.args.defaults:
            _refuse(bind, "parameters other than (__submods__, __consts__)")
        match _statements(bind):
            case [
                *assigns,
                ast.FunctionDef(name="execution_fn") as function,
                ast.Return(value=ast.Name(id="execution_fn")),
            ]:
                pass
            case _:
                _refuse(bind, "no execution_fn at its end")
        unpacked: dict[_Kind, int] = {}
        for node in assigns:
            match node:
                case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id=table)) if (
                    table in _UNPACKED and _UNPACKED[table] not in unpacked
                ):
                    unpacked[_UNPACKED[table]] = len(names)
                    for index, name in enumerate(names):
                        self._bind_name(name, _UNPACKED[table], index)
                case ast.Assign(targets=[ast.Name() as name], value=value):
                    self._resolve(value)
                    self._bind_name(name, "op", 0)
                case _:
                    _refuse(node, "anything but a binding in bind")
        if (taken := {"submod": 0, "const": 0, **unpacked}) != self._counts:
            said = [f"{taken[kind]} of {number} {kind}s" for kind, number in self._counts.items()]
            _refuse(bind, f"names for {' and '.join(said)}")
        self._function(function)

    def list_module(self, functions: list[ast.FunctionDef]) -> None:
        """``execution_fn`` of the list ABI, after the inlined functions that it calls."""
        *inlined, execution = functions
        submods, self._counts["submod"] = self._counts["submod"], 0  # an inlined function gets none
        for function in inlined:
            number = function.name.removeprefix("__vllm_inlined_submods__")
            if number == function.name or not (number.isascii() and number.isdecimal()):
                _refuse(function, f"a function named {function.name}")
            self._function(function)
            self._names[function.name] = ("op", 0)
        self._counts["submod"] = submods
        args = execution.args
        keywords = zip(args.kwonlyargs, args.kw_defaults, strict=True)
        given = [default for arg, default in keywords if arg.arg == "__vllm_submods__"]
        if execution.name != "execution_fn" or given != [None]:
            _refuse(execution, "no execution_fn(*, __vllm_submods__) at its end")
        self._function(execution)

    def _function(self, function: ast.FunctionDef) -> None:
        outer, self._names = self._names, dict(self._names)
        for default in (*function.args.defaults, *filter(None, function.args.kw_defaults)):
            if self._stands_for(default) != "const":
                for part in ast.walk(default):
                    if not isinstance(part, _IN_DEFAULTS):
                        _refuse(part, "a default that is neither a literal nor a constant")
            self._value(default)
        for name in self._parameters(function):
            if name != "__vllm_submods__" or function.name != "execution_fn" or self._is_bound:
                self._assign(function, name)
        *statements, last = _statements(function) or [function]
        for statement in statements:
            self._statement(statement)
        if not isinstance(last, ast.Return):
            _refuse(last, "anything but a return at the end of a function")
        if last.value is not None:
            self._value(last.value)
        self._names = outer

    @staticmethod
    def _parameters(function: ast.FunctionDef) -> list[str]:
        args = function.args
        every = [*args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
        if function.decorator_list or function.returns or getattr(function, "type_params", None):
            _refuse(function, "a decorator, annotation or type parameter")
        if args.posonlyargs or any(arg.annotation for arg in every):
            _refuse(function, "an annotated or positional-only parameter")
        names = [arg.arg for arg in every]
        if len(set(names)) < len(names):
            _refuse(function, "two parameters of one name")  # Python parses that and refuses to compile it
        return names

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[target], value=value):
                self._value(value)
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    self._assign(name, name.id if isinstance(name, ast.Name) else "")
            case ast.Delete(targets=targets):
                for name in targets:
                    if not isinstance(name, ast.Name) or self._names.get(name.id) != ("local", 0):
                        _refuse(name, "a del of anything but a local name that is defined")
                    del self._names[name.id]
            case ast.Expr(value=value) if not isinstance(value, ast.Constant):
                self._value(value)
            case _:
                _refuse(node, f"a {type(node).__name__} statement")

    def _assign(self, node: ast.AST, name: str, kind: _Kind = "local", index: int = 0) -> None:
        # vLLM's code has a local named __mul__ where the graph calls torch.Tensor.__mul__.
        legal = name not in (*_ROOTS, "getattr", "")
        if name.startswith("__"):
            legal = name in reach.OPERATOR_METHODS
        if not legal or self._names.get(name, ("local", 0)) != ("local", 0):
            _refuse(node, f"an assignment to {name or 'anything but names'}")
        self._names[name] = (kind, index)

    def _bind_name(self, node: ast.expr, kind: _Kind, index: int) -> None:
        # bind binds `op_0 = max`: a slot that is named max would change what that means.
        name = node.id if isinstance(node, ast.Name) and node.id not in reach.BUILTINS else ""
        self._assign(node, name, kind, index)

    def _value(self, node: ast.expr) -> None:
        """An expression that is computed."""
        if self._stands_for(node) is not None:
            return
        match node:
            case ast.Attribute(value=owner, attr=name) if self._is_value(owner):
                if not reach.is_attribute(name):
                    _refuse(node, f"the attribute {name}")
                return
            case ast.Call():
                self._call(node)
                return
            case ast.Dict(keys=keys) if None in keys:
                _refuse(node, "a dict inside a dict display")
            case (
                ast.Constant()
                | ast.Tuple()
                | ast.List()
                | ast.Dict()
                | ast.Slice()
                | ast.BinOp()
                | ast.Compare(ops=[_])
                | ast.Subscript(value=ast.Name() | ast.Call() | ast.Subscript())
                | ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() | complex()))
            ):
                pass
            case _:
                _refuse(node, f"{_shown(node)}, which has no meaning there")
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self._value(part)
            elif not isinstance(part, _OPERATORS):
                _refuse(node, f"the operator {type(part).__name__}")

    def _call(self, node: ast.Call) -> None:
        match node.func:
            case func if self._stands_for(func) not in (None, "local"):
                pass
            case ast.Attribute(value=owner, attr=name) if self._is_value(owner):
                if not reach.is_method(name):
                    _refuse(node, f"a call of the method {name}")
            case func if not self._reads_attribute(node):
                _refuse(node, f"a call of {_shown(func)}, which is no submodule, op or method")
        for arg in node.args:
            self._value(arg)
        for keyword in node.keywords:
            match keyword:
                case ast.keyword(arg=None, value=ast.Dict(keys=keys)):
                    if not all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in keys):
                        _refuse(node, "keyword arguments from anything but a dict of names")
                case ast.keyword(arg=str() as name) if not reach.is_dunder(name):
                    pass
                case _:
                    _refuse(node, "a keyword argument that graphs do not have")
            self._value(keyword.value)

    def _reads_attribute(self, node: ast.Call) -> bool:
        """Whether it is ``getattr(value, 'name')``, as graphs read attributes in the list ABI."""
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str() as name), *rest]):
                return not (self._is_bound or node.keywords or rest[1:]) and reach.is_attribute(name)
        return False

    def _is_value(self, node: ast.expr) -> bool:
        return self._stands_for(node) in ("local", "submod", "const")

    def _stands_for(self, node: ast.expr) -> _Kind | None:
        """What a name, a slot or a dotted path stands for; ``None`` for any other expression."""
        match node:
            case ast.Name(id=name):
                kind, index = self._names.get(name, (None, 0))
                if kind == "submod":
                    self.used.add(index)
                return "op" if kind is None and not self._is_bound and name in reach.BUILTINS else kind
            case ast.Subscript(value=ast.Name(id=table), slice=at) if table in _INDEXED:
                number = at.value if isinstance(at, ast.Constant) else None
                count = 0 if self._is_bound else self._counts[_INDEXED[table]]
                # Not isinstance: True is an int too, and generated code never has it there.
                if type(number) is not int or not 0 <= number < count:
                    _refuse(node, f"an index into {table} that is not one of its {count}")
                if _INDEXED[table] == "submod":
                    self.used.add(number)
                return _INDEXED[table]
            case ast.Attribute() | ast.Call(func=ast.Name(id="getattr")) if not self._is_bound:
                path = _dotted_path(node)
                if path and path[0] in _ROOTS:
                    self._resolve(node)
                    return "op"
        return None

    def _resolve(self, node: ast.expr) -> None:
        path = _dotted_path(node)
        if path is None:
            _refuse(node, f"{_shown(node)} for an op")
        try:
            reach.resolve(path)
        except reach.NotAllowedError as error:
            _refuse(node, f"the name {'.'.join(path)}, which {error}")


def _shown(node: ast.expr) -> str:
    path = _dotted_path(node)
    return f"the name {'.'.join(path)}" if path else f"a {type(node).__name__} expression"


def _dotted_path(node: ast.expr) -> reach.Path | None:
    """Read a dotted path, some steps of which may be written as ``getattr(path, 'step')``."""
    match node:
        case ast.Name(id=name):
            return (name,)
        case ast.Attribute(value=owner, attr=step):
            pass
        case ast.Call(
            func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str() as step)], keywords=[]
        ):
            pass
        case _:
            return None
    path = _dotted_path(owner)
    return None if path is None else (*path, step)
