"""The private names of torch that stitchcache uses, one file a subject.

Other rooms import from here what torch does not promise to keep, so that a new version of torch is looked at
in one place. Each file says in ``SEEN`` with which minor versions of torch the tests were run.

Private is what begins with an underscore, in a module's path or in an attribute, and the fields of symbolic
sizes and fake tensors. Three names are taken as public, because ``nn.Module`` declares them with their types
and every tool that walks over modules reads them: ``_parameters``, ``_buffers`` and ``_modules``.

In this file, as every start needs it: what is switched on in this process, what modules, tensors and custom
ops do not tell in public, and AOTInductor's libraries, mapped into the process.

Uses ``torch.overrides._get_current_function_mode_stack``,
``torch.utils._python_dispatch._get_current_dispatch_mode_stack``, ``torch.utils._device``,
``torch._C._functorch``, ``torch._C._set_grad_enabled``, the entries of ``torch._inductor.config``
(``torch.utils._config_module``), the names of ``nn.Module``'s hook tables and other attributes,
``torch.nn.modules.module._global_*``, ``torch.library._impls``, ``torch._native.registry._graphs``,
``torch._C._storage_address``, ``Tensor._version``, ``torch._neg_view``, ``FakeTensor.fake_mode``,
``torch._subclasses.FakeTensorMode``, ``torch.utils._python_dispatch.is_traceable_wrapper_subclass`` and
``torch._library.custom_ops.CustomOpDef``, ``torch._ops.OpOverload`` and its packets, a tensor's ``_cdata``,
and the runners in ``torch._C._aoti``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef as CustomOpDef
from torch._ops import OpOverload as OpOverload, OpOverloadPacket as OpOverloadPacket
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _config_module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_traceable_wrapper_subclass

from stitchcache.errors import BackendError
from stitchcache.types import CALLER_MARK

SEEN = ("2.11", "2.13", "2.15")

if not getattr(sys, "_is_gil_enabled", lambda: True)():
    # Nobody has tried what threads do to each other here. Pieces let go of the GIL anyway.
    raise ImportError("stitchcache was not tried without the GIL: run Python with -X gil=1 or PYTHON_GIL=1.")

INDUCTOR_SETTINGS = "torch._inductor.config"
DYNAMO = "torch._dynamo"
RESUMED = "torch_dynamo_resume_in"
"""What the code of functions is named that Dynamo adds to modules, to go on after a graph break."""
GUARD = "___make_guard_fn."
"""What the names of guards begin with that Dynamo of torch 2.11 writes in Python."""

set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""Set this thread's grad mode. ``torch.no_grad`` calls it too, and takes seven times as long."""

_PERFORMANCE_ONLY = frozenset(
    """debug debug_fusion debug_ir_traceback disable_progress verbose_progress worker_log_path
    worker_start_method worker_suppress_logging compile_threads quiesce_async_compile_pool
    quiesce_async_compile_time fx_graph_cache fx_graph_remote_cache bundle_triton_into_fx_graph_cache
    autotune_local_cache autotune_remote_cache bundled_autotune_remote_cache force_disable_caches
    unsafe_skip_cache_dynamic_shape_guards unsafe_marked_cacheable_functions
    enable_caching_generated_triton_templates""".split()  # noqa: SIM905
)
"""Inductor's settings that decide how it works, not what it makes; those below ``trace.`` do too."""


def imported_compilers() -> tuple[str, ...]:
    """Those of torch's compilers that this process has imported."""
    return tuple(name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules)


def fx_globals() -> dict[str, Any]:
    """What ``torch.fx`` puts beside the code that it generates for a graph, by name."""
    return {
        "device": torch.device,
        "inf": float("inf"),
        "nan": float("nan"),
        "NoneType": type(None),
        "fx_pytree": sys.modules.get("torch.fx._pytree"),
        "pytree": sys.modules.get("torch.utils._pytree"),
    }


def active_modes() -> list[str]:
    """Names of the torch function and dispatch modes that are active, innermost last.

    A default device is a mode too; it is left out here, as it is a factor of its own.
    """
    functions: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = [*functions, *_get_current_dispatch_mode_stack()]
    names = [type(mode).__name__ for mode in modes]
    return [name for name in names if name not in {"DeviceContext", "FakeTensorMode"}]


def default_device() -> str:
    """The kind of device that new tensors are made on where none is named."""
    # Whoever sets one imports this; to ask torch does, too.
    return torch.get_default_device().type if "torch.utils._device" in sys.modules else "cpu"


def dispatch_modes() -> list[Any]:
    """The dispatch modes that are active, innermost last."""
    return list(_get_current_dispatch_mode_stack())


