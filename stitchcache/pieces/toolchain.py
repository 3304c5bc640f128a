"""Look for the C++ compiler that Inductor will call."""

from __future__ import annotations

import os
import shutil
import sys

from stitchcache.errors import CompilerMissingError


def find_compiler() -> str | None:
    """Path of the C++ compiler that Inductor takes: ``CXX`` if it is set, else the platform's."""
    return shutil.which(_wanted())


def _wanted() -> str:
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def require_compiler(backend: str) -> None:
    """Check that there is a C++ compiler.

    Raises:
        CompilerMissingError: There is none; says what to install.
    """
    if find_compiler() is None:
        raise CompilerMissingError(
            f"backend={backend!r} needs a C++ compiler and found no {_wanted()} on PATH. Install one "
            "(Debian, Ubuntu: 'apt install g++'; Fedora: 'dnf install gcc-c++'; conda: 'cxx-compiler'), "
            "point CXX at it, or use backend='eager'. Loading what is cached needs no compiler.",
            backend=backend,
        )
