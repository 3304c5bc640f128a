"""See each op of a block before it runs, and keep the memory that it is about to write.

Uses ``torch.utils._python_dispatch.TorchDispatchMode`` with ``_should_skip_dynamo``, the stack of such modes
in ``torch._C``, ``OpOverload._schema`` and ``torch._dynamo.utils.counters``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import _C
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stitchcache.records import dataclass
from stitchcache.torchside import QUIET, storage_id

SEEN = ("2.11", "2.13", "2.15")

# Namespaces of ops whose schemas torch answers for.
_TORCHS_OWN = frozenset({"aten", "prim", "prims", "quantized", "inductor", "mkldnn", "mkl", "higher_order"})
# Ops that update running statistics although their schemas deny it, where they are told that they train.
_SILENT = frozenset({"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"})
# Functions made in C that neither write nor draw, with what they return: new memory, a view, or either.
_NEW, _VIEW, _EITHER = range(3)
_FUNCTIONS = {
    _NEW: """linear matmul bmm conv1d conv2d layer_norm rms_norm softmax gelu relu sigmoid tanh add sub mul
    div neg pow exp rsqrt sin cos clamp sum mean cumsum cat stack where gather masked_fill clone arange zeros
    ones full empty zeros_like ones_like empty_like new_ones new_zeros all any item __bool__ __and__ __or__
    __invert__ __eq__ eq ne lt le gt ge embedding scaled_dot_product_attention""",
    _VIEW: "view view_as transpose permute expand expand_as unsqueeze squeeze chunk unbind narrow select",
    _EITHER: "reshape flatten contiguous to type_as float half bfloat16 bool int long __getitem__",
}
_HARMLESS = {name: returns for returns, names in _FUNCTIONS.items() for name in names.split()}
# Where it is given, the first writes, and the second draws.
_UNLESS = {"embedding": (3, "max_norm"), "scaled_dot_product_attention": (4, "dropout_p")}
_OF_C = frozenset({BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType})
_PLAIN = ((), (torch.Tensor,))


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

    ``shapes`` ops change sizes or strides of what they write, such as ``t_``.
    """

    writes: tuple[tuple[int, str], ...]
    makes: bool
    draws: tuple[tuple[int, str, Any], ...] | None
    acts: bool
    silent: bool
    shapes: bool = False


