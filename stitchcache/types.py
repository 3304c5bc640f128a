"""Plain records that every layer shares. Imports no torch.

A symbolic size stands in these records as a string: a symbol's canonical name (``"s0"``) or an
expression over such names (``"2*s0 + 1"``); a static size is an int.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


Digest = str
"""64 lowercase hex digits: see :func:`is_digest`."""

Name = str
"""Text of at most 65,536 characters, which a person may read: names, labels, paths."""

Expression = str
"""Arithmetic over symbols: at most 16,384 characters, and no number of more than 20 digits."""

Count = int
"""A whole number from 0 to 2**63 - 1."""

Length = int
"""How many things there are: from 0 to 2**20, because all of them are held in memory."""

Seconds = float
"""A finite number of seconds; at most 250 thousand million, so that a time has a date."""

Amount = float
"""A finite number that is not negative."""

Size = int | str
"""A :data:`Count`, or an :data:`Expression`."""

Shape = tuple[Size, ...]
"""One size a dimension; at most 64."""

Scalar = bool | int | float | str | None

# A record says once what its fields are: by these names in its annotations. ``stitchcache.artifact.schema``
# derives reading, checking and writing from them. A rule about several fields of a record is its method
# ``flaw``, which returns the field that is wrong and why, or ``None``.


_HEX = frozenset("0123456789abcdef")

BOUND = "bound"
"""Stitching code knows tensors of the model as ``bound.<qualified name>``."""


def is_digest(value: object) -> bool:
    """Whether a value is 64 lowercase hex digits: a graph hash, a key, or a sha256."""
    return type(value) is str and len(value) == 64 and _HEX.issuperset(value)


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How much memory a strided tensor covers.

    Args:
        shape: One size a dimension.
        stride: One stride a dimension, in elements, none of them negative.

    Returns:
        Elements from the first to the last, gaps included; 0 for a tensor without elements.
    """
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


@dataclass(frozen=True, slots=True, order=True)
class SizeRange:
    """Sizes of a dynamic dimension that get code of their own, both ends included.

    Args:
        min: Smallest size.
        max: Largest size.
        dim: Name of the ``torch.export.Dim`` it is about; ``None`` where the model has only one.

    Raises:
        ValueError: ``min`` is below 0 or above ``max``.
    """

    min: Count
    max: Count
    dim: Name | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max:
            raise ValueError(f"SizeRange({self.min}, {self.max}): needs 0 <= min <= max")

    def flaw(self) -> tuple[str, str] | None:
        """What is wrong with fields that were read."""
        return ("max", f"{self.max} is below min {self.min}") if self.min > self.max else None

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min}..{self.max}"