_KERNELS = ("/CPU", "/CUDA", "/CompositeImplicitAutograd")


def replaced_kernels() -> list[str]:
    """Ops of torch's own for which somebody else registered a kernel in Python."""
    # torch itself registers two thousand, nearly all for Meta: the last letter is asked first.
    some = [item for item in torch.library._impls if item[-1] in "UAd" and item.endswith(_KERNELS)]
    replaced = {item for item in some if item.startswith("aten/")}
    # torch's own are there in every build for CUDA, more of them where Triton is installed.
    registered: Any = getattr(sys.modules.get("torch._native.registry"), "_graphs", {})
    for nodes in registered.values() if replaced else ():
        if all(str(node.impl_fn.__module__).startswith("torch._native.") for node in nodes):
            # Before 2.15 all of them are for ops of aten.
            named = {(getattr(n, "lib_symbol", "aten"), n.op_symbol, n.dispatch_key) for n in nodes}
            replaced.difference_update(map("/".join, named))
    return sorted(item.split("/")[1] for item in replaced)


def in_function_transform() -> bool:
    """Whether the caller stands inside of a ``torch.func`` transform such as vmap."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def changed_inductor_settings() -> dict[str, Any]:
    """Settings of Inductor that differ from their defaults, without importing Inductor.

    Where it is not imported nothing was changed but by environment variables, which are factors.
    """
    config: Any = sys.modules.get(INDUCTOR_SETTINGS)
    if config is None:
        return {}
    changed: dict[str, Any] = {}
    for name, entry in config._config.items():
        # A context variable since 2.12, a plain value before.
        override = entry.user_override
        value = override.get() if isinstance(override, ContextVar) else override
        if value is _config_module._UNSET_SENTINEL or value == entry.default:
            continue
        # AOTInductor writes down there what it compiled for, and leaves it.
        if name == "aot_inductor.metadata":
            continue
        if entry.alias is None and name not in _PERFORMANCE_ONLY and not name.startswith("trace."):
            changed[name] = value
    return changed


HOOKS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_backward_hooks": (),
    "_backward_pre_hooks": (),
}
"""Dictionaries of hooks that a call looks at, each with those that say how its hooks are called.

Hooks around state dictionaries are no part of a call.
"""

TRANSIENT_BUFFERS = "_non_persistent_buffers_set"
"""Names of the buffers that ``state_dict`` leaves out."""

COMPILED_CALL = "_compiled_call_impl"
"""Set by ``Module.compile()``."""

TABLES = frozenset({"training", "_parameters", "_buffers", "_modules", TRANSIENT_BUFFERS})
"""What every module has: a key or a graph hash writes each in its own way."""

INTERNALS = TABLES | {
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    *HOOKS,
    *(flag for flags in HOOKS.values() for flag in flags),
}
"""What torch itself keeps in a module; each is either a factor of its own or no part of a call."""


def has_global_hooks() -> bool:
    """Whether hooks are registered that every module runs."""
    return any(getattr(nn_module, f"_global{name}", None) for name in HOOKS)


QUIET = frozenset({"dropout_p", "p", "dropout", "train", "training"})
"""Arguments that make an op of the random kind a plain one where they are zero or false."""

FAKE_INTERNALS = frozenset(
    "fake_mode fake_device _fake_device constant pytype dispatch_keys real_tensor _is_param".split()  # noqa: SIM905
)
"""What a fake tensor keeps about itself in its ``__dict__``, beside its memos."""


def storage_id(value: torch.Tensor) -> int:
    """Identity of a tensor's memory. Views share it, also views of tensors without data."""
    return int(torch._C._storage_address(value))  # type: ignore[attr-defined]


def version_of(value: torch.Tensor) -> int:
    """A number that grows with each write into a tensor or its views; not for tensors of inference mode."""
    return 0 if value.is_inference() else int(value._version)


def negated(value: torch.Tensor) -> torch.Tensor:
    """A view that negates lazily, by a bit of its own."""
    return torch._neg_view(value)


def without_data() -> AbstractContextManager[Any]:
    """A block in which every new tensor has a shape, a dtype and a device, and no data."""
    # Not at the top: most processes never make a tensor without data.
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(value: Any) -> bool:
    """Whether a value is a fake tensor: one with sizes, strides and a device, and no data."""
    # To ask a plain one for what it lacks takes a microsecond.
    plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    return not plain and isinstance(value, torch.Tensor) and hasattr(value, "fake_mode")


def has_fakes(values: Iterable[Any]) -> bool:
    """Whether any value is a tensor without data."""
    return any(isinstance(v, torch.Tensor) and (v.is_meta or is_fake(v)) for v in values)


