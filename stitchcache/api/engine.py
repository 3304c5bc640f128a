"""The door to the cache for engines with a splitter and a compiler of their own.

An engine brings stitching code, names and consts, and perhaps the bytes of its pieces. Another process gets
the callable back. Nothing is traced, split or compiled here.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stitchcache.artifact.consts import dump_consts, load_consts
from stitchcache.artifact.entry import decode
from stitchcache.cache import Cache, chosen_cache
from stitchcache.codegen import compile_execution_fn
from stitchcache.codegen.gate import check_code
from stitchcache.encoding import UnkeyableError, make_factor
from stitchcache.errors import BindError, EntryDamagedError, GraphHashError, OptionError, check_kind
from stitchcache.keys.environment import environment_factors
from stitchcache.keys.model import readable
from stitchcache.keys.walk import plain_bytes
from stitchcache.runtime.model import check_environment
from stitchcache.types import ENGINE, Artifact, Factor, PieceRef, Variant, is_digest

log = logging.getLogger("stitchcache")

LoadPiece = Callable[[str, Path | None], Any]
"""Makes the callable of a submodule from its name and the file that holds its bytes, if the entry has any."""


def save_execution(
    cache: Cache | None,
    graph_hash: str,
    code: str,
    submod_names: Sequence[str],
    consts: Sequence[Any] | bytes | None = None,
    pieces: Mapping[str, bytes | os.PathLike[str]] | None = None,
    factors: Mapping[str, Any] | None = None,
) -> str:
    """Store stitching code that an engine made, so that another process can run it.

    Takes what ``generate_execution_code`` returns, or vLLM's generator. All of it is checked as it will be
    when it is loaded, so what is stored can be loaded. An entry of the same graph hash is replaced.

    Args:
        cache: Where to store; the default cache if ``None``.
        graph_hash: 64 lowercase hex digits that the engine finds the entry by. They must stand for everything
            that the code and the pieces depend on. ``stitchcache.graph_hash`` gives such digits for a graph.
        code: Source of the stitching function, in either ABI.
        submod_names: Names in the order in which the code expects their callables.
        consts: Constants in the order in which the code expects them: a list, or the pickled list.
        pieces: The bytes of compiled pieces, or files that hold them, by submodule name. Equal bytes are
            stored once. Names that are missing are supplied when the entry is loaded.
        factors: What the graph hash stands for, name to plain value. ``stitchcache inspect`` and ``diff``
            show it; it decides nothing.

    Returns:
        The graph hash.

    Raises:
        OptionError: An argument makes no sense.
        EntryFormatError: The code is not of the shape that the generators write, does not fit the numbers of
            names and constants, or ``consts`` are bytes that are no table of constants.
        LinkError: The code calls an op that no imported library registers.
        UnserializableConstError: A constant cannot be stored.
        StoreWriteError: The cache cannot be written.
    """
    store = chosen_cache(cache)
    if not is_digest(graph_hash):
        raise OptionError(
            f"graph_hash={graph_hash!r}: an entry is named by 64 lowercase hex digits. Give "
            "hashlib.sha256(key).hexdigest() of your own key.",
            option="graph_hash",
        )
    check_kind("code", code, str, "the source of the stitching function")
    check_kind("submod_names", submod_names, (list, tuple), "a list of names")
    names = tuple(submod_names)
    for position, name in enumerate(names):
        check_kind(f"submod_names[{position}]", name, str, "a name")
    check_kind("consts", consts, (bytes, list, tuple, type(None)), "a list, or the pickled list")
    table = load_consts(consts) if isinstance(consts, bytes) else list(consts or ())
    check_code(code, len(names), len(table))
    given = _given_pieces(pieces, names)
    known = _factors(factors)
    if given:
        # Compiled pieces may depend on all of it; code and constants alone depend on nothing.
        devices = {"cpu", "cuda"} if torch.cuda.is_initialized() else {"cpu"}  # type: ignore[no-untyped-call]
        known = [make_factor("options.backend", ENGINE), *environment_factors(ENGINE, devices), *known]
    blobs = {name: store.put_blob(piece) for name, piece in given.items()}
    variant = Variant(
        size_range=None,
        code=code,
        submod_names=names,
        consts=consts if isinstance(consts, bytes) else dump_consts(table),
        pieces=tuple(
            PieceRef(name=name, key=blobs[name].digest, backend=ENGINE, blob=blobs[name])
            for name in dict.fromkeys(names)
            if name in blobs
        ),
    )
    artifact = Artifact(
        graph_hash=graph_hash, variants=(variant,), factors=tuple(known), created=time.time(), label=ENGINE
    )
    return store.put(artifact)


def _given_pieces(
    pieces: Mapping[str, bytes | os.PathLike[str]] | None, names: Sequence[str]
) -> dict[str, bytes | os.PathLike[str]]:
    check_kind("pieces", pieces, (Mapping, type(None)), "a dict from submodule names to bytes")
    given = dict(pieces or {})
    for name, piece in given.items():
        if name not in names:
            raise OptionError(
                f"pieces[{name!r}]: the code takes no such submodule; submod_names has "
                f"{', '.join(names) or 'none'}. The code of a GraphModule is written out: put another module "
                "in its place before you generate the code.",
                option="pieces",
            )
        check_kind(f"pieces[{name!r}]", piece, (bytes, os.PathLike), "the piece's bytes, or a pathlib.Path")
        if not isinstance(piece, bytes) and not Path(piece).is_file():
            raise OptionError(f"pieces[{name!r}]: there is no file {os.fspath(piece)}.", option="pieces")
    return given


def _factors(factors: Mapping[str, Any] | None) -> list[Factor]:
    check_kind("factors", factors, (Mapping, type(None)), "a dict from names to plain values")
    found = []
    for name, value in (factors or {}).items():
        check_kind("a name in factors", name, str, "text")
        try:
            found.append(make_factor(f"user.{name}", readable(value, name), plain_bytes(value)))
        except UnkeyableError as error:
            raise OptionError(f"factors[{name!r}] is no plain value: {error}", option="factors") from error
    return found


def load_execution(
    source: str | os.PathLike[str] | Artifact,
    submod_callables: Mapping[str, Any] | LoadPiece,
    *,
    cache: Cache | None = None,
) -> Callable[..., Any]:
    """Make the callable of an entry that an engine stored, of a legacy entry too.

    Args:
        source: A graph hash, a prefix of one that is unique in the cache, the ``pathlib.Path`` of an entry's
            file, or what ``Cache.get`` returned.
        submod_callables: The callable of each submodule by name; names that the code does not use may be
            missing. Or a function ``(name, path)`` that makes one, and is called once a name: ``path`` is the
            verified file with the bytes of that piece, to be read or mapped in place, or ``None`` if the
            entry has none. It returns ``None`` for a name that the code does not use.
        cache: Where to look; the default cache if ``None``.

    Returns:
        A function over the stitching graph's placeholders, in graph order.

    Raises:
        OptionError: An argument is of a wrong type.
        GraphHashError: No entry has that hash, or it cannot be read.
        AmbiguousPrefixError: More than one entry begins with it.
        BindError: The entry is a whole model, which ``stitchcache.load`` loads.
        EnvironmentMismatchError: Its pieces were compiled for another processor, GPU, libc, Python or torch.
        EntryDamagedError: A piece is damaged or gone.
        EntryFormatError: Code or constants are not what the format says.
        LinkError: The code uses a submodule that is not supplied, or an op that does not exist here.
        UntrustedEntryError: Others could have written the entry or a piece.
    """
    began, store = time.perf_counter(), chosen_cache(cache)
    if not callable(submod_callables):
        check_kind("submod_callables", submod_callables, Mapping, "a dict of callables, or a function")
    artifact = source if isinstance(source, Artifact) else _find(source, store)
    name = f"entry {artifact.graph_hash[:12]}"
    if artifact.input_spec is not None or len(artifact.variants) > 1:
        raise BindError(
            f"{name} is a compiled model with a contract of its own. Load it with "
            f"stitchcache.load({artifact.graph_hash[:12]!r}, model).",
            name="input_spec",
            expected="an entry of save_execution, or a legacy entry",
            actual=f"a model: {artifact.label}",
        )
    if artifact.pieces:
        check_environment(artifact, name)
    # Kept, so that no process evicts a piece between its check and its loading.
    with store.kept(artifact):
        files: dict[str, Path] = {}
        for piece in artifact.pieces:
            # By name and not by descriptor: an engine may keep the path, or map it after this.
            path = store.blob_path(piece.blob)
            if path is None:
                raise EntryDamagedError(
                    f"piece {piece.name!r} of {name} in {store.root} is missing or damaged. Compile it and "
                    "save the entry again.",
                    path=str(store.root),
                    field=f"pieces[{piece.name}]",
                    reason="missing or damaged",
                )
            files[piece.name] = path
        if isinstance(submod_callables, Mapping):
            callables = dict(submod_callables)
        else:
            callables = {each: submod_callables(each, files.get(each)) for each in artifact.submod_names}
    function = compile_execution_fn(artifact.code, callables, artifact.submod_names, artifact.consts)
    store.count("hit.load")
    log.info("%s: loaded %s in %.3f s", ENGINE, artifact.graph_hash[:12], time.perf_counter() - began)
    return function


def _find(source: str | os.PathLike[str], store: Cache) -> Artifact:
    check_kind("source", source, (str, os.PathLike), "a graph hash, a pathlib.Path or an Artifact")
    if not isinstance(source, str):
        path = Path(source)
        if not path.is_file():
            raise GraphHashError(f"{path}: there is no such file", prefix=str(path))
        return decode(path.read_bytes(), path=str(path))
    artifact = store.get(store.find(source))
    if artifact is None:
        raise GraphHashError(
            f"entry {source[:12]} in {store.root} cannot be read. Save it again.", prefix=source
        )
    return artifact
