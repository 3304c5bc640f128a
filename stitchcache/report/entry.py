"""An entry to look at: read from its file, told in words or as a JSON record. Nothing of it is run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from stitchcache.artifact.entry import decode_named
from stitchcache.cache import Cache
from stitchcache.errors import GraphHashError, StoreError
from stitchcache.store.layout import LEGACY_SUFFIXES, Area, keyed_path
from stitchcache.types import (
    Artifact,
    BindingSpec,
    InputSpec,
    LeafSpec,
    PieceRef,
    Size,
    SizeRange,
    SymbolSpec,
    TensorSpec,
    Variant,
)

_MOST_TEXT = 2000


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry with the file it came from.

    Args:
        artifact: What the file holds.
        path: The file.
        file_bytes: Its length.
    """

    artifact: Artifact
    path: str
    file_bytes: int


def read_entry(cache: Cache, prefix: str) -> Entry:
    """Read the entry that a prefix means, of any format and whoever may write its file.

    Args:
        cache: Where to look.
        prefix: The first digits of its graph hash.

    Raises:
        GraphHashError: It names no entry.
        AmbiguousPrefixError: It names more than one.
        EntryFormatError: The entry is damaged or of a newer format.
        StoreError: Its file cannot be read.
    """
    graph_hash = cache.find(prefix)
    for path in _files(cache, graph_hash):
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            continue
        except OSError as error:
            reason = error.strerror or str(error)
            raise StoreError(
                f"{path}: cannot be read ({reason}); check its owner and mode", path=path
            ) from error
        return Entry(decode_named(data, graph_hash, path), path, len(data))
    raise GraphHashError(f"entry {graph_hash[:12]} was removed from {cache.root} just now", prefix=prefix)


def _files(cache: Cache, graph_hash: str) -> Iterator[str]:
    for root in cache.roots:
        yield keyed_path(str(root), Area.ENTRIES, graph_hash)
        for suffix in LEGACY_SUFFIXES:
            yield os.path.join(root, graph_hash + suffix)


# -- pieces ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PieceRow:
    """One call of a compiled piece.

    Args:
        piece: What is called.
        size_range: The sizes it is for; ``None`` is all.
        shared: Calls of the entry that run the same blob, this one included.
    """

    piece: PieceRef
    size_range: SizeRange | None
    shared: int


@dataclass(frozen=True, slots=True)
class DistinctPiece:
    """A compiled piece with the calls that run it.

    Args:
        piece: The first of them.
        names: Of all its calls, in order.
    """

    piece: PieceRef
    names: tuple[str, ...]


def piece_rows(artifact: Artifact) -> list[PieceRow]:
    """All calls, in order."""
    calls = Counter(piece.blob.digest for piece in artifact.pieces)
    return [
        PieceRow(piece, variant.size_range, calls[piece.blob.digest])
        for variant in artifact.variants
        for piece in variant.pieces
    ]


def distinct_pieces(artifact: Artifact) -> list[DistinctPiece]:
    """The different pieces, in order of first use."""
    names: dict[str, list[str]] = {}
    first: dict[str, PieceRef] = {}
    for piece in artifact.pieces:
        first.setdefault(piece.key, piece)
        names.setdefault(piece.key, []).append(piece.name)
    return [DistinctPiece(piece, tuple(names[key])) for key, piece in first.items()]


