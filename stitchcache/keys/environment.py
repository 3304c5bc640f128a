"""Factors of the machine, the installation and torch's own settings: what a trace and a piece depend on.

Left out on purpose: host, user, paths, process, time, threads, and the C++ compiler, as pieces that two
compilers made from one graph are both right. Capture and calls run without autograd, so grad mode is no
factor.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any

import torch

from stitchcache import torchside
from stitchcache.encoding import is_telling, make_factor
from stitchcache.keys.code import replaced_factor
from stitchcache.keys.walk import Walk
from stitchcache.types import ENGINE, Factor, follow

SCHEMA_VERSION = 4
"""Version of the key schema: raised whenever a key's factors or their encoding change, or the options that
stitchcache itself chooses for a piece do, as ``pieces.thread_options`` does. See docs/keys.md."""

_INSTRUCTION_SETS = tuple(
    """3dnowprefetch abm adx aes amx apx avx bmi cmpccxadd cx16 f16c fma gfni lahf_lm lzcnt mmx movbe movdir
    pclmulqdq pni popcnt prefetchi raoint rdpid rdrand rdseed serialize sha sm3 sm4 sse ssse tbm vaes
    vpclmulqdq xop xsave""".split()  # noqa: SIM905
)
"""Prefixes of the kernel's names for what a compiler may emit under ``-march=native``."""

_VARIABLE_PREFIXES = tuple(
    """TORCHINDUCTOR_ _TORCHINDUCTOR_ AOT_INDUCTOR_ AOTINDUCTOR_ AOTI_ TRITON_ CUTLASS_ CUTEDSL_ TORCHDYNAMO_
    TORCH_DYNAMO_ TORCH_COMPILE_ PARTITIONER_ ONEDNN_ DNNL_ MKL_CBWR""".split()  # noqa: SIM905
)
_VARIABLES = frozenset(
    """ATEN_CPU_CAPABILITY TORCH_ALLOW_TF32_CUBLAS_OVERRIDE NVIDIA_TF32_OVERRIDE CUBLAS_WORKSPACE_CONFIG
    TORCH_BLAS_PREFER_CUBLASLT TORCH_BLAS_PREFER_HIPBLASLT TORCH_LINALG_PREFER_CUSOLVER
    TORCH_LINALG_PREFER_MAGMA USE_HUB_KERNELS DISABLE_KERNEL_MAPPING ENABLE_PERSISTENT_TMA_MATMUL
    ENABLE_TEMPLATE_TMA_STORE ENABLE_TMA_LOAD_FOR_TEMPLATE_EPILOGUE PYTORCH_REORDER_COLLECTIVES_LIMIT
    PYTORCH_SINK_WAITS_LIMIT PYTORCH_ROCM_ARCH PYTORCH_JIT FX_PATCH_GETITEM FAKE_ALLOW_META
    UNSAFE_SKIP_FSDP_MODULE_GUARDS OMP_PREFIX""".split()  # noqa: SIM905
)
_HARMLESS_VARIABLES = frozenset(
    """TORCHINDUCTOR_CACHE_DIR TORCHINDUCTOR_COMPILE_THREADS TORCHINDUCTOR_COMPILE_WORKER_WAIT_TIMEOUT
    TORCHINDUCTOR_WORKER_START TORCHINDUCTOR_WORKER_LOGPATH TORCHINDUCTOR_WORKER_SUPPRESS_LOGGING
    TORCHINDUCTOR_QUIESCE_ASYNC_COMPILE_POOL TORCHINDUCTOR_FILE_LOCK_TIMEOUT
    TORCHINDUCTOR_FX_GRAPH_CACHE TORCHINDUCTOR_FX_GRAPH_CACHE_DEFAULT TORCHINDUCTOR_FX_GRAPH_REMOTE_CACHE
    TORCHINDUCTOR_AUTOGRAD_CACHE TORCHINDUCTOR_AUTOGRAD_REMOTE_CACHE TORCHINDUCTOR_AUTOTUNE_REMOTE_CACHE
    TORCHINDUCTOR_BUNDLED_AUTOTUNE_REMOTE_CACHE TORCHINDUCTOR_NON_BLOCKING_REMOTE_CACHE_WRITE
    TORCHINDUCTOR_REDIS_HOST TORCHINDUCTOR_REDIS_PORT TORCHINDUCTOR_REDIS_URL
    TORCHINDUCTOR_MM_LOGGING_FILE TORCHINDUCTOR_CONV_LOGGING_FILE TORCHINDUCTOR_ENABLED_METRIC_TABLES
    TORCHINDUCTOR_AUTOTUNE_NUM_CHOICES_DISPLAYED TORCHINDUCTOR_PATTERN_MATCH_DEBUG
    TORCHINDUCTOR_WRITE_MISSING_OPS TORCHDYNAMO_VERBOSE TORCHDYNAMO_EXTENDED_ADVICE
    TORCHDYNAMO_EXTENDED_DEBUG_CPP TORCH_COMPILE_CPROFILE TORCH_COMPILE_DYNAMO_PROFILER
    TORCH_COMPILE_GRAPH_FORMAT TORCH_COMPILE_DEBUG_DIR TORCH_COMPILE_JOB_ID TORCH_COMPILE_STROBELIGHT
    TORCH_COMPILE_FORCE_DISABLE_CACHES TORCH_COMPILE_CACHE_KEY_TAG TORCH_DYNAMO_RUN_GC_AFTER_COMPILE
    TRITON_CACHE_DIR TRITON_DUMP_DIR TRITON_HOME TRITON_PTXAS_PATH TRITON_PRINT_AUTOTUNING
    TRITON_KERNEL_DUMP ONEDNN_VERBOSE DNNL_VERBOSE ONEDNN_PRIMITIVE_CACHE_CAPACITY ONEDNN_JIT_PROFILE
    ONEDNN_JIT_DUMP DNNL_JIT_PROFILE DNNL_JIT_DUMP""".split()  # noqa: SIM905
)
"""Variables with these prefixes that say where, how loudly or with how many workers, not what is made. Whole
names, read off torch 2.13's own configuration: a part of a name says nothing (``PROLOGUE_FUSION``)."""


