"""The vector instruction set that Inductor compiles for, probed once instead of once a process.

Inductor compiles and loads small test programs for every instruction set that the CPU has, best first,
and then takes the best that worked: ten compilations on a CPU with AMX, of which four decide, and each test
is a process that imports torch. Uses ``torch._inductor.cpu_vec_isa``; where it looks different, Inductor
probes as it always does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

SEEN = ("2.11", "2.13")

# Whoever sets one of these may be given another set than the best, so all must be probed.
_CHOOSERS = ("cpp.simdlen", "cpp.vec_isa_ok")


def probe_best(options: Mapping[str, Any]) -> None:
    """Find the best instruction set that works, and let Inductor remember it.

    Results on disk, in Inductor's own directory, save the compiling; loading is tried in each process.

    Args:
        options: Backend options.
    """
    from torch._inductor import cpu_vec_isa

    candidates = _candidates(options)
    if candidates is None:
        cpu_vec_isa.pick_vec_isa()
        return
    for candidate in candidates:
        if candidate:
            return


@contextlib.contextmanager
def best_alone(options: Mapping[str, Any]) -> Iterator[None]:
    """Keep Inductor from probing anything below the best.

    Whoever asks for a lesser set meanwhile does not find it; afterwards Inductor probes anew.

    Args:
        options: Backend options.
    """
    candidates = _candidates(options)
    best = next((candidate for candidate in candidates or () if candidate), None)
    with contextlib.nullcontext() if best is None else _known([best]):
        yield


@contextlib.contextmanager
def none_at_all(options: Mapping[str, Any]) -> Iterator[None]:
    """Keep Inductor from probing: for code that only starts what runs on another device.

    Args:
        options: Backend options.
    """
    with contextlib.nullcontext() if _candidates(options) is None else _known([]):
        yield


@contextlib.contextmanager
def _known(sets: list[Any]) -> Iterator[None]:
    """Have Inductor know these instruction sets, unless it has probed already."""
    from torch._inductor import config, cpu_vec_isa

    valid = cpu_vec_isa.valid_vec_isa_list
    if valid.cache_info().currsize:
        yield
        return
    try:
        with config.patch({"cpp.vec_isa_ok": False}):
            # Sets that were found to work are remembered as such; the rest are told no without a test.
            found = valid()
        if found != sets:
            _forget()
        yield
    finally:
        _forget()


def _forget() -> None:
    """Have Inductor probe anew; what it built for that is still on disk."""
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        # Those that were told no remember it as if it had been tested.
        clear = getattr(type(isa).__bool__, "cache_clear", None)
        if clear is not None:
            clear()


def _candidates(options: Mapping[str, Any]) -> list[Any] | None:
    """Instruction sets of this CPU, best first; ``None`` where Inductor had better do it all itself."""
    from torch._inductor import config, cpu_vec_isa

    if os.environ.get("ATEN_CPU_CAPABILITY") or any(name in options for name in _CHOOSERS):
        return None
    if getattr(config.cpp, "simdlen", 0) is not None or getattr(config.cpp, "vec_isa_ok", True) is not None:
        return None
    known = getattr(cpu_vec_isa, "supported_vec_isa_list", None)
    checker = getattr(cpu_vec_isa, "x86_isa_checker", None)
    valid = getattr(cpu_vec_isa, "valid_vec_isa_list", None)
    if known is None or checker is None or not hasattr(valid, "cache_clear"):
        return None
    flags = set(checker())
    # Without flags this is no x86, and Inductor has no list to go through. With one there is nothing to skip.
    found = [isa for isa in known if flags and set(str(isa).split()) <= flags]
    return found if len(found) > 1 else None