@dataclass(frozen=True)
class Dim:
    """A size that may vary, for ``dynamic_shapes``; means what ``torch.export.Dim`` means.

    Making one of torch's imports sympy, a third of a second that a warm start has no use for. Use
    torch's where one dimension is derived from another (``2 * dim``).

    Args:
        name: A Python identifier; the same name is the same size.
        min: Smallest size.
        max: Largest size; ``None`` is unbounded.

    Raises:
        ValueError: The name is no identifier, or the range is empty.
    """

    name: str
    min: int = 0
    max: int | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"Dim({self.name!r}): the name must be an identifier")
        if self.min < 0 or (self.max is not None and self.max < self.min):
            raise ValueError(f"Dim({self.name!r}, {self.min}, {self.max}): needs 0 <= min <= max")

    @property
    def __name__(self) -> str:
        """The name, where torch's own dimensions have it."""
        return self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One named part of a key, kept so that a miss can be explained.

    Args:
        name: Dotted name, such as ``env.torch`` or ``model.attributes``.
        value: What a person reads; may be shortened.
        digest: 64 hex digits over the whole value.
    """

    name: Name
    value: str
    digest: Name


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRef:
    """A blob by content.

    Args:
        digest: sha256 of the bytes, 64 hex digits.
        size: Length in bytes.
    """

    digest: Digest
    size: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRef:
    """A compiled piece, as an entry refers to it.

    Args:
        name: Submodule name in the stitching graph, such as ``submod_0``.
        key: Piece key: canonical graph of the piece, backend, options and environment.
        backend: ``aoti``, ``inductor`` or ``eager``.
        blob: The compiled piece.
    """

    name: Name
    key: Name
    backend: Name
    blob: BlobRef


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What a capture relies on in a tensor.

    Args:
        dtype: Without the ``torch.`` prefix, such as ``float32``.
        device: Device type without index, such as ``cuda``.
        shape: One size a dimension.
        stride: One stride a dimension, in elements.
    """

    dtype: Name
    device: Name
    shape: Shape
    stride: Shape

    def flaw(self) -> tuple[str, str] | None:
        """What is wrong with fields that were read."""
        if len(self.shape) != len(self.stride):
            return "stride", f"{len(self.stride)} strides for {len(self.shape)} dimensions"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafSpec:
    """One leaf of the input tree.

    Args:
        path: As a person writes it, such as ``ids`` or ``batch['mask']``.
        kind: ``tensor``; ``inout`` (a tensor that the graph writes into); ``symbol`` (an int that may
            vary); ``constant`` (baked in by the capture).
        tensor: For a tensor.
        symbol: For a symbol: its expression.
        value: For a constant: what it must equal.
    """

    path: Name
    kind: Literal["tensor", "inout", "symbol", "constant"]
    tensor: TensorSpec | None = None
    symbol: Expression | None = None
    value: Scalar = None

    def flaw(self) -> tuple[str, str] | None:
        """What is wrong with fields that were read."""
        needed = {"tensor": self.tensor, "inout": self.tensor, "symbol": self.symbol}
        if needed.get(self.kind, self) is None:
            return self.kind, f"missing where kind is {self.kind}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SymbolSpec:
    """A symbol and the sizes that the capture allows for it.

    Args:
        name: Canonical name, such as ``s0``.
        min: Smallest size.
        max: Largest size; ``None`` is unbounded.
        label: The user's name for it (``torch.export.Dim``), or ``""``.
    """

    name: Name
    min: int
    max: int | None
    label: Name = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """What a call must bring.

    Args:
        tree: The pytree of ``(args, kwargs)``, as ``stitchcache.tree`` writes it.
        leaves: One a leaf, in tree order.
        symbols: Symbols in order of first appearance.
        constraints: Further relations that the capture relied on, as expressions that must hold,
            such as ``"s0 <= 2*s1"``, and any of three words. ``distinct``: no tensor is given twice.
            ``plain``: no tensor is a parameter, requires gradients, has one or begins inside its storage.
            ``apart``: no tensor shares memory with the tensors of the model.
    """

    tree: str
    leaves: tuple[LeafSpec, ...]
    symbols: tuple[SymbolSpec, ...] = ()
    constraints: tuple[Expression, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """How the stitching function's flat results become what the model returns.

    Args:
        tree: The pytree of the result, as ``stitchcache.tree`` writes it.
        count: Leaves of that tree: the last ``count`` results.
        mutations: For each result before those, what it is written back to: ``buffer:<name>`` or
            ``input:<leaf index>``.
    """

    tree: str
    count: Length
    mutations: tuple[Name, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BindingSpec:
    """A tensor that the stitching function takes from the model, not from the call.

    Args:
        name: Qualified name in the model, such as ``layers.0.norm.weight``; for an attribute a path, such as
            ``cache.layers[0].keys``.
        kind: ``parameter``, ``buffer`` or ``attribute`` (looked up in the model) or ``constant`` (stored
            here). An attribute lies where only plain attributes, containers and objects lead.
        tensor: What it must be.
        blob: For a constant: its bytes.
        aliases: Other names and paths that the same tensor had in the model (tied weights); they must still
            be the same tensor.
    """

    name: Name
    kind: Literal["parameter", "buffer", "attribute", "constant"]
    tensor: TensorSpec
    blob: BlobRef | None = None
    aliases: tuple[Name, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputBound:
    """How far one output of a compiled model was from the model's own.

    Args:
        name: The output, as a person writes it, such as ``output['logits']``.
        difference: Largest absolute difference that was seen.
        magnitude: Largest absolute value of the model's own.
    """

    name: Name
    difference: Amount
    magnitude: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRecord:
    """How the results of a cold compile compared with those of the model itself.

    Args:
        state: ``compared``, or ``unchecked`` where there was nothing to compare with.
        reason: Why it is unchecked; ``""`` where it is compared.
        bounds: One for each output that was compared.
    """

    state: Literal["compared", "unchecked"]
    reason: str = ""
    bounds: tuple[OutputBound, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How the look at a compiled model stands: whether it does what the model itself does on the example.

    Args:
        state: ``agreed``; ``mismatch``; ``unchecked``, where they were not compared; or ``pending``, while a
            thread looks.
        reason: What disagrees, or why nothing was compared.
        seconds: What looking took.
        output: The result or written tensor that disagrees, such as ``output['logits']`` or ``buffer:cache``.
        difference: By how much, where it is a matter of numbers.
    """

    state: Literal["agreed", "mismatch", "unchecked", "pending"]
    reason: str = ""
    seconds: float = 0.0
    output: str = ""
    difference: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRef:
    """A source file that ran during capture.

    Args:
        module: Its module's name, such as ``mylib.layers``.
        digest: sha256 of the file.
        size: Length in bytes.
    """

    module: Name
    digest: Name
    size: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRecord:
    """What a target key leads to.

    Args:
        graph_hash: The entry.
        sources: Every source file that ran during capture; all must be unchanged for a hit.
        globals: Values of module globals that the captured code read: ``module:dotted.name`` to digest.
        label: The model's class, for people.
        created: Unix seconds.
        refused: Why nothing may be served for this key without tracing; ``None`` where it may.
        factors: What the key is made of, packed: ``stitchcache.artifact.factors`` reads it. Empty where
            it was not recorded. A direct hit has no use for it.
        code: Code objects of the entry's source: what names one (``stitchcache.codegen.execution``), and its
            marshalled bytes.
    """

    graph_hash: Digest
    sources: tuple[SourceRef, ...]
    globals: tuple[tuple[Name, str], ...] = ()
    label: Name = ""
    created: Seconds = 0.0
    refused: str | None = None
    factors: bytes = b""
    code: tuple[tuple[Name, bytes], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What tells a model from the one that was compiled.

    Args:
        name: A factor of the key, such as ``model.class``, or ``sources``.
        was: Its value when the model was compiled.
        now: Its value now; where nothing can be told, the reason.
        unknown: Whether nothing can be told, as no key stands for the model.
    """

    name: str
    was: str
    now: str
    unknown: bool = False

    def __str__(self) -> str:
        return self.now if self.unknown else f"{self.name} was {self.was} and is {self.now}"
