"""What a call must bring and what it gets, in words."""

from __future__ import annotations

from stitchcache.artifact.record import Artifact
from stitchcache.report.trees import tree_text
from stitchcache.types import BindingSpec, InputSpec, LeafSpec, Size, SymbolSpec, TensorSpec


def tensor_text(tensor: TensorSpec) -> str:
    """A tensor such as ``float32[s0, 384] cpu``; strides are told where they are not the usual ones."""
    shape = ", ".join(str(size) for size in tensor.shape)
    text = f"{tensor.dtype}[{shape}] {tensor.device}"
    if contiguous(tensor.shape) not in (None, tensor.stride):
        text += f" strides ({', '.join(str(size) for size in tensor.stride)})"
    return text


def contiguous(shape: tuple[Size, ...]) -> tuple[Size, ...] | None:
    """Strides of a contiguous tensor; ``None`` where one is a product that can be spelled in several ways."""
    strides: list[Size] = []
    factor, symbol = 1, ""
    for size in reversed(shape):
        if symbol and factor != 1 and not symbol.isidentifier():
            return None
        strides.append(factor if not symbol else symbol if factor == 1 else f"{factor}*{symbol}")
        if isinstance(size, int):
            factor *= size
        elif len(strides) < len(shape):
            if symbol:
                return None
            symbol = size
    return tuple(reversed(strides))


def leaf_text(leaf: LeafSpec) -> str:
    """What one argument must be."""
    if leaf.tensor is not None:
        return tensor_text(leaf.tensor)
    if leaf.kind == "symbol":
        return f"int {leaf.symbol}"
    return f"must be {leaf.value!r}"


def symbol_text(symbol: SymbolSpec) -> str:
    """A symbol's range, such as ``1..64 (batch)``."""
    most = "" if symbol.max is None else str(symbol.max)
    label = f" ({symbol.label})" if symbol.label else ""
    return f"{symbol.min}..{most}{label}" if most else f"{symbol.min} and more{label}"


def input_lines(spec: InputSpec | None) -> list[tuple[str, str]]:
    """The input contract as names and values."""
    if spec is None:
        return [("", "not recorded: made through the engine API")]
    lines = [(leaf.path, leaf_text(leaf)) for leaf in spec.leaves]
    lines += [(symbol.name, symbol_text(symbol)) for symbol in spec.symbols]
    lines += [("must hold", constraint) for constraint in spec.constraints]
    return lines or [("", "no arguments")]


def output_lines(artifact: Artifact) -> list[tuple[str, str]]:
    """What a call returns, and what it writes to, as names and values."""
    spec = artifact.output_spec
    if spec is None:
        return [("", "not recorded: made through the engine API")]
    lines = [("returns", tree_text(spec.tree))]
    leaves = artifact.input_spec.leaves if artifact.input_spec is not None else ()
    for mutation in spec.mutations:
        kind, _, what = mutation.partition(":")
        if kind == "input" and what.isdigit() and int(what) < len(leaves):
            what = leaves[int(what)].path
        lines.append(("writes to", f"{kind} {what}"))
    return lines


def binding_text(binding: BindingSpec) -> str:
    """What a bound tensor must be."""
    text = tensor_text(binding.tensor)
    return f"{text} (the same tensor as {', '.join(binding.aliases)})" if binding.aliases else text
