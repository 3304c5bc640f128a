"""What ``torch.compile`` hands to its backends, beyond the graph and the example inputs.

Private API of torch (``torch._guards``, ``torch._dynamo``); tried with 2.11 and 2.13.
Only ever imported where Dynamo is at work already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor

try:
    from torch._dynamo.aot_compile_types import SerializableCallable
except ImportError:  # torch without aot_compile

    class SerializableCallable:  # type: ignore[no-redef]
        """Stands in where torch cannot save compiled functions."""


__all__ = ["SerializableCallable", "fake_inputs", "fix_own_floats", "outside_tracing"]


def fix_own_floats(gm: torch.fx.GraphModule) -> None:
    """Have Dynamo take a model's own numbers, such as the epsilon of a norm, for the constants that they are.

    With ``dynamic=True`` it passes every float as an argument, and a piece that takes one cannot be compiled.
    Inductor does the same to floats that it cannot turn into tensors. Floats among the caller's arguments are
    left as they are.

    Args:
        gm: As a backend gets it.

    Raises:
        TensorifyScalarRestartAnalysis: Dynamo's sign to trace again; guards hold the values from then on.
    """
    found = False
    for node in gm.graph.nodes:
        memo = getattr(node.meta.get("example_value"), "item_memo", None)
        source = getattr(node.meta.get("grapharg"), "source", None)
        if node.op != "placeholder" or not isinstance(memo, torch.SymFloat) or source is None:
            continue
        kind = source.guard_source() if callable(source.guard_source) else source.guard_source
        name = str(memo.node._expr)
        if "NN_MODULE" in str(kind) and not TensorifyState.should_specialize(name):
            TensorifyState.specialize(name)
            found = True
    if found:
        raise TensorifyScalarRestartAnalysis


def fake_inputs(example_inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Fake tensors for a backend's example inputs, with the symbols that Dynamo gave their sizes.

    Those in the graph's metadata will not do: the forward may have changed their shapes and strides.

    Args:
        example_inputs: As a backend gets them: tensors, ``SymInt`` objects, plain values.

    Returns:
        The fake mode that Dynamo set aside for backends, and one fake an input; anything that is no tensor
        stays as it is.

    Raises:
        RuntimeError: Not called by Dynamo.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if context is None or mode is None:
        raise RuntimeError("there is no tracing context: this backend is for torch.compile to call")
    found: list[Any] = []
    for value in example_inputs:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            found.append(value)
            continue
        known = context.tensor_to_context.get(value)  # type: ignore[no-untyped-call]
        if known is None:
            found.append(mode.from_tensor(value, static_shapes=True))
        else:
            source = getattr(known, "tensor_source", None)
            found.append(mode.from_tensor(value, symbolic_context=known, source=source, trace=False))
    return mode, found


@contextlib.contextmanager
def outside_tracing() -> Iterator[None]:
    """Compile pieces as if nobody compiled around them: Inductor asks the tracing context."""
    with tracing(None):
        yield
