"""Straight-line source between a call and the stitching function.

How arguments are taken apart, checked against the capture's contract and how results are put
together is known when a model is linked, so it is written out once instead of being interpreted on
every call. Any surprise leaves the fast path for ``refuse``, which finds out what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import combinations
from typing import TYPE_CHECKING, Any

from stitchcache.errors import EntryFormatError
from stitchcache.runtime.expressions import WORDS, check_expression, evaluate, names_in
from stitchcache.types import InputSpec, LeafSpec, OutputSpec, Size, TensorSpec

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


@dataclass(slots=True)
class CallSource:
    """Source under construction.

    Args:
        symbols: Symbols that expressions may use.
        lines: Body lines of ``call``; ``args`` and ``kwargs`` are in scope.
        names: Values that the source refers to by name.
    """

    symbols: frozenset[str]
    lines: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    derived: list[tuple[str, str]] = field(default_factory=list)
    stride_checks: list[tuple[TensorSpec, str]] = field(default_factory=list)
    locals: int = 0

    def fresh(self) -> str:
        """A new local name."""
        self.locals += 1
        return f"v{self.locals}"

    def constant(self, value: Any) -> str:
        """A name for a value that has no literal form."""
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    def refuse_if(self, condition: str) -> None:
        """Leave the fast path when a condition holds."""
        self.lines.append(f"if {condition}: return refuse(args, kwargs)")


def write_inputs(
    source: CallSource, spec: InputSpec, dtypes: Mapping[str, Any], collected: Sequence[str]
) -> list[str] | None:
    """Write the code that takes a call apart and checks it.

    Args:
        source: Gets the lines.
        spec: The contract.
        dtypes: torch's dtypes by name.
        collected: Keywords that the model's ``**kwargs`` collects, in the order of the example.

    Returns:
        Local names of the leaves in order; ``None`` when the tree holds containers that only torch
        can take apart.

    Raises:
        EntryFormatError: A dtype or an expression in the contract is not one.
    """
    leaves: list[str] = []
    if len(collected) > 1:
        # The model may go through them in their order. That of named parameters nobody sees.
        wanted, members = source.constant(list(collected)), source.constant(frozenset(collected))
        source.refuse_if(f"[key for key in kwargs if key in {members}] != {wanted}")
    for tree, value in zip(json.loads(spec.tree)[1]["children_spec"], ("args", "kwargs"), strict=True):
        if not _open(source, tree, value, leaves):
            return None
    write_checks(source, spec, leaves, dtypes)
    return leaves


def _open(source: CallSource, tree: Any, value: str, leaves: list[str]) -> bool:
    """Take one container apart; False for a type that is not a plain list, tuple or dict."""
    kind, children = tree["type"], tree["children_spec"]
    if kind is None:
        leaves.append(value)
        return True
    names = [source.fresh() for _ in children]
    # Python itself makes the outermost two: a tuple and a dict.
    given = value in ("args", "kwargs")
    if given and kind in {"builtins.tuple", "builtins.dict"} and not children:
        source.refuse_if(value)
    elif kind in {"builtins.list", "builtins.tuple"}:
        wrong_type = "" if given and kind == "builtins.tuple" else f"type({value}) is not {kind[9:]} or "
        source.refuse_if(f"{wrong_type}len({value}) != {len(children)}")
        if names:
            source.lines.append(f"{', '.join(names)}, = {value}")
    elif kind == "builtins.dict":
        known = json.loads(tree["context"])
        keys = [source.constant(key) for key in known]
        if given:
            source.refuse_if(f"len({value}) != {len(keys)}")
            for key in keys:
                source.refuse_if(f"{key} not in {value}")
        else:
            # In their order, as the model may go through them. 1 and True are one key, and two values.
            source.refuse_if(f"type({value}) is not dict or [*{value}] != {source.constant(known)}")
            if not all(type(key) is str for key in known):
                source.refuse_if(f"[*map(type, {value})] != {source.constant([type(key) for key in known])}")
        for name, key in zip(names, keys, strict=True):
            source.lines.append(f"{name} = {value}[{key}]")
    else:
        return False
    return all(_open(source, child, name, leaves) for child, name in zip(children, names, strict=True))


def write_checks(source: CallSource, spec: InputSpec, leaves: list[str], dtypes: Mapping[str, Any]) -> None:
    """Write the checks of the contract; symbols become local variables."""
    for index, (leaf, name) in enumerate(zip(spec.leaves, leaves, strict=True)):
        if leaf.tensor is not None:
            _tensor_checks(source, leaf.tensor, name, dtypes, f"input_spec.leaves[{index}].tensor")
        elif leaf.kind == "symbol" and leaf.symbol is not None:
            source.refuse_if(f"type({name}) is not int")
            _learn(source, leaf.symbol, name)
        else:
            _constant_check(source, leaf, name)
    _solve(source)
    for symbol in spec.symbols:
        if symbol.name in source.known:
            high = "" if symbol.max is None else f" <= {int(symbol.max)}"
            source.refuse_if(f"not {int(symbol.min)} <= {symbol.name}{high}")
    for expr, actual in source.derived:
        source.refuse_if(f"{actual} != {check_expression(expr, source.known, 'input_spec.leaves')}")
    for tensor, name in source.stride_checks:
        _stride_check(source, tensor, name)
    written = [name for leaf, name in zip(spec.leaves, leaves, strict=True) if leaf.kind == "inout"]
    if written:
        tensors = [name for leaf, name in zip(spec.leaves, leaves, strict=True) if leaf.tensor is not None]
        source.refuse_if(f"share_memory(({', '.join(written)},), ({', '.join(tensors)},))")
    _write_words(source, spec, [name for leaf, name in zip(spec.leaves, leaves, strict=True) if leaf.tensor])
    for expr in (expr for expr in spec.constraints if expr not in WORDS):
        source.refuse_if(f"not {check_expression(expr, source.known, 'input_spec.constraints')}")


def _write_words(source: CallSource, spec: InputSpec, tensors: list[str]) -> None:
    """Write the checks of the constraints that are words."""
    if "distinct" in spec.constraints and len(tensors) > 3:
        ids = ", ".join(f"id({name})" for name in tensors)
        source.refuse_if(f"len({{{ids}}}) != {len(tensors)}")
    elif "distinct" in spec.constraints and len(tensors) > 1:
        source.refuse_if(" or ".join(f"{a} is {b}" for a, b in combinations(tensors, 2)))
    if "plain" in spec.constraints:
        for name in tensors:
            source.refuse_if(f"not is_plain({name})")
    if "apart" in spec.constraints and tensors:
        source.refuse_if(f"meets_state(({', '.join(tensors)},))")


def _tensor_checks(
    source: CallSource, tensor: TensorSpec, name: str, dtypes: Mapping[str, Any], where: str
) -> None:
    if tensor.dtype not in dtypes:
        raise EntryFormatError(
            f"{where}.dtype: torch has no dtype {tensor.dtype!r}.",
            field=f"{where}.dtype",
            reason="unknown dtype",
        )
    known_devices = {"cpu": f"not {name}.is_cpu", "cuda": f"not {name}.is_cuda"}
    device = known_devices.get(tensor.device, f"{name}.device.type != {tensor.device!r}")
    # Exact types: what a subclass computes is its own, and compiled pieces return none.
    source.refuse_if(
        f"type({name}) is not Tensor and type({name}) is not Parameter "
        f"or {name}.dtype is not {source.constant(dtypes[tensor.dtype])} or {device}"
    )
    if tensor.dtype.startswith("complex"):
        source.refuse_if(f"{name}.is_conj() or {name}.is_neg()")
    elif tensor.dtype.startswith(("float", "bfloat")):
        source.refuse_if(f"{name}.is_neg()")
    if not tensor.shape:
        source.refuse_if(f"{name}.dim()")
        return
    # The shape is needed anyway, and says the rank for less than a call of dim().
    shape = source.fresh()
    source.lines.append(f"{shape} = {name}.shape")
    source.refuse_if(f"len({shape}) != {len(tensor.shape)}")
    sizes = [source.fresh() for _ in tensor.shape]
    source.lines.append(f"{', '.join(sizes)}, = {shape}")
    for size, actual in zip(tensor.shape, sizes, strict=True):
        _learn(source, size, actual)
    source.stride_checks.append((tensor, name))


def _stride_check(source: CallSource, tensor: TensorSpec, name: str) -> None:
    for part in (*tensor.shape, *tensor.stride):
        if isinstance(part, str):
            check_expression(part, source.known, "input_spec.leaves")
    if is_contiguous(tensor):
        source.refuse_if(f"not {name}.is_contiguous()")
    else:
        strides = "(" + ", ".join(str(stride) for stride in tensor.stride) + ",)"
        source.refuse_if(f"{name}.stride() != {strides} and not same_strides({name}, {strides})")


def _learn(source: CallSource, size: Size, actual: str) -> None:
    """Check a size, or take it as the value of a symbol that is met for the first time."""
    if isinstance(size, int) or size in source.known:
        source.refuse_if(f"{actual} != {size}")
    elif size in source.symbols:
        source.known.add(size)
        source.lines.append(f"{size} = {actual}")
    else:
        source.derived.append((check_expression(size, source.symbols, "input_spec.leaves"), actual))


def _solve(source: CallSource) -> None:
    """Get symbols that occur only in linear expressions, such as ``(4 * s0)``."""
    for expr, actual in source.derived:
        unknown = names_in(expr) - source.known
        if len(unknown) != 1 or len(names_in(expr)) != 1:
            continue
        (symbol,) = unknown
        try:
            offset, one, *more = (evaluate(expr, {symbol: x}) for x in (0, 1, 2, 7, 1000))
        except EntryFormatError:
            # It divides by zero at one of them, so it is no line.
            continue
        step = one - offset
        if step and more == [step * x + offset for x in (2, 7, 1000)]:
            source.lines.append(f"{symbol} = ({actual} - {offset}) // {step}")
            source.known.add(symbol)


def is_contiguous(tensor: TensorSpec) -> bool:
    """Whether a specification describes a contiguous tensor, judged at three sets of sizes."""
    texts = [part for part in (*tensor.shape, *tensor.stride) if isinstance(part, str)]
    names = sorted(set().union(*(names_in(part) for part in texts)))
    for base in (3, 5, 11):
        values = {name: base + 2 * i for i, name in enumerate(names)}
        step = 1
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
            actual_size = size if isinstance(size, int) else evaluate(size, values)
            actual_stride = stride if isinstance(stride, int) else evaluate(stride, values)
            if actual_size != 1 and actual_stride != step:
                return False
            step *= actual_size
    return True


def _constant_check(source: CallSource, leaf: LeafSpec, name: str) -> None:
    if leaf.value is None:
        source.refuse_if(f"{name} is not None")
        return
    value, kind = source.constant(leaf.value), type(leaf.value).__name__
    if kind == "float" and leaf.value == 0:
        # Zeros of both signs are equal, and not the same to what divides by them.
        source.refuse_if(f"type({name}) is not float or {name} or str({name}) != {str(leaf.value)!r}")
        return
    both_nan = f"and ({name} == {name} or {value} == {value})" if kind == "float" else ""
    source.refuse_if(f"type({name}) is not {kind} or ({name} != {value} {both_nan})")


def output_expression(source: CallSource, spec: OutputSpec, results: list[str]) -> str | None:
    """Write how results are put into the model's own containers.

    Args:
        source: Gets the names that the expression needs.
        spec: The result's tree.
        results: Local names of the results, one a leaf.

    Returns:
        An expression; ``None`` when only torch can build the containers.
    """
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
            keys = [source.constant(key) for key in json.loads(node["context"])]
            return "{" + ", ".join(f"{key}: {part}" for key, part in zip(keys, parts, strict=True)) + "}"
        return None

    return build(json.loads(spec.tree)[1])
