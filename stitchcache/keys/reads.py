"""What code reads from outside of the model, how that is noted, and what no key would stand for.

A trace bakes in whatever the model's code learns while it runs. Globals, environment variables and some
answers (:data:`_ASKED`) are recorded and checked at each lookup; what else it may ask turns direct lookup
off.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import inspect
import io
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch

from stitchcache.encoding import UnkeyableError
from stitchcache.keys import bytecode, check
from stitchcache.keys.walk import Walk, in_stdlib, installed_path, module_stands_by_version, stands_by_version
from stitchcache.torchside import fx_globals
from stitchcache.types import follow

FORBIDDEN_CODE = {
    threading.Thread.start.__code__: "starts a thread, whose code is not seen; start it outside of the model",
    importlib.import_module.__code__: "imports a module by a name that is computed; import it by name",
    type(os.environ).__iter__.__code__: "lists the environment variables; read the ones that matter by name",
}
"""Functions of the library that the model's code may not call, and why."""

IMPORT_MODULE = importlib.import_module.__code__

_MODULES = frozenset(
    """time posix nt _random _socket _io io random _thread _datetime datetime gc _locale resource fcntl mmap
    _uuid _posixsubprocess _pickle marshal _ctypes faulthandler select pwd grp""".split()  # noqa: SIM905
)
_NAMES = {
    "builtins": frozenset({"open", "eval", "exec", "globals", "hash", "input", "id", "__import__"}),
    "sys": frozenset(
        """_getframe _current_frames getrefcount getrecursionlimit getswitchinterval getallocatedblocks
        gettrace getprofile""".split()  # noqa: SIM905
    ),
    "decimal": frozenset({"getcontext", "localcontext"}),
    "_contextvars": frozenset({"copy_context"}),
    "numpy": frozenset({"fromfile"}),
    "torch": frozenset({"from_file"}),
}
_HARMLESS_IN_PACKAGES = frozenset("id hash globals _getframe getrefcount gettrace getprofile".split())  # noqa: SIM905
"""What installed packages call for warnings and debugging, not for numbers."""

_PACKAGES = os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))
_LIBRARY = os.path.dirname(os.__file__)


def _files(directory: str, names: str) -> frozenset[str]:
    return frozenset(os.path.join(directory, *f"{name}.py".split("/")) for name in names.split())


_WATCHED_IN_LIBRARY = "random secrets tempfile subprocess socket locale platform uuid getpass _pydecimal"
_WATCHED_IN_PACKAGES = """torch/serialization torch/hub torch/random torch/cuda/memory torch/cuda/random
    numpy/lib/npyio numpy/lib/_npyio_impl numpy/core/memmap numpy/_core/memmap"""
WATCHED_FILES = _files(_LIBRARY, _WATCHED_IN_LIBRARY) | _files(_PACKAGES, _WATCHED_IN_PACKAGES)
"""Files of the library, torch and numpy whose functions give what is not the same each time."""

_FX_TRACE = os.path.join(_PACKAGES, "torch", "fx", "_symbolic_trace.py")
_ON_BEHALF = ("<frozen importlib", "<frozen zipimport")
FOR_PEOPLE = _files(_LIBRARY, "warnings traceback inspect logging/__init__")
_BYSTANDING_FILES = FOR_PEOPLE | _files(_LIBRARY, "linecache tokenize")
"""What these read is source text for people, or the code of modules, which is recorded elsewhere."""
_READ_ANY_FILE = frozenset({"getline", "getlines", "updatecache", "open", "get_data"})
"""Functions of theirs, and of loaders, that read whatever file the model asks for."""

_HARMLESS_POSIX = frozenset({"fspath", "putenv", "unsetenv", "fsencode", "fsdecode"})
_SYSTEM = [io.open, io.open_code, *(getattr(os, name) for name in {*os.__all__} - _HARMLESS_POSIX)]
SYSTEM = {id(function): function for function in _SYSTEM if isinstance(function, BuiltinFunctionType)}
"""Functions made in C that ask the operating system, by id; held, so that an id stays its own."""

