"""A call that left the fast path: bring it into the form of the capture, or say what is wrong with it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stitchcache.errors import EntryFormatError, InputMismatchError
from stitchcache.runtime.expressions import WORDS, evaluate, names_in
from stitchcache.torchside import tree
from stitchcache.torchside.tensors import is_fake, storage_id
from stitchcache.types import InputSpec, LeafSpec, SymbolSpec, TensorSpec


def explain_mismatch(spec: InputSpec, leaves: Sequence[Any]) -> InputMismatchError | None:
    """Compare leaves with the contract, one by one.

    Args:
        spec: The contract.
        leaves: The call's leaves, as many as the contract has.

    Returns:
        The first thing that is wrong; ``None`` if nothing is.
    """
    values: dict[str, int] = {}
    owner: dict[str, str] = {}
    symbols = {symbol.name: symbol for symbol in spec.symbols}
    for leaf, value in zip(spec.leaves, leaves, strict=True):
        error = _kind(leaf, value)
        if error is None and leaf.tensor is not None:
            error = _shape(leaf.path, leaf.tensor, value, values, owner, symbols)
        if error is None and leaf.kind == "symbol" and leaf.symbol in symbols:
            error = _take(leaf.path, leaf.symbol, value, values, owner, symbols)
        if error is not None:
            return error
    return _derived(spec, leaves, values) or _constraints(spec, values) or _sharing(spec, leaves)


def share_memory(written: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> bool:
    """Whether any tensor that is written into shares its memory with another argument.

    Compiled code takes them for distinct: it may read one after it has written the other.
    """
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    return any(
        storages.count(tensor.untyped_storage().data_ptr()) > 1 for tensor in written if tensor.numel()
    )


def mismatch(argument: str, expected: str, actual: str, advice: str = "") -> InputMismatchError:
    """An error about one argument."""
    return InputMismatchError(
        f"argument {argument}: expected {expected}, got {actual}.{' ' + advice if advice else ''}",
        argument=argument,
        expected=expected,
        actual=actual,
    )


def _kind(leaf: LeafSpec, value: Any) -> InputMismatchError | None:
    if leaf.kind == "constant":
        # By its text, in which zeros of both signs differ, and NaN is NaN.
        if type(value) is not type(leaf.value) or repr(value) != repr(leaf.value):
            return mismatch(
                leaf.path,
                repr(leaf.value),
                repr(value)[:80],
                "The capture baked this value in; compile again for another one.",
            )
        return None
    if leaf.kind == "symbol":
        return None if type(value) is int else mismatch(leaf.path, "an int", type(value).__qualname__)
    if leaf.tensor is None:
        return None
    if not isinstance(value, torch.Tensor):
        return mismatch(leaf.path, "a tensor", type(value).__qualname__)
    # A fake one is the example of a model without data; no call has it.
    if type(value) not in (torch.Tensor, torch.nn.Parameter) and not is_fake(value):
        return mismatch(
            leaf.path,
            "a plain tensor",
            f"a {type(value).__qualname__}",
            "What a subclass of Tensor computes is its own; pass x.as_subclass(torch.Tensor).",
        )
    return _metadata(leaf.path, leaf.tensor, value)


def _metadata(path: str, tensor: TensorSpec, value: torch.Tensor) -> InputMismatchError | None:
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype != tensor.dtype:
        return mismatch(path, f"dtype {tensor.dtype}", dtype, f"Convert it with .to(torch.{tensor.dtype}).")
    if value.device.type != tensor.device:
        return mismatch(
            path, f"device {tensor.device}", value.device.type, f"Move it with .to({tensor.device!r})."
        )
    if value.is_conj() or value.is_neg():
        lazy = "a conjugate" if value.is_conj() else "a negative"
        return mismatch(
            path,
            "a tensor in memory",
            f"{lazy} that is not worked out yet",
            "Pass x.resolve_conj().resolve_neg().",
        )
    if value.dim() != len(tensor.shape):
        return mismatch(
            path,
            f"rank {len(tensor.shape)} (shape {_sizes(tensor.shape)})",
            f"rank {value.dim()} (shape {tuple(value.shape)})",
        )
    return None


def _shape(
    path: str,
    tensor: TensorSpec,
    value: torch.Tensor,
    values: dict[str, int],
    owner: dict[str, str],
    symbols: dict[str, SymbolSpec],
) -> InputMismatchError | None:
    for dim, (size, actual) in enumerate(zip(tensor.shape, value.shape, strict=True)):
        where = f"{path}.shape[{dim}]"
        if isinstance(size, int):
            if size != actual:
                return mismatch(
                    where,
                    str(size),
                    str(actual),
                    "This size is static; name it in dynamic_shapes to let it vary.",
                )
        elif size in symbols:
            error = _take(where, size, actual, values, owner, symbols)
            if error is not None:
                return error
    return None


def _take(
    where: str,
    symbol: str,
    actual: int,
    values: dict[str, int],
    owner: dict[str, str],
    symbols: dict[str, SymbolSpec],
) -> InputMismatchError | None:
    if symbol in values:
        if values[symbol] != actual:
            return mismatch(where, f"{values[symbol]} (the same as {owner[symbol]})", str(actual))
        return None
    values[symbol], owner[symbol] = actual, where
    allowed = symbols[symbol]
    if actual < allowed.min or (allowed.max is not None and actual > allowed.max):
        high = "" if allowed.max is None else str(allowed.max)
        return mismatch(
            where,
            f"a size in {allowed.min}..{high}",
            str(actual),
            "Widen the range in dynamic_shapes and compile again.",
        )
    return None


def _derived(spec: InputSpec, leaves: Sequence[Any], values: dict[str, int]) -> InputMismatchError | None:
    for leaf, value in zip(spec.leaves, leaves, strict=True):
        if leaf.tensor is None:
            continue
        for dim, (size, actual) in enumerate(zip(leaf.tensor.shape, value.shape, strict=True)):
            if isinstance(size, str) and not size.isidentifier() and not _holds(size, int(actual), values):
                return mismatch(f"{leaf.path}.shape[{dim}]", f"a size of the form {size}", str(actual))
        wanted = [
            s if isinstance(s, int) else evaluate(s, values) if names_in(s) <= values.keys() else None
            for s in leaf.tensor.stride
        ]
        for size, want, got in zip(value.shape, wanted, value.stride(), strict=True):
            if size > 1 and want is not None and want != got:
                return mismatch(
                    leaf.path,
                    f"strides {tuple(wanted)}",
                    str(tuple(value.stride())),
                    "Compiled code relies on the example's strides; pass it laid out as that.",
                )
    return None


def _holds(expr: str, actual: int, values: dict[str, int]) -> bool:
    """Whether a size fits an expression; solves for one unknown symbol by search in small steps."""
    unknown = names_in(expr) - values.keys()
    if not unknown:
        return evaluate(expr, values) == actual
    if len(unknown) > 1:
        return True
    (symbol,) = unknown
    try:
        offset = evaluate(expr, {**values, symbol: 0})
        step = evaluate(expr, {**values, symbol: 1}) - offset
    except EntryFormatError:
        # It divides by zero there, so this is no way to find the symbol.
        return True
    if step and (actual - offset) % step == 0:
        values[symbol] = (actual - offset) // step
    return symbol in values


def _constraints(spec: InputSpec, values: dict[str, int]) -> InputMismatchError | None:
    for expr in spec.constraints:
        if expr not in WORDS and names_in(expr) <= values.keys() and not evaluate(expr, values):
            sizes = ", ".join(f"{name}={values[name]}" for name in sorted(names_in(expr)))
            return mismatch("sizes", f"{expr}", sizes, "The capture relied on this relation between sizes.")
    return None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor answers as the plain one that was traced, whatever a model asks of it."""
    if type(tensor) is torch.nn.Parameter or tensor.requires_grad or tensor.storage_offset():
        return False
    return tensor.grad is None


