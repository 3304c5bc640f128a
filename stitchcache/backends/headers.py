"""Precompile the C++ headers of AOTInductor's sources before the first piece needs them.

Each takes 5 s of one core, once for a machine, compiler and set of flags. AOTInductor makes them one
after the other when it meets the first piece. Private API of torch (``torch._inductor.codecache``,
``torch._inductor.cpp_builder``); tried with 2.13. torch locks each header by file, so whoever else wants
it waits for it; a header made with other flags than the pieces' is one that nobody takes.
"""

from __future__ import annotations

import os
from typing import Any


def precompile() -> None:
    """Make both headers of CPU pieces, at the same time, with the options that are in force.

    Forks: only for a process that does nothing else.

    Raises:
        AttributeError: This torch has no such headers.
        TypeError: This torch makes them in another way.
        RuntimeError: The compiler failed.
    """
    from torch._inductor import codecache, config
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if not config.aot_inductor.precompile_headers or config.aot_inductor.package_cpp_only:
        return
    isa = pick_vec_isa()
    command = CppBuilder(
        name="o",
        sources="i",
        BuildOption=CppTorchDeviceOptions(vec_isa=isa, device_type="cpu", aot_mode=True),
    ).get_command_line()
    # As for a piece without weights of its own: ours get theirs as inputs.
    flags: dict[str, Any] = {
        "aot_mode": True,
        "device_type": "cpu",
        "use_mmap_weights": False,
        "use_mmap_weights_external": False,
        "use_relative_path": False,
        "vec_isa": isa,
    }
    wrapper = codecache._get_cpp_wrapper_header("cpu", aot_mode=True)
    kernel = codecache._get_cpp_prefix_header("cpu")
    child = os.fork() if kernel is not None else -1
    if child == 0:
        try:
            codecache._precompile_header(kernel, repr(command), **flags)
        finally:
            os._exit(0)
    try:
        codecache._precompile_header(wrapper, repr(command), min_optimize=True, **flags)
    finally:
        if child > 0:
            os.waitpid(child, 0)