OF_A_PROCESS = frozenset(
    """RANK LOCAL_RANK GROUP_RANK ROLE_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE
    ROLE_WORLD_SIZE TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT""".split()  # noqa: SIM905
)
"""Variables that tell processes of one program apart: recorded also where torch reads them for a model."""

_ASKED = {
    "sys": "get_int_max_str_digits",
    "signal": "getsignal",
    "threading": "active_count",
    "tracemalloc": "is_tracing",
    "numpy": "geterr geterrcall get_printoptions getbufsize",
    "torch": """get_num_threads get_num_interop_threads initial_seed is_warn_always_enabled
        is_anomaly_enabled is_anomaly_check_nan_enabled is_autocast_cache_enabled""",
    "torch.__future__": "get_swap_module_params_on_conversion get_overwrite_module_params_on_conversion",
    "torch.sparse": "check_sparse_tensor_invariants.is_enabled",
    "torch.utils.data": "get_worker_info",
    "torch.cuda": "is_available device_count current_device get_device_capability get_device_name",
    "torch.distributed": """is_available is_initialized is_torchelastic_launched get_rank get_world_size
        get_backend get_node_local_rank""",
}
"""Functions whose answers are recorded: module to names."""


class Reads:
    """What the model's code reads, noted while it runs: ``found`` has the record's entries and their digests.

    ``unsound`` is the first reason why a target key must not lead to this capture, if there is one.
    """

    def __init__(self, keyed: Walk) -> None:
        self.found: dict[str, str] = {}
        self.answers: dict[str, None] = {}
        self.unsound: str | None = None
        self.walk = keyed.child()
        self.loaded = frozenset(sys.modules)
        # torch.export replaces builtin min and max and math.pow while it traces, for its own ends.
        self.patched = {id(space): dict(space) for space in (vars(builtins), vars(math))}
        self._keyed = keyed
        self._imports: list[tuple[str, bytecode.Chain, bool, CodeType]] = []
        self._module_classes: dict[int, type] = {}
        self._library_state: list[tuple[str, check.Found, list[Any]]] = []

    def refuse(self, reason: str) -> None:
        """Turn direct lookup off; the first reason is kept."""
        self.unsound = self.unsound or reason

    def read_globals(self, code: CodeType, namespace: dict[str, Any], name: str) -> None:
        """Note the globals that code of a module reads, and what it imports."""
        for chain, called in bytecode.chains(code):
            found = check.lookup(namespace, chain, self.patched)
            self._note(name, chain, found)
            # What goes on as a value may be called by code made in C, which nobody sees: ``map(id, items)``.
            as_value = not called and type(found.value) is BuiltinFunctionType
            if as_value and (reason := forbidden_call(code, found.value)):
                self.refuse(f"{bytecode.place(code)} {reason}")
        if bytecode.makes_sets(code) and not installed_path(code.co_filename):
            entry = f"seed:{self._label(name)}:{code.co_qualname}"
            self.found[entry] = check.seed_digest(self.walk, "")
        package = str(namespace.get("__package__") or name.rpartition(".")[0])
        self._imports += [(*item, code) for item in bytecode.imports_of(code, package)]

    def read_cells(self, code: CodeType, cells: dict[str, Any]) -> None:
        """Note what code reads from modules that it closes over; the target key has their names only."""
        for chain, _ in bytecode.chains(code, bytecode.CELL):
            module = cells.get(chain[0])
            if len(chain) == 1 or not isinstance(module, ModuleType):
                continue
            name = module.__name__
            if sys.modules.get(name) is not module:
                self.refuse(f"{bytecode.place(code)} reads from module {name}; put that in sys.modules")
                continue
            self._note(name, chain[1:], check.lookup(vars(module), chain[1:], self.patched))

    def run_for(self, receiver: type) -> None:
        """Note the class whose method runs; those of modules are part of the target key already."""
        for cls in receiver.__mro__:
            if issubclass(cls, torch.nn.Module):
                self._module_classes[id(cls)] = cls
            elif not self.walk.is_versioned(cls.__module__):
                self.walk.note_class(cls)

    def finish(self, runs: Mapping[int, int]) -> None:
        """Note what shows at the end; ``runs`` says how often code of the user's ran, by its id."""
        self._finish_imports()
        self._finish_classes()
        for walk in (self._keyed, self.walk):
            if reason := walk.warm_cache(runs):
                self.refuse(reason)
        self._check_library_state()
        for entry in self.answers:
            self._digest(entry, check.answer_digest, self.walk, entry.partition(":")[2])

    def _digest(self, entry: str, digest: Callable[..., str], *args: Any) -> None:
        try:
            self.found[entry] = digest(*args)
        except UnkeyableError as error:
            self.refuse(str(error))

    def _label(self, module: str) -> str:
        label = self.walk.label(module)
        return label if label == self.walk.main or label in self.loaded else f"?{label}"

    def _note(self, module: str, chain: bytecode.Chain, found: check.Found, *, held: bool = True) -> None:
        plain = f"{self._label(module)}:{'.'.join(found.used)}"
        name = plain if held and found.used == chain else f"{plain}."
        entry = f"global:{name}"
        if entry in self.found or plain in check.ROLL_CALLS:
            return
        if plain in check.REGISTRIES and isinstance(found.value, dict):
            for key, item in found.value.items():
                self._digest(f"item:{plain}:{key}", check.item_digest, self.walk, item)
            return
        self._digest(entry, check.global_digest, self.walk, name, _as_before_trace(found))
        if found.owner in sys.stdlib_module_names and isinstance(found.value, (list, dict, set)):
            self._library_state.append((name, found, _parts(found.value)))

    def _check_library_state(self) -> None:
        """Refuse state of the library that torch changes meanwhile, such as the filters of warnings."""
        for name, found, parts in self._library_state:
            now = getattr(sys.modules.get(found.owner), found.used[-1], None)
            new = _parts(now) if type(now) is type(found.value) else []
            if list(map(id, new)) != list(map(id, parts)):
                self.refuse(f"{check.title(name)} changes while the model is captured; read it beforehand")

    def _finish_imports(self) -> None:
        for name, names, exact, code in self._imports:
            module = sys.modules.get(name)
            if module is not None:
                self._note_imported(module, names, exact, code, set())
            elif not self.walk.is_versioned(name):
                digest = check.import_digest(self.walk, name)
                if digest == check.text_digest(None):
                    self.found[f"import:{name}"] = digest

    def _note_imported(
        self, module: ModuleType, names: bytecode.Chain, exact: bool, code: CodeType, done: set[int]
    ) -> None:
        """Note what code may read from a module that it has imported, and from modules in that."""
        name, done = module.__name__, done | {id(module)}
        computes = exact and not installed_path(getattr(module, "__file__", None) or "")
        for attribute in dict.fromkeys(names):
            if attribute == "*":
                self.refuse(f"{code.co_qualname} imports everything from {name}; name what is imported")
                continue
            found = check.lookup_in(module, (attribute,))
            if found.exists and found.owner:
                self._note(name, (attribute,), found, held=False)
                if isinstance(found.value, ModuleType) and id(found.value) not in done:
                    self._note_imported(found.value, code.co_names, False, code, done)
            elif computes and not self.walk.is_versioned(name):
                why = "which computes it; make it a plain global"
                self.refuse(f"{code.co_qualname} imports {attribute} from {name}, {why}")

    def _finish_classes(self) -> None:
        for cls in self.walk.unwritten_classes():
            entry = f"class:{self._label(cls.__module__)}:{cls.__qualname__}"
            self._digest(entry, lambda cls: check.bytes_digest(self.walk.contents(cls)), cls)
        covered = Walk()
        covered.codes = self.walk.codes
        for cls in self._module_classes.values():
            with contextlib.suppress(UnkeyableError):
                # The target key has met this class, or will; here it only says which code was digested.
                covered.contents(cls)


