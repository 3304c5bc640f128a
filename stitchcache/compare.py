"""Run a model and what was compiled from it from the same state, and measure how far they are apart.

A model's forward is the user's code and may raise anything; that it does is a finding, not a failure of ours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from stitchcache.errors import InputMismatchError
from stitchcache.records import dataclass
from stitchcache.state import Held, generators, plain_tensors, state_of, tensor_at
from stitchcache.torchside import has_fakes, tree
from stitchcache.torchside.watch import memory_of, watch
from stitchcache.types import Check, CheckRecord, OutputBound

# What rounding alone may do to a whole model, relative to the largest value of a tensor: the order of sums
# changes with fusion, with the number of threads and with weights.
_FLOOR = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
# A difference of two numbers of these kinds is right enough in 32 bits.
_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
_COARSE = 1e-1
# The most that a hit may be off by what the cold compile measured, unless that was over half of it itself.
HIGH = 0.25
# Other weights under the same graph round differently: that often what the cold compile measured.
_SLACK = 10.0
# Below this a tensor counts as noise around zero, whose own size says nothing.
_SMALL = 1e-2
# What rounding may do to one piece: four times the floor, but no more than this.
_PIECE = 6e-2

_IMPORTED_BY = os.getpid()
_LEFT = (
    "the model itself returns a tensor without data. Its forward keeps a tensor outside of the model, in a "
    "global or a closure, and kept one of a trace; keep it on the model, and start the process again"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One result on both sides, or one tensor that was written, such as ``buffer:cache``."""

    name: str
    fact: str = ""  # what is wrong beside values
    difference: float = 0.0  # largest absolute one; of whole numbers and truth values the share that differs
    magnitude: float = 0.0  # largest finite absolute value of the model's own; 1 for whole numbers
    spread: float = 0.0  # root of the mean square of large differences, relative to that of the model's own
    dtype: torch.dtype | None = None  # of floating-point and complex tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """What came of running both sides."""

    items: tuple[Compared, ...] = ()  # every result and every tensor that either side wrote
    unchecked: str = ""  # why nothing was compared
    fails: str = ""  # what is wrong with the call as a whole, such as an error on one side
    drew: bool = False  # the model drew random numbers
    moved: bool = False  # the model gave its modules something else to hold, such as a number counted up


@dataclass(frozen=True, slots=True)
class _Results:
    """What the model gave. Of a written tensor: its name, what the model made of it, and itself."""

    returned: list[tuple[str, Any]]
    shape: Any
    written: list[tuple[str, torch.Tensor, torch.Tensor]]


