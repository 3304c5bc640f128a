"""Caches for tests of the command line: entries put in by hand, so that no test pays for torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stitchcache.cache import Cache
from stitchcache.options import SizeRange
from stitchcache.types import (
    Artifact,
    BindingSpec,
    Factor,
    InputSpec,
    LeafSpec,
    OutputSpec,
    PieceRef,
    SourceRef,
    SymbolSpec,
    TargetRecord,
    TensorSpec,
    Variant,
)

LEAF = '{"type": null, "context": null, "children_spec": []}'
CODE = """\
def bind(__submods__, __consts__):
    def execution_fn(x):
        return x
    return execution_fn
"""


def key(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def artifact(
    cache: Cache, graph_hash: str, label: str = "Model", *, blobs: int = 2, ranged: bool = False
) -> Artifact:
    """An entry with one call more than it has blobs, which are stored."""
    stored = [cache.put_blob(f"blob {index} of {label}".encode() * 100) for index in range(blobs)]
    calls = [*stored, stored[-1]]
    pieces = tuple(
        PieceRef(name=f"submod_{2 * index}", key=key(blob.digest), backend="aoti", blob=blob)
        for index, blob in enumerate(calls)
    )
    ranges = [SizeRange(1, 8), SizeRange(9, 64)] if ranged else [None]
    names = tuple(piece.name for piece in pieces)
    variants = tuple(
        Variant(size_range=sizes, code=CODE, submod_names=names, consts=b"pickled", pieces=pieces)
        for sizes in ranges
    )
    ids = TensorSpec(dtype="int64", device="cpu", shape=("s0", "s1"), stride=("s1", 1))
    mask = TensorSpec(dtype="bool", device="cuda", shape=("s0", 4), stride=(1, "s0"))
    weight = TensorSpec(dtype="float32", device="cpu", shape=(4, 4), stride=(4, 1))
    return Artifact(
        graph_hash=graph_hash,
        variants=variants,
        input_spec=InputSpec(
            tree=LEAF,
            leaves=(
                LeafSpec(path="ids", kind="tensor", tensor=ids),
                LeafSpec(path="batch['mask']", kind="tensor", tensor=mask),
                LeafSpec(path="count", kind="symbol", symbol="s0 + 1"),
                LeafSpec(path="flag", kind="constant", value=True),
            ),
            symbols=(
                SymbolSpec(name="s0", min=1, max=64, label="rows"),
                SymbolSpec(name="s1", min=2, max=None),
            ),
            constraints=("s0 <= 2*s1",),
        ),
        output_spec=OutputSpec(tree=f"[1, {LEAF}]", count=1, mutations=("buffer:cache.k", "input:1")),
        bindings=(
            BindingSpec(name="head.weight", kind="parameter", tensor=weight, aliases=("embedding.weight",)),
            BindingSpec(name="scale", kind="buffer", tensor=weight),
        ),
        factors=(
            Factor(name="env.torch", value="2.13.0+cpu", digest=key("torch")),
            Factor(name="options.backend", value="aoti", digest=key("aoti")),
        ),
        created=1_700_000_000.0,
        label=label,
        compile_seconds=12.5,
    )


def put(root: Path, graph_hash: str, label: str = "Model", **options: object) -> Artifact:
    cache = Cache(root)
    made = artifact(cache, graph_hash, label, **options)  # type: ignore[arg-type]
    cache.put(made)
    return made


def put_target(root: Path, name: str, graph_hash: str, factors: dict[str, str], **more: object) -> str:
    """A target that leads to an entry; returns its key."""
    from stitchcache.artifact.entry import pack_factors

    made = [Factor(name=n, value=value, digest=key(value)) for n, value in factors.items()]
    record = TargetRecord(
        graph_hash=graph_hash,
        sources=(SourceRef(module="mylib.model", digest=key("source"), size=321),),
        globals=(("env:FLAG", "1"),),
        factors=pack_factors(made),
        **{"label": "Model", "created": 1_700_000_000.0, **more},  # type: ignore[arg-type]
    )
    Cache(root).put_target(key(name), record)
    return key(name)


def entry_file(root: Path, graph_hash: str) -> Path:
    return root / "entries" / graph_hash[:2] / f"{graph_hash}.stitch"
