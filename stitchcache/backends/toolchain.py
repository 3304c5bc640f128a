"""Look for the C++ compiler that Inductor will call."""

from __future__ import annotations

import os
import shutil

from stitchcache.errors import CompilerMissingError


def find_compiler() -> str | None:
    """Path of the C++ compiler: ``CXX`` if it is set, else ``g++`` or ``clang++`` on ``PATH``."""
    wanted = os.environ.get("CXX")
    candidates = [wanted] if wanted else ["g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def require_compiler(backend: str) -> None:
    """Check that there is a C++ compiler.

    Raises:
        CompilerMissingError: There is none; says what to install.
    """
    if find_compiler() is None:
        looked = os.environ.get("CXX") or "g++ or clang++"
        raise CompilerMissingError(
            f"backend={backend!r} needs a C++ compiler and found no {looked} on PATH. Install one "
            "(Debian, Ubuntu: 'apt install g++'; Fedora: 'dnf install gcc-c++'; conda: 'cxx-compiler'), "
            "point CXX at it, or use backend='eager'. Loading what is cached needs no compiler.",
            backend=backend,
        )
