"""Which globals a consts table may name. Looks them up among imported modules only, and imports nothing."""

from __future__ import annotations

import builtins
import collections
import enum
import sys
import types
from typing import Any

# Classes that hold values; as values they are harmless too.
_VALUE_TYPES: tuple[type, ...] = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    dict,
    set,
    frozenset,
    slice,
    range,
    object,
    type(None),
    collections.OrderedDict,
)
_BUILTIN_NAMES: dict[str, Any] = {
    **{kind.__name__: kind for kind in _VALUE_TYPES if kind.__module__ == "builtins"},
    **{
        name: getattr(builtins, name)
        for name in ("abs", "len", "max", "min", "pow", "round", "sum", "divmod")
    },
    "Ellipsis": Ellipsis,
    "NotImplemented": NotImplemented,
}
FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType)
# Not even as values: no model's graph calls these, and a table that names one is not ours.
# fmt: off
_POWERS = frozenset({
    "_io", "_posixsubprocess", "_pickle", "_thread", "asyncio", "builtins", "code", "codeop", "ctypes",
    "_ctypes", "faulthandler", "gc", "http", "importlib", "_frozen_importlib",
    "_frozen_importlib_external", "inspect", "io", "marshal", "mmap", "multiprocessing", "nt", "os",
    "pdb", "pickle", "pkgutil", "platform", "posix", "posixpath", "pty", "runpy", "shutil", "signal",
    "site", "socket", "_socket", "sqlite3", "ssl", "subprocess", "sys", "tempfile", "threading",
    "urllib", "webbrowser", "zipimport",
})
# fmt: on


# Parts of torch that read files, run code or start processes; code could call what a table names.
_TORCH_POWERS = tuple(
    f"torch.{name}."
    for name in (
        "serialization",
        "hub",
        "jit",
        "package",
        "multiprocessing",
        "distributed.run",
        "distributed.launcher",
        "distributed.elastic",
        "utils.cpp_extension",
        "utils.model_zoo",
        "utils.data",
        "utils.bundled_inputs",
        "_inductor",
        "_dynamo",
        "_library",
        "library",
        "onnx",
        "export",
        "storage",
        "_utils",
        "_utils_internal",
        "fx",
        "testing",
        "profiler",
        "monitor",
        "_appdirs",
        "_lobpcg",
        "compiler",
        "cuda.jiterator",
    )
)


class Refused(Exception):
    """Something that a table may not have."""


def resolve(module: str, qualname: str) -> Any:
    """What a global name means here and now; imports nothing."""
    if module in ("builtins", "__builtin__"):
        if qualname in _BUILTIN_NAMES:
            return _BUILTIN_NAMES[qualname]
        raise Refused(f"global builtins.{qualname} is not allowed")
    if module.partition(".")[0] in _POWERS and not _is_enum(module, qualname):
        raise Refused(f"global {module}.{qualname} is not allowed")
    found: Any = sys.modules.get(module)
    if found is None:
        raise Refused(
            f"global {module}.{qualname} needs module {module!r}: import it before loading this entry"
        )
    for part in qualname.split("."):
        if found is not sys.modules.get(module) and not isinstance(found, type):
            raise Refused(f"global {module}.{qualname} is not allowed: {part!r} is looked up in no class")
        try:
            found = getattr(found, part)
        except AttributeError:
            raise Refused(f"global {module}.{qualname} does not exist here") from None
    if f"{getattr(found, '__module__', '')}.".startswith(_TORCH_POWERS) or f"{module}.".startswith(
        _TORCH_POWERS
    ):
        raise Refused(f"global {module}.{qualname} is not allowed")
    if isinstance(found, (type, *FUNCTION_TYPES)) or torch_value(found):
        return found
    raise Refused(f"global {module}.{qualname} is not allowed: neither a function nor a class")


def _is_enum(module: str, qualname: str) -> bool:
    found = getattr(sys.modules.get(module), qualname, None)
    return isinstance(found, type) and issubclass(found, enum.Enum)


def torch_value(value: object) -> bool:
    """Whether a value is a dtype, layout, memory format or quantization scheme."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return isinstance(value, (torch.dtype, torch.layout, torch.memory_format, torch.qscheme))


def name_of(value: Any) -> tuple[str, str] | None:
    """A name that :func:`resolve` leads back to this function or class."""
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    name = getattr(value, "__name__", None)
    candidates = [(module, qualname), (module, name)]
    # Functions made in C often do not know where they are found.
    candidates += [
        (place, name) for place in ("torch", "torch.nn.functional", "torch._C._nn", "_operator", "math")
    ]
    for place, path in candidates:
        if not isinstance(place, str) or not isinstance(path, str) or place == "__main__":
            continue
        try:
            if resolve(place, path) is value:
                return place, path
        except Refused:
            continue
    return None
