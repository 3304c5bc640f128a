"""The artifact: everything that a compiled model is, but its weights. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stitchcache.types import BindingSpec, BlobRef, Factor, InputSpec, OutputSpec, PieceRef, SizeRange

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Execution code with its pieces, for one size range or for all sizes.

    Args:
        size_range: The sizes it is for; ``None`` is all.
        code: Python source of the stitching function.
        submod_names: Submodules in the order the code expects their callables.
        consts: Pickled consts table, or ``None`` where the code needs none.
        pieces: One for each name in ``submod_names`` that has a compiled piece.
    """

    size_range: SizeRange | None
    code: str
    submod_names: tuple[str, ...]
    consts: bytes | None
    pieces: tuple[PieceRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A compiled model as one immutable record.

    Args:
        graph_hash: 64 hex digits that name it.
        variants: At least one; more with ``size_ranges``.
        input_spec: What a call must bring; ``None`` for entries made through the engine API.
        output_spec: How results are returned; ``None`` likewise.
        bindings: Tensors taken from the model, in the order the stitching function takes them.
        factors: Named parts of its keys.
        created: Unix seconds.
        label: The model's class or the target's name, for people.
        compile_seconds: What compiling it took.
        format_version: Version it was read from; new ones have the current.
    """

    graph_hash: str
    variants: tuple[Variant, ...]
    input_spec: InputSpec | None = None
    output_spec: OutputSpec | None = None
    bindings: tuple[BindingSpec, ...] = ()
    factors: tuple[Factor, ...] = ()
    created: float = 0.0
    label: str = ""
    compile_seconds: float = 0.0
    format_version: int = 3

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
    def blobs(self) -> tuple[BlobRef, ...]:
        """Distinct blobs of pieces and constants, in order of first use."""
        refs = [piece.blob for piece in self.pieces]
        refs += [binding.blob for binding in self.bindings if binding.blob is not None]
        return tuple(dict.fromkeys(refs))


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRecord:
    """What a piece key leads to.

    Args:
        key: Piece key.
        backend: Backend that made the blob.
        blob: The compiled piece.
    """

    key: str
    backend: str
    blob: BlobRef
