"""The caller: a small library that runs AOTInductor's libraries without the GIL, see ``caller.cpp``.

It uses ``torch._C`` (where a tensor keeps its ``_cdata``), ``THPVariable_Wrap`` and torch's C shim, and is compiled
once a store, in about a second, when the first piece is.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SEEN = ("2.11", "2.13")
SOURCE = Path(__file__).with_suffix(".cpp")


def compile_caller(compiler: str, path: Path) -> None:
    """Compile the caller.

    Args:
        compiler: A C++ compiler.
        path: Where the library is written.

    Raises:
        OSError: The compiler cannot be run.
        subprocess.CalledProcessError: It failed; ``stderr`` says why.
    """
    libraries = Path(torch.__file__).parent / "lib"
    command = [compiler, "-O2", "-shared", "-fPIC", "-std=c++17", "-fvisibility=hidden", str(SOURCE)]
    command += ["-o", str(path), f"-L{libraries}", "-ltorch_python", "-ltorch_cpu"]
    subprocess.run(command, check=True, capture_output=True, text=True)


def load_with(caller: str, path: str, device: str) -> Callable[[list[Any]], Sequence[Any]]:
    """Map a piece's library, to be called without the GIL.

    Args:
        caller: The caller's library.
        path: The piece's library.
        device: Where it runs: ``cpu``, or ``cuda:1``.

    Returns:
        One list of tensors, which is emptied, to one list of tensors.

    Raises:
        OSError: The caller cannot be mapped.
        RuntimeError: The piece cannot be, or was made for another torch.
    """
    import ctypes

    load: Any = ctypes.PyDLL(caller).stitchcache_load
    load.restype = ctypes.py_object
    load.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_size_t]
    index = int(device.partition(":")[2] or 0) if device.startswith("cuda") else -1
    run: Callable[[list[Any]], Sequence[Any]] = load(path.encode(), device.encode(), index, _offset())
    return run


def _offset() -> int:
    """Where a Python tensor keeps its ``at::Tensor``: found by its value, as it moved between versions."""
    import ctypes

    tensor = torch.empty(0)
    words = (ctypes.c_size_t * 8).from_address(id(tensor))
    try:
        return list(words).index(tensor._cdata) * ctypes.sizeof(ctypes.c_size_t)
    except ValueError:
        raise RuntimeError("this torch keeps tensors elsewhere in their Python objects") from None