def environment_factors(backend: str, device_types: Collection[str]) -> Iterator[Factor]:
    """Factors of the environment that a backend's pieces for these types of devices rely on."""
    yield make_factor("env.schema", str(SCHEMA_VERSION))
    build = f"{torch.__version__} {torch.version.git_version or ''} debug={torch.version.debug}"
    yield make_factor("env.torch", build)
    yield make_factor("env.platform", f"{sys.platform} {os.uname().machine} {sys.byteorder}")
    # Imported together with torch where it is installed.
    yield make_factor("env.numpy", str(getattr(sys.modules.get("numpy"), "__version__", "none")))
    yield make_factor("env.variables", *_variables())
    yield make_factor("env.op_libraries", *_op_libraries())
    # What an engine compiled may depend on all of it.
    if backend in {"inductor", "eager", ENGINE}:
        yield make_factor("env.python", python_version())
    if backend in {"aoti", "inductor", ENGINE}:
        yield make_factor("env.cxx_abi", str(torch.compiled_with_cxx11_abi()))
        yield make_factor("env.libc", _libc())
        yield make_factor("env.cpu", *_cpu())
    if "cuda" in device_types:
        yield make_factor("env.cuda", f"cuda {torch.version.cuda} hip {torch.version.hip}")
        yield make_factor("env.gpu", _gpu())


def python_version() -> str:
    """Implementation, major and minor version: what bytecode and pickled code belong to."""
    return f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"


def python_code() -> str:
    """What decides how Python runs code: the version, ``-O``, warnings that are errors, limits of ints."""
    optimize = f" -{'O' * sys.flags.optimize}" if sys.flags.optimize else ""
    digits = sys.get_int_max_str_digits()
    digits_text = f" {digits} digits" if digits != sys.int_info.default_max_str_digits else ""
    errors = ""
    for action, message, category, module, line in warnings.filters:
        if action == "error":
            texts = [getattr(part, "pattern", part) for part in (message, module)]
            errors += f" error {getattr(category, '__qualname__', category)} {texts} {line}"
    return python_version() + optimize + digits_text + errors


def numpy_state() -> str:
    """How numpy prints, and what it does at a division by zero: nobody sees it being read."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return "none"
    options = {**numpy.get_printoptions(), **numpy.geterr(), "buffer": numpy.getbufsize()}
    options["formatter"] = sorted(options.get("formatter") or ())
    return str(sorted(options.items()))


def decimal_context() -> str:
    """How this thread rounds decimal numbers: state of C code, which no recorder sees being read."""
    module: Any = sys.modules.get("decimal")
    if module is None:
        # What a thread begins with where nobody changed decimal.DefaultContext; that one may be changed.
        return "28 ROUND_HALF_EVEN -999999 999999 1 0 DivisionByZero InvalidOperation Overflow"
    now = module.getcontext()
    traps = sorted(signal.__name__ for signal, on in now.traps.items() if on)
    fields = (now.prec, now.rounding, now.Emin, now.Emax, now.capitals, now.clamp, *traps)
    return " ".join(map(str, fields))


def _libc() -> str:
    name = "CS_GNU_LIBC_VERSION"
    return (os.confstr(name) if name in os.confstr_names else None) or "unknown"


def _cpu() -> tuple[str, bytes]:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = sorted(_cpu_flags())
    return f"{capability}, {len(flags)} instruction sets", " ".join([capability, *flags]).encode()


def _cpu_flags() -> list[str]:
    """Instruction sets as the kernel names them; the first processor speaks for all."""
    # Without procfs the capability level alone tells, as it did to torch. Decoded as utf-8, which is imported
    # by now; ascii would be another module.
    with suppress(OSError), open("/proc/cpuinfo", "rb", buffering=0) as file:
        for line in file.read(1 << 14).decode("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in {"flags", "Features"}:
                # Of ARM's, under the second name, all count.
                every = name.strip() == "Features"
                return [flag for flag in value.split() if every or flag.startswith(_INSTRUCTION_SETS)]
    return []


def _variables() -> tuple[str, bytes]:
    relevant = {name for name in os.environ if name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)}
    found = [(name, os.environ[name]) for name in sorted(relevant - _HARMLESS_VARIABLES)]
    shown = [f"{name}={value if is_telling(name, value) else '(not shown)'}" for name, value in found]
    payload = "\0".join(f"{name}={value}" for name, value in found)
    return ", ".join(shown) or "none", payload.encode("utf-8", "surrogatepass")


def _op_libraries() -> tuple[str, bytes]:
    """Libraries of operators that were loaded by path: known by content, as they have no version."""
    digests = []
    for path in torch.ops.loaded_libraries:
        try:
            with open(path, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError:
            digests.append("gone")
    return f"{len(digests)} loaded by path", " ".join(sorted(digests)).encode()


def _gpu() -> str:
    """The visible GPUs, each kind once: by name, as kernels are tuned to it, or by ROCm's architecture."""
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    names = {gpu.gcnArchName if torch.version.hip else gpu.name for gpu in found}
    return " ".join(sorted(names)) or "none"


