"""``start``: from an artifact to a callable. Every road ends here, with one log line and one count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from stitchcache.cache import Cache
from stitchcache.codegen.execution import CodeObjects
from stitchcache.errors import (
    BackendError,
    BindError,
    EntryDamagedError,
    EntryFormatError,
    LinkError,
    StaleEntryError,
    UntrustedEntryError,
)
from stitchcache.keys.target import TargetKey
from stitchcache.pieces import get_backend
from stitchcache.pipeline.find import Miss, Ready
from stitchcache.pipeline.request import Site
from stitchcache.runtime.model import CompiledModel
from stitchcache.types import Artifact

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass

log = logging.getLogger("stitchcache")

T = TypeVar("T")


class Started(Protocol):
    """What every start ends in: a callable that knows its artifact."""

    artifact: Artifact


R = TypeVar("R", bound=Started)

# What a start is called in the log and in the statistics, by the road that led to it.
_SAID = {"direct": "direct hit", "graph": "graph hit", "load": "loaded", None: "compiled"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """An artifact's blobs, loaded.

    Args:
        pieces: Piece key to callable.
        constants: Name to tensor, for the tensors that the artifact carries itself.
    """

    pieces: Mapping[str, Any]
    constants: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """By which road an artifact comes to be started, and what is at hand of it.

    Args:
        hit: ``"direct"``, ``"graph"``, ``"load"``, or ``None`` where it was compiled now.
        miss: Why it is no direct hit; ``None`` where it is one, or none was asked for.
        loaded: Its blobs, where they are loaded already.
        store: Puts a new artifact, after the look at it.
    """

    hit: str | None
    miss: Miss | None = None
    loaded: Loaded | None = None
    store: Callable[[Artifact], None] | None = None


def start(
    artifact: Artifact,
    way: Way,
    model: torch.nn.Module,
    site: Site,
    *,
    target: TargetKey | None = None,
    objects: CodeObjects | None = None,
    ready: Ready | None = None,
    look: Callable[[CompiledModel], None] | None = None,
) -> CompiledModel:
    """Make an artifact callable on a model.

    Args:
        artifact: What was found or made.
        way: How it came to this.
        model: Its parameters and buffers are bound by reference.
        site: Where.
        target: The target key; ``None`` where none was computed.
        objects: Code objects of its stitching functions; new ones are added.
        ready: Pieces that a preload may have loaded.
        look: Compares it with the model before anybody gets it, and raises where they disagree.

    Raises:
        EntryDamagedError: A blob is missing or damaged.
        BindError: The model has other tensors.
        BackendError: A piece cannot be loaded here.
        UntrustedEntryError: Others could have written a blob.
        StaleEntryError: The look found that a hit is wrong.
    """

    def link(found: Loaded) -> CompiledModel:
        hit = "graph" if way.hit == "load" else way.hit
        return CompiledModel(artifact, model, found.pieces, found.constants, cache_hit=hit, objects=objects)

    compiled = start_with(link, artifact, way, site, ready, look)
    compiled.timings = dict(site.clock.timings)
    if target is not None:
        reason, facts = (way.miss.reason, way.miss.facts) if way.miss is not None else ("", None)
        compiled.lookup = (site.label, target, reason, facts)
    return compiled


def start_with(
    link: Callable[[Loaded], R],
    artifact: Artifact,
    way: Way,
    site: Site,
    ready: Ready | None = None,
    look: Callable[[R], None] | None = None,
) -> R:
    """:func:`start` for any callable: for a model's, and for that of a graph of Dynamo's.

    Args:
        link: Binds loaded blobs to stitching code; the rest is as for :func:`start`.
        artifact: See there.
        way: See there.
        site: See there.
        ready: See there.
        look: See there.
    """
    clock = site.clock
    loaded, store, miss = way.loaded, way.store, way.miss
    if loaded is not None:
        compiled = clock.timed("link", lambda: link(loaded))
    else:
        # Held, so that no process evicts a blob between its check and its loading.
        with site.cache.hold(artifact):
            pieces = ready.take(artifact.graph_hash) if ready is not None and site.device == "cpu" else {}
            opened = clock.timed("load", lambda: load_blobs(artifact, site.cache, site.device, pieces))
            compiled = clock.timed("link", lambda: link(opened))
    if look is not None:
        clock.timed("look", lambda: look(compiled))
    if store is not None:
        clock.timed("store", lambda: store(compiled.artifact))
    _count(artifact, site, way)
    clock.timings["total"] = clock.seconds
    log.info(
        "%s: %s %s in %.3f s%s",
        site.label,
        _SAID[way.hit],
        artifact.graph_hash[:12],
        clock.timings["total"],
        f" (no direct hit: {miss.reason}{miss.facts.hint if miss.facts else ''})" if miss else "",
    )
    clock.tell("done")
    return compiled


def _count(artifact: Artifact, site: Site, way: Way) -> None:
    """Add to the store's statistics."""
    spent, count = site.clock.seconds, site.cache.count
    count(f"hit.{way.hit}" if way.hit else "compiled")
    if way.miss is not None:
        count(f"miss.{way.miss.cause}")
    count("microseconds.spent", int(spent * 1e6))
    if way.hit:
        count("microseconds.saved", max(0, int((artifact.compile_seconds - spent) * 1e6)))


