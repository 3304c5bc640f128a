"""Where code comes from: which files a version stands for, and what a module is called.

torch, the standard library and stitchcache itself stand by their versions, which are factors of their
own. So do the packages that torch itself requires and calls while it traces, such as sympy and networkx:
they shape how it works, and what it traces is the same under any version that works at all. Models do call
numpy, so its version is a factor. All other code is known by its bytes.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

import torch

_SITE = os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_REQUIRED_BY_TORCH = (
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
    "filelock",
    "triton",
    "numpy",
)
_VERSIONED = (
    *(os.path.join(_SITE, name) + os.sep for name in ("torch", "torchgen", "functorch", *_REQUIRED_BY_TORCH)),
    os.path.join(_SITE, "typing_extensions.py"),
    _PACKAGE + os.sep,
    "<frozen ",
)
# The demo's models are models like anybody's, and are edited like anybody's.
_DEMO = os.path.join(_PACKAGE, "demo") + os.sep
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
# What sysconfig would say, without the milliseconds that asking it takes.
_STDLIB = tuple(
    {
        os.path.dirname(os.__file__) + os.sep,
        os.path.join(sys.base_exec_prefix, sys.platlibdir, _VERSION) + os.sep,
    }
)
_SITE_NAMES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")

VERSIONED_PACKAGES = frozenset(
    {"torch", "torchgen", "functorch", "stitchcache", "builtins", "typing_extensions", *_REQUIRED_BY_TORCH}
)
"""Top-level packages whose classes and functions are known by name alone."""


def in_stdlib(filename: str) -> bool:
    """Whether a file belongs to the standard library."""
    if filename.startswith(_STDLIB):
        return not any(name in filename for name in _SITE_NAMES)
    return filename.startswith("<frozen ")


def stands_by_version(filename: str) -> bool:
    """Whether a version stands for this file, so that its bytes are not looked at."""
    if filename.startswith(_DEMO):
        return False
    return filename.startswith(_VERSIONED) or in_stdlib(filename)


def installed_path(filename: str) -> str:
    """An installed file's path below the directory of packages; ``""`` for any other file."""
    for name in _SITE_NAMES:
        _, found, rest = filename.rpartition(name)
        if found:
            return rest
    return ""


def module_stands_by_version(name: str) -> bool:
    """The same for a module by name; a user's module that shadows one of the library's does not."""
    top = name.partition(".")[0]
    if name.startswith("stitchcache.demo."):
        return False
    if top in VERSIONED_PACKAGES:
        return True
    if top not in sys.stdlib_module_names:
        return False
    module = sys.modules.get(name) or sys.modules.get(top)
    file = getattr(module, "__file__", None)
    return file is None or in_stdlib(file)


def _name_from_file(file: str) -> str:
    """The dotted name under which a script would be imported: its stem, with the packages around it."""
    directory, base = os.path.split(os.path.abspath(file))
    parts = [os.path.splitext(base)[0]]
    while os.path.exists(os.path.join(directory, "__init__.py")):
        directory, package = os.path.split(directory)
        parts.insert(0, package)
    return ".".join(parts)


def main_label() -> str:
    """The name under which other processes would import what runs here as ``__main__``.

    ``__main__`` itself where there is no file, or where another file is imported under that name.
    """
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if main is None or file is None:
        return "__main__"
    spec = getattr(main, "__spec__", None)
    label = spec.name if spec is not None else _name_from_file(file)
    other = sys.modules.get(label)
    if other is not None and other is not main and not _same_file(getattr(other, "__file__", None), file):
        return "__main__"
    return str(label)


def _same_file(one: str | None, two: str) -> bool:
    return one is not None and os.path.realpath(one) == os.path.realpath(two)


def module_by_label(label: str, main: str) -> ModuleType | None:
    """The loaded module that goes by a label.

    Args:
        label: A module's name, or what :func:`main_label` called it where it was recorded.
        main: This process's :func:`main_label`.
    """
    module = sys.modules.get(label)
    if module is None and label == main:
        module = sys.modules.get("__main__")
    return module
