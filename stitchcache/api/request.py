"""What a caller asks for, checked once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal

import torch

from stitchcache.cache import Cache
from stitchcache.errors import OptionError
from stitchcache.pieces import NAMES
from stitchcache.state import modules_of
from stitchcache.types import SizeRange

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


OnMiss = Literal["compile", "error"]
_OWN_OPTIONS = {"stitchcache.jobs": int, "stitchcache.verify": bool}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options of one compilation, as :func:`stitchcache.compile` takes them.

    Args:
        dynamic_shapes: As for ``torch.export.export``.
        splitting_ops: Names of ops to split at.
        size_ranges: Ranges that get code of their own.
        backend: Piece backend.
        on_miss: ``compile`` or ``error``.
        key_factors: The caller's own distinctions.
        options: Inductor's options, and ours under ``stitchcache.``.
        label: What to call the model in listings.

    Raises:
        OptionError: An option makes no sense.
    """

    dynamic_shapes: Any = None
    splitting_ops: tuple[str, ...] = ()
    size_ranges: tuple[SizeRange, ...] = ()
    backend: str = "aoti"
    on_miss: OnMiss = "compile"
    key_factors: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        if self.backend not in NAMES:
            raise OptionError(f"backend={self.backend!r}: there is {', '.join(NAMES)}.", option="backend")
        if self.on_miss not in ("compile", "error"):
            raise OptionError(f"on_miss={self.on_miss!r}: use 'compile' or 'error'.", option="on_miss")
        for op in self.splitting_ops:
            if not isinstance(op, str) or not op:
                raise OptionError(
                    f"splitting_ops: {op!r} is not an op's name; write 'namespace::op'.",
                    option="splitting_ops",
                )
        for name in ("key_factors", "options"):
            if not isinstance(getattr(self, name), Mapping):
                raise OptionError(
                    f"{name} is a {type(getattr(self, name)).__qualname__}: pass a dict.", option=name
                )
        for name, value in self.options.items():
            kind = _OWN_OPTIONS.get(name)
            if name.startswith("stitchcache.") and (kind is None or type(value) is not kind):
                known = ", ".join(f"{n} ({k.__name__})" for n, k in _OWN_OPTIONS.items())
                raise OptionError(
                    f"options[{name!r}]={value!r}: there is {known}.", option=f"options[{name!r}]"
                )

    @property
    def backend_options(self) -> dict[str, Any]:
        """Options that go to the backend, and into keys."""
        return {k: v for k, v in self.options.items() if not k.startswith("stitchcache.")}

    @property
    def jobs(self) -> int | None:
        """Processes to compile with; ``None`` takes one a core."""
        jobs: int | None = self.options.get("stitchcache.jobs")
        return jobs

    @property
    def verify(self) -> bool:
        """Whether fresh pieces are compared with eager."""
        return bool(self.options.get("stitchcache.verify", True))

    @property
    def miss_is_error(self) -> bool:
        """Whether compiling is forbidden, by argument or by ``STITCHCACHE_REQUIRE``."""
        return self.on_miss == "error" or environment_flag("STITCHCACHE_REQUIRE")


def environment_flag(name: str) -> bool:
    """An environment variable that is on or off.

    Raises:
        OptionError: It is neither.
    """
    value = os.environ.get(name, "").strip().lower()
    if value in {"", "0", "false", "no", "off"}:
        return False
    if value in {"1", "true", "yes", "on"}:
        return True
    raise OptionError(f"{name}={value!r}: use 1 or 0.", option=name)


def check_model(model: Any, args: Any, kwargs: Any) -> None:
    """Refuse what cannot be compiled before anything is done.

    Raises:
        OptionError: Not a module, in training mode, or arguments that are not a tuple and a dict.
    """
    if not isinstance(model, torch.nn.Module):
        raise OptionError(
            f"model is a {type(model).__qualname__}; stitchcache compiles torch.nn.Module objects. "
            "Put a function into a module's forward.",
            option="model",
        )
    if model.training:
        raise OptionError(
            f"{type(model).__qualname__} is in training mode, and compiled models are for inference. "
            "Call model.eval() first.",
            option="model",
        )
    if not isinstance(args, tuple):
        raise OptionError(
            f"args is a {type(args).__qualname__}; pass a tuple, such as (x,) for one argument.",
            option="args",
        )
    if not isinstance(kwargs, Mapping):
        raise OptionError(f"kwargs is a {type(kwargs).__qualname__}; pass a dict or None.", option="kwargs")


def devices_of(model: torch.nn.Module, leaves: Sequence[Any]) -> tuple[str, tuple[str, ...]]:
    """What a model and its arguments live on.

    Returns:
        The device that pieces are loaded for (the first accelerator found among parameters, buffers and
        arguments, else the CPU), and the types of all devices, sorted.
    """
    parameters: dict[torch.device, None] = {}
    others: dict[torch.device, None] = {}
    # By hand: asking for all parameters, or a tensor whether it is one, takes milliseconds.
    for _, module in modules_of(model):
        parameters.update((t.device, None) for t in module._parameters.values() if t is not None)
        others.update((t.device, None) for t in module._buffers.values() if t is not None)
    others.update((leaf.device, None) for leaf in leaves if isinstance(leaf, torch.Tensor))
    found = parameters | others
    first = next((str(device) for device in found if device.type != "cpu"), "cpu")
    return first, tuple(sorted({device.type for device in found} or {"cpu"}))


def chosen_cache(cache: Cache | None) -> Cache:
    """The cache that a caller gave, or the default one.

    Raises:
        OptionError: It is something else, such as a path.
    """
    if cache is None:
        return Cache()
    if not isinstance(cache, Cache):
        raise OptionError(
            f"cache is {cache!r}, not a Cache: write cache=stitchcache.Cache(...) with its directory.",
            option="cache",
        )
    return cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a compilation has come.

    Args:
        target: The target's name or the model's class.
        stage: ``lookup``, ``capture``, ``wait``, ``compile``, ``store``, ``load`` or ``done``.
        done: Pieces that are ready.
        total: Distinct pieces.
        seconds: Since the target was begun.
        left: Seconds that compiling will still take, from what pieces took in this run or before on this
            store; ``None`` where that is not known.
    """

    target: str
    stage: str
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    left: float | None = None


OnProgress = Callable[[Progress], None]