class Beside:
    """A model and a call, to be compared with what should do the same, as often as one likes.

    Put back are all tensors that ops write, attributes of the model's modules, and random number generators.
    ``writes`` names tensors that the other may write; of the model's writes each is seen. ``apart``: it runs
    beside the user's own calls, on arguments of its own, so no shared state may be written and no random
    number drawn, not even for a moment. ``reads`` are paths to tensors in plain attributes that the other
    reads; a model that replaces one writes it. ``deep`` puts back what plain objects hold, too. ``quick``
    hides functions that are known to be harmless: what that says counts only where both agree.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        writes: Mapping[str, torch.Tensor] | None = None,
        effects: Mapping[str, bool] | None = None,
        apart: bool = False,
        quick: bool = False,
        reads: Collection[str] = (),
        deep: bool = False,
    ) -> None:
        self._model, self._args, self._kwargs, self._writes = model, args, dict(kwargs), writes or {}
        self._leaves, self._spec = tree.flatten((args, self._kwargs))
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]
        self._inference = any(tensor.is_inference() for tensor in tensors)
        own = [memory for leaf in tensors if (memory := memory_of(leaf)) is not None]
        only = own if apart else None
        self._new_watch = partial(watch, effects or {}, only=only, draw=not apart, quick=quick)
        self._found: _Results | Both | None = None
        self._held, self._state = Held(model, deep=deep), state_of(model)
        there = {path: tensor_at(model, path) for path in reads}
        self._reads = {path: tensor for path, tensor in there.items() if tensor is not None}
        self._generators = [] if apart else list(generators(tensors))

    def run(self, subject: Callable[..., Any], times: int = 1, *, again: bool = False) -> Both:
        """Call the model and then the subject, each so many times in a row; the last results are compared.

        ``again`` calls the subject only, to compare it with what the model gave in the run before.
        """
        both: Both | None = None
        while both is None:
            if not again:
                self._watch = self._new_watch()
            # What was made in inference mode can be written only there. That mode switches gradients: they
            # are switched after it.
            with _threads_of_a_fork(), torch.inference_mode(self._inference), torch.no_grad():
                try:
                    if not again:
                        self._found = self._model_results(times)
                    found = self._found
                    moved = self._put_back()
                    both = self._compared(subject, found, times) if isinstance(found, _Results) else found
                finally:
                    self._put_back()
        return replace(both, moved=moved, drew=self._watch.drew)

    def _put_back(self) -> bool:
        """Make everything what it was, and tell whether modules held something else."""
        self._watch.put_back()
        for put, state in self._generators:
            put(state)
        return self._held.put_back()

    def _model_results(self, times: int) -> _Results | Both | None:
        """Run the model. ``None`` if it has to be run again, under a watch that Dynamo does not trace."""
        watched, call = self._watch, 0
        try:
            for tensor in self._writes.values():
                watched.save(tensor)
            with watched, watched.known:
                while call < times:
                    args, kwargs = tree.unflatten(self._leaves, self._spec)
                    value, call = self._model(*args, **kwargs), call + 1
        except (torch.OutOfMemoryError, MemoryError):
            return Both(unchecked="there is no memory for running the model itself")
        except Exception as error:  # noqa: BLE001 - see the module's docstring
            if not watched.stopped:
                # A cache may be full after the first call.
                said = f"the model itself raises {_said(error)}"
                return None if watched.traced else Both(unchecked=said) if call else Both(fails=said)
        # The forward may have swallowed the error that stopped it.
        return Both(unchecked=watched.stopped) if watched.stopped else self._kept(value)

    def _compared(self, subject: Callable[..., Any], wanted: _Results, times: int) -> Both:
        """Run the subject, and compare."""
        try:
            for _ in range(times):
                args, kwargs = tree.unflatten(self._leaves, self._spec)
                got, shape = tree.flatten(subject(*args, **kwargs))
        except InputMismatchError as error:
            return Both(unchecked=f"the example does not fit what was compiled: {error.message}")
        except (torch.OutOfMemoryError, MemoryError):
            return Both(unchecked="there is no memory for the compiled model beside the model itself")
        except Exception as error:  # noqa: BLE001 - see the module's docstring
            return Both(fails=f"the model returns, and the compiled one raises {_said(error)}")
        if not tree.alike(shape, wanted.shape):
            return Both(fails=f"the result is {_tree_text(shape)} instead of {_tree_text(wanted.shape)}")
        items = [measure(name, a, b) for (name, a), b in zip(wanted.returned, got, strict=True)]
        items += [measure(name, a, b) for name, a, b in wanted.written]
        return Both(items=tuple(items))

    def _kept(self, value: Any) -> _Results | Both:
        """Keep what the model returned and wrote, before it is put back."""
        saved = self._watch.saved
        after = {memory: one.now() for memory, one in saved.items()}

        def kept(leaf: Any) -> Any:
            lasting = not isinstance(leaf, torch.Tensor) or memory_of(leaf) not in saved
            return leaf if lasting else leaf.clone()

        flat, shape = tree.flatten(value)
        if has_fakes(flat) and not has_fakes(self._leaves):
            return Both(fails=_LEFT)
        returned = [(name, kept(leaf)) for name, leaf in zip(tree.result_paths(value), flat, strict=True)]
        # self.cache = torch.cat(...) makes another tensor; compiled code writes into the one it knows.
        state = state_of(self._model)
        places = [(f"{_kind(was)}:{name}", was, state.get(name)) for name, was in self._state.items()]
        reads = self._reads.items()
        places += [(f"attribute:{path}", was, tensor_at(self._model, path)) for path, was in reads]
        written = [(name, kept(now), was) for name, was, now in places if now is not None and now is not was]
        owners = self._owners() if saved else {}
        # Such memory shrinks again, and nobody knows the tensors over it.
        if any(one.storage.nbytes() != one.before.nbytes() for m, one in saved.items() if m not in owners):
            return Both(unchecked="the model resizes memory that is no argument and no buffer")
        rebound = {name for name, _, _ in written}
        for memory, one in saved.items():
            for name, tensor in (owners.get(memory) or dict([_whole(one.tensor, one.storage)])).items():
                if name not in rebound:
                    copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                    copy.set_(after[memory], tensor.storage_offset(), tensor.size(), tensor.stride())
                    written.append((name, copy, tensor))
        return _Results(returned, shape, written)

    def _owners(self) -> dict[int | None, dict[str, torch.Tensor]]:
        """Tensors by what one calls them, for each memory that was or may be written."""
        paths = tree.leaf_paths(self._model.forward, self._args, self._kwargs)
        named = [(f"input:{path}", leaf) for path, leaf in zip(paths, self._leaves, strict=True)]
        named += [(f"{_kind(tensor)}:{name}", tensor) for name, tensor in self._state.items()]
        owners: dict[int | None, dict[str, torch.Tensor]] = {}
        for name, tensor in [*named, *self._writes.items()]:
            if isinstance(tensor, torch.Tensor):
                owners.setdefault(memory_of(tensor), {})[name] = tensor
        unknown = self._watch.saved.keys() - owners.keys()
        for path, tensor in plain_tensors(self._model).items() if unknown else ():
            if memory_of(tensor) in unknown:
                owners.setdefault(memory_of(tensor), {})[f"attribute:{path}"] = tensor
        return owners


def _kind(tensor: torch.Tensor) -> str:
    return "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"


def _whole(tensor: torch.Tensor, storage: torch.UntypedStorage) -> tuple[str, torch.Tensor]:
    """All of the memory that a tensor of unknown owner is a part of, and what to call it."""
    values = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    values.set_(storage, 0, (storage.nbytes() // tensor.itemsize,), (1,))
    return f"a tensor of {values.numel()} values that is no argument and no buffer", values


@contextmanager
def _threads_of_a_fork() -> Iterator[None]:
    """One thread in a forked process: OpenMP's threads stay in the parent, and a loop would wait for them."""
    before = torch.get_num_threads()
    if os.getpid() == _IMPORTED_BY or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def unchanged(model: torch.nn.Module, *, registered: bool = True) -> Iterator[None]:
    """Let a model run, and put back what its tensors contain (``registered`` ones too) and what it holds."""
    memory, held = watch({}), Held(model, deep=True)
    for tensor in (*plain_tensors(model).values(), *(state_of(model).values() if registered else ())):
        if not has_fakes([tensor]):
            memory.save(tensor)
    try:
        yield
    finally:
        held.put_back()
        memory.put_back()


