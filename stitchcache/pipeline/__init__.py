"""Three verbs over values that do not change: ``find``, ``make`` and ``start``.

``find`` says what a start can be served from (``Hit``) or why nothing is served (``Miss``). ``make`` compiles
what the cache lacks. ``start``, in this file, makes an artifact callable: every road ends in it, with one log
line and one count. docs/design.md has the walk of each road.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from stitchcache import errors
from stitchcache.artifact import well_formed
from stitchcache.keys import TargetKey
from stitchcache.keys.check import check_sources
from stitchcache.keys.walk import Walk
from stitchcache.options import CudaGraphs
from stitchcache.pipeline.find import Hit, Miss, Site, Wanted
from stitchcache.runtime.model import CompiledModel
from stitchcache.state import state_attributes, taken_apart
from stitchcache.torchside import load_library
from stitchcache.types import Artifact, BindingSpec, Change, Factor, TargetRecord

if TYPE_CHECKING:
    from stitchcache.runtime.graph import CompiledGraph

log = logging.getLogger("stitchcache")

T = TypeVar("T")
R = TypeVar("R", bound="CompiledModel | CompiledGraph")

_UNUSABLE = (
    errors.StaleEntryError,
    errors.UntrustedEntryError,
    errors.EntryFormatError,
    errors.LinkError,
    errors.BindError,
    errors.BackendError,
)
# What a start is called in the log and in the statistics, by the road that led to it.
_ROADS = {
    "direct": ("direct hit", "hit.direct"),
    "graph": ("graph hit", "hit.graph"),
    "load": ("loaded", "hit.load"),
    "aside": ("swapped in", "swapped"),
    None: ("compiled", "compiled"),
}


def start(
    found: Hit,
    model: torch.nn.Module,
    site: Site,
    *,
    miss: Miss | None = None,
    target: TargetKey | None = None,
    look: Callable[[CompiledModel], None] | None = None,
    cuda_graphs: CudaGraphs | None = None,
) -> CompiledModel:
    """Make an artifact callable on a model, whose parameters and buffers are bound by reference.

    ``miss`` is why it is no direct hit, ``target`` the key, if one was computed. ``look`` compares the
    callable with the model before anybody gets it, and raises where they disagree.
    """

    def link(pieces: Mapping[str, Any], constants: Mapping[str, torch.Tensor]) -> CompiledModel:
        hit = "graph" if found.way == "load" else found.way
        how: dict[str, Any] = {"cache_hit": hit, "objects": found.objects, "cuda_graphs": cuda_graphs}
        return CompiledModel(found.artifact, model, pieces, constants, **how)

    compiled = start_with(link, found, site, miss, look)
    for said in found.artifact.narrowed.values():
        log.warning("%s: size %s", site.label, said)
    # What was recorded for the look has its seconds there already.
    compiled.timings |= {stage: round(seconds, 6) for stage, seconds in site.timings.items()}
    # A cache that nobody holds goes away here, and would write its counts before the first call.
    compiled.came_from = site.cache
    if target is not None:
        compiled.lookup = (site.label, target, miss)
    return compiled


def start_with(
    link: Callable[[Mapping[str, Any], Mapping[str, torch.Tensor]], R],
    found: Hit,
    site: Site,
    miss: Miss | None = None,
    look: Callable[[R], None] | None = None,
) -> R:
    """:func:`start` for any callable: ``link`` binds loaded pieces and constants to stitching code."""
    artifact, cache = found.artifact, site.cache
    # What was compiled now is ours; an entry may be anybody's.
    with nullcontext() if found.way is None else well_formed(f"entry {artifact.graph_hash[:12]}"):
        loaded = found.loaded or site.timed("load", lambda: load_blobs(artifact, site))
        compiled = site.timed("link", lambda: link(*loaded))
    if look is not None:
        site.timed("look", lambda: look(compiled))
    if (store := found.store) is not None:
        site.timed("store", lambda: store(compiled.artifact))
    spent = site.timings["total"] = time.perf_counter() - site.began
    said, counted = _ROADS[found.way]
    cache.count(counted)
    if miss is not None:
        cache.count(f"miss.{miss.cause}")
    cache.count("microseconds.spent", int(spent * 1e6))
    saved = max(0.0, artifact.compile_seconds - spent) if counted.startswith("hit.") else 0.0
    if saved:
        cache.count("microseconds.saved", int(saved * 1e6))
    cache.started(artifact.graph_hash, counted, saved, site.timings)
    why = f" (no direct hit: {miss.reason}{miss.hint})" if miss else ""
    log.info("%s: %s %s in %.3f s%s", site.label, said, artifact.graph_hash[:12], spent, why)
    site.tell("done")
    return compiled


def started_or_miss(artifact: Artifact, site: Site, begin: Callable[[], T]) -> T | Miss:
    """Start what was found; an entry that cannot be used here is a miss, and a warning."""
    name = artifact.graph_hash[:12]
    try:
        return begin()
    except errors.EntryDamagedError as error:
        # The store has told of damage; a blob that was evicted is no news.
        return Miss(reason=f"a piece of entry {name} is {error.reason}", cause="piece")
    except _UNUSABLE as error:
        # It is met on several roads.
        site.cache.warn(f"{name} {error}", f"{site.label}: entry {name} is not used: {error}")
        return Miss(
            reason=error.message, cause="look" if isinstance(error, errors.StaleEntryError) else "refused"
        )
    except OSError as error:
        # Checked a moment ago, and now it cannot be read: too many open files, a stale network file.
        log.warning("%s: entry %s cannot be loaded: %s", site.label, name, error)
        return Miss(reason=str(error), cause="piece")


def load_blobs(artifact: Artifact, site: Site) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Load every distinct piece of an artifact by its key, and the tensors that it carries by name."""
    ready = site.ready.take(artifact.graph_hash) if site.ready is not None and site.device == "cpu" else {}
    distinct = {piece.key: piece for piece in artifact.pieces}
    for piece in distinct.values():
        site.cache.require_voucher(piece.backend)
    carried = [(binding, binding.blob) for binding in artifact.bindings if binding.blob is not None]
    refs = [*(piece.blob for piece in distinct.values()), *(blob for _, blob in carried)]
    # All are opened before the first is loaded: what a prune removes meanwhile stays in reach.
    with site.cache.opened(refs) as found:
        paths = [path for path in found if path is not None]
        if len(paths) != len(found):
            problems = filter(None, (site.cache.problem(blob.digest)[0] for blob in artifact.blobs))
            reason = next((f"not there ({said})" for said in problems), "missing or damaged")
            raise errors.EntryDamagedError(
                f"a piece of entry {artifact.graph_hash[:12]} in {site.cache.root} is {reason}. "
                "Compile the model again.",
                path=str(site.cache.root),
                field="pieces",
                reason=reason,
            )
        pieces = {
            key: ready.get((piece.backend, piece.blob.digest)) or load_piece(piece.backend, path, site.device)
            for (key, piece), path in zip(distinct.items(), paths, strict=False)
        }
        rest = zip(carried, paths[len(distinct) :], strict=True)
        return pieces, {binding.name: _constant(binding, path, site.device) for (binding, _), path in rest}


