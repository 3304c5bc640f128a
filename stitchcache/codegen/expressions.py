"""The gate for expressions: what may stand on the right of an assignment."""

from __future__ import annotations

import ast
from dataclasses import field
from typing import TYPE_CHECKING, NoReturn

from stitchcache.codegen.allowed import BUILTINS, Path
from stitchcache.codegen.names import is_dunder
from stitchcache.codegen.reach import NoSuchOpError, NotAllowedError, is_attribute, is_method, resolve
from stitchcache.errors import EntryFormatError, LinkError

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


_SUBMODS = "__vllm_submods__"
_CONSTS = "__vllm_consts__"
_ROOTS = ("torch", "operator", "_operator")
_BINARY = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult, ast.BitAnd, ast.BitOr,
    ast.BitXor, ast.LShift, ast.RShift,
)  # fmt: skip
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_NUMBERS = (int, float, complex)


def refuse(node: ast.AST, construct: str) -> NoReturn:
    """Refuse the code.

    Args:
        node: Where.
        construct: What stands there that must not.

    Raises:
        EntryFormatError: Always.
    """
    line = getattr(node, "lineno", 1)
    kind = type(node).__name__
    raise EntryFormatError(
        f"line {line} of the code has {construct}, which generated code never has. "
        "The entry was changed or made by something else; it is not run.",
        field=f"code, line {line}, {kind}",
        reason=construct,
    )


@dataclass(slots=True)
class Names:
    """What the names in a function's body mean, beside its own variables.

    Args:
        bound: Whether it is the bound ABI.
        submod_count: Submodules that may be indexed (list ABI).
        const_count: Constants that may be indexed (list ABI).
        slots: Name of each submodule to its number (bound ABI).
        consts: Name of each constant to its number (bound ABI).
        ops: Names of ops (bound ABI).
        functions: Functions defined before this one (list ABI).
    """

    bound: bool
    submod_count: int = 0
    const_count: int = 0
    slots: dict[str, int] = field(default_factory=dict)
    consts: dict[str, int] = field(default_factory=dict)
    ops: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)

    def is_outer(self, name: str) -> bool:
        """Whether a name belongs to the function around, so that a local may not take it."""
        return name in self.slots or name in self.consts or name in self.ops


