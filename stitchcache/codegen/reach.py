"""What generated code may reach by a dotted name, and which name reaches a given object.

The gate asks `resolve` what a path leads to; the generator asks `path_of` for a path. Both use the
one list of what is allowed, so the generator never writes a name that the gate would refuse, and
never one that leads to another object than the graph's.
"""

from __future__ import annotations

import builtins
import operator
import types
from typing import Any

import torch

from stitchcache.codegen.names import is_dunder, is_identifier
from stitchcache.torchside import ops

Path = tuple[str, ...]

# fmt: off
BUILTINS = frozenset({
    "abs", "all", "any", "bool", "bytes", "complex", "dict", "divmod", "enumerate", "float", "frozenset",
    "int", "isinstance", "issubclass", "iter", "len", "list", "map", "max", "min", "next", "pow", "range",
    "reversed", "round", "set", "slice", "sorted", "str", "sum", "tuple", "zip",
})
"""Builtins that code may call by name. None reaches an attribute by a computed name, or a file."""

OPERATOR_FUNCTIONS = frozenset(operator.__all__) - {"attrgetter", "methodcaller", "call"}
"""Functions of ``operator``, but those that reach an attribute by a computed name or call a value."""

_REFLECTED = frozenset({
    "__bool__", "__complex__", "__divmod__", "__float__", "__int__", "__iter__", "__len__", "__radd__",
    "__rand__", "__rdiv__", "__rfloordiv__", "__rlshift__", "__rmatmul__", "__rmod__", "__rmul__", "__ror__",
    "__rpow__", "__rrshift__", "__rsub__", "__rtruediv__", "__rxor__", "__round__",
})

OPERATOR_METHODS = (
    frozenset(name for name in vars(operator) if is_dunder(name) and callable(getattr(operator, name)))
    - frozenset(vars(types.ModuleType))
    - {"__call__", "__builtins__", "__loader__", "__spec__"}
) | _REFLECTED
"""Dunder methods that do what an operator does, and nothing else."""

TORCH_SPACES = frozenset[Path]({
    ("torch",),
    ("torch", "functional"),
    ("torch", "nn", "functional"),
    ("torch", "linalg"),
    ("torch", "fft"),
    ("torch", "special"),
    ("torch", "sparse"),
    ("torch", "nested"),
    ("torch", "_C", "_nn"),
    ("torch", "_C", "_linalg"),
    ("torch", "_C", "_fft"),
    ("torch", "_C", "_special"),
    ("torch", "_C", "_sparse"),
    ("torch", "_C", "_nested"),
})
"""Modules of torch that hold functions over tensors."""

TORCH_SOURCES = frozenset({
    "torch.functional", "torch.nn.functional", "torch.sparse", "torch.nested", "torch._C._nn",
    "torch._C._linalg", "torch._C._fft", "torch._C._special", "torch._C._sparse", "torch._C._nested",
})
"""Where a function found in those must have been defined, so that an import there is not a way out."""

TORCH_PREFIXES = ("sym_", "_sym_", "_check")
"""Functions right under ``torch`` that begin so: symbolic arithmetic and checks."""

TORCH_NAMED = frozenset[Path]({
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch", "_assert"),
    ("torch", "device"),
    ("torch", "get_default_dtype"),
    ("torch", "is_grad_enabled"),
    ("torch", "is_inference_mode_enabled"),
    ("torch", "is_storage"),
    ("torch", "is_tensor"),
    ("torch", "_C", "_set_grad_enabled"),
    ("torch", "amp", "autocast_mode", "_enter_autocast"),
    ("torch", "amp", "autocast_mode", "_exit_autocast"),
})
"""Further objects, each looked at: checks, and the modes that graphs switch."""

FORBIDDEN_FUNCTIONS = frozenset({"from_file"})
"""Ops and functions that touch files, in every namespace."""

FORBIDDEN_MEMBERS = frozenset({
    # files and processes
    "dump", "dumps", "from_file", "load", "loads", "open", "popen", "save", "system", "tofile",
    "write", "writelines",
    # code, and attributes by computed name
    "eval", "exec", "format", "format_map", "import_module", "load_library", "mro",
    # frames and code objects
    "ag_await", "ag_code", "ag_frame", "co_code", "cr_await", "cr_code", "cr_frame", "cr_origin", "f_back",
    "f_builtins", "f_code", "f_globals", "f_locals", "f_trace", "func_code", "func_globals", "gi_code",
    "gi_frame", "gi_yieldfrom", "tb_frame", "tb_next",
})
"""Public methods and attributes that lead out of computing, on whatever value."""
# fmt: on

_VALUE_TYPES = (torch.dtype, torch.layout, torch.memory_format)
_METHOD_TYPES = (types.MethodDescriptorType, types.WrapperDescriptorType, types.FunctionType)
_FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType)
_TORCH_CLASS = "_VariableFunctionsClass."
_REFUSED = "is no function of torch that code may reach"


class NotAllowedError(Exception):
    """A path leads to something that generated code may not reach."""


class NoSuchOpError(Exception):
    """A path would be allowed, but no library of this process registers such an op."""


def is_method(name: str) -> bool:
    """Whether code may call a method of this name on any value."""
    if not name.startswith("_"):
        return is_attribute(name)
    if name.startswith("__"):
        return name in OPERATOR_METHODS
    # Graphs call torch.Tensor._values and the like; _make_subclass makes what is no plain tensor.
    return not name.startswith("_make_") and isinstance(getattr(torch.Tensor, name, None), _METHOD_TYPES)