def names_text(names: tuple[str, ...], most: int = 3) -> str:
    """Names of calls, cut where there are many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


# -- as JSON --------------------------------------------------------------------------------------


def entry_record(entry: Entry) -> dict[str, Any]:
    """Everything that is known of an entry."""
    artifact = entry.artifact
    return {
        "graph_hash": artifact.graph_hash,
        "label": artifact.label,
        "created": artifact.created,
        "compile_seconds": artifact.compile_seconds,
        "format_version": artifact.format_version,
        "path": entry.path,
        "entry_bytes": entry.file_bytes,
        "blob_bytes": sum(blob.size for blob in artifact.blobs),
        "backends": sorted({piece.backend for piece in artifact.pieces}),
        "input": None if artifact.input_spec is None else asdict(artifact.input_spec),
        "output": None if artifact.output_spec is None else asdict(artifact.output_spec),
        "pieces": _pieces(artifact),
        "bindings": [asdict(binding) for binding in artifact.bindings],
        "factors": [asdict(factor) for factor in artifact.factors],
        "variants": [_variant(variant) for variant in artifact.variants],
    }


def _pieces(artifact: Artifact) -> list[dict[str, Any]]:
    return [
        {
            **_piece(row.piece),
            "size_range": None if row.size_range is None else asdict(row.size_range),
            "shared_by": row.shared,
        }
        for row in piece_rows(artifact)
    ]


def _piece(piece: PieceRef) -> dict[str, Any]:
    return {
        "name": piece.name,
        "key": piece.key,
        "backend": piece.backend,
        "blob": piece.blob.digest,
        "bytes": piece.blob.size,
    }


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "size_range": None if variant.size_range is None else asdict(variant.size_range),
        "code": variant.code,
        "submod_names": list(variant.submod_names),
        "consts_bytes": None if variant.consts is None else len(variant.consts),
    }


# -- in words -------------------------------------------------------------------------------------


def tensor_text(tensor: TensorSpec) -> str:
    """A tensor such as ``float32[s0, 384] cpu``; strides are told where they are not the usual ones."""
    shape = ", ".join(str(size) for size in tensor.shape)
    text = f"{tensor.dtype}[{shape}] {tensor.device}"
    if contiguous(tensor.shape) not in (None, tensor.stride):
        text += f" strides ({', '.join(str(size) for size in tensor.stride)})"
    return text


def contiguous(shape: tuple[Size, ...]) -> tuple[Size, ...] | None:
    """Strides of a contiguous tensor; ``None`` where one is a product that can be spelled in several ways."""
    strides: list[Size] = []
    factor, symbol = 1, ""
    for size in reversed(shape):
        if symbol and factor != 1 and not symbol.isidentifier():
            return None
        strides.append(factor if not symbol else symbol if factor == 1 else f"{factor}*{symbol}")
        if isinstance(size, int):
            factor *= size
        elif len(strides) < len(shape):
            if symbol:
                return None
            symbol = size
    return tuple(reversed(strides))


def leaf_text(leaf: LeafSpec) -> str:
    """What one argument must be."""
    if leaf.tensor is not None:
        return tensor_text(leaf.tensor)
    if leaf.kind == "symbol":
        return f"int {leaf.symbol}"
    return f"must be {leaf.value!r}"


def symbol_text(symbol: SymbolSpec) -> str:
    """A symbol's range, such as ``1..64 (batch)``."""
    most = "" if symbol.max is None else str(symbol.max)
    label = f" ({symbol.label})" if symbol.label else ""
    return f"{symbol.min}..{most}{label}" if most else f"{symbol.min} and more{label}"


def input_lines(spec: InputSpec | None) -> list[tuple[str, str]]:
    """The input contract as names and values."""
    if spec is None:
        return [("", "not recorded: made through the engine API")]
    lines = [(leaf.path, leaf_text(leaf)) for leaf in spec.leaves]
    lines += [(symbol.name, symbol_text(symbol)) for symbol in spec.symbols]
    lines += [("must hold", constraint) for constraint in spec.constraints]
    return lines or [("", "no arguments")]


def output_lines(artifact: Artifact) -> list[tuple[str, str]]:
    """What a call returns, and what it writes to, as names and values."""
    spec = artifact.output_spec
    if spec is None:
        return [("", "not recorded: made through the engine API")]
    lines = [("returns", tree_text(spec.tree))]
    leaves = artifact.input_spec.leaves if artifact.input_spec is not None else ()
    for mutation in spec.mutations:
        kind, _, what = mutation.partition(":")
        if kind == "input" and what.isdigit() and int(what) < len(leaves):
            what = leaves[int(what)].path
        lines.append(("writes to", f"{kind} {what}"))
    return lines


def binding_text(binding: BindingSpec) -> str:
    """What a bound tensor must be."""
    text = tensor_text(binding.tensor)
    return f"{text} (the same tensor as {', '.join(binding.aliases)})" if binding.aliases else text


def tree_text(tree: str, leaves: list[str] | None = None) -> str:
    """A structure such as ``(*, {'mask': *})``.

    Args:
        tree: As ``stitchcache.tree.dumps`` writes it.
        leaves: What to write for each leaf; ``*`` if ``None``.

    Returns:
        The text; the serialized form itself where it is of a kind unknown here.
    """
    try:
        _version, spec = json.loads(tree)
        return _node(spec, iter(leaves) if leaves is not None else None)[:_MOST_TEXT]
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError):
        return tree[:_MOST_TEXT]


def _node(spec: dict[str, Any], leaves: Any) -> str:
    kind = spec["type"]
    if kind is None:
        return next(leaves) if leaves is not None else "*"
    children = [_node(child, leaves) for child in spec["children_spec"]]
    context = spec["context"]
    if kind == "builtins.tuple":
        return f"({', '.join(children)}{',' if len(children) == 1 else ''})"
    if kind == "builtins.list":
        return f"[{', '.join(children)}]"
    if kind == "collections.namedtuple":
        return f"{context.rpartition('.')[2]}({', '.join(children)})"
    keys = json.loads(context) if isinstance(context, str) else None
    if isinstance(keys, list) and len(keys) == len(children):
        fields = ", ".join(f"{key!r}: {child}" for key, child in zip(keys, children, strict=True))
        braces = "{" + fields + "}"
        return braces if kind == "builtins.dict" else f"{kind.rpartition('.')[2]}({braces})"
    return f"{kind.rpartition('.')[2]}({', '.join(children)})"
