"""What a capture may ask the outside world, and what no key would stand for. Looked at only while capturing.

A trace bakes in whatever the model's code learns while it runs. Values of globals and environment variables
are recorded and checked at each lookup. The answers of the functions here are either recorded in the same
way (:data:`ASKED`), or turn direct lookup off.
"""

from __future__ import annotations

import importlib
import inspect
import io
import os
import sys
import threading
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from stitchcache.keys.check import Found
from stitchcache.keys.origins import (
    in_stdlib,
    installed_path,
    module_stands_by_version,
    stands_by_version,
)
from stitchcache.torchside.state import fx_globals

FORBIDDEN_CODE = {
    threading.Thread.start.__code__: "starts a thread, whose code is not seen",
    importlib.import_module.__code__: "imports a module by a name that is computed",
    type(os.environ).__iter__.__code__: "lists the environment variables; read the ones that matter by name",
}
"""Functions of the library that the model's code may not call, and why."""

IMPORT_MODULE = importlib.import_module.__code__

_MODULES = frozenset(
    """time posix nt _random _socket _io io random _thread _datetime datetime gc _locale resource fcntl mmap
    _uuid _posixsubprocess""".split()  # noqa: SIM905
)
_BUILTINS = frozenset({"open", "eval", "exec", "globals", "hash", "input", "id", "__import__"})
_NAMES = {
    "sys": frozenset(
        """_getframe _current_frames getrefcount getrecursionlimit getswitchinterval getallocatedblocks
        gettrace getprofile""".split()  # noqa: SIM905
    ),
    "decimal": frozenset({"getcontext", "localcontext"}),
    "numpy": frozenset({"fromfile"}),
    "torch": frozenset({"from_file"}),
}
_HARMLESS_IN_PACKAGES = frozenset("id hash globals _getframe getrefcount gettrace getprofile".split())  # noqa: SIM905
"""What installed packages call for warnings and debugging, not for numbers."""

_PACKAGES = os.path.dirname(os.path.dirname(os.path.abspath(sys.modules["torch"].__file__ or "")))
_LIBRARY = os.path.dirname(os.__file__)
_WATCHED_IN_LIBRARY = "random secrets tempfile subprocess socket locale platform uuid getpass _pydecimal"
_WATCHED_IN_PACKAGES = """torch/serialization.py torch/hub.py torch/random.py torch/cuda/memory.py
    torch/cuda/random.py numpy/lib/npyio.py numpy/lib/_npyio_impl.py"""
WATCHED_FILES = frozenset(
    [os.path.join(_LIBRARY, f"{name}.py") for name in _WATCHED_IN_LIBRARY.split()]
    + [os.path.join(_PACKAGES, *name.split("/")) for name in _WATCHED_IN_PACKAGES.split()]
)
"""Files of the library, torch and numpy whose functions give what is not the same each time."""

_FX_TRACE = os.path.join(_PACKAGES, "torch", "fx", "_symbolic_trace.py")
_ON_BEHALF = ("<frozen importlib", "<frozen zipimport")
_BYSTANDING_FILES = frozenset(
    os.path.join(_LIBRARY, *name.split("/"))
    for name in "linecache.py warnings.py traceback.py inspect.py tokenize.py logging/__init__.py".split()  # noqa: SIM905
)
"""What these read is source text for people, or the code of modules, which is recorded elsewhere."""

_HARMLESS_POSIX = frozenset({"fspath", "putenv", "unsetenv", "fsencode", "fsdecode"})
SYSTEM = {
    id(function): function
    for function in (
        io.open,
        *(item for name, item in vars(os).items() if name not in _HARMLESS_POSIX and name in os.__all__),
    )
    if isinstance(function, BuiltinFunctionType)
}
"""Functions made in C that ask the operating system, by id; held, so that an id stays its own."""

_SEES_NAMESPACES = frozenset({"__globals__", "f_globals", "__builtins__"})

OF_A_PROCESS = frozenset(
    """RANK LOCAL_RANK GROUP_RANK ROLE_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE
    ROLE_WORLD_SIZE TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT""".split()  # noqa: SIM905
)
"""Variables that tell processes of one program apart: recorded also where torch reads them for a model."""

ASKED: dict[str, tuple[str, ...]] = {
    "sys": ("get_int_max_str_digits",),
    "numpy": ("geterr", "geterrcall", "get_printoptions", "getbufsize"),
    "torch": (
        "get_num_threads",
        "get_num_interop_threads",
        "initial_seed",
        "is_warn_always_enabled",
        "is_anomaly_enabled",
        "is_anomaly_check_nan_enabled",
    ),
    "torch.cuda": (
        "is_available",
        "device_count",
        "current_device",
        "get_device_capability",
        "get_device_name",
    ),
    "torch.distributed": (
        "is_available",
        "is_initialized",
        "is_torchelastic_launched",
        "get_rank",
        "get_world_size",
        "get_backend",
        "get_node_local_rank",
    ),
}
"""Functions of torch whose answers are recorded: module to names."""


