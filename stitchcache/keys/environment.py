"""Factors of the machine and the installation: what a compiled piece needs to be right, and to run.

Left out on purpose: host, user, home, paths, process, time, number of threads and the index of a device.
The C++ compiler is left out too: pieces that two compilers made from one graph are both right, and asking
a compiler for its version costs a process on every start. Backends record it with what they compiled.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch

from stitchcache.keys.digest import make_factor
from stitchcache.types import Factor

SCHEMA_VERSION = 3
"""Version of the key schema: raised whenever a key's factors or their encoding change, or the options that
stitchcache itself chooses for a piece do, as backends/threads.py does. See docs/keys.md."""

_NATIVE = frozenset({"aoti", "inductor"})
_PICKLING = frozenset({"inductor", "eager"})

_INSTRUCTION_SETS = [
    "3dnowprefetch",
    "abm",
    "adx",
    "aes",
    "amx",
    "apx",
    "avx",
    "bmi",
    "cmpccxadd",
    "cx16",
    "f16c",
    "fma",
    "gfni",
    "lahf_lm",
    "lzcnt",
    "mmx",
    "movbe",
    "movdir",
    "pclmulqdq",
    "pni",
    "popcnt",
    "prefetchi",
    "raoint",
    "rdpid",
    "rdrand",
    "rdseed",
    "serialize",
    "sha",
    "sm3",
    "sm4",
    "sse",
    "ssse",
    "tbm",
    "vaes",
    "vpclmulqdq",
    "xop",
    "xsave",
]
"""Prefixes of the kernel's names for what a compiler may emit under ``-march=native``."""

_VARIABLE_PREFIXES = ("TORCHINDUCTOR_", "AOT_INDUCTOR_", "TRITON_", "ONEDNN_", "DNNL_", "MKL_CBWR")
_VARIABLES = frozenset(
    """ATEN_CPU_CAPABILITY TORCH_ALLOW_TF32_CUBLAS_OVERRIDE NVIDIA_TF32_OVERRIDE CUBLAS_WORKSPACE_CONFIG
    TORCH_BLAS_PREFER_CUBLASLT TORCH_BLAS_PREFER_HIPBLASLT TORCH_LINALG_PREFER_CUSOLVER
    TORCH_LINALG_PREFER_MAGMA USE_HUB_KERNELS DISABLE_KERNEL_MAPPING""".split()  # noqa: SIM905
)
_HARMLESS_WORDS = (
    "CACHE",
    "_DIR",
    "_PATH",
    "HOME",
    "COMPILE_THREADS",
    "WORKER",
    "LOG",
    "VERBOSE",
    "PROGRESS",
    "PROVENANCE",
    "_TRACE",
    "DUMP",
    "PRINT",
    "PROFILE",
)
"""A variable with one of these in its name says where or how loudly, not what is made."""


def environment_factors(backend: str, device_types: Collection[str]) -> tuple[Factor, ...]:
    """Factors of the environment that a backend's pieces for these devices rely on.

    Args:
        backend: ``aoti``, ``inductor`` or ``eager``.
        device_types: Types of the devices used, such as ``{"cpu", "cuda"}``, without an index.
    """
    return tuple(_factors(backend, device_types))


def _factors(backend: str, device_types: Collection[str]) -> Iterator[Factor]:
    yield make_factor("env.schema", str(SCHEMA_VERSION))
    build = f"{torch.__version__} {torch.version.git_version or ''} debug={torch.version.debug}"
    yield make_factor("env.torch", build)
    yield make_factor("env.platform", f"{sys.platform} {os.uname().machine} {sys.byteorder}")
    # Imported together with torch where it is installed.
    yield make_factor("env.numpy", str(getattr(sys.modules.get("numpy"), "__version__", "none")))
    yield make_factor("env.variables", *_variables())
    yield make_factor("env.op_libraries", *_op_libraries())
    if backend in _PICKLING:
        yield make_factor("env.python", python_version())
    if backend in _NATIVE:
        yield make_factor("env.cxx_abi", str(torch.compiled_with_cxx11_abi()))
        yield make_factor("env.libc", _libc())
        yield make_factor("env.cpu", *_cpu())
    if "cuda" in device_types:
        yield make_factor("env.cuda", f"cuda {torch.version.cuda} hip {torch.version.hip}")
        yield make_factor("env.gpu", _gpu())


# What a thread begins with where nobody changed decimal.DefaultContext; that one may be changed.
_USUAL_DECIMALS = (
    "Context(prec=28, rounding=ROUND_HALF_EVEN, Emin=-999999, Emax=999999, capitals=1, clamp=0, flags=[], "
    "traps=[InvalidOperation, DivisionByZero, Overflow])"
)


def python_version() -> str:
    """Implementation, major and minor version: what bytecode and pickled code belong to."""
    return f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"


def decimal_context() -> str:
    """How this thread rounds decimal numbers: state of C code, which no recorder sees being read."""
    module: Any = sys.modules.get("decimal")
    if module is None:
        return _USUAL_DECIMALS
    now = module.getcontext().copy()
    now.clear_flags()
    return repr(now)


def _libc() -> str:
    name = "CS_GNU_LIBC_VERSION"
    return (os.confstr(name) if name in os.confstr_names else None) or "unknown"


def _cpu() -> tuple[str, bytes]:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = sorted(_cpu_flags())
    return f"{capability}, {len(flags)} instruction sets", " ".join([capability, *flags]).encode()


def _cpu_flags() -> Iterator[str]:
    """Instruction sets as the kernel names them; the first processor speaks for all."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "flags":
                    yield from (flag for flag in value.split() if flag.startswith(tuple(_INSTRUCTION_SETS)))
                    return
                if name.strip() == "Features":
                    yield from value.split()
                    return
    except OSError:
        # No procfs: the capability level alone tells, as it did to torch.
        return


def _variables() -> tuple[str, bytes]:
    found = []
    for name in sorted(os.environ):
        relevant = name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)
        if relevant and not any(word in name for word in _HARMLESS_WORDS):
            found.append(f"{name}={os.environ[name]}")
    return ", ".join(found) or "none", "\0".join(found).encode("utf-8", "surrogatepass")


def _op_libraries() -> tuple[str, bytes]:
    """Libraries of operators that were loaded by path: known by content, as they have no version."""
    digests = []
    for path in torch.ops.loaded_libraries:
        try:
            with open(path, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError:
            digests.append("gone")
    digests.sort()
    return f"{len(digests)} loaded by path", " ".join(digests).encode()


def _gpu() -> str:
    """The visible GPUs, each kind once.

    By name, as in Inductor's own cache: GPUs of one architecture differ in their multiprocessors, by which
    kernels are tuned and some are sized. Where ROCm tells an architecture, that counts.
    """
    names = set()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.add(properties.gcnArchName if torch.version.hip else properties.name)
    return " ".join(sorted(names)) or "none"
