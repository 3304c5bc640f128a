"""The target key: everything that can be known of a compilation without tracing; factors of its inputs.

A size of a dimension with a named ``Dim`` is left out: ``torch.export`` gives one graph for the whole range,
or refuses. What it does look at stays in: whether a size is 0 or 1, and which named dimensions are equal. All
else about a tensor counts, but strides of one that is laid out by rows follow from its sizes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from stitchcache.encoding import UnkeyableError, make_factor, text_bytes
from stitchcache.errors import OptionError
from stitchcache.keys import environment
from stitchcache.keys.model import class_factors, memory_factor, model_factors, readable
from stitchcache.keys.values import own_attributes, stands_for_itself, tensor_span
from stitchcache.keys.walk import Walk
from stitchcache.options import Dim, SizeRange
from stitchcache.records import dataclass
from stitchcache.state import devices_of
from stitchcache.types import Factor

# Compiled where one is needed: most paths are an argument's name, and compiling takes part of a warm start.
_STEP = r"\[(-?\d+)\]|\['([^']*)'\]|\.(\w+)"
_HEAD = r"args\[\d+\]|[^.\[]+"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetKey:
    """A target key (64 hex digits), or the reason why there is none, with the factors it is made of."""

    key: str | None
    reason: str | None
    factors: tuple[Factor, ...]


def target_key(
    model: torch.nn.Module,
    leaves: Sequence[tuple[str, Any]],
    tree: str,
    dynamic_shapes: Any,
    splitting_ops: Iterable[str],
    size_ranges: Sequence[SizeRange] | None,
    backend: str,
    options: Mapping[str, Any],
    key_factors: Mapping[str, Any] | None,
    walk: Walk | None = None,
    devices: Sequence[str] | None = None,
) -> TargetKey:
    """Compute the key under which a direct lookup finds a target. No model code is run, nothing is traced.

    Arguments are those of a request; ``leaves`` are the inputs' paths and values, ``tree`` their tree as
    text, ``devices`` the types of theirs and of the model's. Give ``check_sources`` and ``SourceRecorder``
    the same ``walk``: a record is said in terms of what this key has met. An OptionError for an option or a
    factor of the caller's that is no plain value.
    """
    walk = walk or Walk()
    factors: list[Factor] = []
    reason = environment.tracing_obstacle()
    model_part: tuple[Factor, ...] = ()
    try:
        # The model comes first: its factors then do not depend on what else objects of its are used for.
        model_part = model_factors(model, walk)
    except UnkeyableError as error:
        reason = reason or str(error)
    try:
        devices = devices or devices_of(model, [value for _, value in leaves])[1]
        factors += environment.environment_factors(backend, devices)
        factors.append(make_factor("code.python", environment.python_code()))
        factors.append(make_factor("code.decimal", environment.decimal_context()))
        factors.append(make_factor("code.numpy", environment.numpy_state()))
        factors += environment.torch_state_factors(walk)
        factors += input_factors(leaves, tree, dynamic_shapes, walk)
        factors += model_part
    except UnkeyableError as error:
        reason = reason or str(error)
    ops = sorted(set(splitting_ops))
    ranges = [f"{item.dim or ''}:{item.min}..{item.max}" for item in size_ranges or ()]
    # These come last, as what they need of classes comes with them; they are told of first.
    factors = [
        make_factor("options.backend", backend),
        make_factor("options.splitting_ops", ", ".join(ops) or "none", b"".join(map(text_bytes, ops))),
        make_factor("options.size_ranges", ", ".join(ranges) or "none"),
        *_given_factors(walk, "options", "options.backend", options),
        *_given_factors(walk, "key_factors", "user", key_factors or {}),
        *factors,
    ]
    if reason is None:
        # A walk that was broken off has not met all classes: what it has is no factor to compare.
        try:
            factors += class_factors(walk, "code.classes")
        except UnkeyableError as error:
            reason = str(error)
    reason = reason or walk.warm_cache()
    return TargetKey(key=None if reason else key_of(factors), reason=reason, factors=tuple(factors))


def key_of(factors: Iterable[Factor]) -> str:
    """The target key (64 hex digits) that is made of some factors, in any order."""
    pairs = sorted((factor.name, factor.digest) for factor in factors)
    # The tuple ("target", *pairs), as a walk would write it; one more walk takes half a millisecond.
    head = b"[tuple %d:" % (1 + len(pairs)) + text_bytes("target")
    written = [b"[tuple 2:" + text_bytes(name) + text_bytes(digest) for name, digest in pairs]
    return hashlib.sha256(head + b"".join(written)).hexdigest()


def _given_factors(walk: Walk, argument: str, kind: str, given: Mapping[str, Any]) -> Iterator[Factor]:
    for name, value in given.items():
        try:
            payload = walk.writer(kind, name).bytes_with(value)
        except UnkeyableError as error:
            message = f"{argument}[{name!r}] must be a plain value, as it becomes part of a key: {error}"
            raise OptionError(message, option=argument) from error
        yield make_factor(f"{kind}.{name}", readable(value, name), payload)


def input_factors(
    leaves: Sequence[tuple[str, Any]], tree: str, dynamic_shapes: Any = None, walk: Walk | None = None
) -> Iterator[Factor]:
    """Factors of the inputs that a capture is made with; in the walk over a key they follow the model."""
    walk = walk or Walk()
    yield make_factor("input.tree", f"{len(leaves)} leaves", tree.encode())
    yield make_factor("input.dynamic_shapes", _shapes_text(dynamic_shapes))
    heads = list(dict.fromkeys(split_path(path)[0] for path, _ in leaves))
    sizes: dict[str, set[int]] = {}
    aliases = []
    for position, (path, value) in enumerate(leaves):
        # Several leaves may have one path by odd keys; the position keeps their names apart.
        name = f"input.{position}.{path}"
        writer = walk.writer("input", f"{position} value", [path])
        if not isinstance(value, torch.Tensor):
            writer.put(value)
            yield make_factor(name, readable(value, path), bytes(writer.out))
            continue
        dims = dims_of_leaf(dynamic_shapes, path, heads, value.dim())
        text = _tensor_text(path, value, dims)
        for index, dim in dims.items():
            sizes.setdefault(dim, set()).add(value.shape[index])
        if id(value) in walk.numbers:
            aliases.append(f"{name} is {walk.numbers.place(value)}")
        else:
            walk.numbers.add(value, "input", str(position), 0)
            if length := tensor_span(value):
                start = value.data_ptr()
                walk.spans.append((start, start + length, name))
        writer.put_pairs(own_attributes(value).items())
        yield make_factor(name, text, text_bytes(text) + writer.out)
    yield make_factor("input.equal_sizes", _equal(sizes))
    yield make_factor("input.aliases", ", ".join(aliases) or "none")
    yield memory_factor(walk, "input.memory")


def _tensor_text(path: str, value: torch.Tensor, dims: dict[int, str]) -> str:
    kind = type(value).__qualname__ if not stands_for_itself(value) else f"{value.layout} tensor"
    if not stands_for_itself(value) or value.layout is not torch.strided or value.is_quantized:
        raise UnkeyableError(path, f"a {kind}, whose content a key cannot describe; pass plain tensors")
    shape, strides = tuple(value.shape), value.stride()
    step, by_rows = 1, True
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        by_rows = by_rows and stride == step
        step *= max(size, 1)
    parts = list(map(str, shape))
    for index, dim in dims.items() if by_rows else ():
        parts[index] = dim if shape[index] >= 2 else f"{shape[index]} as {dim}"
    layout = "by rows" if by_rows else f"strides {strides}"
    flags = f" offset {value.storage_offset()} conj {value.is_conj()} neg {value.is_neg()}"
    if flags == " offset 0 conj False neg False":
        flags = ""
    return f"{str(value.dtype)[6:]} {value.device.type} ({', '.join(parts)}) {layout}{flags}"


def _equal(sizes: dict[str, set[int]]) -> str:
    """Which named dimensions have equal sizes in the example: a trace may compare two of them."""
    groups: dict[int, list[str]] = {}
    for dim, found in sizes.items():
        for size in found:
            groups.setdefault(size, []).append(dim)
    equal = sorted(" = ".join(sorted(group)) for group in groups.values() if len(group) > 1)
    # One name with two sizes is an error that export will report.
    uneven = sorted(f"{dim} is {sorted(found)}" for dim, found in sizes.items() if len(found) > 1)
    return "; ".join(equal + uneven) or "none"


def _is_dim(value: Any) -> bool:
    # By name: torch.export is not imported for it.
    return isinstance(value, Dim) or any(
        base.__module__ == "torch.export.dynamic_shapes" and base.__name__ in {"Dim", "_DimHint"}
        for base in type(value).__mro__
    )


def _dim_text(value: Any) -> str:
    """A ``torch.export.Dim`` as text: name and range, or the kind of hint. A name is an identifier."""
    hint = getattr(value, "type", None)
    if hint is not None and hasattr(hint, "name"):
        return f"Dim.{hint.name}(min={value.min}, max={value.max})"
    root = getattr(value, "root", None)
    of = f" of {_dim_text(root)}" if root is not None else ""
    largest = "int_oo" if value.max is None else value.max
    return f"Dim({value.__name__}, min={value.min}, max={largest}){of}"


def _shapes_text(value: Any, path: str = "dynamic_shapes") -> str:
    """Dynamic shapes as canonical text; keys and texts in JSON's form."""
    if value is None or type(value) in {int, bool, str}:
        return json.dumps(value)
    if _is_dim(value):
        return _dim_text(value)
    if type(value) is dict:
        for key in value:
            if type(key) not in {int, str}:
                kind = type(key).__qualname__
                raise UnkeyableError(path, f"a {kind} as a key; use names and numbers of dimensions")
        # Neither names nor numbers of dimensions have an order that export looks at.
        items = sorted((json.dumps(key), _shapes_text(item, f"{path}[{key}]")) for key, item in value.items())
        return "{" + ", ".join(f"{key}: {item}" for key, item in items) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_shapes_text(item, f'{path}[{index}]') for index, item in enumerate(value))}]"
    raise UnkeyableError(path, f"a {type(value).__qualname__} cannot be keyed; use dicts, tuples and Dim")


