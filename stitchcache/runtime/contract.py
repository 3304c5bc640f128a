"""The contract of a capture, as straight-line source: each check is said once, with what it raises.

How arguments are taken apart and checked is known when a model is linked, so it is written out instead of
being interpreted on every call. A call that is built in another way than the example leaves for ``refuse``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

from stitchcache.errors import EntryFormatError, InputMismatchError
from stitchcache.records import Size
from stitchcache.torchside import storage_id
from stitchcache.types import InputSpec, LeafSpec, OutputSpec, TensorSpec, row_major

_WORDS = frozenset({"distinct", "plain", "apart"})  # of constraints; InputSpec says what they mean


class CallSource:
    """Source under construction.

    Attributes:
        lines: Body lines of ``call``; ``args`` and ``kwargs`` are in scope.
        names: Values that the source refers to by name.

    Raises:
        EntryFormatError: A symbol has no canonical name.
    """

    def __init__(self, spec: InputSpec, narrowed: Mapping[str, str]) -> None:
        for symbol in spec.symbols:
            number = symbol.name.removeprefix("s")
            if number == symbol.name or not (number.isascii() and number.isdecimal()):
                reason = f"{symbol.name!r} is not a canonical name"
                raise EntryFormatError.at("", "input_spec.symbols", reason)
        self.spec, self._narrowed = spec, narrowed
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}
        self._locals = 0
        self._symbols = {symbol.name for symbol in spec.symbols}
        # Each symbol that has a value: the size that gave it, where it stands, and how it follows from it.
        self._known: dict[str, tuple[str, str, str]] = {}
        # Expression, size, and where it stands.
        self._derived: list[tuple[str, str, str]] = []

    def fresh(self) -> str:
        """A new local name."""
        self._locals += 1
        return f"v{self._locals}"

    def constant(self, value: Any) -> str:
        """A name for a value that has no literal form."""
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    def rearrange_if(self, condition: str) -> None:
        """Leave for ``refuse`` when a condition holds."""
        self.lines.append(f"if {condition}: return refuse(args, kwargs)")

    def refuse_if(self, condition: str, argument: str, expected: str, actual: str, advice: str = "") -> None:
        """Raise when a condition holds. ``expected`` and ``actual`` are source too, for the message."""
        self.lines.append(f"if {condition}: raise mismatch({argument!r}, {expected}, {actual}, {advice!r})")

    def open(self, collected: Sequence[str]) -> list[str]:
        """Take a call apart; returns local names of the leaves in order.

        ``collected`` are keywords that the model's ``**kwargs`` collects, in the order of the example.
        """
        leaves: list[str] = []
        if len(collected) > 1:
            # The model may go through them in their order. That of named parameters nobody sees.
            wanted, members = self.constant(list(collected)), self.constant(frozenset(collected))
            self.rearrange_if(f"[key for key in kwargs if key in {members}] != {wanted}")
        before = len(self.lines)
        trees = zip(json.loads(self.spec.tree)[1]["children_spec"], ("args", "kwargs"), strict=True)
        if not all(self._open(tree, value, leaves) for tree, value in trees):
            # Containers that only torch can take apart.
            del self.lines[before:]
            leaves = [self.fresh() for _ in self.spec.leaves]
            self.lines.append(f"{''.join(f'{leaf}, ' for leaf in leaves) or '_'} = take_apart(args, kwargs)")
        return leaves

    def _open(self, tree: Any, value: str, leaves: list[str]) -> bool:
        """Take one container apart; False for a type that is not a plain list, tuple or dict."""
        kind, children = tree["type"], tree["children_spec"]
        if kind is None:
            leaves.append(value)
            return True
        names = [self.fresh() for _ in children]
        # Python itself makes the outermost two: a tuple and a dict.
        given = value in ("args", "kwargs")
        if given and kind in {"builtins.tuple", "builtins.dict"} and not children:
            self.rearrange_if(value)
        elif kind in {"builtins.list", "builtins.tuple"}:
            wrong_type = "" if given else f"type({value}) is not {kind[9:]} or "
            self.rearrange_if(f"{wrong_type}len({value}) != {len(children)}")
            if names:
                self.lines.append(f"{', '.join(names)}, = {value}")
        elif kind == "builtins.dict":
            known = json.loads(tree["context"])
            keys = [self.constant(key) for key in known]
            if given:
                self.rearrange_if(
                    " or ".join([f"len({value}) != {len(keys)}", *(f"{k} not in {value}" for k in keys)])
                )
            else:
                # In their order, as the model may go through them. 1 and True are one key, and two values.
                self.rearrange_if(f"type({value}) is not dict or [*{value}] != {self.constant(known)}")
                if not all(type(key) is str for key in known):
                    kinds = self.constant([type(key) for key in known])
                    self.rearrange_if(f"[*map(type, {value})] != {kinds}")
            self.lines += [f"{name} = {value}[{key}]" for name, key in zip(names, keys, strict=True)]
        else:
            return False
        return all(self._open(child, name, leaves) for child, name in zip(children, names, strict=True))

    def check(self, leaves: Sequence[str]) -> None:
        """Write the checks of the contract; symbols become local variables.

        Raises:
            EntryFormatError: A dtype or an expression in the contract is not one.
        """
        paired = list(zip(self.spec.leaves, leaves, strict=True))
        for index, (leaf, name) in enumerate(paired):
            if leaf.tensor is not None:
                self._check_tensor(leaf.path, leaf.tensor, name, f"input_spec.leaves[{index}].tensor")
            elif leaf.kind == "symbol" and leaf.symbol is not None:
                self.refuse_if(
                    f"type({name}) is not int", leaf.path, "'an int'", f"type({name}).__qualname__"
                )
                self._learn(leaf.symbol, name, leaf.path)
            else:
                self._check_constant(leaf, name)
        first = len(self.lines)
        self._check_sizes([(leaf, name) for leaf, name in paired if leaf.tensor is not None])
        if any("//" in line or "%" in line for line in self.lines[first:]):
            # An expression that stitchcache did not write may divide by zero.
            self.lines[first:] = [
                "try:",
                *(f"    {line}" for line in self.lines[first:]),
                "except ZeroDivisionError:",
                "    raise mismatch('sizes', 'sizes that the contract is defined for', 'a division by zero', "
                "'Delete the entry, if stitchcache did not write it.') from None",
            ]
        self._check_sharing([(leaf, name) for leaf, name in paired if leaf.tensor is not None])

    def _check_tensor(self, path: str, tensor: TensorSpec, name: str, where: str) -> None:
        dtype = getattr(torch, tensor.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise EntryFormatError.at("", f"{where}.dtype", f"torch has no dtype {tensor.dtype!r}")
        # Exact types: what a subclass computes is its own, and compiled pieces return none.
        self.lines.append(
            f"if type({name}) is not Tensor and type({name}) is not Parameter and type({name}) not in fakes: "
            f"raise no_tensor({path!r}, {name})"
        )
        advice = f"Convert it with .to(torch.{tensor.dtype})."
        is_dtype = f"{name}.dtype is not {self.constant(dtype)}"
        self.refuse_if(is_dtype, path, repr(f"dtype {tensor.dtype}"), f"str({name}.dtype)[6:]", advice)
        known_devices = {"cpu": f"not {name}.is_cpu", "cuda": f"not {name}.is_cuda"}
        device = known_devices.get(tensor.device, f"{name}.device.type != {tensor.device!r}")
        advice = f"Move it with .to({tensor.device!r})."
        self.refuse_if(device, path, repr(f"device {tensor.device}"), f"{name}.device.type", advice)
        lazy = [f"{name}.is_neg()"] if tensor.dtype.startswith(("float", "bfloat", "complex")) else []
        lazy += [f"{name}.is_conj()"] if tensor.dtype.startswith("complex") else []
        if lazy:
            actual = "'a conjugate or a negative that is not worked out yet'"
            advice = "Pass x.resolve_conj().resolve_neg()."
            self.refuse_if(" or ".join(lazy), path, "'a tensor in memory'", actual, advice)
        sizes = ", ".join(str(size) for size in tensor.shape)
        expected = repr(f"rank {len(tensor.shape)} (shape ({sizes}))")
        if not tensor.shape:
            self.refuse_if(f"{name}.dim()", path, expected, f"f'rank {{{name}.dim()}}'")
            return
        # The shape is needed anyway, and says the rank for less than a call of dim().
        shape, *locals_ = [self.fresh() for _ in range(len(tensor.shape) + 1)]
        self.lines.append(f"{shape} = {name}.shape")
        actual = f"f'rank {{len({shape})}} (shape {{tuple({shape})}})'"
        self.refuse_if(f"len({shape}) != {len(tensor.shape)}", path, expected, actual)
        self.lines.append(f"{', '.join(locals_)}, = {shape}")
        for dim, (size, local) in enumerate(zip(tensor.shape, locals_, strict=True)):
            self._learn(size, local, f"{path}.shape[{dim}]")

    def _learn(self, size: Size, actual: str, where: str) -> None:
        """Check a size, or take it as the value of a symbol that is met for the first time."""
        if isinstance(size, int):
            advice = "This size is static; name it in dynamic_shapes to let it vary."
            self.refuse_if(f"{actual} != {size}", where, repr(str(size)), actual, advice)
        elif size in self._known:
            same = f"str({size}) + {f' (the same as {self._known[size][1]})'!r}"
            self.refuse_if(f"{actual} != {size}", where, same, actual)
        elif size in self._symbols:
            self._known[size] = (actual, where, "a size")
            self.lines.append(f"{size} = {actual}")
        else:
            self._derived.append((_arithmetic(size, self._symbols, "leaves"), actual, where))

    def _check_constant(self, leaf: LeafSpec, name: str) -> None:
        value, kind = leaf.value, type(leaf.value).__name__
        if value is None:
            wrong = f"{name} is not None"
        elif kind == "float" and value == 0:
            # Zeros of both signs are equal, and not the same to what divides by them.
            wrong = f"type({name}) is not float or {name} or str({name}) != {str(value)!r}"
        elif value != value:
            wrong = f"type({name}) is not float or {name} == {name}"
        else:
            wrong = f"type({name}) is not {kind} or {name} != {self.constant(value)}"
        advice = "The capture baked this value in; compile again for another one."
        self.refuse_if(wrong, leaf.path, repr(repr(value)), f"repr({name})[:80]", advice)

    def _check_sizes(self, tensors: Sequence[tuple[LeafSpec, str]]) -> None:
        """Ranges of symbols, sizes that follow from symbols, strides, relations between sizes."""
        self._solve()
        for symbol in self.spec.symbols:
            if symbol.name in self._known:
                actual, where, form = self._known[symbol.name]
                high = "" if symbol.max is None else f" <= {int(symbol.max)}"
                expected = f"{form} in {symbol.min}..{'' if symbol.max is None else symbol.max}"
                advice = "Widen the range in dynamic_shapes and compile again."
                if symbol.name in self._narrowed:
                    advice = f"Size {self._narrowed[symbol.name]}."
                outside = f"not {int(symbol.min)} <= {symbol.name}{high}"
                self.refuse_if(outside, where, repr(expected), actual, advice)
        for expr, actual, where in self._derived:
            _arithmetic(expr, self._known, "leaves")
            self.refuse_if(f"{actual} != {expr}", where, repr(f"a size of the form {expr}"), actual)
        for leaf, name in tensors:
            self._check_strides(leaf.path, leaf.tensor, name)  # type: ignore[arg-type]
        for expr in self.spec.constraints:
            if expr not in _WORDS:
                _arithmetic(expr, self._known, "constraints")
                sizes = ", ".join(f"{name}={{{name}}}" for name in self._known if name in expr)
                advice = "The capture relied on this relation between sizes."
                self.refuse_if(f"not {expr}", "sizes", repr(expr), f"f'{sizes}'", advice)

    def _solve(self) -> None:
        """Get symbols that occur only in linear expressions, such as ``(4 * s0)``."""
        for expr, actual, where in self._derived:
            from stitchcache.runtime.expressions import evaluator, names_in

            names = names_in(expr)
            if len(names) != 1 or names <= self._known.keys():
                continue
            (symbol,) = names
            value = evaluator(expr)
            try:
                offset, one, *more = (value({symbol: x}) for x in (0, 1, 2, 7, 1000))
            except EntryFormatError:
                # It divides by zero at one of them, so it is no line.
                continue
            step = one - offset
            if step and more == [step * x + offset for x in (2, 7, 1000)]:
                self.lines.append(f"{symbol} = ({actual} - {offset}) // {step}")
                self._known[symbol] = (actual, where, f"a size of the form {expr} with {symbol}")

    def _check_strides(self, path: str, tensor: TensorSpec, name: str) -> None:
        if not tensor.shape:
            return
        for part in tensor.stride:
            if isinstance(part, str):
                _arithmetic(part, self._known, "leaves")
        strides = f"({', '.join(str(stride) for stride in tensor.stride)},)"
        wrong = f"{name}.stride() != {strides} and not same_strides({name}, {strides})"
        if tensor.stride == row_major(tensor.shape):
            wrong = f"not {name}.is_contiguous()"
        advice = "Compiled code relies on the example's strides; pass it laid out as that."
        self.refuse_if(wrong, path, f"f'strides {{{strides}}}'", f"{name}.stride()", advice)

    def _check_sharing(self, tensors: Sequence[tuple[LeafSpec, str]]) -> None:
        """What tensors may not have in common, with one another and with the model."""
        names = [name for _, name in tensors]
        every, words = f"({''.join(f'{name}, ' for name in names)})", self.spec.constraints
        leaves = self.constant([leaf for leaf, _ in tensors])

        def conflict_if(condition: str, word: str) -> None:
            self.lines.append(f"if {condition}: raise conflict({word!r}, {leaves}, {every}, state)")

        written = [name for leaf, name in tensors if leaf.kind == "inout"]
        if written:
            conflict_if(f"share_memory(({', '.join(written)},), {every})", "inout")
        if "distinct" in words and len(names) > 3:
            conflict_if(f"len({{{', '.join(f'id({name})' for name in names)}}}) != {len(names)}", "distinct")
        elif "distinct" in words and len(names) > 1:
            conflict_if(" or ".join(f"{a} is {b}" for a, b in combinations(names, 2)), "distinct")
        if "plain" in words and names:
            conflict_if(" or ".join(f"not is_plain({name})" for name in names), "plain")
        if "apart" in words and names:
            conflict_if(f"not state.isdisjoint([*map(storage_id, {every})])", "apart")

    def result(self, spec: OutputSpec, results: Sequence[str]) -> str | None:
        """Write how results become the model's own containers; ``None`` when only torch can build those."""
        remaining = iter(results)

        def build(node: Any) -> str | None:
            kind = node["type"]
            if kind is None:
                return next(remaining)
            parts = [build(child) for child in node["children_spec"]]
            if None in parts:
                return None
            if kind == "builtins.tuple":
                return "(" + "".join(f"{part}, " for part in parts) + ")"
            if kind == "builtins.list":
                return f"[{', '.join(str(part) for part in parts)}]"
            if kind == "builtins.dict":
                keys = [self.constant(key) for key in json.loads(node["context"])]
                return "{" + ", ".join(f"{key}: {part}" for key, part in zip(keys, parts, strict=True)) + "}"
            return None

        return build(json.loads(spec.tree)[1])