def started_or_miss(artifact: Artifact, site: Site, begin: Callable[[], T]) -> T | Miss:
    """Start what was found; an entry that cannot be used here is a miss, and a warning.

    Args:
        artifact: What was found.
        site: Where.
        begin: Starts it.
    """
    name = artifact.graph_hash[:12]
    try:
        return begin()
    except EntryDamagedError:
        # The store has told of damage; a blob that was evicted is no news.
        return Miss(reason=f"a piece of entry {name} is missing or damaged", cause="piece")
    except StaleEntryError as error:
        log.warning("%s: entry %s is not used: %s", site.label, name, error)
        return Miss(reason=error.message, cause="look")
    except (UntrustedEntryError, EntryFormatError, LinkError, BindError, BackendError) as error:
        log.warning("%s: entry %s is not used: %s", site.label, name, error)
        return Miss(reason=error.message, cause="refused")
    except OSError as error:
        # Checked a moment ago, and now it cannot be read: too many open files, a stale network file.
        log.warning("%s: entry %s cannot be loaded: %s", site.label, name, error)
        return Miss(reason=str(error), cause="piece")


def load_blobs(artifact: Artifact, cache: Cache, device: str, ready: Mapping[tuple[str, str], Any]) -> Loaded:
    """Load every distinct piece of an artifact, and the tensors that it carries.

    Args:
        artifact: From the cache.
        cache: Where its blobs are.
        device: Where pieces run.
        ready: Pieces that are loaded for that device already, by backend and digest of their bytes.

    Raises:
        EntryDamagedError: A blob is missing or damaged.
        BackendError: A piece cannot be loaded here.
        UntrustedEntryError: A blob could have been written by others.
    """
    distinct = {piece.key: piece for piece in artifact.pieces}
    paths = cache.blob_paths([piece.blob for piece in distinct.values()])
    pieces: dict[str, Any] = {}
    for piece, path in zip(distinct.values(), paths, strict=True):
        if path is None:
            raise _missing(artifact, cache)
        loaded = ready.get((piece.backend, piece.blob.digest))
        pieces[piece.key] = loaded or get_backend(piece.backend).load(path, device)
    return Loaded(pieces, _load_constants(artifact, cache, device))


def _load_constants(artifact: Artifact, cache: Cache, device: str) -> dict[str, torch.Tensor]:
    constants: dict[str, torch.Tensor] = {}
    for binding in artifact.bindings:
        if binding.kind != "constant" or binding.blob is None:
            continue
        # Few models carry constants, and a warm start without them needs no reader of pickles.
        from stitchcache.artifact.consts import load_consts

        path = cache.blob_path(binding.blob)
        if path is None:
            raise _missing(artifact, cache)
        stored = load_consts(path.read_bytes())
        if len(stored) != 1 or not isinstance(stored[0], torch.Tensor):
            raise EntryFormatError(
                f"{path}: constant {binding.name!r} is not a tensor. Run 'stitchcache verify --repair'.",
                path=str(path),
                field=f"bindings[{binding.name}]",
                reason="not a tensor",
            )
        tensor = stored[0]
        constants[binding.name] = tensor if binding.tensor.device == "cpu" else tensor.to(device)
    return constants


def _missing(artifact: Artifact, cache: Cache) -> EntryDamagedError:
    return EntryDamagedError(
        f"a piece of entry {artifact.graph_hash[:12]} in {cache.root} is missing or damaged. "
        "Compile the model again.",
        path=str(cache.root),
        field="pieces",
        reason="missing or damaged",
    )
