"""See each op of a block before it runs, and keep the memory that it is about to write.

Uses ``torch.utils._python_dispatch.TorchDispatchMode`` with ``_should_skip_dynamo``, ``_push_mode`` and
``_pop_mode``, ``OpOverload._schema`` and ``_can_decompose``, ``torch._C._storage_address`` and
``torch._C._AutoDispatchBelowAutograd``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from stitchcache.records import dataclass
from stitchcache.torchside import QUIET, storage_id

SEEN = ("2.11", "2.13", "2.15")

# Namespaces of ops whose schemas torch answers for.
_TORCHS_OWN = frozenset({"aten", "prim", "prims", "quantized", "inductor", "mkldnn", "mkl", "higher_order"})
# Ops that update running statistics although their schemas deny it, where they are told that they train.
_SILENT = frozenset({"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"})


# Ops that torch makes of others, and that do nothing but return new memory. The rest may return what they
# were given, or write what their schemas deny (``instance_norm``): they are taken apart.
_WHOLE = frozenset(
    """aten::linear aten::matmul aten::layer_norm aten::rms_norm aten::softmax aten::log_softmax aten::conv1d
    aten::conv2d aten::scaled_dot_product_attention""".split()  # noqa: SIM905
)


class StoppedError(RuntimeError):
    """An op was about to do what nobody could put back; the message says what."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Memory that is written: a tensor over it, the memory itself, and what it held before."""

    tensor: torch.Tensor
    storage: torch.UntypedStorage
    before: torch.UntypedStorage

    def now(self) -> torch.UntypedStorage:
        """What it holds now."""
        return self.storage.clone()  # type: ignore[no-untyped-call,no-any-return]

    def put_back(self) -> None:
        """Make it what it was; no version counter moves."""
        if self.storage.nbytes() != self.before.nbytes():
            self.storage.resize_(self.before.nbytes())
        self.storage.copy_(self.before)


@dataclass(frozen=True, slots=True)
class _Op:
    """What a schema says: which arguments an op writes, whether it makes new tensors, whether it draws.

    ``shapes`` ops change sizes or strides of what they write, such as ``t_``. Those with ``parts`` are seen
    as the ops that they are made of.
    """

    writes: tuple[tuple[int, str], ...]
    makes: bool
    draws: tuple[tuple[int, str, Any], ...] | None
    acts: bool
    silent: bool
    shapes: bool = False
    parts: bool = False