def unlike(want: Any, got: Any) -> str:
    """What is wrong with a result beside the values of a tensor; ``""`` where nothing is."""
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        same = type(want) is type(got) and (want is got or want == got or (want != want and got != got))
        # -0.0 is equal to 0.0, and is another number all the same.
        same = same and (not isinstance(want, (float, complex)) or repr(want) == repr(got))
        return "" if same else f"is {_shown(got)} instead of {_shown(want)}"
    for fact in ("dtype", "shape", "device", "layout"):
        wanted, found = getattr(want, fact), getattr(got, fact)
        if wanted != found:
            # A shape is shown as the tuple that it is.
            wanted, found = (tuple(one) if fact == "shape" else one for one in (wanted, found))
            return f"has {fact} {found} instead of {wanted}"
    return ""


def measure(name: str, want: Any, got: Any) -> Compared:
    """How far a result is from the model's own, which is the one that is wanted."""
    fact = unlike(want, got)
    if fact or not isinstance(want, torch.Tensor):
        return Compared(name=name, fact=fact)
    if want.layout != torch.strided:
        want, got = want.to_dense(), got.to_dense()
    if want.numel() == 0:
        return Compared(name=name)
    if not (want.is_floating_point() or want.is_complex()):
        share = float((want != got).double().mean()) if not torch.equal(want, got) else 0.0
        return Compared(name=name, difference=share, magnitude=1.0, spread=share)
    # A GPU takes three milliseconds to load each kind of kernel when it is first used: most results need few.
    kind, wide = want.dtype, torch.complex128 if want.is_complex() else torch.float64
    a, b = (side.to(torch.float32 if kind in _NARROW else wide) for side in (want, got))
    known, apart = a, a - b
    largest = _largest(apart)
    # A difference is finite only where both sides are, and not too far apart.
    if not math.isfinite(largest):
        a, b = want.to(wide), got.to(wide)
        finite = a.isfinite()
        odd = ~finite | ~b.isfinite()
        known = torch.where(finite, a, torch.zeros_like(a))
        # Compared as they are: what is infinite or no number on one side must be the same on the other.
        wrong = odd & (a != b) & ~(a.isnan() & b.isnan())
        if bool(wrong.any()):
            fact = f"has {int(wrong.sum())} values that are infinite or NaN, and others on the other side"
            return Compared(name=name, fact=fact, magnitude=_largest(known), dtype=kind)
        apart = torch.where(odd, torch.zeros_like(a), a - b)
        largest = _largest(apart)
    found = Compared(name=name, difference=largest, magnitude=_largest(known), dtype=kind)
    if not disagreement(found):
        return found
    # Products are loaded, powers and roots take 60 ms.
    scale, spread = (math.sqrt(float((s * s).mean())) for s in (known.abs().double(), apart.abs().double()))
    return replace(found, spread=spread / scale if scale else spread)