def asked_functions() -> dict[int, tuple[str, Any]]:
    """By the id of its code, or its own where it is made in C: an entry's name, and what has that id."""
    found: dict[int, tuple[str, Any]] = {}
    for module, names in ASKED.items():
        for name in names:
            function = inspect.unwrap(getattr(sys.modules.get(module), name, None))  # type: ignore[arg-type]
            if function is not None:
                thing = getattr(function, "__code__", function)
                found[id(thing)] = (f"call:{module}:{name}", thing)
    return found


def forbidden_call(code: CodeType, function: Any) -> str | None:
    """Why the model's code may not call a function made in C; ``None`` where it may."""
    name = getattr(function, "__name__", "")
    module = module_of(function)
    if name == "__subclasses__":
        return "asks for the subclasses of a class, which depend on what is imported"
    forbidden = (
        module in _MODULES
        or (module == "builtins" and name in _BUILTINS)
        or name in _NAMES.get(module or "", ())
    )
    if not forbidden or isinstance(getattr(function, "__self__", None), str) or code.co_name == "<module>":
        return None
    if installed_path(code.co_filename) and name in _HARMLESS_IN_PACKAGES:
        return None
    return f"calls {module}.{name}, whose result is not the same each time"


def module_of(function: Any) -> str | None:
    """The module of a function made in C, or of the object that it is bound to."""
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None)
    if isinstance(owner, ModuleType):
        return owner.__name__
    if owner is not None and module is None:
        module = (owner if isinstance(owner, type) else type(owner)).__module__
    return module if isinstance(module, str) else None


def on_behalf_of(frame: FrameType) -> FrameType | None:
    """The model's frame that made the library ask the system; ``None`` where it was torch, or an import."""
    for caller in _callers(frame):
        filename = caller.f_code.co_filename
        if filename.startswith(_ON_BEHALF) or filename in _BYSTANDING_FILES:
            return None
        if not in_stdlib(filename):
            return None if stands_by_version(filename) else caller
    return None


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def outside_stdlib(frame: FrameType) -> FrameType | None:
    """The nearest caller that is not the library's."""
    return next(
        (caller for caller in _callers(frame.f_back) if not in_stdlib(caller.f_code.co_filename)), None
    )


def is_given(code: CodeType, name: str, value: object) -> bool:
    """Whether a global of code that no module holds means the same wherever it has this name.

    So do torch itself and the library's modules under their own names, and what torch.fx puts beside the code
    that it generates for a graph.
    """
    if isinstance(value, ModuleType) and value.__name__ == name and sys.modules.get(name) is value:
        return module_stands_by_version(name)
    if not code.co_filename.startswith("<eval_with_key>"):
        return False
    known = fx_globals().get(name)
    return known is not None and (value is known or repr(value) == repr(known))


def as_before_trace(found: Found) -> Found:
    """A global as it is when nobody traces: torch.fx wraps functions under ``torch.fx.wrap`` meanwhile."""
    code = getattr(found.value, "__code__", None)
    if type(found.value) is FunctionType and code is not None and code.co_filename == _FX_TRACE:
        original = getattr(found.value, "__wrapped__", None)
        return found if original is None else Found(original, found.exists, found.used, found.owner)
    return found


def forbidden_to_dynamo(code: CodeType, value: object) -> str | None:
    """Why a function that torch._dynamo traces may not read a global whose calls nobody would see."""
    if value is os.environ or value is getattr(os, "environb", None):
        return "reads environment variables"
    called = getattr(value, "__code__", None)
    if called is not None:
        watched = called in FORBIDDEN_CODE or called.co_filename in WATCHED_FILES
        return f"calls {called.co_qualname}" if watched else None
    if id(value) in SYSTEM:
        return f"calls {getattr(value, '__name__', '')}, which asks the system"
    return forbidden_call(code, value) if isinstance(value, BuiltinFunctionType) else None


def sees_namespaces(code: CodeType) -> bool:
    """Whether code reaches for a namespace as a whole, so that what it reads there has no name."""
    return not _SEES_NAMESPACES.isdisjoint(code.co_names) and not installed_path(code.co_filename)


def is_search(frame: FrameType) -> bool:
    """Whether the import machinery asks somebody's finder where a module is; that runs none of it."""
    caller: FrameType | None = frame
    name = ""
    while caller is not None and not stands_by_version(caller.f_code.co_filename):
        name = caller.f_code.co_name
        caller = caller.f_back
    machinery = caller is not None and caller.f_code.co_filename.startswith("<frozen importlib")
    return machinery and name in {"find_spec", "find_module", "path_hook"}


def receiver_of(frame: FrameType, code: CodeType) -> type | None:
    """The class that a method runs for; ``None`` for a plain function."""
    if not code.co_argcount or not code.co_varnames or code.co_varnames[0] not in {"self", "cls"}:
        return None
    value = frame.f_locals.get(code.co_varnames[0])
    return value if isinstance(value, type) else type(value)


def place(code: CodeType) -> str:
    """A function's name and where it is written, for messages."""
    return f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