_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
_PRECISION = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
# Settings below torch.backends.
_SETTINGS = {
    "reduced_precision": """cuda.matmul.allow_fp16_reduced_precision_reduction
        cuda.matmul.allow_bf16_reduced_precision_reduction cuda.matmul.allow_fp16_accumulation""",
    "backends": """cudnn.enabled cudnn.deterministic mkldnn.enabled mkldnn.deterministic opt_einsum.enabled
        opt_einsum.strategy quantized.engine mha.get_fastpath_enabled""",
    "attention": """cuda.flash_sdp_enabled cuda.mem_efficient_sdp_enabled cuda.math_sdp_enabled
        cuda.cudnn_sdp_enabled cuda.fp16_bf16_reduction_math_sdp_allowed""",
}
_FUNCTION_MODULES = (torch, torch.nn.functional, torch.linalg, torch.fft, torch.special)


def tracing_obstacle() -> str | None:
    """Why no key can stand for a trace made now: a mode, transform or hook would change what it sees."""
    modes = torchside.active_modes()
    if modes:
        return f"the mode {modes[-1]} is active; compile outside of it"
    if torchside.in_function_transform():
        return "a torch.func transform is active; compile outside of it"
    if replaced := torchside.replaced_kernels():
        return f"a kernel of aten::{replaced[0]} was replaced; register an op of your own"
    if torchside.has_global_hooks():
        return "hooks are registered for all modules; remove them or register them on the model"
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if tracing or torch.compiler.is_compiling():
        return "another compiler is tracing; compile outside of it"
    return None


def torch_state_factors(walk: Walk | None = None) -> Iterator[Factor]:
    """Factors of torch's global state; ``walk`` is that over the whole key, after the model."""
    walk = walk or Walk()
    yield make_factor("torch.default_dtype", str(torch.get_default_dtype()))
    yield make_factor("torch.default_device", torchside.default_device())
    autocast = [
        f"{device} {'on' if torch.is_autocast_enabled(device) else 'off'} {torch.get_autocast_dtype(device)}"
        for device in _AUTOCAST_DEVICES
    ]
    yield make_factor("torch.autocast", ", ".join(autocast))
    yield make_factor("torch.float32_precision", _float32_precision())
    # What torch.set_flush_denormal set in this thread; nothing says so but a calculation.
    smallest, two = sys.float_info.min, float(len("ab"))
    yield make_factor("torch.denormals", "flushed" if smallest / two == 0.0 else "kept")
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    mode = torch.get_deterministic_debug_mode()
    yield make_factor("torch.deterministic", f"mode {mode}, fill {fill}")
    for kind, names in _SETTINGS.items():
        values = ", ".join(f"{name}={_setting(name)}" for name in names.split())
        yield make_factor(f"torch.{kind}", values)
    changed = sorted(torchside.changed_inductor_settings().items())
    writer = walk.writer("torch.inductor", path=[torchside.INDUCTOR_SETTINGS])
    writer.put_pairs(changed)
    shown = ", ".join(f"{name}={value!r}"[:60] for name, value in changed)
    yield make_factor("torch.inductor", shown, bytes(writer.out))
    classes = [item for item in vars(torch.nn.modules).values() if isinstance(item, type)]
    owners = [*_FUNCTION_MODULES, torch.Tensor, *dict.fromkeys(classes)]
    yield replaced_factor(walk, "torch.patched", owners)


def _float32_precision() -> str:
    """What each kind of operator may do to float32; unset ones ask their backend, then the whole."""
    try:
        parts = [torch.get_float32_matmul_precision()]
    except RuntimeError:
        # Set through the newer fp32_precision, which torch does not translate back.
        parts = ["mixed"]
    for name in _PRECISION:
        backend = name.partition(".")[0]
        asked = (_setting(f"{step}fp32_precision") for step in (f"{name}.", f"{backend}.", ""))
        parts.append(f"{name}={next((value for value in asked if value not in {None, 'none'}), 'ieee')}")
    return ", ".join(parts)


def _setting(name: str) -> Any:
    value = follow(torch.backends, name)
    return value() if callable(value) else value
