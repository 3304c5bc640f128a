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


Size = int | str
Scalar = bool | int | float | str | None


BOUND = "bound"
"""Stitching code knows tensors of the model as ``bound.<qualified name>``."""


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

    min: int
    max: int
    dim: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max:
            raise ValueError(f"SizeRange({self.min}, {self.max}): needs 0 <= min <= max")

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

    name: str
    value: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRef:
    """A blob by content.

    Args:
        digest: sha256 of the bytes, 64 hex digits.
        size: Length in bytes.
    """

    digest: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRef:
    """A compiled piece, as an entry refers to it.

    Args:
        name: Submodule name in the stitching graph, such as ``submod_0``.
        key: Piece key: canonical graph of the piece, backend, options and environment.
        backend: ``aoti``, ``inductor`` or ``eager``.
        blob: The compiled piece.
    """

    name: str
    key: str
    backend: str
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

    dtype: str
    device: str
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]


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

    path: str
    kind: Literal["tensor", "inout", "symbol", "constant"]
    tensor: TensorSpec | None = None
    symbol: str | None = None
    value: Scalar = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SymbolSpec:
    """A symbol and the sizes that the capture allows for it.

    Args:
        name: Canonical name, such as ``s0``.
        min: Smallest size.
        max: Largest size; ``None`` is unbounded.
        label: The user's name for it (``torch.export.Dim``), or ``""``.
    """

    name: str
    min: int
    max: int | None
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """What a call must bring.

    Args:
        tree: The pytree of ``(args, kwargs)``, as ``stitchcache.tree`` writes it.
        leaves: One a leaf, in tree order.
        symbols: Symbols in order of first appearance.
        constraints: Further relations that the capture relied on, as expressions that must hold,
            such as ``"s0 <= 2*s1"``.
    """

    tree: str
    leaves: tuple[LeafSpec, ...]
    symbols: tuple[SymbolSpec, ...] = ()
    constraints: tuple[str, ...] = ()


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
    count: int
    mutations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BindingSpec:
    """A tensor that the stitching function takes from the model, not from the call.

    Args:
        name: Qualified name in the model, such as ``layers.0.norm.weight``.
        kind: ``parameter`` or ``buffer`` (looked up in the model) or ``constant`` (stored here).
        tensor: What it must be.
        blob: For a constant: its bytes.
        aliases: Other names that the same tensor had in the model (tied weights); they must still
            be the same tensor.
    """

    name: str
    kind: Literal["parameter", "buffer", "constant"]
    tensor: TensorSpec
    blob: BlobRef | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRef:
    """A source file that ran during capture.

    Args:
        module: Its module's name, such as ``mylib.layers``.
        digest: sha256 of the file.
        size: Length in bytes.
    """

    module: str
    digest: str
    size: int


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
        code: Code objects of the entry's source: what names one (``stitchcache.codegen.bytecode``), and its
            marshalled bytes.
    """

    graph_hash: str
    sources: tuple[SourceRef, ...]
    globals: tuple[tuple[str, str], ...] = ()
    label: str = ""
    created: float = 0.0
    refused: str | None = None
    factors: bytes = b""
    code: tuple[tuple[str, bytes], ...] = ()
