"""What an artifact and a target are made of, as every layer shares it. Imports no torch.

A symbolic size stands in these records as a string: a symbol's canonical name (``"s0"``) or an expression
over such names (``"2*s0 + 1"``); a static size is an int.

A record says once what its fields are, by the names of ``stitchcache.records`` in its annotations.
``stitchcache.artifact`` derives reading, checking and writing from them. A rule about several fields of a
record is its method ``_flaw``: it returns the field that is wrong and why, or ``None``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from stitchcache.options import SizeRange
from stitchcache.records import (
    Amount,
    Count,
    Digest,
    Expression,
    Length,
    Name,
    Scalar,
    Seconds,
    Shape,
    Size,
    dataclass,
)

ENTRY_VERSION = 4  # of the entries that are written
ENGINE = "engine"
"""Backend of pieces that an engine compiled itself: nothing here can load them."""
BOUND = "bound"
"""Stitching code knows tensors of the model as ``bound.<qualified name>``."""

CALLER_MARK = b"stitchcaller\n"
"""Ends a library of AOTInductor that lets go of the GIL while it runs, see ``torchside/caller.py``."""


def is_digest(value: object) -> bool:
    """Whether a value is 64 lowercase hex digits: a graph hash, a key, or a sha256."""
    if type(value) is not str or len(value) != 64:
        return False
    try:
        # All of it is done by C code: a listing of thousands of files asks this for each.
        return bytes.fromhex(value).hex() == value
    except ValueError:
        return False


def follow(start: Any, path: str) -> Any:
    """What a dotted path leads to from a value; ``None`` where it leads nowhere."""
    for step in path.split("."):
        start = getattr(start, step, None)
    return start


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a strided tensor, gaps included; no stride is negative."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def row_major(shape: Shape) -> Shape | None:
    """Strides of a contiguous tensor as records have them; ``None`` where one follows from an expression."""
    strides: list[Size] = []
    factor, symbols = 1, list[str]()
    for size in (1, *reversed(shape[1:])) if shape else ():
        if isinstance(size, int):
            factor *= size
        elif size.isidentifier():
            symbols.append(size)
        else:
            return None
        parts = [str(factor)] * (factor != 1) + sorted(symbols)
        strides.append(factor if not symbols else f"({' * '.join(parts)})" if len(parts) > 1 else parts[0])
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One named part of a key, kept so that a miss can be explained."""

    name: Name  # dotted, such as ``env.torch`` or ``model.attributes``
    value: str  # what a person reads; may be shortened
    digest: Name  # 64 hex digits over the whole value


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRef:
    """A blob by content: its sha256, and its length in bytes."""

    digest: Digest
    size: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRef:
    """A compiled piece, as an entry refers to it."""

    name: Name  # submodule name in the stitching graph, such as ``submod_0``
    key: Name  # over the canonical graph of the piece, backend, options and environment
    backend: Name  # ``aoti``, ``inductor`` or ``eager``
    blob: BlobRef


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What a capture relies on in a tensor."""

    dtype: Name  # without the ``torch.`` prefix, such as ``float32``
    device: Name  # device type without index, such as ``cuda``
    shape: Shape
    stride: Shape  # in elements

    def _flaw(self) -> tuple[str, str] | None:
        if len(self.shape) != len(self.stride):
            return "stride", f"{len(self.stride)} strides for {len(self.shape)} dimensions"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafSpec:
    """One leaf of the input tree.

    An ``inout`` is a tensor that the graph writes into, a ``symbol`` an int that may vary, a ``constant`` was
    baked in by the capture.
    """

    path: Name  # as a person writes it, such as ``ids`` or ``batch['mask']``
    kind: Literal["tensor", "inout", "symbol", "constant"]
    tensor: TensorSpec | None = None
    symbol: Expression | None = None
    value: Scalar = None  # what a constant must equal

    def _flaw(self) -> tuple[str, str] | None:
        needed = {"tensor": self.tensor, "inout": self.tensor, "symbol": self.symbol}
        if needed.get(self.kind, self) is None:
            return self.kind, f"missing where kind is {self.kind}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SymbolSpec:
    """A symbol and the sizes that the capture allows for it."""

    name: Name  # canonical, such as ``s0``
    min: int
    max: int | None  # ``None`` is unbounded
    label: Name = ""  # the user's name for it (``torch.export.Dim``)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """What a call must bring.

    ``constraints`` are further relations that the capture relied on: expressions that must hold, such as
    ``"s0 <= 2*s1"``, and any of three words. ``distinct``: no tensor is given twice. ``plain``: no tensor is
    a parameter, requires gradients, has one or begins inside its storage. ``apart``: no tensor shares memory
    with the tensors of the model.
    """

    tree: str  # the pytree of ``(args, kwargs)``, as ``stitchcache.containers`` writes it
    leaves: tuple[LeafSpec, ...]  # in tree order
    symbols: tuple[SymbolSpec, ...] = ()  # in order of first appearance
    constraints: tuple[Expression, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """How the stitching function's flat results become what the model returns."""

    tree: str  # the pytree of the result
    count: Length  # leaves of that tree: the last ``count`` results
    # For each result before those, what it is written back to: ``buffer:<name>`` or ``input:<leaf index>``.
    mutations: tuple[Name, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BindingSpec:
    """A tensor that the stitching function takes from the model, not from the call.

    A ``constant`` is stored as a blob; all others are looked up in the model by qualified name, such as
    ``layers.0.norm.weight``. An ``attribute`` has a path instead, such as ``cache.layers[0].keys``, where
    only plain attributes, containers and objects lead. What ``aliases`` name must still be the same tensor.
    """

    name: Name
    kind: Literal["parameter", "buffer", "attribute", "constant"]
    tensor: TensorSpec
    blob: BlobRef | None = None
    aliases: tuple[Name, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputBound:
    """How far one output of a compiled model was from the model's own."""

    name: Name  # as a person writes it, such as ``output['logits']``
    difference: Amount  # largest absolute difference that was seen
    magnitude: Amount  # largest absolute value of the model's own


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRecord:
    """How the results of a cold compile compared with those of the model itself."""

    state: Literal["compared", "unchecked"]
    reason: str = ""  # why it is unchecked
    bounds: tuple[OutputBound, ...] = ()  # one for each output that was compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Execution code with its pieces, for one size range or for all sizes."""

    size_range: SizeRange | None
    code: str  # Python source of the stitching function
    submod_names: tuple[Name, ...]  # in the order the code expects their callables
    consts: bytes | None  # pickled consts table
    pieces: tuple[PieceRef, ...]  # one for each submodule that has a compiled piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A compiled model as one immutable record: everything but its weights."""

    graph_hash: Digest  # its name
    variants: tuple[Variant, ...]  # at least one; more with ``size_ranges``
    input_spec: InputSpec | None = None  # ``None``, as is the next, in entries made through the engine API
    output_spec: OutputSpec | None = None
    bindings: tuple[BindingSpec, ...] = ()  # in the order the stitching function takes them
    factors: tuple[Factor, ...] = ()  # of its keys
    check: CheckRecord | None = None  # ``None`` where nothing was noted
    created: Seconds = 0.0  # Unix time
    label: Name = ""  # the model's class or the target's name, for people
    compile_seconds: Seconds = 0.0
    format_version: int = ENTRY_VERSION  # the one it was read from

    def _flaw(self) -> tuple[str, str] | None:
        return None if self.variants else ("variants", "none")

    def _repr_html_(self, *more: tuple[str, object]) -> str:
        """What a notebook shows."""
        # Only notebooks ask for it.
        from stitchcache.html import facts
        from stitchcache.words import count_text, moment_text, seconds_text, size_text

        different = len({piece.key for piece in self.pieces})
        pairs = [
            ("label", self.label),
            ("graph hash", self.graph_hash),
            *more,
            ("made", f"{moment_text(self.created)}, in {seconds_text(self.compile_seconds)}"),
            ("pieces", f"{count_text(len(self.pieces), 'call')} of {different} different"),
            ("backends", ", ".join(sorted({piece.backend for piece in self.pieces}))),
            ("tensors of the model", len(self.bindings)),
            ("blobs", size_text(sum(blob.size for blob in self.blobs))),
        ]
        return facts(pairs)

    @property
    def leaves(self) -> tuple[LeafSpec, ...]:
        """Leaves of a call, in tree order; none in entries made through the engine API."""
        return self.input_spec.leaves if self.input_spec is not None else ()

    @property
    def taken(self) -> dict[int, LeafSpec]:
        """Those that the stitching function takes, by their places among all."""
        return {place: leaf for place, leaf in enumerate(self.leaves) if leaf.kind != "constant"}

    @property
    def code(self) -> str:
        """Source of the first variant."""
        return self.variants[0].code

    @property
    def submod_names(self) -> tuple[str, ...]:
        """Submodule names of the first variant."""
        return self.variants[0].submod_names

    @property
    def consts(self) -> bytes | None:
        """Pickled consts table of the first variant."""
        return self.variants[0].consts

    @property
    def pieces(self) -> tuple[PieceRef, ...]:
        """Pieces of all variants."""
        return tuple(piece for variant in self.variants for piece in variant.pieces)

    @property
    def narrowed(self) -> dict[str, str]:
        """Symbols that are served from a larger size than was asked for, with what to say and to do of it."""
        known, found = self.input_spec.symbols if self.input_spec is not None else (), dict[str, str]()
        symbols = {symbol.name: symbol for symbol in known if symbol.min > 1}
        texts = {factor.name: factor.value.partition(" (")[2] for factor in self.factors if symbols}
        for position, leaf in enumerate(self.leaves if symbols else ()):
            # Sizes of a tensor, as keys writes them, such as "3, 1 as Dim(rows, min=1, max=8)". No pattern:
            # to compile one takes a fiftieth of a warm start.
            text = texts.get(f"input.{position}.{leaf.path}", "").replace(", m", "|m")
            shape = leaf.tensor.shape if leaf.tensor is not None else ()
            for size, name in zip(text.split(", "), shape, strict=False):
                label, _, bounds = size.partition("Dim(")[2].partition("|min=")
                asked, symbol = bounds.partition("|")[0], symbols.get(str(name))
                least = max(1, int(asked)) if asked.isdecimal() else 0
                if label.isidentifier() and symbol is not None and 0 < least < symbol.min:
                    dim = f", dim={label!r}" if len(known) > 1 else ""
                    found[symbol.name] = (
                        f"{label} may be from {least}, and is served from {symbol.min}: what was "
                        "captured could not be shown right below. Pad the input, or give small sizes "
                        "code of their own: "
                        f"size_ranges=[SizeRange({least}, {symbol.min - 1}{dim}), "
                        f"SizeRange({symbol.min}, {'LARGEST' if symbol.max is None else symbol.max}{dim})]"
                    )
        return found

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """Distinct blobs of pieces and constants, in order of first use."""
        refs = [piece.blob for piece in self.pieces]
        refs += [binding.blob for binding in self.bindings if binding.blob is not None]
        return tuple(dict.fromkeys(refs))


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRef:
    """A source file that ran during capture: its module's name, sha256 and length in bytes."""

    module: Name
    digest: Name
    size: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRecord:
    """What a target key leads to."""

    graph_hash: Digest
    sources: tuple[SourceRef, ...]  # all must be unchanged for a hit
    # Values of module globals that the captured code read: ``module:dotted.name`` to digest.
    globals: tuple[tuple[Name, str], ...] = ()
    label: Name = ""
    created: Seconds = 0.0
    refused: str | None = None  # why nothing may be served for this key without tracing
    # What the key is made of, packed (``artifact.entry.unpack_factors``): a direct hit has no use for it.
    factors: bytes = b""
    # Code objects of the entry's source: what names one (``stitchcache.codegen``), and its marshalled bytes.
    code: tuple[tuple[Name, bytes], ...] = ()


LOOK_THREAD = "stitchcache look"
"""Name of the thread that looks at a hit in the background: no child is forked while it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How the look at a compiled model stands: whether it does what the model itself does on the example.

    It is ``unchecked`` where nothing was compared, and ``pending`` while a thread looks.
    """

    state: Literal["agreed", "mismatch", "unchecked", "pending"]
    reason: str = ""  # what disagrees, or why nothing was compared
    seconds: float = 0.0  # what looking took
    output: str = ""  # the result or written tensor that disagrees: ``output['logits']``, ``buffer:cache``
    difference: float = 0.0  # by how much, where it is a matter of numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What tells a model from the one that was compiled."""

    name: str  # a factor of the key, such as ``model.class``, or ``sources``
    was: str
    now: str  # where nothing can be told, the reason
    unknown: bool = False  # nothing can be told, as no key stands for the model

    def __str__(self) -> str:
        return self.now if self.unknown else f"{self.name} was {self.was} and is {self.now}"
