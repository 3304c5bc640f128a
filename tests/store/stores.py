"""Small artifacts and stores for tests."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from stitchcache.cache import Cache
from stitchcache.types import (
    Artifact,
    BindingSpec,
    BlobRef,
    Factor,
    PieceRef,
    SourceRef,
    TargetRecord,
    TensorSpec,
    Variant,
)


def key(name: str | int) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def artifact(
    name: str | int, blobs: list[BlobRef], *, label: str = "Model", created: float = 1.5
) -> Artifact:
    pieces = tuple(
        PieceRef(name=f"submod_{index}", key=key(blob.digest), backend="aoti", blob=blob)
        for index, blob in enumerate(blobs)
    )
    variant = Variant(
        size_range=None,
        code="def bind(__submods__, __consts__):\n    return __submods__[0]\n",
        submod_names=tuple(piece.name for piece in pieces),
        consts=None,
        pieces=pieces,
    )
    tensor = TensorSpec(dtype="float32", device="cpu", shape=(2, "s0"), stride=("s0", 1))
    return Artifact(
        graph_hash=key(name),
        variants=(variant,),
        bindings=(BindingSpec(name="weight", kind="parameter", tensor=tensor),),
        factors=(Factor(name="env.torch", value="2.13", digest=key("torch")),),
        created=created,
        label=label,
        compile_seconds=3.0,
    )


def put(cache: Cache, name: str | int, contents: list[bytes], **kwargs: object) -> Artifact:
    made = artifact(name, [cache.put_blob(content) for content in contents], **kwargs)  # type: ignore[arg-type]
    cache.put(made)
    return made


def target(graph_hash: str) -> TargetRecord:
    source = SourceRef(module="mylib.model", digest=key("source"), size=12)
    return TargetRecord(
        graph_hash=graph_hash, sources=(source,), globals=(("mylib:FLAG", "1"),), label="Model"
    )


def read_back(cache: Cache, graph_hash: str) -> list[bytes] | None:
    """What a warm start would load: every blob's bytes, or ``None`` for a miss."""
    found = cache.get(graph_hash)
    if found is None:
        return None
    with cache.opened([piece.blob for piece in found.pieces]) as paths:
        return None if None in paths else [path.read_bytes() for path in paths]


LEGACY = Path(__file__).parent.parent / "data" / "legacy"


def copy_legacy(names: list[str], root: Path) -> None:
    """Legacy entries as their owner would have them: a checkout may have made them group-writable."""
    for name in names:
        shutil.copyfile(LEGACY / name, root / name)
        (root / name).chmod(0o644)


def files_under(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