class ExpressionGate:
    """Checks the expressions of one function, in the order in which they run.

    Args:
        names: What names mean.
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        self.defined: set[str] = set()
        self.used: set[int] = set()

    def check(self, node: ast.expr) -> None:
        """Check an expression.

        Args:
            node: It.

        Raises:
            EntryFormatError: It is not of a form that generated code has.
        """
        if isinstance(node, ast.Name):
            self._check_name(node)
        elif isinstance(node, ast.Constant):
            pass
        elif isinstance(node, ast.Call):
            self._check_call(node)
        elif isinstance(node, (ast.Tuple, ast.List)):
            for item in node.elts:
                self.check(item)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is None:
                    refuse(node, "a dict inside a dict display")
                self.check(key)
                self.check(value)
        elif isinstance(node, ast.Subscript):
            self._check_subscript(node)
        elif isinstance(node, ast.Attribute):
            self._check_attribute(node)
        else:
            self._check_operator(node)

    def check_default(self, node: ast.expr) -> None:
        """Check a parameter's default: a literal or a constant.

        Args:
            node: It.

        Raises:
            EntryFormatError: It is anything else.
        """
        is_const = isinstance(node, ast.Name) and node.id in self.names.consts
        if is_const or self._slot_index(node, _CONSTS, self.names.const_count) is not None:
            return
        for part in ast.walk(node):
            if not isinstance(
                part, (ast.Constant, ast.UnaryOp, ast.USub, ast.Tuple, ast.List, ast.Dict, ast.Load)
            ):
                refuse(part, "a default that is no literal")
        self.check(node)

    def _check_name(self, node: ast.Name) -> None:
        name = node.id
        if name in self.defined or name in self.names.consts or name in self.names.ops:
            return
        if name in BUILTINS and not self.names.bound:
            return
        if name not in self.names.slots:
            refuse(node, f"the name {name}, which is not defined there")
        self.used.add(self.names.slots[name])

    def _check_call(self, node: ast.Call) -> None:
        if not self._is_getattr(node):
            self._check_callee(node.func)
        for arg in node.args:
            self.check(arg)
        for keyword in node.keywords:
            if keyword.arg is None:
                self._check_keywords(keyword.value)
            elif is_dunder(keyword.arg):
                refuse(node, f"an argument named {keyword.arg}")
            self.check(keyword.value)

    def _check_keywords(self, node: ast.expr) -> None:
        keys = node.keys if isinstance(node, ast.Dict) else [None]
        if not all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in keys):
            refuse(node, "keyword arguments from anything but a dict of names")

    def _check_callee(self, node: ast.expr) -> None:
        if isinstance(node, ast.Name):
            self._check_called_name(node)
        elif self._slot_index(node, _CONSTS, self.names.const_count) is not None or self._submodule(node):
            pass
        elif isinstance(node, ast.Attribute):
            root = node.value.id if isinstance(node.value, ast.Name) else ""
            if self._is_value(root) or self._is_slot(node.value):
                if not is_method(node.attr):
                    refuse(node, f"a call of the method {node.attr}")
                self.check(node.value)
            else:
                self._check_op(node)
        elif isinstance(node, ast.Call) and not self.names.bound:
            self._check_op(node)
        else:
            refuse(node, "a call of a value")

    def _check_called_name(self, node: ast.Name) -> None:
        name = node.id
        if name in self.names.ops or name in self.names.consts:
            return
        if name in self.names.slots:
            self.used.add(self.names.slots[name])
        elif name in self.defined or self.names.bound:
            refuse(node, f"a call of {name}, which is no submodule or op")
        elif name not in self.names.functions and name not in BUILTINS:
            refuse(node, f"a call of {name}")

    def _is_getattr(self, node: ast.Call) -> bool:
        """Whether it is ``getattr(value, 'name')``, as graphs read attributes in the list ABI."""
        if self.names.bound or not isinstance(node.func, ast.Name) or node.func.id != "getattr":
            return False
        if node.func.id in self.defined:
            return False
        name = node.args[1] if len(node.args) in (2, 3) and not node.keywords else None
        if (
            not isinstance(name, ast.Constant)
            or not isinstance(name.value, str)
            or not is_attribute(name.value)
        ):
            refuse(node, "a getattr that is not of a plain attribute")
        return True

    def _is_value(self, name: str) -> bool:
        return name in self.defined or name in self.names.slots or name in self.names.consts

    def _is_slot(self, node: ast.expr) -> bool:
        is_const = self._slot_index(node, _CONSTS, self.names.const_count) is not None
        return is_const or self._slot_index(node, _SUBMODS, self.names.submod_count) is not None

    def _check_subscript(self, node: ast.Subscript) -> None:
        if self._submodule(node) or self._slot_index(node, _CONSTS, self.names.const_count) is not None:
            return
        if not isinstance(node.value, (ast.Name, ast.Call, ast.Subscript)):
            refuse(node, "an index into anything but a value")
        self.check(node.value)
        for index in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            if isinstance(index, ast.Slice):
                for part in filter(None, (index.lower, index.upper, index.step)):
                    self.check(part)
            else:
                self.check(index)

    def _check_attribute(self, node: ast.Attribute) -> None:
        root = node.value.id if isinstance(node.value, ast.Name) else ""
        if self._is_value(root) or self._is_slot(node.value):
            if not is_attribute(node.attr):
                refuse(node, f"the attribute {node.attr}")
            self.check(node.value)
        else:
            self._check_op(node)

    def _check_op(self, node: ast.expr) -> None:
        path = dotted_path(node)
        if self.names.bound or path[0] not in _ROOTS or path[0] in self.defined:
            refuse(node, f"the name {'.'.join(path)}")
        resolve_op(node, path)

    def _check_operator(self, node: ast.expr) -> None:
        if isinstance(node, ast.UnaryOp):
            value = node.operand.value if isinstance(node.operand, ast.Constant) else None
            if not isinstance(node.op, ast.USub) or not isinstance(value, _NUMBERS):
                refuse(node, "a sign before anything but a number")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, _BINARY):
            self.check(node.left)
            self.check(node.right)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], _COMPARISONS):
            self.check(node.left)
            self.check(node.comparators[0])
        else:
            refuse(node, f"a {type(node).__name__} expression")

    def _submodule(self, node: ast.expr) -> bool:
        index = self._slot_index(node, _SUBMODS, self.names.submod_count)
        if index is None:
            return False
        self.used.add(index)
        return True

    def _slot_index(self, node: ast.expr, table: str, count: int) -> int | None:
        if not (
            isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == table
        ):
            return None
        index = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if self.names.bound or type(index) is not int or not 0 <= index < count:
            refuse(node, f"an index into {table} that is not one of its {count}")
        return index


def dotted_path(node: ast.expr) -> Path:
    """Read a dotted path, some steps of which may be written as ``getattr(path, 'step')``.

    Args:
        node: An expression.

    Returns:
        Its steps.

    Raises:
        EntryFormatError: It is anything else.
    """
    steps: list[str] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            steps.append(node.attr)
            node = node.value
            continue
        args = node.args if isinstance(node, ast.Call) and not node.keywords else []
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"):
            refuse(node, "an attribute of anything but a value, torch or operator")
        step = args[1].value if len(args) == 2 and isinstance(args[1], ast.Constant) else None
        if not isinstance(step, str):
            refuse(node, "a getattr that is not of a plain attribute")
        steps.append(step)
        node = args[0]
    steps.append(node.id)
    return tuple(reversed(steps))


def resolve_op(node: ast.expr, path: Path) -> None:
    """Check that a dotted path leads to an op or function that code may reach.

    Args:
        node: Where it stands.
        path: Its steps.

    Raises:
        EntryFormatError: It leads elsewhere.
        LinkError: There is no such op here.
    """
    try:
        resolve(path)
    except NotAllowedError as error:
        refuse(node, f"the name {'.'.join(path)}, which {error}")
    except NoSuchOpError as error:
        name = ".".join(path)
        raise LinkError(
            f"The code needs {name}, which does not exist in this process. "
            "Import the library that registers it before loading.",
            missing=[name],
        ) from error
