"""What a capture read, as its record says it: how each entry is digested, and whether it is still the same.

Recorder and lookup digest with the same functions.
"""

from __future__ import annotations

import builtins
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

from stitchcache.encoding import SCALARS, UnkeyableError
from stitchcache.keys.origins import (
    changed_since_import,
    find_file,
    installed_path,
    module_by_label,
    read_file,
)
from stitchcache.keys.scope import Scope, find_class
from stitchcache.keys.walk import Walk
from stitchcache.types import SourceRef, TargetRecord

_ABSENT = b"absent"
_KEYED_OF_LIBRARY = (*SCALARS, FunctionType, BuiltinFunctionType, type)
"""Kinds of values that are keyed even where they belong to torch or the library: they may be replaced."""

_NAMESPACE = object()
"""Stands for the namespace of a module as a whole."""

_OPS = (type(torch.ops), type(torch.ops.aten))


class Found(NamedTuple):
    """Where a chain leads.

    Args:
        value: What it leads to.
        exists: Whether there is such a thing.
        used: The part of the chain that leads there; the rest is within the value, which is keyed whole.
        owner: The last module on the way, or ``""``.
    """

    value: Any
    exists: bool
    used: tuple[str, ...]
    owner: str = ""


def lookup(
    namespace: dict[str, Any], chain: tuple[str, ...], patched: Mapping[int, dict[str, Any]] | None = None
) -> Found:
    """Follow a chain through modules.

    Args:
        namespace: The globals that the first name is looked up in.
        chain: A global's name, and attributes.
        patched: Namespaces as they were before torch patched them for the time of a trace, by the id of
            what they are now.
    """
    patched = patched or {}
    name = chain[0]
    own = patched.get(id(namespace), namespace)
    common = patched.get(id(vars(builtins)), vars(builtins))
    if name in own:
        value = own[name]
    elif name in common:
        value = common[name]
    else:
        return Found(None, False, chain[:1])
    owner = ""
    for index, step in enumerate(chain[1:], 1):
        if not isinstance(value, ModuleType):
            return Found(value, True, chain[:index], owner)
        inner, owner = patched.get(id(vars(value)), vars(value)), value.__name__
        if step == "__dict__":
            return Found(_NAMESPACE, True, chain[: index + 1], owner)
        if step not in inner and isinstance(value, _OPS):
            # torch makes these the first time they are asked for; that nobody has says nothing.
            getattr(value, step, None)
        if step not in inner:
            return Found(value, False, chain[: index + 1], owner)
        value = inner[step]
    return Found(value, True, chain, owner)


def title(entry: str) -> str:
    """An entry's name for people: ``module.name``."""
    return entry.removeprefix("?").replace(":", ".").rstrip(".")


def global_digest(shared: Scope, entry: str, found: Found) -> str:
    """Digest of what a global's name leads to.

    Args:
        shared: What this record's encoders have in common; classes that the value names are noted there.
        entry: Its name in the record. It ends in a dot where the code goes on to read from the value;
            elsewhere the code holds the value itself, which for a module says nothing of what it reads.
        found: Where its chain leads.

    Raises:
        UnkeyableError: No digest stands for it soundly.
    """
    payload = _ABSENT
    value, exists = found.value, found.exists
    library = found.owner != "" and shared.is_versioned(found.owner)
    if value is _NAMESPACE:
        why = f"the namespace of module {found.owner} is used as a whole; name what is read from it"
        raise UnkeyableError(f"global {title(entry)}", why)
    if found.owner.startswith("numpy.random"):
        raise UnkeyableError(f"global {title(entry)}", "gives other numbers each time; draw them beforehand")
    if value is sys.modules and not _of_package(shared, entry):
        raise UnkeyableError(
            f"global {title(entry)}", "what is loaded depends on the process; import it by name"
        )
    if isinstance(value, ModuleType):
        if exists and not entry.endswith(".") and not _may_be_held(shared, entry, value):
            why = f"the module {value.__name__} is used as a value; name what is read from it"
            raise UnkeyableError(f"global {title(entry)}", why)
        # torch and others load parts of themselves late; that a part is not there yet means nothing.
        payload = b"module " + value.__name__.encode()
    elif exists:
        encoder = shared.writer("global", entry, [f"global {title(entry)}"])
        if library and not isinstance(value, _KEYED_OF_LIBRARY) and not _is_plain_of_library(found):
            # An object of torch's or the library's own; what torch's settings say are factors.
            payload = b"object " + type(value).__qualname__.encode()
        else:
            encoder.put(value)
            payload = bytes(encoder.out)
    return hashlib.sha256(payload).hexdigest()


