"""Calls of a compiled model as CUDA graphs: recorded, replayed, and left where a graph would not be right.

A graph repeats kernels on the addresses that they had. So inputs are copied to where the recorded ones lie,
and results from there. Ops that stay outside are called again with the tensors that they had, which lie in
memory of the graphs. Weights are read where they are; if one was moved, everything is recorded anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import field
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch

from stitchcache import collection_paused
from stitchcache.errors import BackendError, StitchCacheError
from stitchcache.options import CudaGraphs
from stitchcache.records import dataclass
from stitchcache.runtime.cuda_sizes import GraphRecord, place_of_size, refuse_elsewhere
from stitchcache.torchside import cuda, storage_id
from stitchcache.torchside.ops import OpOverload
from stitchcache.types import Artifact

log = logging.getLogger("stitchcache")

Function = Callable[..., Any]
"""A stitching function: leaves to a flat sequence of results."""

# Namespaces of torch's own ops, which do all that they do on the GPU.
_OWN = ("aten", "prims", "prim")
# Shapes that were called once; beyond, they are forgotten.
_MOST_WARM = 1000


@dataclass(slots=True)
class Recorded:
    """One recorded call."""

    inputs: list[Any]  # where recorded leaves lie; a number for a leaf that is one
    steps: list[Callable[[], None]] = field(default_factory=list)  # in order: graphs, and ops outside
    results: list[Any] = field(default_factory=list)  # tensors of the graphs are borrowed
    returned: dict[int, int] = field(default_factory=dict)  # results that are arguments: place to leaf
    filled: int = 0  # how far inputs are filled along the dimension of sizes; zeros lie behind


class Graphs:
    """The graphs of one compiled model on one set of tensors; :meth:`call` is its stitching function.

    Calls are made one after the other, from whatever threads and streams they come.

    Args:
        wanted: What the user asked for.
        artifact: What is called; it has a contract.
        tensors: The model's, by binding.
        linked: Makes the stitching function, or with each variant's function put through another one.
        timings: Gets the seconds of recording, as ``graphs``.
        recorder: Makes the recorder for a GPU; tests have one for the CPU.
        kind: The type of device that everything lies on.

    Raises:
        OptionError: The contract has no such sizes, or tensors that lie elsewhere than on the GPU.
    """

    def __init__(
        self,
        wanted: CudaGraphs,
        artifact: Artifact,
        tensors: Iterable[torch.Tensor],
        linked: Callable[[Callable[[Function], Function] | None], Function],
        timings: dict[str, float],
        recorder: Callable[[int], cuda.Recorder] = cuda.Recorder,
        *,
        kind: str = "cuda",
    ) -> None:
        refuse_elsewhere(artifact, kind)
        self.wanted, self._label, self._timings, self._kind = wanted, artifact.label, timings, kind
        self._place = place_of_size(artifact, wanted)
        # Positions of leaves that a call writes into.
        self._inout = [index for index, leaf in enumerate(artifact.taken.values()) if leaf.kind == "inout"]
        self._plain, self._tensors = linked(None), list(tensors)
        self._inner = linked(partial(with_ops, put=self._outside))
        self._state = {storage_id(tensor) for tensor in self._tensors}
        self._make_recorder = recorder
        self._recorder: cuda.Recorder | None = None
        self._lock = threading.RLock()
        self._records: dict[Any, GraphRecord] = {}
        self._graphs: dict[Any, Recorded] = {}
        # By the shapes of a call: its graph, and the shapes of its results.
        self._known: dict[Any, tuple[Recorded, list[Any]]] = {}
        self._warm: dict[Any, list[Any]] = {}
        self._session: Recorded | None = None
        self._last: tuple[int, Any] | None = None
        self._bytes = 0
        self._in_place: Callable[[], bool] = cuda.in_place(self._tensors)

    @property
    def records(self) -> tuple[GraphRecord, ...]:
        """What was recorded, and what could not be, in order."""
        return tuple(self._records.values())

    @property
    def due(self) -> bool:
        """Whether there are calls that will be recorded when they come again."""
        return bool(self._warm)

    def call(self, *leaves: Any) -> Any:
        """Run the model on leaves that were checked; returns flat results."""
        key = tuple([leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
        known = self._known.get(key)
        if known is None:
            return self._first_calls(key, leaves)
        recorded, shapes = known
        if self._recorder is not None and self._recorder.recorded_by_others():
            return self._plain(*leaves)
        with self._lock:
            if not self._in_place():
                self._forget()
                return self.call(*leaves)
            if self._recorder is not None:
                self._follow_stream(self._recorder)
            self._put_in(recorded, leaves)
            for step in recorded.steps:
                step()
            return self._take_out(recorded, leaves, shapes)

    def examples(self, leaves: Sequence[Any]) -> Iterator[list[Any]]:
        """Leaves of each size that gets a graph, the largest first: the given ones, repeated or cut."""
        if self._place is None:
            yield list(leaves)
            return
        for size in sorted(self.wanted.sizes or (), reverse=True):
            made = list(leaves)
            for index, dims in self._place[2].items():
                for dim in dims:
                    rows = torch.arange(size, device=made[index].device) % max(1, made[index].shape[dim])
                    made[index] = made[index].index_select(dim, rows)
            yield [_laid_out_as(leaf, one) for leaf, one in zip(leaves, made, strict=True)]

    def _first_calls(self, key: Any, leaves: Sequence[Any]) -> Any:
        size = self._recorded_size(leaves)
        larger = tuple(self._enlarged(index, each, size) for index, each in enumerate(key))
        full = len(self._records) >= self.wanted.max_graphs or self._too_large()
        new = larger not in self._records and not full
        if size is None or not (new or larger in self._graphs):
            return self._plain(*leaves)
        shapes = self._warm.get(key)
        if shapes is None:
            # Kernels are loaded, and libraries make what they need, in calls that are not recorded.
            results = self._plain(*leaves)
            if len(self._warm) >= _MOST_WARM:
                self._warm.clear()
            self._warm[key] = [r.shape if isinstance(r, torch.Tensor) else None for r in results]
            return results
        with self._lock:
            if key in self._known:
                return self.call(*leaves)
            if self._recorder is None:
                tensor = next(one for one in (*leaves, *self._tensors) if isinstance(one, torch.Tensor))
                self._recorder = self._make_recorder(tensor.device.index or 0)
            if self._recorder.recorded_by_others():
                return self._plain(*leaves)
            self._warm.pop(key, None)
            if larger in self._graphs:
                self._known[key] = (self._graphs[larger], shapes)
                return self.call(*leaves)
            # What is made in inference mode cannot be written outside of it.
            with torch.inference_mode(False), torch.no_grad():
                return self._record(self._recorder, key, larger, leaves, shapes)

    def _too_large(self) -> bool:
        return self.wanted.max_bytes is not None and self._bytes > self.wanted.max_bytes

    def _recorded_size(self, leaves: Sequence[Any]) -> int | None:
        """The size that is recorded for a call; ``None`` for one that gets no graph."""
        if self._place is None:
            return 0
        size = int(leaves[self._place[0]].shape[self._place[1]])
        sizes = self.wanted.sizes
        if sizes is None or size in sizes:
            return size
        return min((s for s in sizes if s > size), default=None) if self.wanted.pad else None

    def _record(
        self, recorder: cuda.Recorder, key: Any, larger: Any, leaves: Sequence[Any], shapes: list[Any]
    ) -> Any:
        """Make a call for real, and record it; where that fails, make it without a graph."""
        began, before = time.perf_counter(), recorder.taken()
        self._follow_stream(recorder)
        inputs = [
            _laid_out_as(leaf, leaf.new_zeros(shape)) if isinstance(leaf, torch.Tensor) else leaf
            for shape, leaf in zip(larger, leaves, strict=True)
        ]
        recorded = self._session = Recorded(inputs)
        self._put_in(recorded, leaves)
        try:
            with collection_paused():
                recorder.begin()
                results = self._inner(*inputs)
                self._end()
        except (RuntimeError, StitchCacheError) as error:
            recorder.abandon()
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self._records[larger] = GraphRecord(sizes=_plain_sizes(larger), reason=reason)
            log.warning("%s: %s gets no CUDA graph: %s", self._label, _plain_sizes(larger), reason)
            if recorded.steps:
                # What ran may have written: the call cannot be made again.
                raise
            return self._plain(*leaves)
        finally:
            # Also where an op raises something else.
            recorder.abandon()
            self._session = None
        self._keep(recorded, results, recorder)
        seconds, taken = time.perf_counter() - began, max(0, recorder.taken() - before)
        count = sum(1 for step in recorded.steps if not isinstance(step, partial))
        found = GraphRecord(sizes=_plain_sizes(larger), seconds=seconds, bytes=taken, graphs=count)
        said = (self._label, found.sizes, count, seconds, taken)
        log.info("%s: recorded %s as %d CUDA graphs in %.3f s, %d bytes", *said)
        self._timings["graphs"] = self._timings.get("graphs", 0.0) + seconds
        self._bytes += taken
        if self._too_large():
            found = GraphRecord(sizes=found.sizes, seconds=seconds, reason="beyond max_bytes")
        else:
            self._graphs[larger], self._known[key] = recorded, (recorded, shapes)
        self._records[larger] = found
        return self._take_out(recorded, leaves, shapes)

    def _enlarged(self, index: int, each: Any, size: int | None) -> Any:
        """A leaf's shape with the recorded size in place of the call's."""
        if self._place is None or size is None or index not in self._place[2]:
            return each
        return torch.Size(size if dim in self._place[2][index] else n for dim, n in enumerate(each))

    def _end(self) -> None:
        """End a graph, and do at once what it recorded."""
        if self._session is not None and self._recorder is not None:
            replay = self._recorder.end()
            self._session.steps.append(replay)
            replay()

    def _outside(self, op: OpOverload) -> Any:
        """An op as the recorded stitching function calls it: where it stays outside, between two graphs."""
        namespace, name, *_ = str(op).split(".")
        inside = {one.partition(".")[0] for one in self.wanted.inside}
        if namespace in _OWN or self.wanted.mode == "whole" or f"{namespace}::{name}" in inside:
            return op

        def call(*args: Any, **kwargs: Any) -> Any:
            session, recorder = self._session, self._recorder
            if session is None or recorder is None:
                return op(*args, **kwargs)
            self._end()
            value = op(*args, **kwargs)
            given = [recorder.borrow(a) if self._is_own(a) else a for a in args]
            named = {k: recorder.borrow(a) if self._is_own(a) else a for k, a in kwargs.items()}
            session.steps.append(partial(_again, op, given, named, value))
            recorder.begin()
            return value

        return call

    def _is_own(self, value: Any) -> bool:
        """Whether a value is a tensor that may lie in memory of a graph."""
        on = isinstance(value, torch.Tensor) and value.device.type == self._kind
        return on and storage_id(value) not in self._state

    def _follow_stream(self, recorder: cuda.Recorder) -> None:
        """Let the current stream wait for the call before, where that was on another one."""
        stream = recorder.stream()
        if self._last is None or self._last[0] != stream:
            current = recorder.current()
            if self._last is not None:
                current.wait_stream(self._last[1])
            self._last = (stream, current)

    def _put_in(self, recorded: Recorded, leaves: Sequence[Any]) -> None:
        if self._place is None or not self.wanted.pad:
            for into, leaf in zip(recorded.inputs, leaves, strict=True):
                if isinstance(leaf, torch.Tensor):
                    into.copy_(leaf)
            return
        argument, dim, sized = self._place
        size = leaves[argument].shape[dim]
        for index, (into, leaf) in enumerate(zip(recorded.inputs, leaves, strict=True)):
            if isinstance(leaf, torch.Tensor):
                for along in sized.get(index, ()):
                    if recorded.filled > size:
                        into.narrow(along, size, recorded.filled - size).zero_()
                    into = into.narrow(along, 0, size)
                into.copy_(leaf)
        # A call may write behind what was given, into arguments that it writes.
        recorded.filled = recorded.inputs[argument].shape[dim] if self._inout else size

    def _take_out(self, recorded: Recorded, leaves: Sequence[Any], shapes: Sequence[Any]) -> list[Any]:
        for index in self._inout:
            leaves[index].copy_(_cut(recorded.inputs[index], leaves[index].shape))
        copied, out = self.wanted.outputs == "copied", []
        for place, (value, shape) in enumerate(zip(recorded.results, shapes, strict=True)):
            if place in recorded.returned:
                out.append(leaves[recorded.returned[place]])
            elif not isinstance(value, torch.Tensor):
                out.append(value)
            else:
                part = _cut(value, shape)
                own = storage_id(value) not in self._state
                out.append(part.clone() if copied and own else part.detach())
        return out

    def _keep(self, recorded: Recorded, results: Iterable[Any], recorder: cuda.Recorder) -> None:
        """Keep results of the recorded call."""
        inputs = [(i, leaf) for i, leaf in enumerate(recorded.inputs) if isinstance(leaf, torch.Tensor)]
        leaves = {id(leaf): index for index, leaf in inputs}
        statics = {storage_id(leaf) for _, leaf in inputs}
        for place, value in enumerate(results):
            if id(value) in leaves:
                recorded.returned[place] = leaves[id(value)]
            own = self._is_own(value) and storage_id(value) not in statics
            borrowed = own and self.wanted.outputs == "copied"
            recorded.results.append(recorder.borrow(value) if borrowed else value)

    def _forget(self) -> None:
        """Record everything anew: a tensor of the model lies elsewhere."""
        log.info("%s: a tensor of the model was moved; its CUDA graphs are recorded anew", self._label)
        self._known, self._graphs, self._warm, self._records, self._bytes = {}, {}, {}, {}, 0
        self._in_place = cuda.in_place(self._tensors)


def with_ops(function: Function, put: Callable[[OpOverload], Any]) -> Function:
    """A stitching function that calls other functions for its ops."""
    if not isinstance(function, FunctionType):
        return function
    cells = function.__closure__ or ()
    made = [CellType(put(c.cell_contents)) if isinstance(c.cell_contents, OpOverload) else c for c in cells]
    return FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(made)
    )


def _again(op: OpOverload, args: Sequence[Any], kwargs: Any, before: Any) -> None:
    """Call an op that stays outside, and put what it returns where the next graph reads it."""
    now = op(*args, **kwargs)
    pairs = zip(before, now, strict=True) if isinstance(before, (tuple, list)) else [(before, now)]
    for kept, new in pairs:
        if isinstance(kept, torch.Tensor) and kept.shape == new.shape:
            if new.data_ptr() != kept.data_ptr() or new.stride() != kept.stride():
                kept.copy_(new)
        elif isinstance(kept, torch.Tensor) or kept != new:
            raise BackendError(
                f"{op} stands between CUDA graphs, and returns another size or number than when the call was "
                "recorded. Compile without cuda_graphs.",
                backend="cuda graphs",
            )


def _cut(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if tensor.shape == shape:
        return tensor
    for dim, size in enumerate(shape):
        tensor = tensor.narrow(dim, 0, size)
    return tensor


def _laid_out_as(leaf: Any, made: Any) -> Any:
    """Memory for a leaf, in the order of its strides; the contract says that they are what pieces rely on."""
    if not isinstance(leaf, torch.Tensor) or leaf.dim() < 2 or leaf.is_contiguous():
        return made
    strides = leaf.stride()
    order = sorted(range(leaf.dim()), key=lambda dim: (-strides[dim], dim))
    back = [order.index(dim) for dim in range(leaf.dim())]
    return made.permute(order).contiguous().permute(back)


def _plain_sizes(key: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(each) if isinstance(each, torch.Size) else each for each in key)