def is_attribute(name: str) -> bool:
    """Whether code may read an attribute of this name from any value."""
    return is_identifier(name) and not name.startswith("_") and name not in FORBIDDEN_MEMBERS


def resolve(path: Path) -> Any:
    """Follow a dotted path from ``torch``, ``operator`` or a builtin.

    Args:
        path: Its steps, such as ``("torch", "ops", "aten", "add", "Tensor")``.

    Returns:
        The op, function, method or dtype at its end.

    Raises:
        NotAllowedError: It leads elsewhere: to a module, a class, a loader, a private name.
        NoSuchOpError: No library of this process registers that op.
    """
    root = path[0]
    if len(path) == 1 and root in BUILTINS:
        return getattr(builtins, root)
    if root in ("operator", "_operator") and len(path) == 2 and path[1] in OPERATOR_FUNCTIONS:
        return getattr(operator, path[1])
    if path[:2] == ("torch", "ops") and 4 <= len(path) <= 5:
        return _resolve_op(path)
    if path[:2] == ("torch", "Tensor") and len(path) == 3:
        method = getattr(torch.Tensor, path[2], None) if is_method(path[2]) else None
        if isinstance(method, _METHOD_TYPES):
            return method
        raise NotAllowedError("is no method of tensors")
    if root == "torch" and len(path) > 1:
        return _resolve_torch(path)
    raise NotAllowedError("is nothing that code may reach")


def _resolve_op(path: Path) -> Any:
    # Attributes of torch.ops that are no ops (load_library, __class__) fail the type checks.
    space = None if is_dunder(path[2]) else getattr(torch.ops, path[2], None)
    if isinstance(space, ops.HigherOrderNamespace) and len(path) == 4:
        found = _member(space, path)
        if isinstance(found, ops.HigherOrderOperator):
            return found
        raise NotAllowedError("is no higher-order op")
    if not isinstance(space, ops.OpNamespace):
        raise NotAllowedError("is no op")
    if path[3] in FORBIDDEN_FUNCTIONS:
        raise NotAllowedError("reads or writes files")
    kind: type[object] = ops.OpOverloadPacket
    found = _member(space, path[:4])
    if isinstance(found, kind) and len(path) == 5:
        found, kind = _member(found, path), ops.OpOverload
    if not isinstance(found, kind):
        raise NotAllowedError("is no op")
    return found


def _member(owner: Any, path: Path) -> Any:
    try:
        return getattr(owner, path[-1])
    except AttributeError as error:
        if is_dunder(path[-1]):
            raise NotAllowedError("is no op") from error
        raise NoSuchOpError(".".join(path)) from error


def _resolve_torch(path: Path) -> Any:
    space, name = path[:-1], path[-1]
    named = path in TORCH_NAMED or (space == ("torch",) and name.startswith(TORCH_PREFIXES))
    if not named and (space not in TORCH_SPACES or name.startswith("_") or name in FORBIDDEN_FUNCTIONS):
        raise NotAllowedError(_REFUSED)
    found: Any = torch
    for step in path[1:]:
        # Not getattr: torch imports some submodules when they are first asked for.
        found = vars(found).get(step)
        if found is None:
            raise NotAllowedError(_REFUSED)
    if named or isinstance(found, _VALUE_TYPES):
        return found
    # torch.relu and its like are methods of one class of torch's; the rest must be defined where it is found.
    is_op = isinstance(found, types.BuiltinFunctionType) and found.__qualname__.startswith(_TORCH_CLASS)
    if is_op or (isinstance(found, _FUNCTION_TYPES) and found.__module__ in TORCH_SOURCES):
        return found
    raise NotAllowedError(_REFUSED)


def path_of(target: Any) -> Path | None:
    """Find a dotted path that leads to exactly this object.

    Args:
        target: An op, function, method or class.

    Returns:
        A path that `resolve` follows to ``target`` itself, or ``None``.
    """
    for path in _candidates(target):
        try:
            if resolve(path) is target:
                return path
        except (NotAllowedError, NoSuchOpError):
            continue
    return None


def _candidates(target: Any) -> list[Path]:
    op: Any = target  # untyped where torch leaves methods of ops without annotations
    if isinstance(target, ops.OpOverload):
        space, _, rest = op.name().partition("::")
        name, _, overload = rest.partition(".")
        return [("torch", "ops", space, name, overload or "default")]
    if isinstance(target, ops.OpOverloadPacket):
        return [("torch", "ops", *str(target).split(".", 1))]
    if isinstance(target, ops.HigherOrderOperator):
        return [("torch", "ops", "higher_order", op.name())]
    if not isinstance(target, (*_METHOD_TYPES, *_FUNCTION_TYPES, type)):
        return []
    name = target.__name__
    found: list[Path] = [(name,), ("operator", name), ("torch", name), ("torch", "nn", "functional", name)]
    # In public torch._C._linalg.linalg_inv is torch.linalg.inv, and so on.
    space, _, short = name.strip("_").partition("_")
    if short:
        found.append(("torch", space, short))
    found.append(("torch", "Tensor", name))
    module = getattr(target, "__module__", None)
    if isinstance(module, str):
        found.append((*module.split("."), name))
    return found