def _largest(values: torch.Tensor) -> float:
    """The largest absolute value; NaN where there is one."""
    least, most = torch.aminmax(values.abs() if values.is_complex() else values)
    return max(abs(float(least)), abs(float(most)))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]


def _tree_text(spec: Any) -> str:
    return f"{spec.type.__name__ if spec.type is not None else 'one value'} of {spec.num_leaves} leaves"


def judged(both: Both, record: CheckRecord | None = None) -> Check:
    """What a comparison comes to, beside what the cold compile measured."""
    if both.unchecked or both.fails:
        return Check(state="unchecked" if both.unchecked else "mismatch", reason=both.unchecked or both.fails)
    compared = record is not None and record.state == "compared"
    bounds = {bound.name: bound for bound in record.bounds} if record is not None and compared else {}
    for item in both.items:
        # A result that the cold compile could not compare has no defined values, such as torch.empty's.
        undefined = compared and item.name.startswith("output") and item.name not in bounds
        wrong = item.fact if undefined else disagreement(item, bounds.get(item.name))
        if wrong:
            said = f"{item.name} {wrong}"
            if both.drew and not compared and not item.fact:
                return Check(state="unchecked", reason=f"the model draws random numbers, and {said}")
            return Check(state="mismatch", reason=said, output=item.name, difference=item.difference)
    return Check(state="agreed")


def allowed(item: Compared, bound: OutputBound | None = None, *, piece: bool = False) -> float:
    """The largest difference that rounding may make; see :func:`disagreement`."""
    small = _smallest(item, bound)
    measured = bound.difference / max(bound.magnitude, small) if bound is not None else 0.0
    if item.dtype is None:
        return min(0.5, 4 * measured)
    floor = _FLOOR.get(item.dtype, _COARSE)
    if piece:
        # More of what a piece gives may be noise than of a whole model's results.
        return max(floor, min(4 * floor, _PIECE)) * max(item.magnitude, 1.0)
    return max(floor, min(_SLACK * measured, max(HIGH, 2 * measured))) * max(item.magnitude, small)


def _smallest(item: Compared, bound: OutputBound | None) -> float:
    """The size below which a tensor counts as noise; that of the cold compile, if it saw no noise there."""
    if bound is None or item.dtype is None or not bound.magnitude:
        return _SMALL
    exact = bound.difference <= _FLOOR.get(item.dtype, _COARSE) * bound.magnitude
    return min(_SMALL, bound.magnitude) if exact else _SMALL


def disagreement(item: Compared, bound: OutputBound | None = None, *, piece: bool = False) -> str:
    """What is wrong with a result, beyond rounding and what the cold compile measured; ``""``: nothing."""
    most = allowed(item, bound, piece=piece)
    if item.fact or item.difference <= most:
        return item.fact
    if item.dtype is None:
        return f"differs in {item.difference:.2%} of its values"
    return f"differs by {item.difference:.3g} (largest value {item.magnitude:.3g}, allowed {most:.2g})"