def _arithmetic(text: str, symbols: Collection[str], field: str) -> str:
    """Let only arithmetic over symbols through."""
    # Most expressions are one symbol, for which a warm start need not import what parses.
    if text not in symbols:
        from stitchcache.runtime.expressions import check_expression

        check_expression(text, symbols, f"input_spec.{field}")
    return text


# What generated source calls.


def mismatch(argument: str, expected: object, actual: object, advice: str = "") -> InputMismatchError:
    """An error about one argument."""
    place = argument if argument == "arguments" else f"argument {argument}"
    said = f"{place}: expected {expected}, got {actual}.{' ' + advice if advice else ''}"
    return InputMismatchError(said, argument=argument, expected=str(expected), actual=str(actual))


def no_tensor(argument: str, value: Any) -> InputMismatchError:
    """An error about a value that is no plain tensor."""
    kind = type(value).__qualname__
    if not isinstance(value, torch.Tensor):
        return mismatch(argument, "a tensor", kind)
    advice = "What a subclass of Tensor computes is its own; pass x.as_subclass(torch.Tensor)."
    return mismatch(argument, "a plain tensor", f"a {kind}", advice)


def same_strides(tensor: torch.Tensor, wanted: tuple[int, ...]) -> bool:
    """Compare strides where they matter: a dimension of one element has none."""
    return tensor.numel() == 0 or all(
        size == 1 or stride == want
        for size, stride, want in zip(tensor.shape, tensor.stride(), wanted, strict=True)
    )


