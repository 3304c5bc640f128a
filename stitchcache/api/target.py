"""Prewarm targets: what to compile, by name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stitchcache.errors import DuplicateTargetError, TargetError, TargetNotFoundError
from stitchcache.types import SizeRange

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """A model to compile, and how.

    Args:
        name: Unique among the targets of a run.
        build: Makes ``(model, args)`` or ``(model, args, kwargs)``; called when its turn comes.
        dynamic_shapes: As for :func:`stitchcache.compile`, like the rest.
        splitting_ops: Ops to split at.
        size_ranges: Ranges that get pieces of their own.
        backend: Piece backend.
        key_factors: The caller's own distinctions.
        options: Inductor options and ours.
    """

    name: str
    build: Callable[[], tuple[Any, ...]]
    dynamic_shapes: Any = field(default=None, kw_only=True)
    splitting_ops: Sequence[str] = field(default=(), kw_only=True)
    size_ranges: Sequence[SizeRange] | None = field(default=None, kw_only=True)
    backend: str = field(default="aoti", kw_only=True)
    key_factors: Mapping[str, Any] | None = field(default=None, kw_only=True)
    options: Mapping[str, Any] | None = field(default=None, kw_only=True)

    def made(self, *, fake: bool = False) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Build the model and its example arguments.

        Args:
            fake: Build them without data: no weight takes any memory.

        Returns:
            Model, positional arguments, keyword arguments.

        Raises:
            TargetError: ``build`` failed, or returned something else.
        """
        try:
            with _data(fake):
                built = self.build()
        except Exception as error:
            # A boundary: build() is the user's, with their loaders of weights and all that those may raise.
            # Whatever it is, it must not stop the targets after this one; Ctrl-C and exits still do.
            raise TargetError(
                f"target {self.name!r}: build() failed: {type(error).__name__}: {error}", target=self.name
            ) from error
        if not isinstance(built, tuple) or len(built) not in (2, 3):
            raise TargetError(
                f"target {self.name!r}: build() returned {type(built).__qualname__}, "
                "not (model, args) or (model, args, kwargs).",
                target=self.name,
            )
        model, args = built[0], built[1]
        kwargs = built[2] if len(built) == 3 else {}
        if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
            raise TargetError(
                f"target {self.name!r}: build() returned {type(args).__qualname__} for the arguments and "
                f"{type(kwargs).__qualname__} for the keyword arguments, not a tuple and a dict.",
                target=self.name,
            )
        return model, tuple(args), dict(kwargs)


def _data(fake: bool) -> AbstractContextManager[Any]:
    if not fake:
        return nullcontext()
    from stitchcache.torchside.tensors import without_data

    return without_data()


def find_targets(reference: str) -> list[Target]:
    """Find the targets that a reference means.

    Args:
        reference: ``pkg.module:name`` or ``path/to/file.py:name``, where name is a :class:`Target`, a
            list of them, or a function that returns either.

    Returns:
        One or more targets.

    Raises:
        TargetNotFoundError: There is no such module, file or name.
        TargetError: The name is something else, or importing it failed.
    """
    where, _, name = reference.rpartition(":")
    if not where or not name:
        raise TargetNotFoundError(
            f"{reference!r} is not a target: write 'pkg.module:name' or 'path/to/file.py:name'.",
            target=reference,
        )
    module = (
        _import_file(Path(where), reference) if where.endswith(".py") else _import_module(where, reference)
    )
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n, v in vars(module).items() if isinstance(v, Target)]
            hint = f"; it has {', '.join(names)}" if names else ""
            raise TargetNotFoundError(f"{reference!r}: {where} has no {name!r}{hint}.", target=reference)
        found = getattr(found, part)
    return _as_targets(found, reference)


def _as_targets(found: Any, reference: str) -> list[Target]:
    if callable(found) and not isinstance(found, (Target, type)):
        found = found()
    targets = [found] if isinstance(found, Target) else found
    if not isinstance(targets, Iterable) or isinstance(targets, (str, bytes)):
        raise TargetError(
            f"{reference!r} is a {type(found).__qualname__}; it must be a Target, a list of them, "
            "or a function that returns either.",
            target=reference,
        )
    listed = list(targets)
    for target in listed:
        if not isinstance(target, Target):
            raise TargetError(
                f"{reference!r} holds a {type(target).__qualname__}, not a Target.", target=reference
            )
    return listed


def check_names(targets: Sequence[Target]) -> None:
    """Refuse two targets of one name.

    Raises:
        DuplicateTargetError: Names it.
    """
    seen: set[str] = set()
    for target in targets:
        if target.name in seen:
            raise DuplicateTargetError(
                f"two targets are called {target.name!r}; give each a name of its own.", target=target.name
            )
        seen.add(target.name)


def _import_module(name: str, reference: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise TargetNotFoundError(
                f"{reference!r}: no module {name!r}; run from the directory that has it, or install it.",
                target=reference,
            ) from error
        raise TargetError(
            f"{reference!r}: importing {name} needs {error.name!r}, which is not installed.", target=reference
        ) from error
    except (ImportError, SyntaxError) as error:
        raise TargetError(f"{reference!r}: {name} cannot be imported: {error}", target=reference) from error


def _import_file(path: Path, reference: str) -> ModuleType:
    if not path.is_file():
        raise TargetNotFoundError(f"{reference!r}: there is no file {path}.", target=reference)
    if (path.resolve().parent / "__init__.py").exists():
        return _import_module(_name_in_package(path.resolve()), reference)
    name = _free_name(path)
    if name in sys.modules:
        return sys.modules[name]
    # As when Python runs the file: its neighbours can be imported.
    if str(path.resolve().parent) not in sys.path:
        sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise TargetNotFoundError(f"{reference!r}: {path} is not a Python file.", target=reference)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        del sys.modules[name]
        raise TargetError(f"{reference!r}: {path} cannot be imported: {error}", target=reference) from error
    return module


def _free_name(path: Path) -> str:
    """The name that ``import`` would give the file, so that keys are the same whoever imports it."""
    stem = path.stem
    loaded = sys.modules.get(stem)
    known = importlib.util.find_spec(stem) if stem.isidentifier() and loaded is None else None
    origin = getattr(loaded, "__file__", None) if loaded is not None else known.origin if known else None
    if origin is None or Path(origin).resolve() == path.resolve():
        return stem
    # Another module has the name: one that no module can have, and that the file's content decides.
    return f"{stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _name_in_package(path: Path) -> str:
    """The dotted name of a file inside a package, whose parent directory becomes importable."""
    parts, directory = [path.stem], path.parent
    while (directory / "__init__.py").exists():
        parts.insert(0, directory.name)
        directory = directory.parent
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    return ".".join(parts)
