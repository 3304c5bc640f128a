"""The caller: a small library behind each of AOTInductor's, which runs that without the GIL.

Its source is ``caller.cpp``. It needs torch's C shim, ``THPVariable_Wrap``, and a tensor's ``_cdata``. It is
compiled once, in half a second, into Inductor's own cache of builds, and appended to every library that is
built: a loader of libraries does not look behind their end, one digest covers both, and a warm start needs no
second file.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SEEN = ("2.11", "2.13")

_SOURCE = Path(__file__).with_suffix(".cpp")
_LENGTH, _MAGIC = 8, b"stitchcaller\n"
_MOST = 1 << 20


def compile_caller(compiler: str) -> Path:
    """Compile the caller, unless it is there.

    Args:
        compiler: A C++ compiler.

    Raises:
        OSError: The compiler cannot be run, or the directory cannot be written.
        subprocess.CalledProcessError: It failed; ``stderr`` says why.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    source = _SOURCE.read_bytes()
    name = hashlib.sha256(b"\0".join((source, compiler.encode(), torch.__version__.encode()))).hexdigest()
    path = Path(cache_dir(), "stitchcache", f"caller-{name[:32]}.so")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory, "caller.so")
            libraries = Path(torch.__file__).parent / "lib"
            flags = ["-O2", "-s", "-shared", "-fPIC", "-std=c++17", "-fvisibility=hidden"]
            command = [compiler, *flags, str(_SOURCE), "-o", str(made), f"-L{libraries}"]
            subprocess.run(
                [*command, "-ltorch_python", "-ltorch_cpu"], check=True, capture_output=True, text=True
            )
            made.replace(path)
    return path


def append_caller(library: Path, caller: Path) -> None:
    """Write the caller, its length and a mark behind a library's end."""
    data = caller.read_bytes()
    with library.open("ab") as file:
        file.write(data + len(data).to_bytes(_LENGTH, "little") + _MAGIC)


def load_with_caller(path: str, device: str) -> Callable[[list[Any]], Sequence[Any]] | None:
    """Map a library, to be called without the GIL.

    Args:
        path: The library.
        device: Where it runs: ``cpu``, or ``cuda:1``.

    Returns:
        One list of tensors, which is emptied, to one list of tensors. ``None`` where the library has no
        caller, or that cannot be mapped here.

    Raises:
        RuntimeError: The library cannot be mapped, or was made for another torch.
    """
    caller = _read_caller(path)
    if caller is None:
        return None
    try:
        load: Any = _map(caller).stitchcache_load
        offset = _offset()
    except (OSError, AttributeError, ValueError):
        # Another system than Linux, or one that runs nothing from memory; or torch keeps tensors elsewhere.
        return None
    load.restype = ctypes.py_object
    load.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_size_t]
    index = int(device.partition(":")[2] or 0) if device.startswith("cuda") else -1
    run: Callable[[list[Any]], Sequence[Any]] = load(os.fsencode(path), device.encode(), index, offset)
    return run


@functools.cache
def _map(caller: bytes) -> ctypes.PyDLL:
    """Map a caller from memory, once a process: what the store's digest covered is what runs.

    The file stays open: the loader knows libraries by path, and would take another file of its number for it.
    """
    file = os.memfd_create("stitchcache-caller")
    with open(file, "wb", closefd=False) as memory:
        memory.write(caller)
    return ctypes.PyDLL(f"/proc/self/fd/{file}")


def _read_caller(path: str) -> bytes | None:
    tail = _LENGTH + len(_MAGIC)
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        end = file.seek(-tail, os.SEEK_END)
        length, mark = file.read(_LENGTH), file.read()
        size = int.from_bytes(length, "little")
        if mark == _MAGIC and 0 < size < min(end, _MOST):
            file.seek(end - size)
            return file.read(size)
    return None


def _offset() -> int:
    """Where a Python tensor keeps its ``at::Tensor``: found by its value, as it moved between versions."""
    tensor = torch.empty(0)
    size = ctypes.sizeof(ctypes.c_size_t)
    words = (ctypes.c_size_t * (object.__sizeof__(tensor) // size)).from_address(id(tensor))
    return list(words).index(tensor._cdata) * size