def share_memory(written: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> bool:
    """Whether any tensor that is written into shares its memory with another argument.

    Compiled code takes them for distinct: it may read one after it has written the other.
    """
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    return any(storages.count(one.untyped_storage().data_ptr()) > 1 for one in written if one.numel())


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor answers as the plain one that was traced, whatever a model asks of it."""
    if type(tensor) is torch.nn.Parameter or tensor.requires_grad or tensor.storage_offset():
        return False
    return tensor.grad is None


def conflict(
    word: str, leaves: Sequence[LeafSpec], tensors: Sequence[torch.Tensor], state: Collection[int]
) -> InputMismatchError:
    """An error about the first tensor that has in common what it may not.

    ``word`` is one of ``InputSpec.constraints``, or ``inout``; ``state`` is the memory of the model.
    """
    for index, (leaf, tensor) in enumerate(zip(leaves, tensors, strict=True)):
        others = [(leaves[i].path, other) for i, other in enumerate(tensors) if i != index]
        same = [path for path, other in others[:index] if other is tensor]
        sharing = [path for path, other in others if share_memory([tensor], [tensor, other])]
        if word == "distinct" and same:
            expected = f"another tensor than {same[0]}, because the model's code compares objects with 'is'"
            return mismatch(leaf.path, expected, "the same", "Pass a clone.")
        if word == "plain" and not is_plain(tensor):
            expected = "a plain tensor, as the model's code asks whether it is a parameter or has gradients"
            actual = "a parameter, a tensor with gradients, or a part of another one"
            return mismatch(leaf.path, expected, actual, "Pass x.detach().clone().")
        if word == "inout" and leaf.kind == "inout" and sharing:
            expected = "memory of its own, because the model writes into it"
            return mismatch(leaf.path, expected, f"memory that {sharing[0]} shares", "Pass a clone.")
        if word == "apart" and storage_id(tensor) in state:
            expected = "memory of its own, because the model writes into an argument or into its own tensors"
            return mismatch(leaf.path, expected, "memory of a tensor of the model", "Pass a clone.")
    return mismatch("arguments", "tensors that do not touch", "others")


_CALLED = (mismatch, no_tensor, same_strides, share_memory, is_plain, conflict, storage_id)
CALLED = {item.__name__: item for item in (torch.Tensor, torch.nn.Parameter, *_CALLED)}
