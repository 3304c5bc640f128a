"""What a capture read, as its record says it: files and values, and whether each is still the same.

Recorder and lookup digest with the same functions. An entry begins with its kind and a colon: ``env``,
``call``, ``seed``, ``import``, ``item``, ``class`` or ``global``; see docs/keys.md.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from stitchcache.containers import code_digest
from stitchcache.encoding import SCALARS, UnkeyableError
from stitchcache.keys.code import CACHE, WRAPPED, filled_cells
from stitchcache.keys.walk import Walk, find_class, installed_path, module_by_label, module_stands_by_version
from stitchcache.torchside import RESUMED
from stitchcache.types import SourceRef, TargetRecord, follow

REGISTRIES = frozenset({"transformers.utils.output_capturing:_CAN_RECORD_REGISTRY"})
"""Dictionaries to which each model of a library adds itself: recorded item by item, else a process that has
imported one model more would miss. An item that is not there belongs to a model that is not in use."""

ROLL_CALLS = frozenset({"transformers.utils.generic:_registered_model_output_types"})
"""Lists of classes for which something was done once; what is in them changes nothing a model computes."""

_KEYED_OF_LIBRARY = (*SCALARS, FunctionType, BuiltinFunctionType, type)
"""Kinds of values that are keyed even where they belong to torch or the library: they may be replaced."""

_NAMESPACE = object()  # stands for the namespace of a module as a whole
_COMPUTED = object()  # stands for what a module makes up when it is asked
_MISSING = object()


class Found:
    """Where a chain leads: a value, by ``used`` of its steps; the last module on the way is ``owner``."""

    def __init__(self, value: Any, exists: bool, used: tuple[str, ...], owner: str = "") -> None:
        self.value, self.exists, self.used, self.owner = value, exists, used, owner


def lookup(
    namespace: dict[str, Any], chain: tuple[str, ...], patched: Mapping[int, dict[str, Any]] | None = None
) -> Found:
    """Follow a global's name, and attributes, through modules; ``patched`` as in ``Reads``."""
    patched = patched or {}
    space = patched.get(id(namespace), namespace)
    if chain[0] not in space:
        space = patched.get(id(vars(builtins)), vars(builtins))
        if chain[0] not in space:
            return Found(None, False, chain[:1])
    value, owner = space[chain[0]], ""
    for index, step in enumerate(chain[1:], 1):
        if not isinstance(value, ModuleType):
            return Found(value, True, chain[:index], owner)
        inner, owner = patched.get(id(vars(value)), vars(value)), value.__name__
        if step == "__dict__":
            return Found(_NAMESPACE, True, chain[: index + 1], owner)
        made = inner[step] if step in inner else _made_up(value, step)
        if made is _COMPUTED or made is _MISSING:
            exists = made is _COMPUTED
            return Found(made if exists else value, exists, chain[: index + 1], owner)
        value = made
    return Found(value, True, chain, owner)


def lookup_in(module: ModuleType, chain: tuple[str, ...]) -> Found:
    """The same for what a module has, builtins left out, or makes up."""
    found = lookup({"": module}, ("", *chain))
    return Found(found.value, found.exists, found.used[1:], found.owner)


def _made_up(module: ModuleType, name: str) -> Any:
    """What a module answers for a name that is not among its globals; ``_MISSING`` where it has none."""
    getter = vars(module).get("__getattr__")
    if type(module) is ModuleType and (getter is None or isinstance(getter, FunctionType)):
        # The code of a __getattr__ is recorded when it runs.
        return _MISSING
    if module_stands_by_version(module.__name__):
        # Settings of torch's, such as torch.backends.cudnn.benchmark, and the ops that it makes when asked.
        return getattr(module, name, _MISSING)
    # Packages import parts of themselves late.
    return _MISSING if _is_installed(module) else _COMPUTED


def title(name: str) -> str:
    """What an entry names, for people: ``module.name``."""
    return name.removeprefix("?").replace(":", ".").rstrip(".")


