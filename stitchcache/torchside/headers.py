"""Precompile the C++ headers of AOTInductor's sources before the first piece needs them.

Each takes 5 s of one core, once for a machine, compiler and set of flags, and saves every piece a second:
a few pieces are compiled sooner without. AOTInductor makes them one after the other when it meets the first
piece. Uses ``torch._inductor.codecache`` and ``torch._inductor.cpp_builder``. torch locks each header by
file, so whoever else wants it waits for it; a header made with other flags than the pieces' is one that
nobody takes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEEN = ("2.13",)

OPTION = "aot_inductor.precompile_headers"
PAYS_FROM = 6
"""Pieces from which making both headers costs less than doing without: 10 s against 2 s a piece."""

_WRAPPER = "aoti_include/cpu.h"


def worth(options: Mapping[str, Any], before: int, pieces: int) -> bool:
    """Whether pieces are to be compiled with precompiled headers, which may have to be made first.

    Args:
        options: The user's; what they say of headers is taken.
        before: Pieces that were compiled on this store until now. As many again are to be expected.
        pieces: Those about to be compiled, as far as it is known.
    """
    if OPTION in options:
        return bool(options[OPTION])
    return max(2 * before, before + pieces) >= PAYS_FROM or _made()


def _made() -> bool:
    """Whether this machine has headers for pieces, of whatever version; a wrong answer costs seconds."""
    from torch._inductor import codecache

    directory = getattr(codecache, "_HEADER_DIR", None)
    if directory is None:
        # Another torch keeps them elsewhere; it makes them if it wants any.
        return True
    made = Path(directory).glob("*.h.gch")
    try:
        return any(_WRAPPER in path.with_suffix("").read_text(errors="replace") for path in made)
    except OSError:
        return False


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