def load_piece(backend: str, path: Path, device: str) -> Callable[[list[Any]], Sequence[Any]]:
    """Load one stored piece; a ``BackendError`` where that fails."""
    if backend == "aoti":
        return load_library(path, device)
    # What compiles comes along with it: a warm start seldom has such pieces.
    from stitchcache.pieces import get_backend

    return get_backend(backend).load(path, device)


def _constant(binding: BindingSpec, path: Path, device: str) -> torch.Tensor:
    # Few models carry constants, and a warm start without them needs no reader of pickles.
    from stitchcache.artifact.consts import load_consts

    stored = load_consts(path.read_bytes())
    if len(stored) != 1 or not isinstance(stored[0], torch.Tensor):
        reason = "not a tensor. Run 'stitchcache verify --repair'."
        raise errors.EntryFormatError.at(str(path), f"bindings[{binding.name}]", reason)
    return stored[0] if binding.tensor.device == "cpu" else stored[0].to(device)


def store_target(wanted: Wanted, record: TargetRecord) -> None:
    """Let the target key lead to an entry, or say why it may not."""
    site, key = wanted.site, wanted.target.key
    try:
        if key is not None:
            site.cache.put_target(key, record)
    except errors.StoreWriteError as error:
        said = "the next start has to trace the model again, as its target record is not stored"
        log.warning("%s: %s: %s", site.label, said, error)


def changed_from(
    wanted: Wanted, record: TargetRecord, bindings: Sequence[BindingSpec]
) -> Callable[[torch.nn.Module], Change | None]:
    """What tells whether a trace of a model may be another one than the trace that was compiled.

    Neither model nor tensors of ``wanted`` are kept.
    """
    target, key_again = wanted.target, wanted.key_again
    unknown = target.reason or record.refused
    leaves = without_data(wanted.leaves) if unknown is None else []

    def changed(model: torch.nn.Module) -> Change | None:
        walk, reason = Walk(), unknown
        now = key_again(model, leaves, walk) if reason is None else target
        if reason is not None or now.key is None:
            return Change(name="model", was="", now=reason or now.reason or "", unknown=True)
        model = taken_apart(model)
        # Of the other factors, the example's and the options' are fixed, and a process keeps its machine.
        found = first_change(target.factors, now.factors, ("model.", "code.", "torch."), model, bindings)
        # A model that was called has warm caches, and is the same model.
        if found is None and (reason := check_sources(record, walk, looked=True)) is not None:
            found = Change(name="sources", was="as captured", now=reason)
        return found

    return changed


def without_data(leaves: Sequence[Any]) -> list[Any]:
    """Leaves with each tensor replaced by one that has its metadata and takes no memory."""
    # A tensor that occurs twice stays one tensor, as that is part of a key.
    replaced = {
        id(leaf): torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
        for leaf in leaves
        if isinstance(leaf, torch.Tensor)
    }
    return [replaced.get(id(leaf), leaf) for leaf in leaves]


def first_change(
    before: Iterable[Factor],
    now: Iterable[Factor],
    prefixes: tuple[str, ...],
    model: torch.nn.Module,
    bindings: Sequence[BindingSpec],
) -> Change | None:
    """The most telling factor that differs, of those whose names begin so; ``None`` where none does."""
    # Attributes that lead to bound tensors hold state, which calls change.
    state = state_attributes(model, [name for item in bindings for name in (item.name, *item.aliases)])
    old, new = ({f.name: f for f in some if f.name.startswith(prefixes)} for some in (before, now))
    found = None
    # An attribute more changes the order of attributes too, and its own factor names it.
    for name in sorted(dict.fromkeys([*old, *new]), key=lambda name: name.endswith("_order")):
        if name.startswith("model.attributes.") and name.rpartition(".")[2] in state:
            continue
        was, is_now = old.get(name), new.get(name)
        if was is None or is_now is None or was.digest != is_now.digest:
            texts = ["not there" if factor is None else repr(factor.value) for factor in (was, is_now)]
            change = Change(name=name, was=texts[0], now=texts[1])
            # "68 tensors" and "68 tensors" tells nobody anything.
            if texts[0] != texts[1]:
                return change
            found = found or change
    return found