def global_digest(walk: Walk, name: str, found: Found) -> str:
    """Digest of what a global's name leads to; an UnkeyableError where none stands for it soundly.

    The name ends in a dot where the code goes on to read from the value; elsewhere it holds the value itself,
    which for a module says nothing of what it reads.
    """
    value, why = found.value, None
    where = f"global {title(name)}"
    if value is _COMPUTED:
        why = f"module {found.owner} computes it when it is asked; make it a plain global"
    elif value is _NAMESPACE:
        why = f"the namespace of module {found.owner} is used as a whole; name what is read from it"
    elif found.owner.startswith("numpy.random"):
        why = "gives other numbers each time; draw them beforehand"
    elif value is sys.modules and not _is_installed(_module_of(name, walk)):
        why = "what is loaded depends on the process; import it by name"
    elif isinstance(value, ModuleType) and found.exists and not name.endswith("."):
        # Code may use torch's modules as values, and those of its own package, as lazy imports do.
        own = _is_installed(value) and _is_installed(_module_of(name, walk))
        if not own and not walk.is_versioned(value.__name__):
            why = f"the module {value.__name__} is used as a value; name what is read from it"
    if why is not None:
        raise UnkeyableError(where, why)
    if isinstance(value, ModuleType):
        # torch and others load parts of themselves late; that a part is not there yet means nothing.
        return bytes_digest(b"module " + value.__name__.encode())
    if not found.exists:
        return bytes_digest(b"absent")
    library = found.owner != "" and walk.is_versioned(found.owner)
    if library and not isinstance(value, _KEYED_OF_LIBRARY) and not _is_plain_of_library(found):
        # An object of torch's or the library's own; what torch's settings say are factors.
        return bytes_digest(b"object " + type(value).__qualname__.encode())
    return _digest(walk, "global", name, value, where)


def _digest(walk: Walk, section: str, name: str, value: Any, where: str) -> str:
    return bytes_digest(walk.writer(section, name, [where]).bytes_with(value))


def _is_installed(module: ModuleType | None) -> bool:
    return installed_path(getattr(module, "__file__", None) or "") != ""


def _is_plain_of_library(found: Found) -> bool:
    if hasattr(type(found.value), "__dataclass_fields__"):
        return True
    plain = isinstance(found.value, (list, dict, tuple, set, frozenset)) and found.value is not sys.modules
    return plain and found.owner.partition(".")[0] in sys.stdlib_module_names


def item_digest(walk: Walk, item: Any) -> str:
    """Digest of an item of a registry, alone: the classes that it names are the key's where they are used."""
    alone = Walk()
    alone.main = walk.main
    return _digest(alone, "item", "", item, "item of a registry")


def answer_digest(walk: Walk, name: str) -> str:
    """Digest of what a function such as ``torch.distributed:get_rank`` answers; an error is an answer too."""
    module, _, function = name.partition(":")
    answer: tuple[Any, ...]
    try:
        ask = follow(sys.modules.get(module), function)
        answer = (ask(),) if ask is not None else ("absent",)
    except (ValueError, RuntimeError, AttributeError, AssertionError) as error:
        answer = ("raises", type(error).__name__)
    return _digest(walk, "call", name, answer, f"what {title(name)}() answers")


def text_digest(value: str | None) -> str:
    """Digest of an environment variable; ``None`` where it is not set."""
    return bytes_digest(b"unset" if value is None else b"=" + value.encode("utf-8", "surrogatepass"))


def import_digest(walk: Walk, name: str) -> str:
    """Digest of whether there is a module of this name to import; nothing is imported for it."""
    there = sys.modules.get(name) is not None or find_file(name, walk.main)[0] is not None
    return text_digest("there" if there else None)


def seed_digest(walk: Walk, name: str) -> str:
    """Digest of what follows from this process's hash seed, such as the order of texts in a set."""
    return bytes_digest(b"seed %d" % hash("a text"))