def dims_of_leaf(dynamic_shapes: Any, path: str, heads: Sequence[str], rank: int) -> dict[int, str]:
    """Named dimensions of one tensor among the inputs, for which export promises one graph over their range.

    ``heads`` are the arguments: first parts of all paths, in order. Hints such as ``Dim.AUTO`` don't count,
    as export may narrow those by the example. Where the shapes cannot be matched with the path beyond doubt
    there are none: the example's sizes then count as fixed, which is always right.
    """
    head, steps = split_path(path)
    found: Any = dynamic_shapes
    if steps is None or (isinstance(found, (list, tuple)) and len(found) != len(heads)):
        return {}
    for step in [head if isinstance(found, dict) else heads.index(head), *steps]:
        in_dict = isinstance(found, dict) and step in found
        in_list = isinstance(found, (list, tuple)) and isinstance(step, int) and 0 <= step < len(found)
        if not in_dict and not in_list:
            return {}
        found = found[step]
    if isinstance(found, (list, tuple)) and len(found) == rank:
        found = dict(enumerate(found))
    if not isinstance(found, dict) or any(type(at) is not int or not 0 <= at < rank for at in found):
        return {}
    dims = ((index, dim) for index, dim in found.items() if _is_dim(dim) and not hasattr(dim, "value"))
    return {index: _dim_text(dim) for index, dim in dims if isinstance(getattr(dim, "__name__", None), str)}


def split_path(path: str) -> tuple[str, list[int | str] | None]:
    """Split a leaf's path into the argument and the steps below it; ``None`` where it cannot be read."""
    if path.isidentifier():
        return path, []
    match = re.match(_HEAD, path)
    if match is None:
        return path, None
    head, rest = match.group(), path[match.end() :]
    if re.fullmatch(f"(?:{_STEP})*", rest) is None:
        return head, None
    return head, [int(index) if index else key or name for index, key, name in re.findall(_STEP, rest)]
