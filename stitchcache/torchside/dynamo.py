"""What ``torch.compile`` hands to its backends, beyond the graph and the example inputs.

Uses ``torch._guards``, ``torch._dynamo`` (``exc``, ``symbolic_convert``), the names of what Dynamo writes
into its graphs, ``SymNode._expr`` and ``torch.fx.experimental.proxy_tensor``. Only ever imported where Dynamo
is at work already.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import TracingContext, tracing
from torch.fx.experimental.proxy_tensor import make_fx as make_fx

from stitchcache.errors import BackendError
from stitchcache.torchside import is_fake

SEEN = ("2.11", "2.13", "2.15")

# Names of the functions that Dynamo writes into its graphs.
INFERENCE_CALLS = frozenset({"_enter_inference_mode", "_exit_inference_mode"})
GRAD_CALLS = frozenset({"_set_grad_enabled"})
ENTER_AUTOCAST = "_enter_autocast"
AUTOCAST_CALLS = frozenset({ENTER_AUTOCAST, "_exit_autocast"})
CHECKPOINT_CALL = "tag_activation_checkpoint"
DATA_CALL = "_get_data_attr"
"""What a read of ``Tensor.data`` becomes."""


def is_transform(node: torch.fx.Node) -> bool:
    """Whether a node calls a transform of ``torch.func``."""
    module = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and module.startswith(("torch._functorch", "torch._C._functorch"))


def fix_own_floats(gm: torch.fx.GraphModule) -> None:
    """Have Dynamo take a model's own numbers, such as the epsilon of a norm, for the constants that they are.

    With ``dynamic=True`` it passes every float as an argument, and a piece that takes one cannot be compiled.
    Inductor does the same to floats that it cannot turn into tensors. Floats among the caller's arguments are
    left as they are.

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


def fake_mode() -> Any:
    """The fake mode that Dynamo set aside for the backend; a BackendError where Dynamo does not call it."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise BackendError(
            "there is no tracing context: this backend is for torch.compile to call.", backend="stitchcache"
        )
    return context.fake_mode


def fake_inputs(mode: Any, example_inputs: Sequence[Any]) -> list[Any]:
    """Fake tensors for a backend's example inputs, with the symbols that Dynamo gave their sizes.

    Those in the graph's metadata will not do: the forward may have changed their shapes and strides. Anything
    that is no tensor stays as it is.
    """
    known = TracingContext.get().tensor_to_context
    found: list[Any] = []
    for value in example_inputs:
        if not isinstance(value, torch.Tensor) or is_fake(value):
            found.append(value)
            continue
        symbolic = known.get(value)  # type: ignore[no-untyped-call]
        if symbolic is None:
            found.append(mode.from_tensor(value, static_shapes=True))
        else:
            source = getattr(symbolic, "tensor_source", None)
            found.append(mode.from_tensor(value, symbolic_context=symbolic, source=source, trace=False))
    return found


def outside_tracing() -> AbstractContextManager[Any]:
    """Compile pieces as if nobody compiled around them: Inductor asks the tracing context."""
    return tracing(None)
