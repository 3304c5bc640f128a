"""The contract of a capture: sizes, strides, ranges and relations that a call must keep."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from types import CodeType
from typing import Any

import torch

from stitchcache.errors import CaptureError
from stitchcache.graph import symbols
from stitchcache.graph.effects import written_placeholders
from stitchcache.graph.symbols import SymbolNames
from stitchcache.types import InputSpec, LeafSpec, SymbolSpec, TensorSpec

_SCALARS = (bool, int, float, str)
# What code asks a tensor by these names is not checked on calls, and may differ between two tensors of one
# shape, dtype and layout.
_ASKS_KIND = frozenset(
    {"Parameter", "requires_grad", "is_leaf", "grad", "grad_fn", "storage_offset", "Buffer"}
)


def input_spec(
    program: torch.export.ExportedProgram,
    user_inputs: Sequence[str],
    paths: Sequence[str],
    leaves: Sequence[Any],
    tree_text: str,
    dynamic_shapes: Any,
    names: SymbolNames,
) -> InputSpec:
    """Read off an exported program what its callers must keep to.

    Args:
        program: The capture.
        user_inputs: Placeholder names, one a leaf.
        paths: What the user calls each leaf.
        leaves: The example's leaves.
        tree_text: The input tree, written down.
        dynamic_shapes: As the user gave them, for the labels of symbols.
        names: Canonical names; filled in the order of the leaves.

    Returns:
        The contract.

    Raises:
        CaptureError: A leaf is neither a tensor nor a plain value.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    written = written_placeholders(program.graph_module)
    specs = tuple(
        _leaf(nodes[name], path, leaf, names, name in written)
        for name, path, leaf in zip(user_inputs, paths, leaves, strict=True)
    )
    shape_env = symbols.shape_environment(program.graph)
    constraints: list[str] = []
    if shape_env is not None:
        constraints = symbols.guards(shape_env, names, only_known=True)
    return InputSpec(
        tree=tree_text,
        leaves=specs,
        symbols=tuple(_symbols(program, names, shape_env)),
        constraints=tuple(constraints),
    )


def more_constraints(codes: Iterable[CodeType], example: Sequence[Any]) -> tuple[str, ...]:
    """What calls must keep to besides, as the code that was traced asks for more than sizes and dtypes.

    From its bytecode: a trace does not see that two arguments were compared with ``is``, or what kind of
    tensor one was. Most models ask for neither, and their calls pay for neither. Tensors as keys of a dict,
    and ``in`` for a list of them, compare identity unseen.

    Args:
        codes: Code that ran during the capture, torch's own left out: what it asks changes no result.
        example: The example's leaves as they were given. Where one tensor was given twice, two were traced,
            and the look compares that with the model: so calls may do either.

    Raises:
        CaptureError: Code asks for the kind of a tensor, and the example has other ones than plain tensors.
    """
    words = {}
    for code in codes:
        if not _ASKS_KIND.isdisjoint(code.co_names):
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


def writes_state(gm: torch.fx.GraphModule, bound: Collection[str], leaves: Sequence[LeafSpec]) -> bool:
    """Whether a graph writes into a tensor of the model, or into an argument beside such tensors."""
    written = written_placeholders(gm)
    return not written.isdisjoint(bound) or (bool(bound) and any(leaf.kind == "inout" for leaf in leaves))


def tensor_spec(value: torch.Tensor, names: SymbolNames, path: str = "") -> TensorSpec:
    """Metadata of a tensor, real or fake.

    Raises:
        CaptureError: Its layout has no strides (sparse), or it is quantized.
    """
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


def _leaf(node: torch.fx.Node, path: str, leaf: Any, names: SymbolNames, written: bool) -> LeafSpec:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return LeafSpec(
            path=path, kind="inout" if written else "tensor", tensor=tensor_spec(value, names, path)
        )
    if isinstance(value, torch.SymInt):
        size = names.size(value)
        if isinstance(size, str):
            return LeafSpec(path=path, kind="symbol", symbol=size)
    if leaf is None or type(leaf) in _SCALARS:
        return LeafSpec(path=path, kind="constant", value=leaf)
    raise CaptureError(
        f"argument {path} is a {type(leaf).__qualname__}; arguments must be tensors, numbers, "
        "strings, None, or containers of these.",
        reason=f"argument of type {type(leaf).__qualname__}",
    )


def _symbols(program: torch.export.ExportedProgram, names: SymbolNames, shape_env: Any) -> list[SymbolSpec]:
    """Ranges of all symbols that the contract mentions."""
    ranges = {str(symbol): value for symbol, value in program.range_constraints.items()}
    found = []
    for symbol, name in list(names.items()):
        if str(symbol).startswith("u"):
            # Born of data inside the graph: no argument of a call has it.
            continue
        value_range = ranges.get(str(symbol))
        if value_range is not None:
            low, high = symbols.finite(value_range.lower), symbols.finite(value_range.upper)
        else:
            low, high = symbols.bounds(shape_env, symbol)
        found.append(SymbolSpec(name=name, min=max(1, low or 0), max=high))
    return found
