"""The names that generated code may use, as data. `reach` says what they lead to."""

from __future__ import annotations

import operator
import types

from stitchcache.codegen.names import is_dunder

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
