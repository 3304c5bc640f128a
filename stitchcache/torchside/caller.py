"""The caller: a small library behind each of AOTInductor's, which runs that without the GIL.

Its source is ``caller.cpp``, which needs torch's C shim and ``THPVariable_Wrap``. It is compiled once, in
half a second, into Inductor's own cache of builds, and appended to every library that is built: a loader of
libraries does not look behind their end, one digest covers both, and a warm start needs no second file.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

import torch

from stitchcache.torchside import LENGTH, MAGIC

SEEN = ("2.11", "2.13", "2.15")

_SOURCE = Path(__file__).with_suffix(".cpp")


def compile_caller(compiler: str) -> Path:
    """Compile the caller with a C++ compiler, unless it is there.

    Raises:
        OSError: The compiler cannot be run, or the directory cannot be written.
        subprocess.CalledProcessError: It failed; ``stderr`` says why.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    source = _SOURCE.read_bytes()
    name = hashlib.sha256(b"\0".join((source, compiler.encode(), torch.__version__.encode()))).hexdigest()
    path = Path(cache_dir(), "stitchcache", f"caller-{name[:32]}.so")
    if not path.is_file():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory, "caller.so")
            libraries = [f"-L{Path(torch.__file__).parent}/lib", "-ltorch_python", "-ltorch_cpu"]
            flags = ["-O2", "-s", "-shared", "-fPIC", "-std=c++17", "-fvisibility=hidden"]
            command = [compiler, *flags, str(_SOURCE), "-o", str(made), *libraries]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(path)
    return path


def append_caller(library: Path, caller: Path) -> None:
    """Write the caller, its length and a mark behind a library's end."""
    data = caller.read_bytes()
    with library.open("ab") as file:
        file.write(data + len(data).to_bytes(LENGTH, "little") + MAGIC)
