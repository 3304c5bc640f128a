"""The target key: everything that can be known of a compilation without tracing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from stitchcache.encoding import Digest, UnkeyableError, make_factor, text_bytes
from stitchcache.errors import OptionError
from stitchcache.keys.environment import (
    decimal_context,
    environment_factors,
    python_code,
    torch_state_factors,
    tracing_obstacle,
)
from stitchcache.keys.inputs import input_factors
from stitchcache.keys.model import class_factors, model_factors, readable
from stitchcache.keys.scope import Scope
from stitchcache.keys.walk import Walk
from stitchcache.records import dataclass
from stitchcache.state import devices_of
from stitchcache.types import Factor, SizeRange


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetKey:
    """A target key with what it is made of.

    Args:
        key: 64 hex digits; ``None`` where no key stands for this target soundly.
        reason: Why there is no key; ``None`` where there is one.
        factors: What the key is made of, as far as it got.
    """

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
    walk: Scope | None = None,
) -> TargetKey:
    """Compute the key under which a direct lookup finds a target.

    None of the model's code is run, and nothing is traced.

    Args:
        model: The model.
        leaves: Path and value of each input leaf, in tree order.
        tree: The input tree, written down.
        dynamic_shapes: As for ``torch.export.export``.
        splitting_ops: Names of the ops to split at.
        size_ranges: Sizes with code of their own.
        backend: ``aoti``, ``inductor`` or ``eager``.
        options: The backend's options.
        key_factors: The caller's own factors, name to plain value.
        walk: An empty walk. Give it to ``check_sources`` and ``SourceRecorder`` too: what a record says of a
            value is said in terms of the objects that this key has met.

    Raises:
        OptionError: One of ``options`` or ``key_factors`` is no plain value.
    """
    walk = walk or Walk()
    factors: list[Factor] = []
    reason = tracing_obstacle()
    # The model comes first: its factors then do not depend on what else objects of its are used for.
    parts = model_factors(model, walk)
    try:
        factors += environment_factors(backend, devices_of(model, [value for _, value in leaves])[1])
        factors.append(make_factor("code.python", python_code()))
        factors.append(make_factor("code.decimal", decimal_context()))
        factors += torch_state_factors(walk)
        factors += input_factors(leaves, tree, dynamic_shapes, walk)
        factors += parts.factors
        reason = reason or parts.unsound
    except UnkeyableError as error:
        reason = reason or str(error)
    # These come last, as what they need of classes comes with them; they are told of first.
    asked = list(_option_factors(walk, splitting_ops, size_ranges, backend, options, key_factors or {}))
    factors = [*asked, *factors]
    if reason is None:
        # A walk that was broken off has not met all classes: what it has is no factor to compare.
        try:
            factors += class_factors(walk, "code.classes")
        except UnkeyableError as error:
            reason = str(error)
    reason = reason or walk.warm_cache()
    if reason is not None:
        return TargetKey(key=None, reason=reason, factors=tuple(factors))
    digest = Digest()
    for factor in sorted(factors, key=lambda item: item.name):
        digest.add(factor.name, factor.digest.encode())
    return TargetKey(key=digest.hexdigest(), reason=None, factors=tuple(factors))


def _option_factors(
    walk: Scope,
    splitting_ops: Iterable[str],
    size_ranges: Sequence[SizeRange] | None,
    backend: str,
    options: Mapping[str, Any],
    key_factors: Mapping[str, Any],
) -> Iterable[Factor]:
    ops = sorted(set(splitting_ops))
    yield make_factor("options.backend", backend)
    yield make_factor("options.splitting_ops", ", ".join(ops) or "none", b"".join(map(text_bytes, ops)))
    ranges = [f"{item.dim or ''}:{item.min}..{item.max}" for item in size_ranges or ()]
    yield make_factor("options.size_ranges", ", ".join(ranges) or "none")
    for kind, mapping in (("options.backend", options), ("user", key_factors)):
        for name, value in mapping.items():
            yield make_factor(f"{kind}.{name}", readable(value), _plain(walk, kind, name, value))


def _plain(walk: Scope, kind: str, name: str, value: Any) -> bytes:
    writer = walk.writer(kind, name)
    argument = "key_factors" if kind == "user" else "options"
    try:
        writer.put(value)
    except UnkeyableError as error:
        message = f"{argument}[{name!r}] must be a plain value, as it becomes part of a key: {error}"
        raise OptionError(message, option=argument) from error
    return bytes(writer.out)