def _sharing(spec: InputSpec, leaves: Sequence[Any]) -> InputMismatchError | None:
    tensors = [
        (leaf, value) for leaf, value in zip(spec.leaves, leaves, strict=True) if leaf.tensor is not None
    ]
    for index, (leaf, value) in enumerate(tensors):
        first = next((other for other, tensor in tensors[:index] if tensor is value), None)
        if first is not None and "distinct" in spec.constraints:
            return mismatch(
                leaf.path,
                f"another tensor than {first.path}, because the model's code compares objects with 'is'",
                "the same",
                "Pass a clone.",
            )
        if "plain" in spec.constraints and not is_plain(value):
            return mismatch(
                leaf.path,
                "a plain tensor, because the model's code asks whether it is a parameter or has gradients",
                "a parameter, a tensor with gradients, or a part of another one",
                "Pass x.detach().clone().",
            )
    for leaf, value in tensors:
        others = [
            other for other, tensor in tensors if other is not leaf and share_memory([value], [value, tensor])
        ]
        if leaf.kind == "inout" and others:
            return mismatch(
                leaf.path,
                "memory of its own, because the model writes into it",
                f"memory that {others[0].path} shares",
                "Pass a clone.",
            )
    return None


def _sizes(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"


def _other_order(name: str, wanted: list[str], found: list[str]) -> InputMismatchError:
    return mismatch(
        name,
        f"keys in the order {', '.join(map(str, wanted))}",
        ", ".join(map(str, found)),
        "A model may go through them in their order, so it is part of what was compiled.",
    )


class Arrangement:
    """Brings a call's arguments into the form of the capture."""

    def __init__(
        self, spec: InputSpec, forward: Callable[..., Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self.spec = spec
        self._forward = forward
        written = "apart" in spec.constraints
        self._state = frozenset(storage_id(tensor) for tensor in tensors.values()) if written else frozenset()

    def collected(self) -> list[str]:
        """Keywords of the example that the model's ``**kwargs`` collects, in their order."""
        _, keyword = json.loads(self.spec.tree)[1]["children_spec"]
        keys: list[str] = json.loads(keyword["context"] or "[]")
        if len(keys) < 2:
            return []
        try:
            parameters = inspect.signature(self._forward).parameters.values()
        except (TypeError, ValueError):
            return keys
        by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        return [key for key in keys if key not in by_name]

    def meets_state(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether an argument shares memory with a tensor of the model."""
        return not self._state.isdisjoint([storage_id(tensor) for tensor in tensors])

    def meeting(self, leaves: Sequence[Any]) -> InputMismatchError | None:
        """Name the argument that does."""
        for leaf, value in zip(self.spec.leaves, leaves, strict=True):
            if leaf.tensor is not None and self.meets_state([value]):
                return mismatch(
                    leaf.path,
                    "memory of its own, because the model writes into an argument or into its own tensors",
                    "memory of a tensor of the model",
                    "Pass a clone.",
                )
        return None

    def take_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Flatten a call whose containers only torch knows."""
        leaves, structure = tree.flatten((args, kwargs))
        if tree.dumps(structure) != self.spec.tree:
            args, kwargs = self.arrange(args, kwargs)
            leaves, structure = tree.flatten((args, kwargs))
        if tree.dumps(structure) != self.spec.tree:
            raise self._other_structure(args, kwargs)
        return leaves

    def _other_structure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InputMismatchError:
        """Name the first argument that is nested in another way than the example was."""
        positional, keyword = json.loads(self.spec.tree)[1]["children_spec"]
        names = [*tree.positional_names(self._forward, len(args)), *kwargs]
        wanted = [*positional["children_spec"], *keyword["children_spec"]]
        for name, want, value in zip(names, wanted, [*args, *kwargs.values()], strict=False):
            got = json.loads(tree.dumps(tree.flatten(value)[1]))[1]
            if got != want:
                if isinstance(value, dict) and want["type"] == got["type"]:
                    keys, given = json.loads(want["context"]), [*value]
                    if keys != given and sorted(map(repr, keys)) == sorted(map(repr, given)):
                        return _other_order(name, keys, given)
                kind = (
                    "a tensor or plain value"
                    if want["type"] is None
                    else f"a {want['type']} as in the example"
                )
                found = type(value).__qualname__ if got["type"] != want["type"] else "other contents"
                return mismatch(name, kind, found, "Pass it nested as it was when the model was compiled.")
        return mismatch(
            "arguments", "those of the example", f"{len(args)} positional, {sorted(kwargs)} by keyword"
        )

    def arrange(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move arguments between positions and keywords, and fill in defaults, as the capture had them."""
        positional, keyword = json.loads(self.spec.tree)[1]["children_spec"]
        count, keys = len(positional["children_spec"]), json.loads(keyword["context"] or "[]")
        try:
            signature = inspect.signature(self._forward)
            given = signature.bind(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise mismatch("arguments", "those of the model's forward", str(error)) from error
        ordered = self.collected()
        found = [key for key in kwargs if key in ordered]
        if len(found) == len(ordered) and found != ordered:
            raise _other_order("keywords", ordered, found)
        given.apply_defaults()
        values: dict[str, Any] = {}
        extra: tuple[Any, ...] = ()
        for name, value in given.arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                extra = value
            elif kind is inspect.Parameter.VAR_KEYWORD:
                values.update(value)
            else:
                values[name] = value
        plain = [
            p.name
            for p in signature.parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        positional_values = [*(values.pop(name) for name in plain[:count]), *extra]
        arranged = {key: values.pop(key) for key in list(keys) if key in values}
        for name, value in values.items():
            default = (
                signature.parameters[name].default
                if name in signature.parameters
                else inspect.Parameter.empty
            )
            if value is not default:
                raise mismatch(
                    name,
                    "nothing: the capture's example did not pass it",
                    type(value).__qualname__,
                    "Compile with an example that passes it.",
                )
        return tuple(positional_values), arranged
