"""What the contract of an artifact says about CUDA graphs: where sizes stand, and what cannot be recorded."""

from __future__ import annotations

from stitchcache.errors import OptionError
from stitchcache.options import CudaGraphs
from stitchcache.records import dataclass
from stitchcache.types import Artifact, LeafSpec, SymbolSpec

Place = tuple[int, int, dict[int, tuple[int, ...]]]
"""Position of an argument and its dimension that has the size; and all such dimensions by argument."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRecord:
    """A call that was recorded, or that could not be."""

    sizes: tuple[tuple[int, ...] | int, ...]  # the shape of each argument that is a tensor, or the number
    seconds: float = 0.0  # what recording took
    bytes: int = 0  # GPU memory that it took beyond that of the graphs before it
    graphs: int = 0  # how many CUDA graphs a call replays: one more than ops that stand outside
    reason: str = ""  # why there is no graph


def refuse_elsewhere(artifact: Artifact, kind: str) -> None:
    """Refuse a model with tensors on another type of device."""
    found = [(f"argument {leaf.path}", leaf.tensor) for leaf in artifact.leaves if leaf.tensor is not None]
    found += [(f"{binding.kind} {binding.name}", binding.tensor) for binding in artifact.bindings]
    for what, spec in found:
        if spec.device != kind:
            raise _refused(
                f"{what} is on {spec.device}, and a graph would keep its value of the recorded call. Move "
                "it to the GPU, or leave cuda_graphs out."
            )


def place_of_size(artifact: Artifact, wanted: CudaGraphs) -> Place | None:
    """Where the size stands that graphs are chosen by; ``None`` where there is none.

    Raises:
        OptionError: The model has no such dimension, or does not take such sizes.
    """
    spec = artifact.input_spec
    if spec is None or wanted.sizes is None or not spec.symbols:
        return None
    known = {symbol.name: symbol for symbol in spec.symbols}
    tensors = [(leaf.path, leaf.tensor) for leaf in artifact.taken.values() if leaf.tensor is not None]
    sizes = [(f"{path}.shape[{dim}]", size) for path, spec in tensors for dim, size in enumerate(spec.shape)]
    varying = {name: str(size) for name, size in sizes if size in known}
    chosen = {size for name, size in varying.items() if wanted.dim in (None, name)}
    if len(chosen) != 1:
        there = ", ".join(varying)
        raise _refused(f"dim={wanted.dim!r} does not name one dimension; the model has {there}.")
    symbol = known[chosen.pop()]
    for size in wanted.sizes:
        if size < symbol.min or (symbol.max is not None and size > symbol.max):
            most = "" if symbol.max is None else symbol.max
            raise _refused(f"the model was compiled for sizes of {symbol.min}..{most}, and not for {size}.")
    places = [_dims(leaf, symbol, pad=wanted.pad) for leaf in artifact.taken.values()]
    found = {index: dims for index, dims in enumerate(places) if dims}
    if not found:
        raise _refused("no argument has just the size that sizes are about.")
    first = min(found)
    return first, found[first][0], found


def _dims(leaf: LeafSpec, symbol: SymbolSpec, *, pad: bool) -> tuple[int, ...]:
    shape = leaf.tensor.shape if leaf.tensor is not None else (str(leaf.symbol),)
    texts = {size for size in shape if isinstance(size, str)}
    follows = [size for size in texts if symbol.name in size and size != symbol.name]
    if pad and (follows or (leaf.tensor is None and symbol.name in shape)):
        raise _refused(f"argument {leaf.path} has a size that follows from the one to pad. Leave pad out.")
    return tuple(dim for dim, size in enumerate(shape) if size == symbol.name) if leaf.tensor else ()


def _refused(said: str) -> OptionError:
    return OptionError(f"cuda_graphs: {said}", option="cuda_graphs")