def fake_mode_of(values: Iterable[Any]) -> Any | None:
    """The mode that the first fake tensor among the values was made in; ``None`` without one."""
    return next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)


def is_wrapper(value: Any) -> bool:
    """Whether a value is a tensor that is made of others, such as a ``DTensor``."""
    return bool(is_traceable_wrapper_subclass(value))


def is_transformed(value: Any) -> bool:
    """Whether a value lives inside a transform of ``torch.func``, such as ``vmap``."""
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def custom_op_parts(op: CustomOpDef) -> dict[str, Any]:
    """What a trace may see of an op made with ``torch.library.custom_op``: its signature and its functions.

    What else the object holds is about autograd, or about how a call finds the kernel.
    """
    names = ("_schema", "_tags", "_init_fn", "_abstract_fn", "_torch_dispatch_fns", "_autocast_dtype")
    parts = {name: getattr(op, name, None) for name in names}
    return {**parts, "_tags": sorted(map(str, parts["_tags"] or ())), "_name": op._qualname}


# -- libraries ------------------------------------------------------------------------------------
# Behind a library lie the caller (``torchside.caller``), its length in so many bytes, and a mark.

LENGTH, MAGIC = 8, CALLER_MARK
_MOST = 1 << 20


def load_library(path: Path, device: str) -> Callable[[list[Any]], Sequence[Any]]:
    """Map a library, for a device such as ``cuda:1``.

    Returns:
        One list of tensors to one sequence of tensors.

    Raises:
        BackendError: It cannot be mapped, or was made for another torch.
    """
    try:
        with _executable(path) as usable:
            name = _new_name(usable)
            return load_with_caller(name, device) or load_with_runner(name, device)
    except (OSError, RuntimeError) as error:
        where, said = os.path.realpath(path), str(error).splitlines()[0]
        raise BackendError(
            f"{where} cannot be loaded: {said}. If it lies on a file system mounted noexec, and this system "
            "runs nothing from memory, set STITCHCACHE_DIR to another; else run 'stitchcache verify "
            "--repair'.",
            backend="aoti",
        ) from error


@contextlib.contextmanager
def _executable(path: Path) -> Iterator[str]:
    """A path to map a library by: its own, or one to a copy in memory.

    Volumes of images may be mounted noexec. Memory of a copy is the process's own; mapped files share theirs.
    """
    if not os.statvfs(path).f_flag & getattr(os, "ST_NOEXEC", 0):
        yield str(path)
        return
    # What is mapped stays when the descriptor is closed.
    with open(path, "rb") as stored, open(os.memfd_create("stitchcache-piece"), "wb") as memory:
        memory.write(stored.read())
        memory.flush()
        yield f"/proc/self/fd/{memory.fileno()}"


def _new_name(path: str) -> str:
    """A path to a library by which none was loaded yet.

    The loader of libraries knows them by path. A descriptor's path is that of another file once its number is
    used again, and it would give the old library. More slashes change nothing but the text.
    """
    directory, _, number = path.rpartition("/")
    if directory != "/proc/self/fd":
        return path
    slashes = "".join("." + "/" * (1 + int(digit, 16)) for digit in os.urandom(8).hex())
    return f"{directory}/{slashes}{number}"


def load_with_runner(path: str, device: str) -> Callable[[list[Any]], Sequence[Any]]:
    """Map a library with torch's own runner, and make one instance of its model."""
    if device.startswith("cuda"):
        runner: Any = torch._C._aoti.AOTIModelContainerRunnerCuda(path, 1, device)
    else:
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(path, 1)
    run: Callable[[list[Any]], Sequence[Any]] = runner.run
    return run


def load_with_caller(path: str, device: str) -> Callable[[list[Any]], Sequence[Any]] | None:
    """Map a library, to be called without the GIL with a list of tensors, which is emptied.

    ``None`` where the library has no caller, or that cannot be mapped here.

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
    tail = LENGTH + len(MAGIC)
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        end = file.seek(-tail, os.SEEK_END)
        length, mark = file.read(LENGTH), file.read()
        size = int.from_bytes(length, "little")
        if mark == MAGIC and 0 < size < min(end, _MOST):
            file.seek(end - size)
            return file.read(size)
    return None


@functools.cache
def _offset() -> int:
    """Where a Python tensor keeps its ``at::Tensor``: found by its value, as it moved between versions."""
    tensor = torch.empty(0)
    size = ctypes.sizeof(ctypes.c_size_t)
    words = (ctypes.c_size_t * (object.__sizeof__(tensor) // size)).from_address(id(tensor))
    return list(words).index(tensor._cdata) * size