class Watch(TorchDispatchMode):
    """A block in which every write to memory from outside the block is noticed before it happens.

    Memory that an op of the block made is the block's own. What code outside of torch's dispatcher writes is
    not seen: a kernel of a custom op that writes more than its schema says, NumPy on shared memory.

    Args:
        effects: Qualified names of ops, with whether they write what no schema shows.
        only: Memory that may be written, by :func:`memory_of`; ``None`` allows all.
        draw: Whether ops may draw random numbers.

    Attributes:
        saved: Memory from outside, by :func:`memory_of`.
        stopped: Why the block was stopped; also where its code has swallowed the error.
        drew: Whether any op drew random numbers.
        known: A block in this one from which harmless functions are hidden, if that is wanted.
    """

    # Without it torch refuses to run torch.cond and its kin in a mode.
    supports_higher_order_operators = True

    def __init__(
        self, effects: Mapping[str, bool], *, only: Iterable[int] | None = None, draw: bool = True
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._effects, self._draw = effects, draw
        self._only = None if only is None else frozenset(only)
        self._ops: dict[Any, _Op] = {}
        self._made: set[int] = set()
        self._generators: dict[int, tuple[torch.Generator, torch.Tensor]] = {}
        self._shapes: dict[int, tuple[torch.Tensor, torch.UntypedStorage, tuple[Any, ...]]] = {}
        self.saved: dict[int, Saved] = {}
        self.stopped = ""
        self.drew = False
        self.known: AbstractContextManager[Any] = nullcontext()

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
        _C._push_on_torch_dispatch_stack(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _C._pop_torch_dispatch_stack(None)

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
        op = self._ops.get(func)
        if op is None:
            op = self._ops[func] = _facts(func, self._effects)
        given = kwargs or {}
        if op.acts or op.writes or op.draws is not None:
            self._look_at(op, func, args, given)
        result = func(*args, **given)
        if op.makes:
            self.note_made(result)
        return result

    def _look_at(self, op: _Op, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op.acts:
            self.stop(f"op {func} writes what no schema shows and nobody can put back")
        if op.draws is not None:
            self._note_draw(op, func, args, kwargs)
        if op.writes and not (op.silent and not (args[5] if len(args) > 5 else kwargs.get("training"))):
            for position, name in op.writes:
                value = args[position] if position < len(args) else kwargs.get(name)
                for item in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(item, torch.Tensor):
                        self._before_write(item, func, op.shapes)

    def note_made(self, result: Any) -> None:
        """Note what an op returned as the block's own."""
        for item in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(item, torch.Tensor) and (memory := memory_of(item)) is not None:
                self._made.add(memory)

    def _before_write(self, tensor: torch.Tensor, func: Any, shapes: bool) -> None:
        memory = memory_of(tensor)
        if memory in self._made:
            return
        if shapes and func._schema.name == "aten::set_":
            self.stop(f"op {func} gives a tensor that outlives the call other memory")
        if shapes and memory is not None:
            kept = (tensor, tensor.untyped_storage(), _shape_of(tensor))
            self._shapes.setdefault(id(tensor), kept)
        if self._only is not None and memory not in self._only:
            self.stop(f"it writes a tensor of shape {tuple(tensor.shape)} that outlives the call")
        self.save(tensor)

    def _note_draw(self, op: _Op, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for position, name, default in op.draws or ():
            value = args[position] if position < len(args) else kwargs.get(name, default)
            if type(value) in (bool, int, float) and not value:
                return
        if not self._draw:
            self.stop(f"it draws random numbers ({func})")
        self.drew = True
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and id(generator) not in self._generators:
            self._generators[id(generator)] = (generator, generator.get_state())

    def stop(self, reason: str) -> None:
        """End the block by an error, also where its code swallows that."""
        self.stopped = self.stopped or reason
        raise StoppedError(reason)


class _Known(TorchFunctionMode):
    """Hides from a watch what functions of torch's own do that neither write nor draw.

    To see them takes ten times as long. What comes another way, such as from C++, the watch sees.
    """

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self._returns: dict[Any, int | None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, unseen if it is known to be harmless."""
        returns = self._returns.get(func, -1)
        if returns == -1:
            returns = self._returns[func] = self._looked_up(func)
        known = returns is not None and args and types in _PLAIN and not (kwargs and "out" in kwargs)
        # What autograd saves may go through the block's own hooks.
        known = known and not torch.is_grad_enabled()
        if known and func.__name__ in _UNLESS:
            at, name = _UNLESS[func.__name__]
            given = args[at] if at < len(args) else (kwargs or {}).get(name)
            # A norm of zero makes rows zero; a dropout of zero draws nothing.
            known = given is None or (name == "dropout_p" and type(given) in (int, float) and not given)
        # The block may have put a mode of its own above, or be inside of an op that the watch has seen.
        depth = _C._len_torch_dispatch_stack() if known else 0
        if not depth or _C._get_dispatch_stack_at(depth - 1) is not self._watch:
            return func(*args, **kwargs) if kwargs else func(*args)
        _C._pop_torch_dispatch_stack(None)
        try:
            result = func(*args, **kwargs) if kwargs else func(*args)
        finally:
            _C._push_on_torch_dispatch_stack(self._watch)
        if returns == _NEW or (returns == _EITHER and memory_of(result) != memory_of(args[0])):
            self._watch.note_made(result)
        return result

    def _looked_up(self, func: Any) -> int | None:
        """What a function returns; ``None`` for one that the watch has to see."""
        if type(func) in _OF_C:
            return _HARMLESS.get(func.__name__)
        name = func.__name__ if getattr(func, "__globals__", None) is vars(torch.nn.functional) else ""
        if name == "multi_head_attention_forward":
            # Attention has asked whether there is such a mode, and goes another way where there is.
            self._watch.stop("attention goes another way where functions are seen")
        # These do nothing but call their namesakes, unless somebody put others there.
        plain = name in ("layer_norm", "rms_norm", "embedding") and type(vars(torch)[name]) in _OF_C
        return _NEW if plain else None


class _Untraced(Watch):  # type: ignore[no-untyped-call]
    """A watch whose methods Dynamo does not look into."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(self, *call: Any) -> Any:
        """As above; that it stands in this class lets torch wrap it."""
        return super().__torch_dispatch__(*call)


def watch(effects: Mapping[str, bool], *, quick: bool = False, **limits: Any) -> Watch:
    """A :class:`Watch` that Dynamo does not trace, where Dynamo is there; it takes two seconds to import.

    It is not a quick one where Dynamo has compiled something, which is compiled anew under another mode, nor
    under a mode that is on. Whoever asks for a quick one knows that kernels are torch's own.
    """
    compiler: Any = sys.modules.get("torch._dynamo.utils")
    made = (Watch if compiler is None else _Untraced)(effects, **limits)
    if quick and not _C._len_torch_function_stack() and not (compiler and compiler.counters.get("frames")):
        made.known = _Known(made)
    return made


def _shape_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.size(), tensor.stride()


def memory_of(tensor: torch.Tensor) -> int | None:
    """Identity of a tensor's memory; ``None`` for a tensor that is made of others or has no plain memory."""
    try:
        return storage_id(tensor) if tensor.layout is torch.strided else None
    except RuntimeError:
        return None


def _facts(func: Any, effects: Mapping[str, bool]) -> _Op:
    schema = getattr(func, "_schema", None)
    if schema is None:
        # torch.cond and its kin return what is new.
        return _Op((), True, None, False, False)
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