class Watch(TorchDispatchMode):
    """A block in which every write to memory from outside the block is noticed before it happens.

    Memory that an op of the block made is the block's own. What code outside of torch's dispatcher writes is
    not seen: a kernel of a custom op that writes more than its schema says, NumPy on shared memory.

    Args:
        effects: Qualified names of ops, with whether they write what no schema shows.
        only: Memory that may be written, by :func:`memory_of`; ``None`` allows all.
        draw: Whether ops may draw random numbers.
        quick: See ops above autograd, where they are half as many. Code that uses autograd fails.

    Attributes:
        saved: Memory from outside, by :func:`memory_of`.
        stopped: Why the block was stopped; also where its code has swallowed the error.
        drew: Whether any op drew random numbers.
    """

    # Without it torch refuses to run torch.cond and its kin in a mode.
    supports_higher_order_operators = True

    def __init__(
        self,
        effects: Mapping[str, bool],
        *,
        only: Iterable[int] | None = None,
        draw: bool = True,
        quick: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._quick, self._above = quick, ExitStack()
        self._effects, self._draw = effects, draw
        self._only = None if only is None else frozenset(only)
        self._ops: dict[Any, _Op] = {}
        # Ops that neither write nor draw, with whether they make new tensors.
        self._inert: dict[Any, bool] = {}
        self._made: set[int] = set()
        self._generators: dict[int, tuple[torch.Generator, torch.Tensor]] = {}
        self._shapes: dict[int, tuple[torch.Tensor, torch.UntypedStorage, tuple[Any, ...]]] = {}
        self.saved: dict[int, Saved] = {}
        self.stopped = ""
        self.drew = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import Dynamo at the first op, to keep it out of this class; see :func:`watch`."""
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What the block has compiled by ``torch.compile`` stays compiled, as it would without the watch."""
        return True

    @property
    def traced(self) -> bool:
        """Whether Dynamo may have stumbled over this object: the block has brought it in."""
        return type(self) is Watch and "torch._dynamo" in sys.modules

    # The base class notes in module globals that a mode is on; another thread's torch.compile goes by them.
    def __enter__(self) -> Watch:
        if self._quick:
            # It holds from when it is made until it is left.
            self._above.enter_context(torch._C._AutoDispatchBelowAutograd())
        _push_mode(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _pop_mode()
        self._above.close()

    def save(self, tensor: torch.Tensor) -> None:
        """Keep what a tensor's memory holds, unless it is kept already."""
        memory = memory_of(tensor)
        if memory is not None and memory not in self.saved:
            storage = tensor.untyped_storage()
            self.saved[memory] = Saved(tensor, storage, storage.clone())  # type: ignore[no-untyped-call]

    def put_back(self) -> None:
        """Undo all writes, and give generators back their states."""
        for saved in self.saved.values():
            saved.put_back()
        for tensor, storage, shape in self._shapes.values():
            if _shape_of(tensor) != shape:
                tensor.set_(storage, *shape)
        for generator, state in self._generators.values():
            generator.set_state(state)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op, after looking at what it will do."""
        makes = self._inert.get(func)
        if makes is None:
            return self._looked_at(func, args, kwargs or {})
        # Nearly all ops come this way, hundreds in a forward.
        result = func(*args, **kwargs) if kwargs else func(*args)
        if makes:
            self._note_made(result)
        return result

    def _looked_at(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = self._ops.get(func)
        if op is None:
            op = self._ops[func] = _facts(func, self._effects, taken_apart=self._quick)
            if not (op.parts or op.acts or op.writes) and op.draws is None:
                self._inert[func] = op.makes
        if op.parts:
            _push_mode(self)
            try:
                return func.decompose(*args, **kwargs)
            finally:
                _pop_mode()
        if op.acts:
            self._stop(f"op {func} writes what no schema shows and nobody can put back")
        if op.draws is not None:
            self._note_draw(op, func, args, kwargs)
        if op.writes and not (op.silent and not (args[5] if len(args) > 5 else kwargs.get("training"))):
            for position, name in op.writes:
                value = args[position] if position < len(args) else kwargs.get(name)
                for item in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(item, torch.Tensor):
                        self._before_write(item, func, op.shapes)
        result = func(*args, **kwargs)
        if op.makes:
            self._note_made(result)
        return result

    def _note_made(self, result: Any) -> None:
        if type(result) is torch.Tensor and result.layout is torch.strided:
            self._made.add(torch._C._storage_address(result))  # type: ignore[attr-defined]
            return
        for item in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(item, torch.Tensor) and (memory := memory_of(item)) is not None:
                self._made.add(memory)

    def _before_write(self, tensor: torch.Tensor, func: Any, shapes: bool) -> None:
        memory = memory_of(tensor)
        if memory in self._made:
            return
        if shapes and func._schema.name == "aten::set_":
            self._stop(f"op {func} gives a tensor that outlives the call other memory")
        if shapes and memory is not None:
            kept = (tensor, tensor.untyped_storage(), _shape_of(tensor))
            self._shapes.setdefault(id(tensor), kept)
        if self._only is not None and memory not in self._only:
            self._stop(f"it writes a tensor of shape {tuple(tensor.shape)} that outlives the call")
        self.save(tensor)

    def _note_draw(self, op: _Op, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for position, name, default in op.draws or ():
            value = args[position] if position < len(args) else kwargs.get(name, default)
            if type(value) in (bool, int, float) and not value:
                return
        if not self._draw:
            self._stop(f"it draws random numbers ({func})")
        self.drew = True
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and id(generator) not in self._generators:
            self._generators[id(generator)] = (generator, generator.get_state())

    def _stop(self, reason: str) -> None:
        self.stopped = self.stopped or reason
        raise StoppedError(reason)


class _Untraced(Watch):  # type: ignore[no-untyped-call]
    """A watch whose methods Dynamo does not look into."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As above; that it stands in this class lets torch wrap it."""
        return super().__torch_dispatch__(func, types, args, kwargs)


def watch(effects: Mapping[str, bool], *, quick: bool = False, **limits: Any) -> Watch:
    """A :class:`Watch` that Dynamo does not trace, where Dynamo is there; it takes two seconds to import.

    It is not a quick one there, because what Dynamo compiled is compiled anew without autograd.
    """
    compiles = "torch._dynamo" in sys.modules
    kind = _Untraced if compiles else Watch
    return kind(effects, quick=quick and not compiles, **limits)


def _shape_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.size(), tensor.stride()


def memory_of(tensor: torch.Tensor) -> int | None:
    """Identity of a tensor's memory; ``None`` for a tensor that is made of others or has no plain memory."""
    if tensor.layout != torch.strided:
        return None
    try:
        return storage_id(tensor)
    except (RuntimeError, NotImplementedError):
        return None


def _facts(func: Any, effects: Mapping[str, bool], *, taken_apart: bool = False) -> _Op:
    schema = getattr(func, "_schema", None)
    if schema is None:
        # torch.cond and its kin return what is new.
        return _Op((), True, None, False, False)
    if taken_apart and schema.name not in _WHOLE and func._can_decompose():
        return _Op((), False, None, False, False, parts=True)
    silent, draws = schema.name in _SILENT, torch.Tag.nondeterministic_seeded in func.tags
    # To list its arguments takes longer than most ops do.
    arguments = list(enumerate(schema.arguments)) if schema.is_mutable or silent or draws else []
    writes = tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    if silent:
        writes = tuple((i, a.name) for i, a in arguments if a.name in ("running_mean", "running_var"))
    returned = [r.alias_info for r in schema.returns]
    # lift_fresh is what torch.tensor() and torch.from_numpy() call last, on memory that no other op made.
    makes = any(alias is None for alias in returned) or schema.name == "aten::lift_fresh"
    quiet = tuple((i, a.name, a.default_value) for i, a in arguments if a.name in QUIET) if draws else None
    custom = schema.name.partition("::")[0] not in _TORCHS_OWN
    acts = effects.get(schema.name, custom and not returned and not writes)
    shapes = torch.Tag.inplace_view in func.tags and schema.name != "aten::detach_"
    return _Op(writes, makes, quiet, acts, silent, shapes)
