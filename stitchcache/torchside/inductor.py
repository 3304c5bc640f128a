"""Inductor: two ways to compile a piece into a file, and probes of the CPU.

Uses ``torch._inductor`` (``aot_compile``, ``standalone_compile``, ``config``, ``cpu_vec_isa``, ``codegen``,
modules in ``_MODULES``). Importing this imports only ``torch``. ``torchside.load_library`` loads libraries.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SEEN = ("2.11", "2.13", "2.15")

# What lowering imports at its first graph; once here instead of once a forked child.
_MODULES = ("torch._inductor.compile_fx", "torch._inductor.graph", "torch._inductor.codegen.cpp")
# Whoever sets one of these may be given another instruction set than the best, so all must be probed.
_CHOOSERS = ("cpp.simdlen", "cpp.vec_isa_ok")


def import_compiler() -> None:
    """Import what compiling a graph needs."""
    for module in _MODULES:
        # Another torch may keep it elsewhere; compiling imports it then.
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def directories() -> tuple[str, str]:
    """Where Inductor builds and keeps what it built, and where it keeps precompiled headers; both are made.

    The second is in the system's temporary directory, whatever ``TORCHINDUCTOR_CACHE_DIR`` says.
    """
    from torch._inductor.runtime import cache_dir_utils

    headers = str(cache_dir_utils.default_cache_dir())
    # As nobody else has made it, nobody else will.
    os.makedirs(headers, 0o700, exist_ok=True)
    return str(cache_dir_utils.cache_dir()), headers


def settings() -> Any:
    """Inductor's settings, as attributes."""
    import torch._inductor.config

    return torch._inductor.config


def compile_library(piece: torch.fx.GraphModule, fakes: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Compile a piece with AOTInductor; returns a library's path, or another product that options ask for."""
    import torch._inductor

    with torch.no_grad():
        return torch._inductor.aot_compile(piece, tuple(fakes), options=dict(options))


def interface() -> str:
    """What AOTInductor copies into each wrapper, after a line that includes headers."""
    import torch._inductor.codegen

    return Path(torch._inductor.codegen.__path__[0], "aoti_runtime", "interface.cpp").read_text().strip()


def keep_sums_apart(graph: torch.fx.Graph) -> None:
    """Write each result that adds something to a product as a difference, which has the same bits.

    On a GPU Inductor has cuBLAS add, unless all users of the sum go element by element, and that copies the
    other summand first. To be a result counts as another use, though kernels follow that could add as well.
    """
    aten = torch.ops.aten
    products = (aten.linear.default, aten.mm.default, aten.matmul.default)
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        parts = [part for part in node.args if isinstance(part, torch.fx.Node)]
        product = next((part for part in parts if part.target in products and len(part.args) == 2), None)
        is_result = any(user.op == "output" for user in node.users) and not node.kwargs
        # A size is no tensor to subtract from, a truth value takes no difference, and a whole number may have
        # no negative.
        values = [part.meta.get("val") for part in parts]
        floats = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
        if is_result and product and len(floats) == 2:
            with graph.inserting_before(node):
                negated = graph.call_function(aten.neg.default, (product,))
            other = parts[0] if parts[1] is product else parts[1]
            node.target, node.args = aten.sub.Tensor, (other, negated)


def compile_artifact(
    piece: torch.fx.GraphModule, fakes: Sequence[Any], options: Mapping[str, Any], path: Path
) -> None:
    """Compile a piece with Inductor, and save what it needs to run into one file."""
    import torch._inductor

    patches = {"config_patches": dict(options)}
    with torch.no_grad():
        artifact = torch._inductor.standalone_compile(
            piece, list(fakes), dynamic_shapes="from_graph", options=patches, aot=True
        )
    artifact.save(path=str(path), format="binary")


def load_artifact(path: Path) -> Any:
    """Load what :func:`compile_artifact` saved, as a function of a piece's inputs."""
    from torch._inductor.standalone_compile import CompiledArtifact

    return CompiledArtifact.load(path=str(path), format="binary")


# Probes of the CPU. Inductor compiles and loads small test programs for every vector instruction set that the
# CPU has, best first, and then takes the best that worked: ten compilations on a CPU with AMX, of which four
# decide, and each test is a process that imports torch. Where this torch looks different, Inductor probes as
# it always does.


def probe_best(options: Mapping[str, Any]) -> None:
    """Find the best instruction set that works; Inductor keeps on disk what that took."""
    from torch._inductor import cpu_vec_isa

    candidates = _candidates(options)
    if candidates is None:
        cpu_vec_isa.pick_vec_isa()
    else:
        any(candidates)  # their truth is the test


@contextlib.contextmanager
def few_probes(options: Mapping[str, Any], cpu: bool) -> Iterator[None]:
    """Keep Inductor from probing what cannot matter; afterwards it probes anew.

    Where pieces do not run on the CPU no set is looked for: the C++ of a GPU's piece only starts kernels.
    """
    from torch._inductor import config, cpu_vec_isa

    candidates = _candidates(options)
    best = [next(filter(None, candidates), None)] if cpu and candidates else []
    valid = cpu_vec_isa.valid_vec_isa_list
    if candidates is None or best == [None] or valid.cache_info().currsize:
        yield
        return
    try:
        # Sets that were found to work are remembered as such. With this setting the rest get a no untested.
        with config.patch({"cpp.vec_isa_ok": False}):
            found = valid()
        if found != best:
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
    if known is None or checker is None or not hasattr(cpu_vec_isa.valid_vec_isa_list, "cache_clear"):
        return None
    flags = set(checker())
    # Without flags this is no x86, and Inductor has no list to go through. With one set nothing is skipped.
    found = [isa for isa in known if flags and set(str(isa).split()) <= flags]
    return found if len(found) > 1 else None