def bytes_digest(data: bytes | bytearray) -> str:
    """sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def check_sources(record: TargetRecord, keyed: Walk | None = None, *, looked: bool = False) -> str | None:
    """Why a record's files, or values from outside of the model, are not as captured; ``None`` if they are.

    Files are read and digested each time: nothing cheaper is sure, and dozens of files take a millisecond. No
    module is imported. ``keyed`` is the walk of the target key; it is not changed. ``looked`` says that the
    model runs before a hit is served: it uses what its ``lru_cache``s hold, so warm ones are no reason to
    trace.
    """
    walk = (keyed or Walk()).child()
    reason = _check_files(record.sources, walk) or _check_entries(record.globals, walk)
    return reason or (None if looked else walk.warm_cache())


def _check_files(sources: Iterable[SourceRef], walk: Walk) -> str | None:
    for source in sources:
        # Records of one target name mostly the same files: each is read once for all of them.
        known = walk.files.get(source.module)
        if known is None:
            known = walk.files[source.module] = _look_at_file(source.module, walk)
        file, size, digest, reason = known
        if size >= 0 and (size != source.size or digest != source.digest):
            return f"{file} ({source.module}) is not the file that was captured"
        if reason is not None:
            return reason
    return None


def _look_at_file(name: str, walk: Walk) -> tuple[str, int, str, str | None]:
    """A module's file, its size and digest, and why it does not say what runs; ``None`` where it does."""
    file, module = find_file(name, walk.main)
    if file is None:
        return "", -1, "", f"the source of {name} cannot be found; it ran during the capture"
    try:
        data = read_file(file, module)
    except OSError as error:
        return file, -1, "", f"the source of {name} cannot be read: {error}"
    reason = None if module is None else changed_since_import(module, data, walk.started)
    return file, len(data), bytes_digest(data), reason


def _check_entries(entries: Iterable[tuple[str, str]], walk: Walk) -> str | None:
    for entry, digest in entries:
        kind, _, name = entry.partition(":")
        if kind not in _KINDS:
            return f"entry {entry} of the record is of no known kind"
        subject, digest_now = _KINDS[kind]
        try:
            now = digest_now(walk, name)
        except UnkeyableError as error:
            return f"{error} (this worked at the capture)"
        if now == digest:
            continue
        if now is None and (kind == "item" or name.startswith("?")):
            # Loaded during the capture, and not loaded yet here: its file, checked above, speaks for it.
            continue
        how = "is not there" if now is None else "changed"
        return f"{subject.format(title(name))} {how} since the capture"
    return None


def _module_of(name: str, walk: Walk) -> ModuleType | None:
    return module_by_label(name.removeprefix("?").partition(":")[0], walk.main)


def _class_now(walk: Walk, name: str) -> str | None:
    module = _module_of(name, walk)
    cls = None if module is None else find_class(module.__name__, name.partition(":")[2])
    return bytes_digest(walk.contents(cls)) if isinstance(cls, type) else None


def _item_now(walk: Walk, name: str) -> str | None:
    _, _, rest = name.partition(":")
    attribute, _, key = rest.partition(":")
    registry = getattr(_module_of(name, walk), attribute, None)
    return item_digest(walk, registry[key]) if isinstance(registry, dict) and key in registry else None


def _global_now(walk: Walk, name: str) -> str | None:
    module = _module_of(name, walk)
    if module is None:
        return None
    chain = tuple(name.partition(":")[2].rstrip(".").split("."))
    # Code of the user's may fall back on builtins; of the library there is only what the user's imports name.
    users = type(module) is ModuleType and not walk.is_versioned(module.__name__)
    found = lookup(vars(module), chain) if users else lookup_in(module, chain)
    # Else what was a module on the way is something else now.
    return global_digest(walk, name, found) if found.used == chain else ""


_KINDS: Mapping[str, tuple[str, Callable[[Walk, str], str | None]]] = {
    "env": ("environment variable {}", lambda walk, name: text_digest(os.environ.get(name))),
    "call": ("what {}() answers", answer_digest),
    "seed": ("the hash seed, on which the order of sets that {} makes depends,", seed_digest),
    "import": ("whether {} can be imported", import_digest),
    "item": ("item {}", _item_now),
    "class": ("class {}", _class_now),
    "global": ("global {}", _global_now),
}
"""For each kind of entry what it is about, and its digest here and now; ``None`` if it is not there."""


_SLACK = 2.0  # seconds by which a file's time and the process's start may be off


