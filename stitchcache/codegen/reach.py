"""What generated code may reach by a dotted name, and which name reaches a given object.

The gate asks `resolve` what a path leads to; the generator asks `path_of` for a path. Both use one list of
what is allowed, so the generator never writes a name that the gate would refuse.
"""

from __future__ import annotations

import builtins
import keyword
import operator
import types
from contextlib import suppress
from typing import Any

import torch

from stitchcache.errors import LinkError
from stitchcache.torchside import ops

Path = tuple[str, ...]


def is_identifier(name: str) -> bool:
    """Whether ``name`` may stand in source as it is.

    ASCII only: Python folds other identifiers to NFKC, so that two different ones can become equal.
    """
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and name != "__debug__"


def is_dunder(name: str) -> bool:
    """Whether ``name`` has the form ``__name__``."""
    return len(name) > 4 and name.startswith("__") and name.endswith("__")


# fmt: off
# None reaches an attribute by a computed name, or a file.
BUILTINS = frozenset({
    "abs", "all", "any", "bool", "bytes", "complex", "dict", "divmod", "enumerate", "float", "frozenset",
    "int", "isinstance", "issubclass", "iter", "len", "list", "map", "max", "min", "next", "pow", "range",
    "reversed", "round", "set", "slice", "sorted", "str", "sum", "tuple", "zip",
})
# Those left out reach an attribute by a computed name, or call a value.
_OPERATOR_FUNCTIONS = frozenset(operator.__all__) - {"attrgetter", "methodcaller", "call"}
# Dunder methods that do what an operator does, and nothing else.
OPERATOR_METHODS = frozenset(
    name for name in vars(operator) if is_dunder(name) and callable(getattr(operator, name))
) - {*vars(types.ModuleType), "__call__", "__builtins__", "__loader__", "__spec__"} | {
    "__bool__", "__complex__", "__divmod__", "__float__", "__int__", "__iter__", "__len__", "__radd__",
    "__rand__", "__rdiv__", "__rfloordiv__", "__rlshift__", "__rmatmul__", "__rmod__", "__rmul__", "__ror__",
    "__rpow__", "__rrshift__", "__rsub__", "__rtruediv__", "__rxor__", "__round__",
}
# Modules that hold functions over tensors. A function found there must have been defined in one of them, so
# that what they import is not a way out; but not in torch itself, which has loaders and settings too.
_SPACES = frozenset({
    "torch", "torch.functional", "torch.nn.functional", "torch.linalg", "torch.fft", "torch.special",
    "torch.sparse", "torch.nested", "torch._C._nn", "torch._C._linalg", "torch._C._fft", "torch._C._special",
    "torch._C._sparse", "torch._C._nested",
})
_SOURCES = _SPACES - {"torch"}
# Symbolic arithmetic and checks, right under torch.
_PREFIXES = ("sym_", "_sym_", "_check")
# Further objects, each looked at: checks, and the modes that graphs switch.
_NAMED = frozenset({
    "torch.Size", "torch.Tensor", "torch._assert", "torch.device", "torch.get_default_dtype",
    "torch.is_grad_enabled", "torch.is_inference_mode_enabled", "torch.is_storage", "torch.is_tensor",
    "torch._C._set_grad_enabled", "torch.amp.autocast_mode._enter_autocast",
    "torch.amp.autocast_mode._exit_autocast",
})
# Ops that touch files. aten::save is TorchScript's, and is found under torch.ops like any other.
_FILE_OPS = frozenset({"aten.from_file", "aten.save", "debugprims.load_tensor"})
# Public methods and attributes that lead out of computing, on whatever value.
_FORBIDDEN_MEMBERS = frozenset({
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
# fmt: on

_VALUE_TYPES = (torch.dtype, torch.layout, torch.memory_format)
_METHOD_TYPES = (types.MethodDescriptorType, types.WrapperDescriptorType, types.FunctionType)
_FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType)
_TORCH_CLASS = "_VariableFunctionsClass."


class NotAllowedError(Exception):
    """A path leads to something that generated code may not reach."""


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
    return is_identifier(name) and not name.startswith("_") and name not in _FORBIDDEN_MEMBERS


def resolve(path: Path) -> Any:
    """Follow a path, such as ``("torch", "ops", "aten", "add")``, to an op, function, method or dtype.

    Raises:
        NotAllowedError: It leads elsewhere: to a module, a class, a loader, a private name.
        LinkError: No library of this process registers that op.
    """
    root = path[0]
    if len(path) == 1 and root in BUILTINS:
        return getattr(builtins, root)
    if root in ("operator", "_operator") and len(path) == 2 and path[1] in _OPERATOR_FUNCTIONS:
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
    found = None if is_dunder(path[2]) else getattr(torch.ops, path[2], None)
    kinds: list[Any] = [ops.OpOverloadPacket, ops.OpOverload]
    if isinstance(found, ops.HigherOrderNamespace) and len(path) == 4:
        kinds = [ops.HigherOrderOperator]
    elif not isinstance(found, ops.OpNamespace):
        raise NotAllowedError("is no op")
    if ".".join(path[2:4]) in _FILE_OPS:
        raise NotAllowedError("reads or writes files")
    for step, kind in zip(path[3:], kinds, strict=False):
        try:
            found = getattr(found, step)
        except AttributeError as error:
            if not is_dunder(step):
                name = ".".join(path)
                raise LinkError(
                    f"The code needs {name}, which does not exist in this process. "
                    "Import the library that registers it before loading.",
                    missing=[name],
                ) from error
            found = None
        if not isinstance(found, kind):
            raise NotAllowedError("is no op")
    return found


def _resolve_torch(path: Path) -> Any:
    space, name = ".".join(path[:-1]), path[-1]
    named = f"{space}.{name}" in _NAMED or (space == "torch" and name.startswith(_PREFIXES))
    found: Any = torch
    if named or (space in _SPACES and not name.startswith("_") and name != "from_file"):
        for step in path[1:]:
            # Not getattr: torch imports some submodules when they are first asked for.
            found = None if found is None else vars(found).get(step)
        if named and found is not None:
            return found
        # torch.relu and its like are methods of one class of torch's.
        is_op = isinstance(found, types.BuiltinFunctionType) and found.__qualname__.startswith(_TORCH_CLASS)
        is_function = isinstance(found, _FUNCTION_TYPES) and found.__module__ in _SOURCES
        if is_op or is_function or isinstance(found, _VALUE_TYPES):
            return found
    raise NotAllowedError("is no function of torch that code may reach")


def path_of(target: Any) -> Path | None:
    """Find a dotted path that `resolve` follows to exactly this op, function, method or class."""
    for path in _candidates(target):
        with suppress(NotAllowedError, LinkError):
            if resolve(path) is target:
                return path
    return None


def _candidates(target: Any) -> list[Path]:
    if isinstance(target, (ops.OpOverload, ops.OpOverloadPacket, ops.HigherOrderOperator)):
        registered, overload = ops.qualified_name(target)
        path = ("torch", "ops", *registered.split("::", 1))
        return [path if overload is None else (*path, overload)]
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
