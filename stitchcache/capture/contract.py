"""The contract of a capture: sizes, strides, ranges and relations that a call must keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch.fx import GraphModule

from stitchcache.errors import CaptureError
from stitchcache.graph import symbols
from stitchcache.graph.effects import written_placeholders
from stitchcache.graph.symbols import SymbolNames
from stitchcache.types import InputSpec, LeafSpec, SymbolSpec, TensorSpec

_PLAIN = (bool, int, float, str, type(None))
# What code asks a tensor by these names is not checked on calls, and may differ between two tensors of one
# shape, dtype and layout.
_ASKED = frozenset({"Parameter", "requires_grad", "is_leaf", "grad", "grad_fn", "storage_offset", "Buffer"})


def input_spec(
    gm: GraphModule,
    inputs: Sequence[str],
    paths: Sequence[str],
    leaves: Sequence[Any],
    tree: str,
    names: SymbolNames,
    ranges: Mapping[Any, Any] | None = None,
) -> InputSpec:
    """Read off a flat graph what its callers must keep to.

    Of each leaf ``inputs`` has the placeholder and ``paths`` what the user calls it. ``names`` is filled in
    their order. ``ranges`` is what ``torch.export`` lets symbols be; ``None`` for Dynamo, which
    checks relations itself.
    """
    fakes = {node.name: symbols.value_of(node) for node in gm.graph.nodes if node.op == "placeholder"}
    written = written_placeholders(gm)
    specs = tuple(
        _leaf(path, fakes[name], leaf, names, "inout" if name in written else "tensor")
        for name, path, leaf in zip(inputs, paths, leaves, strict=True)
    )
    shape_env = symbols.shape_environment(gm.graph)
    known = shape_env is not None and ranges is not None
    return InputSpec(
        tree=tree,
        leaves=specs,
        constraints=tuple(symbols.guards(shape_env, names) if known else ()),
        symbols=tuple(_symbols(names, shape_env, ranges or {})),
    )


def _leaf(path: str, fake: Any, leaf: Any, names: SymbolNames, kind: Any) -> LeafSpec:
    if isinstance(fake, torch.Tensor):
        return LeafSpec(path=path, kind=kind, tensor=tensor_spec(fake, names, path))
    if isinstance(fake, torch.SymInt):
        leaf = names.size(fake)
        if isinstance(leaf, str):
            return LeafSpec(path=path, kind="symbol", symbol=leaf)
    if type(leaf) in _PLAIN:
        return LeafSpec(path=path, kind="constant", value=leaf)
    raise CaptureError(
        f"argument {path} is a {type(leaf).__qualname__}; arguments must be tensors, numbers, "
        "strings, None, or containers of these.",
        reason=f"argument of type {type(leaf).__qualname__}",
    )


def _symbols(names: SymbolNames, shape_env: Any, ranges: Mapping[Any, Any]) -> Iterable[SymbolSpec]:
    """Ranges of all symbols that the contract mentions."""
    by_text = {str(symbol): value for symbol, value in ranges.items()}
    for symbol, name in list(names.items()):
        # One that begins with u is born of data inside the graph: no argument of a call has it.
        if not str(symbol).startswith("u"):
            found = by_text.get(str(symbol))
            known = (symbols.finite(found.lower), symbols.finite(found.upper)) if found is not None else None
            low, high = known or symbols.bounds(shape_env, symbol)
            yield SymbolSpec(name=name, min=max(1, low or 0), max=high)


def tensor_spec(value: torch.Tensor, names: SymbolNames, path: str = "") -> TensorSpec:
    """Metadata of a tensor, real or fake; a CaptureError for a layout that has no strides (sparse)."""
    if value.layout != torch.strided:
        raise CaptureError(
            f"{path or 'a tensor'} has layout {value.layout}; only strided tensors are supported.",
            reason=str(value.layout),
        )
    return TensorSpec(
        dtype=str(value.dtype).removeprefix("torch."),
        device=value.device.type,
        shape=tuple(names.size(size) for size in value.shape),
        stride=tuple(names.size(size) for size in value.stride()),
    )


def more_constraints(codes: Iterable[CodeType], example: Sequence[Any]) -> tuple[str, ...]:
    """What calls must keep to besides, as the code that was traced asks for more than sizes and dtypes.

    From its bytecode: a trace does not see that two arguments were compared with ``is``, or what kind of
    tensor one was. Tensors as keys of a dict, and ``in`` for a list of them, compare identity unseen. torch's
    own code is left out. A CaptureError where code asks for the kind of a tensor, and one is not plain.
    """
    words = {}
    for code in codes:
        if not _ASKED.isdisjoint(code.co_names):
            words["plain"] = code
        if "id" in code.co_names or _compares_identity(code):
            words["distinct"] = code
    tensors = [value for value in example if isinstance(value, torch.Tensor)]
    if "plain" in words and any(t.requires_grad or type(t) is torch.nn.Parameter for t in tensors):
        raise CaptureError(
            f"{words['plain'].co_qualname} asks whether a tensor is a parameter or has gradients, and an "
            "argument of the example is a parameter or requires gradients. Pass x.detach(); compiled models "
            "are for inference.",
            reason="an argument with gradients that the code asks about",
        )
    # Given twice, a tensor was traced as two; the look compares that with the model, so calls may do either.
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        words.pop("distinct", None)
    return tuple(sorted(words))


def _compares_identity(code: CodeType) -> bool:
    """Whether code uses ``is`` with something else than a constant or what a global leads to."""
    # Not at the top: only what traces needs it.
    import dis

    loads: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname == "IS_OP" and loads and not loads[-1].startswith(("LOAD_CONST", "LOAD_GLOBAL")):
            return True
        if not step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "PRECALL", "CACHE")):
            loads.append(step.opname)
    return False
