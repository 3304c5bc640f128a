"""Factors of torch's own settings in this process, as far as a trace or generated code depends on them.

Grad and inference mode are no factors: capture runs with both switched off, and calls run without
autograd, whatever the caller's mode. The number of threads is none either: it changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch

from stitchcache.keys import torch_private
from stitchcache.keys.digest import make_factor
from stitchcache.keys.encoder import new_encoder
from stitchcache.keys.values import Shared
from stitchcache.types import Factor

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")

_PRECISION = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
_REDUCTION = (
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_accumulation",
)
_BACKENDS = (
    "cudnn.enabled",
    "cudnn.deterministic",
    "mkldnn.enabled",
    "mkldnn.deterministic",
    "opt_einsum.enabled",
    "opt_einsum.strategy",
    "quantized.engine",
    "mha.get_fastpath_enabled",
)
_ATTENTION = (
    "cuda.flash_sdp_enabled",
    "cuda.mem_efficient_sdp_enabled",
    "cuda.math_sdp_enabled",
    "cuda.cudnn_sdp_enabled",
    "cuda.fp16_bf16_reduction_math_sdp_allowed",
)
_PATCHABLE = (torch, torch.nn.functional, torch.Tensor)


def torch_state_factors(shared: Shared | None = None) -> tuple[Factor, ...]:
    """Factors of torch's global state.

    Args:
        shared: What this lookup's steps have in common.

    Raises:
        UnkeyableError: A changed setting of Inductor, or a replaced function of torch, cannot be keyed.
    """
    return tuple(_factors(shared or Shared()))


def tracing_obstacle() -> str | None:
    """Why no key can stand for a trace made now: a mode, transform or hook would change what it sees."""
    modes = torch_private.active_modes()
    if modes:
        return f"the mode {modes[-1]} is active; compile outside of it"
    if torch_private.in_function_transform():
        return "a torch.func transform is active; compile outside of it"
    if torch_private.has_global_module_hooks():
        return "hooks are registered for all modules; remove them or register them on the model"
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return "another compiler is tracing" if tracing or torch.compiler.is_compiling() else None


def _factors(shared: Shared) -> Iterator[Factor]:
    yield make_factor("torch.default_dtype", str(torch.get_default_dtype()))
    yield make_factor("torch.default_device", torch.get_default_device().type)
    yield make_factor("torch.autocast", _autocast())
    yield make_factor("torch.float32_precision", _float32_precision())
    yield make_factor("torch.reduced_precision", _read(_REDUCTION))
    yield make_factor("torch.deterministic", _deterministic())
    yield make_factor("torch.backends", _read(_BACKENDS))
    yield make_factor("torch.attention", _read(_ATTENTION))
    yield make_factor("torch.inductor", *_inductor())
    yield make_factor("torch.patched", *_patched(shared))


def _autocast() -> str:
    parts = []
    for device in _AUTOCAST_DEVICES:
        state = "on" if torch.is_autocast_enabled(device) else "off"
        parts.append(f"{device} {state} {torch.get_autocast_dtype(device)}")
    return ", ".join(parts)


def _float32_precision() -> str:
    """What each kind of operator may do to float32; unset ones ask their backend, then the whole."""
    parts = [_legacy_precision()]
    for name in _PRECISION:
        backend = name.partition(".")[0]
        asked = (_setting(f"{step}fp32_precision") for step in (f"{name}.", f"{backend}.", ""))
        parts.append(f"{name}={next((value for value in asked if value not in {None, 'none'}), 'ieee')}")
    return ", ".join(parts)


def _legacy_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # Set through the newer fp32_precision, which torch does not translate back.
        return "mixed"


def _deterministic() -> str:
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return f"mode {torch.get_deterministic_debug_mode()}, fill {fill}"


def _read(names: tuple[str, ...]) -> str:
    """Settings below ``torch.backends`` as text."""
    return ", ".join(f"{name}={_setting(name)}" for name in names)


def _setting(name: str) -> Any:
    """A setting below ``torch.backends`` by dotted name; a function is asked."""
    value: Any = torch.backends
    for step in name.split("."):
        value = getattr(value, step, None)
    ask: Callable[[], Any] | None = value if callable(value) else None
    return ask() if ask is not None else value


def _inductor() -> tuple[str, bytes]:
    changed = torch_private.changed_inductor_settings()
    encoder = new_encoder(Shared(), ["torch._inductor.config"])
    for name, value in sorted(changed.items()):
        encoder.text(name)
        encoder.put_at(f".{name}", value)
    return ", ".join(f"{name}={value!r}"[:60] for name, value in sorted(changed.items())), bytes(encoder.out)


def _patched(shared: Shared) -> tuple[str, bytes]:
    """Functions of torch that were replaced by somebody else's: captured code may call them."""
    encoder = new_encoder(shared)
    names = []
    for owner in _PATCHABLE:
        for name, value in vars(owner).items():
            if type(value) is FunctionType and not shared.origin(value.__code__.co_filename)[0]:
                names.append(f"{owner.__name__}.{name}")
                encoder.text(names[-1])
                encoder.put_at(names[-1], value)
    return ", ".join(names) or "as shipped", bytes(encoder.out)