def read_file(file: str, module: ModuleType | None = None) -> bytes:
    """The bytes of a module's file, or an OSError; through its loader where it lies in an archive."""
    try:
        with open(file, "rb") as stream:
            return stream.read()
    except NotADirectoryError:
        get_data = getattr(getattr(module, "__loader__", None), "get_data", None)
        if get_data is None:
            raise
        return bytes(get_data(file))


def find_file(label: str, main: str) -> tuple[str | None, ModuleType | None]:
    """Where a module's source is, and the module if it is loaded; runs none of its packages' code."""
    module = module_by_label(label, main)
    if module is not None:
        return getattr(module, "__file__", None), module
    top, *rest = label.split(".")
    spec: Any = None
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(top)
    name = top
    for step in rest:
        name = f"{name}.{step}"
        parent = sys.modules.get(name.rpartition(".")[0])
        found = getattr(spec, "submodule_search_locations", None)
        path = getattr(parent, "__path__", None) if parent else found
        if path is None:
            return None, None
        spec = importlib.machinery.PathFinder.find_spec(name, list(path))
    return getattr(spec, "origin", None), None


def changed_since_import(
    module: ModuleType, source: bytes, started: float, ran: Iterable[CodeType] = ()
) -> str | None:
    """Why what runs of a module is not what its file says; ``None`` where it is.

    Files that nobody touched since the process started cannot have been edited. For the others ``source``,
    what the file holds now, is compiled, and every function of the module must be found in the result. Code
    that ``ran`` is always looked for: bytecode that Python keeps may be that of an older text of the same
    size and time.
    """
    file = getattr(module, "__file__", None) or ""
    found = [*ran, *(_codes_of(module) if _may_differ(module, file, started) else ())]
    if not file.endswith(".py") or not found:
        return None
    try:
        compiled = compile(source, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return f"{file} was changed since it was imported; start the process again"
    known = {(code.co_qualname, code_digest(code)) for code in _nested(compiled)}
    for code in found:
        if (code.co_qualname, code_digest(code)) not in known:
            why = f"{file} was changed since it was imported: {code.co_qualname} is not what runs"
            return f"{why}; start the process again"
    return None


def _nested(code: CodeType) -> list[CodeType]:
    inner = [_nested(const) for const in code.co_consts if isinstance(const, CodeType)]
    return [code, *(item for items in inner for item in items)]


_PARTS: dict[type, tuple[str, ...]] = {**WRAPPED, MethodType: ("__func__",), CACHE: ("__wrapped__",)}


def _codes_of(module: ModuleType) -> list[CodeType]:
    """The code of functions that a module's names and its classes' attributes lead to, also when wrapped."""
    file = module.__file__
    found: list[CodeType] = []
    todo: list[Any] = list(vars(module).values())
    met: set[int] = set()
    while todo:
        item = todo.pop()
        if id(item) in met:
            continue
        met.add(id(item))
        if isinstance(item, type):
            if item.__module__ == module.__name__:
                todo += vars(item).values()
        elif isinstance(item, FunctionType):
            # Dynamo adds functions to go on after graph breaks, which no file has. What ran is looked for.
            if item.__code__.co_filename == file and not item.__code__.co_name.startswith(RESUMED):
                found.append(item.__code__)
            # A decorator's own function closes over the one that it was given.
            todo += filled_cells(item)
        elif (parts := _PARTS.get(type(item))) is not None:
            todo += [getattr(item, name, None) for name in parts]
        else:
            # Not getattr: a proxy would run code, or import what it stands for.
            with contextlib.suppress(AttributeError):
                held = object.__getattribute__(item, "__dict__").values()
                todo += [value for value in held if type(value) is FunctionType or type(value) in _PARTS]
    return found


def _may_differ(module: ModuleType, file: str, started: float) -> bool:
    """Whether a file may be newer than the process, or a user's than its bytecode, which may have run."""
    try:
        found = os.stat(file)
    except OSError:
        return True
    # A copy may keep its old mtime.
    if max(found.st_mtime, found.st_ctime) > started - _SLACK:
        return True
    cached = getattr(module, "__cached__", None)
    if cached is not None and not installed_path(file):
        with contextlib.suppress(OSError):
            return found.st_ctime > os.stat(cached).st_mtime + _SLACK
    return False