def _of_package(shared: Scope, entry: str) -> bool:
    """Whether it is an installed package's code that reads an entry."""
    label = entry.removeprefix("?").partition(":")[0]
    file = getattr(module_by_label(label, shared.main), "__file__", None)
    return installed_path(file or "") != ""


def _is_plain_of_library(found: Found) -> bool:
    """Whether a value of torch or the library is known by what is in it, such as ``sys.argv``."""
    if hasattr(type(found.value), "__dataclass_fields__"):
        return True
    plain = isinstance(found.value, (list, dict, tuple, set, frozenset)) and found.value is not sys.modules
    return plain and found.owner.partition(".")[0] in sys.stdlib_module_names


def _may_be_held(shared: Scope, entry: str, module: ModuleType) -> bool:
    """Whether code may use a module as a value: one of torch's, or of its own package, as lazy imports do."""
    installed = installed_path(getattr(module, "__file__", None) or "") != ""
    return shared.is_versioned(module.__name__) or (installed and _of_package(shared, entry))


def class_digest(shared: Scope, cls: type) -> str:
    """Digest of a class's contents.

    Raises:
        UnkeyableError: One of its attributes cannot be written soundly.
    """
    return hashlib.sha256(shared.contents(cls)).hexdigest()


REGISTRIES = frozenset({"transformers.utils.output_capturing:_CAN_RECORD_REGISTRY"})
"""Dictionaries to which each model of a library adds itself by name: recorded item by item.

Otherwise a process that has imported one model more would not find what another one compiled. An item that is
there at a lookup must be as it was; one that is not belongs to a model that is not in use.
"""

ROLL_CALLS = frozenset({"transformers.utils.generic:_registered_model_output_types"})
"""Lists of classes for which something was done once; what is in them changes nothing a model computes."""


def item_digest(main: str, item: Any) -> str:
    """Digest of an item of a registry. The classes that it names are the key's where they are in use.

    Raises:
        UnkeyableError: No digest stands for it soundly.
    """
    walk = Walk()
    walk.main = main
    encoder = walk.writer("item", path=["item of a registry"])
    encoder.put(item)
    return hashlib.sha256(encoder.out).hexdigest()


KINDS = frozenset({"env", "call", "item", "class", "global", "import"})
"""What an entry may begin with, before a colon, when it is no global of a module of another name."""


def answer_digest(entry: str) -> str:
    """Digest of what a function of torch answers here and now; that it raises is an answer too.

    Args:
        entry: ``call:torch.distributed:get_rank``.
    """
    if entry.count(":") != 2:
        return ""
    _, module, name = entry.split(":")
    try:
        answer = repr(getattr(sys.modules.get(module), name)())
    except (ValueError, RuntimeError, AttributeError, AssertionError) as error:
        answer = f"raises {type(error).__name__}"
    return hashlib.sha256(answer.encode()).hexdigest()


def text_digest(value: str | None) -> str:
    """Digest of an environment variable; ``None`` where it is not set."""
    data = b"unset" if value is None else b"=" + value.encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()


def import_digest(name: str, main: str) -> str:
    """Digest of whether there is a module of this name to import; nothing is imported for it."""
    there = sys.modules.get(name) is not None or find_file(name, main)[0] is not None
    return text_digest("there" if there else None)


def is_module_namespace(namespace: dict[str, Any]) -> bool:
    """Whether a function's globals are those of a module that is imported under its name."""
    module = sys.modules.get(str(namespace.get("__name__")))
    return module is not None and vars(module) is namespace


def bytes_digest(data: bytes) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(data).hexdigest()


