"""Checks that what ran during a capture is still what would run now."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import ModuleType

from stitchcache.keys import reads
from stitchcache.keys.files import changed_since_import, find_file, process_start, read_file
from stitchcache.keys.origins import module_by_label
from stitchcache.keys.values import Shared, UnkeyableError, find_class
from stitchcache.types import SourceRef, TargetRecord


def check_sources(record: TargetRecord, shared: Shared | None = None) -> str | None:
    """Check every source file and every value from outside of the model that a capture depended on.

    Files are read and digested each time: nothing cheaper is sure, and a model's few dozen files take about
    a millisecond. No module is imported for it.

    Args:
        record: What the target key led to.
        shared: What the target key was just computed with; what it digested is not digested again.

    Returns:
        ``None`` if nothing changed, else the reason, naming the file, global or variable.
    """
    shared = shared or Shared()
    reason = _check_files(record.sources, shared.main)
    return reason if reason is not None else _check_globals(record.globals, shared)


def _check_files(sources: Iterable[SourceRef], main: str) -> str | None:
    started = process_start()
    for source in sources:
        file, module = find_file(source.module, main)
        if file is None:
            return f"the source of {source.module} cannot be found; it ran during the capture"
        try:
            data = read_file(file, module)
        except OSError as error:
            return f"the source of {source.module} cannot be read: {error}"
        if len(data) != source.size or reads.bytes_digest(data) != source.digest:
            return f"{file} ({source.module}) is not the file that was captured"
        if module is not None and (reason := changed_since_import(module, data, started)) is not None:
            return reason
    return None


def _check_globals(entries: Iterable[tuple[str, str]], shared: Shared) -> str | None:
    for entry, digest in entries:
        kind, _, rest = entry.partition(":")
        try:
            if kind == "env":
                now: str | None = reads.text_digest(os.environ.get(rest))
                subject = f"environment variable {rest}"
            elif kind == "call":
                now, subject = reads.answer_digest(entry), f"what {reads.title(rest)}() answers"
            elif kind == "item":
                now, subject = _item_now(rest, shared), f"item {rest}"
            elif kind == "class":
                now, subject = _class_now(rest, shared), f"class {reads.title(rest)}"
            else:
                name = rest if kind == "global" else entry
                now, subject = _global_now(name, shared), f"global {reads.title(name)}"
        except UnkeyableError as error:
            return f"{error} (it could be digested when the model was captured)"
        if now is None and (kind == "item" or entry.removeprefix(f"{kind}:").startswith("?")):
            # Loaded during the capture, and not loaded yet here: its file, checked above, speaks for it.
            continue
        if now != digest:
            return f"{subject} {'is not there' if now is None else 'changed'} since the capture"
    return None


def _module(label: str, shared: Shared) -> ModuleType | None:
    return module_by_label(label.removeprefix("?"), shared.main)


def _class_now(entry: str, shared: Shared) -> str | None:
    label, _, qualname = entry.partition(":")
    module = _module(label, shared)
    cls = None if module is None else find_class(module.__name__, qualname)
    return reads.class_digest(shared, cls) if isinstance(cls, type) else None


def _item_now(entry: str, shared: Shared) -> str | None:
    if entry.count(":") < 2:
        return ""
    label, name, key = entry.split(":", 2)
    registry = getattr(_module(label, shared), name, None)
    if not isinstance(registry, dict) or key not in registry:
        return None
    return reads.item_digest(shared.main, registry[key])


def _global_now(entry: str, shared: Shared) -> str | None:
    label, _, dotted = entry.partition(":")
    module = _module(label, shared)
    if module is None:
        return None
    chain = tuple(dotted.rstrip(".").split("."))
    found = reads.lookup(vars(module), chain)
    if found.used != chain:
        # What was a module on the way is something else now.
        return ""
    return reads.global_digest(shared, entry, found)
