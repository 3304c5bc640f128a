"""CUDA graphs: recording work into graphs that share one pool of memory, and replaying it.

Uses ``CUDAGraph.capture_begin``, ``torch._C._cuda_getCurrentRawStream``, ``_cuda_clearCublasWorkspaces``,
``_cuda_endAllocateToPool``, ``_construct_storage_from_data_pointer`` and
``_tensors_data_ptrs_at_indices_equal``.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

SEEN = ("2.11", "2.13")


class Recorder:
    """Records what runs on a GPU between :meth:`begin` and :meth:`end`.

    Recorded work is not run. Memory that it takes stays with the graphs, whose pool is one: work of two
    graphs must not run at the same time.
    """

    # Of the process, as torch's generators and its allocator know one recording at a time.
    _one = threading.Lock()

    def __init__(self, index: int) -> None:
        self.index = index
        self._stream = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._around = torch.cuda.stream(self._stream)
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        """Record from here on what this thread gives to the GPU."""
        self._one.acquire()
        # A workspace belongs to a stream. Its memory comes from the pool now, and goes back at the end: kept
        # there it would be shared with whoever uses that stream next.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.device(self.index):
            # Made now where this thread has none: it cannot be while recording.
            torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
        if not self._alive:
            # A pool goes with the last of its graphs.
            self._pool = torch.cuda.graph_pool_handle()
        self._graph = torch.cuda.CUDAGraph()
        self._around.__enter__()  # type: ignore[no-untyped-call]
        # Other threads may go on using the GPU meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        """What replays all since :meth:`begin`, on the stream that is current then."""
        graph, self._graph = self._graph, None
        if graph is None:
            raise RuntimeError("nothing is being recorded")
        try:
            with warnings.catch_warnings():
                # Between two ops there may be nothing for the GPU to do.
                warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
                graph.capture_end()
        finally:
            self._around.__exit__(None, None, None)
            torch._C._cuda_clearCublasWorkspaces()
            self._one.release()
        self._alive.add(graph)
        return graph.replay

    def abandon(self) -> None:
        """Stop recording after an error, and heal what torch leaves of it."""
        if self._graph is None:
            return
        try:
            self.end()
        except RuntimeError:
            # Its allocator and its random number generator go on as if the recording did. The first is told
            # to stop; the second stops with the next recording that ends well.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.index, self._pool)
            self._stream = torch.cuda.Stream(self.index)  # type: ignore[no-untyped-call]
            self._around = torch.cuda.stream(self._stream)
            self._pool = torch.cuda.graph_pool_handle()
            with suppress(RuntimeError):
                self.begin()
                torch.empty(1, device=f"cuda:{self.index}").zero_()
                self.end()

    def taken(self) -> int:
        """Bytes of GPU memory that torch holds."""
        return torch.cuda.memory_reserved(self.index)

    def stream(self) -> int:
        """The current stream, as a number."""
        return int(torch._C._cuda_getCurrentRawStream(self.index))

    def current(self) -> torch.cuda.Stream:
        """The current stream."""
        return torch.cuda.current_stream(self.index)

    def recorded_by_others(self) -> bool:
        """Whether the caller records the current stream."""
        return torch.cuda.is_current_stream_capturing()

    def borrow(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor over the same memory that does not keep it from being used again by later recordings."""
        whole = tensor.untyped_storage()
        make = torch._C._construct_storage_from_data_pointer
        memory = make(whole.data_ptr(), tensor.device, whole.nbytes())
        borrowed = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return borrowed.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())


def in_place(tensors: Sequence[torch.Tensor]) -> Callable[[], bool]:
    """A function that tells whether all these tensors still lie where they do now."""
    known, places = list(tensors), [tensor.data_ptr() for tensor in tensors]
    equal = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if equal is None:
        # torch without CUDA.
        return lambda: [tensor.data_ptr() for tensor in known] == places
    indices = list(range(len(known)))
    return lambda: bool(equal(known, places, indices))