def check_sources(record: TargetRecord, keyed: Scope | None = None, *, looked: bool = False) -> str | None:
    """Check every source file and every value from outside of the model that a capture depended on.

    Files are read and digested each time: nothing cheaper is sure, and a model's few dozen files take about
    a millisecond. No module is imported for it.

    Args:
        record: What the target key led to.
        keyed: The walk that the target key was just computed with; it is not changed.
        looked: Whether the model itself runs before a hit is served. It uses what its ``lru_cache``s hold, so
            a cache that is warm by now is no reason to trace. When it was captured they were empty.

    Returns:
        ``None`` if nothing changed, else the reason, naming the file, global or variable.
    """
    shared = Walk(keyed)
    reason = _check_files(record.sources, shared) or _check_globals(record.globals, shared)
    return reason or (None if looked else shared.warm_cache())


def _check_files(sources: Iterable[SourceRef], shared: Scope) -> str | None:
    for source in sources:
        # Records of one target name mostly the same files: each is read once for all of them.
        known = shared.files.get(source.module)
        if known is None:
            known = shared.files[source.module] = _look_at_file(source.module, shared)
        file, size, digest, reason = known
        if size >= 0 and (size != source.size or digest != source.digest):
            return f"{file} ({source.module}) is not the file that was captured"
        if reason is not None:
            return reason
    return None


def _look_at_file(name: str, shared: Scope) -> tuple[str, int, str, str | None]:
    """A module's file, its size and digest, and why it does not say what runs; ``None`` where it does."""
    file, module = find_file(name, shared.main)
    if file is None:
        return "", -1, "", f"the source of {name} cannot be found; it ran during the capture"
    try:
        data = read_file(file, module)
    except OSError as error:
        return file, -1, "", f"the source of {name} cannot be read: {error}"
    reason = None if module is None else changed_since_import(module, data, shared.started())
    return file, len(data), bytes_digest(data), reason


def _check_globals(entries: Iterable[tuple[str, str]], shared: Scope) -> str | None:
    for entry, digest in entries:
        kind, _, rest = entry.partition(":")
        try:
            now = _digest_now(entry, kind, rest, shared)
        except UnkeyableError as error:
            return f"{error} (it could be digested when the model was captured)"
        if now == digest:
            continue
        if now is None and (kind == "item" or entry.removeprefix(f"{kind}:").startswith("?")):
            # Loaded during the capture, and not loaded yet here: its file, checked above, speaks for it.
            continue
        how = "is not there" if now is None else "changed"
        return f"{_subject(entry, kind, rest)} {how} since the capture"
    return None


def _digest_now(entry: str, kind: str, rest: str, shared: Scope) -> str | None:
    if kind == "env":
        return text_digest(os.environ.get(rest))
    if kind == "call":
        return answer_digest(entry)
    if kind == "import":
        return import_digest(rest, shared.main)
    if kind == "item":
        return _item_now(rest, shared)
    if kind == "class":
        return _class_now(rest, shared)
    return _global_now(rest if kind == "global" else entry, shared)


def _subject(entry: str, kind: str, rest: str) -> str:
    """What an entry is about, for people."""
    subjects = {
        "env": f"environment variable {rest}",
        "call": f"what {title(rest)}() answers",
        "import": f"whether {rest} can be imported",
        "item": f"item {rest}",
        "class": f"class {title(rest)}",
        "global": f"global {title(rest)}",
    }
    return subjects.get(kind) or f"global {title(entry)}"


def _module(label: str, shared: Scope) -> ModuleType | None:
    return module_by_label(label.removeprefix("?"), shared.main)


def _class_now(entry: str, shared: Scope) -> str | None:
    label, _, qualname = entry.partition(":")
    module = _module(label, shared)
    cls = None if module is None else find_class(module.__name__, qualname)
    return class_digest(shared, cls) if isinstance(cls, type) else None


def _item_now(entry: str, shared: Scope) -> str | None:
    if entry.count(":") < 2:
        return ""
    label, name, key = entry.split(":", 2)
    registry = getattr(_module(label, shared), name, None)
    if not isinstance(registry, dict) or key not in registry:
        return None
    return item_digest(shared.main, registry[key])


def _global_now(entry: str, shared: Scope) -> str | None:
    label, _, dotted = entry.partition(":")
    module = _module(label, shared)
    if module is None:
        return None
    chain = tuple(dotted.rstrip(".").split("."))
    found = lookup(vars(module), chain)
    if found.used != chain:
        # What was a module on the way is something else now.
        return ""
    return global_digest(shared, entry, found)