def _parts(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else list(value)


def _as_before_trace(found: check.Found) -> check.Found:
    """A global as it is when nobody traces: torch.fx wraps functions under ``torch.fx.wrap`` meanwhile."""
    if type(found.value) is FunctionType and found.value.__code__.co_filename == _FX_TRACE:
        original = getattr(found.value, "__wrapped__", found.value)
        return check.Found(original, found.exists, found.used, found.owner)
    return found


def asked_functions() -> dict[int, tuple[str, Any]]:
    """By the id of its code, or its own where it is made in C: an entry's name, and what has that id."""
    found: dict[int, tuple[str, Any]] = {}
    for module, names in _ASKED.items():
        for name in names.split():
            function = follow(sys.modules.get(module), name)
            if function is not None:
                function = inspect.unwrap(function)
                thing = getattr(function, "__code__", function)
                found[id(thing)] = (f"call:{module}:{name}", thing)
    return found


def forbidden_call(code: CodeType, function: Any) -> str | None:
    """Why the model's code may not call a function made in C; ``None`` where it may."""
    name = getattr(function, "__name__", "")
    module = module_of(function) or ""
    if name == "__subclasses__":
        return "asks for the subclasses of a class, as far as they are imported; list them by name"
    forbidden = module in _MODULES or name in _NAMES.get(module, ())
    if not forbidden or isinstance(getattr(function, "__self__", None), str) or code.co_name == "<module>":
        return None
    if installed_path(code.co_filename) and name in _HARMLESS_IN_PACKAGES:
        return None
    return f"calls {module}.{name}, whose result is not the same each time; call it beforehand"


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
    bystands, entered = False, ""
    for caller in callers(frame):
        filename = caller.f_code.co_filename
        if not in_stdlib(filename):
            bystands = bystands and entered not in _READ_ANY_FILE
            return None if bystands or stands_by_version(filename) else caller
        if filename.startswith(_ON_BEHALF) or filename in _BYSTANDING_FILES:
            bystands, entered = True, caller.f_code.co_name
    return None


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame, and those that led to it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def outside_stdlib(frame: FrameType) -> FrameType | None:
    """The nearest caller that is not the library's."""
    return next((one for one in callers(frame.f_back) if not in_stdlib(one.f_code.co_filename)), None)


def is_search(frame: FrameType) -> bool:
    """Whether the import machinery asks somebody's finder where a module is; that runs none of it."""
    name = ""
    for caller in callers(frame):
        if stands_by_version(caller.f_code.co_filename):
            machinery = caller.f_code.co_filename.startswith("<frozen importlib")
            return machinery and name in {"find_spec", "find_module", "path_hook"}
        name = caller.f_code.co_name
    return False


def is_module_namespace(namespace: dict[str, Any]) -> bool:
    """Whether a function's globals are those of a module that is imported under its name."""
    module = sys.modules.get(str(namespace.get("__name__")))
    return module is not None and vars(module) is namespace


def is_given(code: CodeType, name: str, value: object) -> bool:
    """Whether a global of code that no module holds means the same wherever it has this name."""
    # So do torch itself and the library's modules under their own names, and what torch.fx puts beside the
    # code that it generates for a graph.
    if isinstance(value, ModuleType) and value.__name__ == name and sys.modules.get(name) is value:
        return module_stands_by_version(name)
    if not code.co_filename.startswith("<eval_with_key>"):
        return False
    known = fx_globals().get(name)
    same_float = isinstance(value, float) and isinstance(known, float) and str(value) == str(known)
    return known is not None and (value is known or same_float)


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
