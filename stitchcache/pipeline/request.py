"""What a caller asks for, checked once; and where a start happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from stitchcache.cache import Cache
from stitchcache.errors import OptionError, check_kind
from stitchcache.pieces import COMPILER_OPTIONS, NAMES
from stitchcache.store.layout import CHECKS, choice, required
from stitchcache.types import SizeRange

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass

T = TypeVar("T")

OnMiss = Literal["compile", "error"]
Check = Literal["example", "background", "none"]
_OWN_OPTIONS = {"stitchcache.jobs": int, "stitchcache.verify": bool, "stitchcache.effects": dict}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options of one compilation, as :func:`stitchcache.compile` takes them.

    Args:
        dynamic_shapes: As for ``torch.export.export``.
        splitting_ops: Names of ops to split at.
        size_ranges: Ranges that get code of their own.
        backend: Piece backend.
        on_miss: ``compile`` or ``error``.
        require: ``"direct"``: a graph hit is an error too, as it traces the model.
        check: When a hit is compared with the model itself; ``None`` takes ``STITCHCACHE_CHECK``. In no key.
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
    require: Literal["direct"] | None = None
    check: Check | None = None
    key_factors: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, NAMES)
        _one_of("on_miss", self.on_miss, ("compile", "error"))
        _one_of("require", self.require, (None, "direct"))
        _one_of("check", self.check, (None, *CHECKS))
        for op in self.splitting_ops:
            if not isinstance(op, str) or not op:
                raise OptionError(
                    f"splitting_ops: {op!r} is not an op's name; write 'namespace::op'.",
                    option="splitting_ops",
                )
        for name in ("key_factors", "options"):
            check_kind(name, getattr(self, name), Mapping, "a dict")
        for name, value in self.options.items():
            kind = _OWN_OPTIONS.get(name)
            if name.startswith("stitchcache.") and (kind is None or type(value) is not kind):
                known = ", ".join(f"{n} ({k.__name__})" for n, k in _OWN_OPTIONS.items())
                raise OptionError(
                    f"options[{name!r}]={value!r}: there is {known}.", option=f"options[{name!r}]"
                )
        for op, writes in self.effects.items():
            if not isinstance(op, str) or "::" not in op or type(writes) is not bool:
                raise OptionError(
                    f"options['stitchcache.effects'] has {op!r}: {writes!r}; it maps names of ops, such as "
                    "'mylib::attention', to True or False.",
                    option="options['stitchcache.effects']",
                )
        if self.jobs is not None and self.jobs < 1:
            raise OptionError(
                f"jobs={self.jobs}: at least one process has to compile. Leave it out for about one a core.",
                option="jobs",
            )

    @property
    def backend_options(self) -> dict[str, Any]:
        """Options that go to the backend, and into keys."""
        ours = {} if self.backend == "eager" else COMPILER_OPTIONS
        return {**ours, **{k: v for k, v in self.options.items() if not k.startswith("stitchcache.")}}

    @property
    def jobs(self) -> int | None:
        """Processes to compile with; ``None`` takes about one a core."""
        jobs: int | None = self.options.get("stitchcache.jobs")
        return jobs

    @property
    def verify(self) -> bool:
        """Whether fresh pieces are compared with eager."""
        return bool(self.options.get("stitchcache.verify", True))

    @property
    def effects(self) -> Mapping[str, bool]:
        """Ops that write what their schemas do not show (true), or that only seem to (false)."""
        effects: Mapping[str, bool] = self.options.get("stitchcache.effects", {})
        return effects

    @property
    def must_be_direct(self) -> bool:
        """Whether tracing is forbidden, by argument or by ``STITCHCACHE_REQUIRE=direct``."""
        return self.require == "direct" or required() == "direct"

    @property
    def miss_is_error(self) -> bool:
        """Whether compiling is forbidden, by argument or by ``STITCHCACHE_REQUIRE``."""
        return self.on_miss == "error" or self.require is not None or required() != "nothing"

    @property
    def checked(self) -> Check:
        """When a hit is compared with the model: the argument, else ``STITCHCACHE_CHECK``, else at once."""
        if self.check is not None:
            return self.check
        return choice("STITCHCACHE_CHECK", CHECKS)  # type: ignore[return-value]


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        there = ", ".join(str(one) for one in known)
        raise OptionError(f"{name}={value!r}: there is {there}.", option=name)


def check_model(model: Any, args: Any, kwargs: Any) -> None:
    """Refuse what cannot be compiled before anything is done.

    Raises:
        OptionError: Not a module, in training mode, or arguments that are not a tuple and a dict.
    """
    check_kind("model", model, torch.nn.Module, "a torch.nn.Module; put a function into a module's forward")
    if model.training:
        raise OptionError(
            f"{type(model).__qualname__} is in training mode, and compiled models are for inference. "
            "Call model.eval() first.",
            option="model",
        )
    check_arguments(args, kwargs)


def check_arguments(args: Any, kwargs: Any) -> None:
    """Refuse arguments that are not a tuple and a dict."""
    check_kind("args", args, tuple, "a tuple, such as (x,) for one argument")
    check_kind("kwargs", kwargs, Mapping, "a dict or None")


def chosen_cache(cache: Cache | None) -> Cache:
    """The cache that a caller gave, or the default one.

    Raises:
        OptionError: It is something else, such as a path.
    """
    if cache is None:
        return Cache()
    check_kind("cache", cache, Cache, "a Cache: write cache=stitchcache.Cache(...) with its directory")
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


class Clock:
    """Seconds by stage, and progress for whoever asked to be told. Nothing is decided by it.

    Args:
        label: What to call the model in progress.
        on_progress: Gets told what happens.
    """

    def __init__(self, label: str, on_progress: OnProgress | None = None) -> None:
        self._began = time.perf_counter()
        self._label, self._on_progress = label, on_progress
        self.timings: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Since the start began."""
        return time.perf_counter() - self._began

    def timed(self, stage: str, work: Callable[[], T]) -> T:
        """Do something and add its seconds to a stage."""
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - began

    def tell(self, stage: str, done: int = 0, total: int = 0, left: float | None = None) -> None:
        """Report progress."""
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    target=self._label,
                    stage=stage,
                    done=done,
                    total=total,
                    seconds=self.seconds,
                    left=left,
                )
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a start happens.

    Args:
        cache: Where to look and store.
        label: What to call the model in log lines and listings.
        device: The device that pieces are loaded for.
        devices: Types of all devices in use, sorted.
        clock: Measures it.
    """

    cache: Cache
    label: str
    device: str
    devices: tuple[str, ...]
    clock: Clock
