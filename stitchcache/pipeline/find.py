"""``find``: what is asked for, and what a start can be served from, by target key or by graph hash."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from stitchcache.artifact import well_formed
from stitchcache.cache import Cache
from stitchcache.codegen import CodeObjects
from stitchcache.errors import EntryFormatError, OptionError, UntrustedEntryError, check_kind
from stitchcache.keys import TargetKey, target_key
from stitchcache.keys.check import check_sources
from stitchcache.keys.walk import Walk
from stitchcache.options import BACKENDS, COMPILER_OPTIONS, CudaGraphs, SizeRange
from stitchcache.records import dataclass
from stitchcache.runtime import misfit
from stitchcache.state import devices_of, taken_apart
from stitchcache.store import CHECKS, choice, required
from stitchcache.torchside import tree
from stitchcache.types import Artifact, TargetRecord

if TYPE_CHECKING:
    from stitchcache.api.preload import Preloaded
    from stitchcache.explanation import Differences, NearestEntry

log = logging.getLogger("stitchcache")

T = TypeVar("T")

_OWN_OPTIONS = {
    "stitchcache.jobs": int,
    "stitchcache.keep_sources": bool,
    "stitchcache.nice": int,
    "stitchcache.verify": bool,
    "stitchcache.effects": dict,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options of one compilation, as :func:`stitchcache.compile` takes them; ``label`` is for listings.

    Lists, sets and ``None`` are taken too, where there is a tuple or a dict then.

    Raises:
        OptionError: An option makes no sense.
    """

    dynamic_shapes: Any = None
    splitting_ops: tuple[str, ...] = ()
    size_ranges: tuple[SizeRange, ...] = ()
    backend: str = "aoti"
    on_miss: Literal["compile", "error", "eager"] = "compile"
    on_mismatch: Literal["error", "eager"] = "error"
    require: Literal["direct"] | None = None
    check: Literal["example", "background", "none"] | None = None
    key_factors: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    cuda_graphs: CudaGraphs | None = None  # in no key: it decides how calls run, not what is compiled
    label: str = ""

    def __post_init__(self) -> None:
        for name, kinds, empty, give in (
            ("splitting_ops", (list, tuple, set, frozenset), (), "a list of names"),
            ("size_ranges", (list, tuple), (), "a list of SizeRange objects"),
            ("key_factors", Mapping, {}, "a dict"),
            ("options", Mapping, {}, "a dict"),
        ):
            value = empty if getattr(self, name) is None else getattr(self, name)
            check_kind(name, value, kinds, give)
            ordered = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
            made = dict(value) if isinstance(value, Mapping) else tuple(ordered)
            object.__setattr__(self, name, made)
        for position, size_range in enumerate(self.size_ranges):
            check_kind(f"size_ranges[{position}]", size_range, SizeRange, "a stitchcache.SizeRange(min, max)")
        _one_of("backend", self.backend, BACKENDS)
        _one_of("on_miss", self.on_miss, ("compile", "error", "eager"))
        _one_of("on_mismatch", self.on_mismatch, ("error", "eager"))
        _one_of("require", self.require, (None, "direct"))
        _one_of("check", self.check, (None, *CHECKS))
        for op in self.splitting_ops:
            if not isinstance(op, str) or not op:
                raise _refused("splitting_ops", f": {op!r} is not an op's name; write 'namespace::op'.")
        check_kind("cuda_graphs", self.cuda_graphs, (CudaGraphs, NoneType), "a stitchcache.CudaGraphs(...)")
        for name, value in self.options.items():
            # Inductor looks at its own options when it compiles; eager pieces have none.
            ours = not isinstance(name, str) or name.startswith("stitchcache.") or self.backend == "eager"
            if ours and type(value) is not _OWN_OPTIONS.get(name):
                known = ", ".join(f"{n} ({k.__name__})" for n, k in _OWN_OPTIONS.items())
                there = "backend 'eager' has only" if self.backend == "eager" else "there is"
                raise _refused(f"options[{name!r}]", f"={value!r}: {there} {known}.")
        for op, writes in self.effects.items():
            if not isinstance(op, str) or "::" not in op or type(writes) is not bool:
                said = f" has {op!r}: {writes!r}; it maps ops, such as 'mylib::attention', to True or False."
                raise _refused("options['stitchcache.effects']", said)
        if self.jobs is not None and self.jobs < 1:
            said = "at least one process has to compile. Leave it out for about one a core."
            raise _refused("jobs", f"={self.jobs}: {said}")
        if self.nice is not None and not 0 <= self.nice <= 19:
            raise _refused("options['stitchcache.nice']", f"={self.nice}: 0 is usual, and 19 the lowest.")

    @property
    def backend_options(self) -> dict[str, Any]:
        """Options that go to the backend, and into keys."""
        ours = {} if self.backend == "eager" else COMPILER_OPTIONS
        return {**ours, **{k: v for k, v in self.options.items() if not k.startswith("stitchcache.")}}

    @property
    def jobs(self) -> int | None:
        """Processes to compile with; ``None`` takes about one a core."""
        return self.options.get("stitchcache.jobs")

    @property
    def nice(self) -> int | None:
        """Priority of what compiles for ``on_miss="eager"``; ``None`` leaves it only idle cores."""
        return self.options.get("stitchcache.nice")

    @property
    def effects(self) -> Mapping[str, bool]:
        """Ops that write what their schemas do not show (true), or that only seem to (false)."""
        found: Mapping[str, bool] = self.options.get("stitchcache.effects", {})
        return found

    @property
    def must_be_direct(self) -> bool:
        """Whether tracing is forbidden, by argument or by ``STITCHCACHE_REQUIRE=direct``."""
        return self.require == "direct" or required() == "direct"

    @property
    def miss_is_error(self) -> bool:
        """Whether compiling is forbidden, by argument or by ``STITCHCACHE_REQUIRE``."""
        return self.on_miss == "error" or self.require is not None or required() != "nothing"

    @property
    def eager_first(self) -> bool:
        """Whether a miss is served by the model itself, while a child process compiles it."""
        return self.on_miss == "eager" and not self.miss_is_error

    @property
    def checked(self) -> str:
        """When a hit is compared with the model: the argument, else ``STITCHCACHE_CHECK``, else at once."""
        return self.check or choice("STITCHCACHE_CHECK", CHECKS)


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise _refused(name, f"={value!r}: there is {', '.join(map(str, known))}.")


def _refused(option: str, said: str) -> OptionError:
    return OptionError(f"{option}{said}", option=option)


def check_model(model: Any, args: Any, kwargs: Any) -> None:
    """Refuse what cannot be compiled before anything is done, with an ``OptionError``."""
    check_kind("model", model, torch.nn.Module, "a torch.nn.Module; put a function into a module's forward")
    if model.training:
        kind = type(model).__qualname__
        raise OptionError(
            f"{kind} is in training mode, and compiled models are for inference. Call model.eval() first.",
            option="model",
        )
    check_arguments(args, kwargs)


def check_arguments(args: Any, kwargs: Any) -> None:
    """Refuse arguments that are not a tuple and a dict."""
    check_kind("args", args, tuple, "a tuple, such as (x,) for one argument")
    check_kind("kwargs", kwargs, Mapping, "a dict or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a compilation has come."""

    target: str  # the target's name or the model's class
    stage: str  # ``lookup``, ``capture``, ``wait``, ``compile``, ``store``, ``load`` or ``done``
    done: int = 0  # pieces that are ready, of ``total`` distinct ones
    total: int = 0
    seconds: float = 0.0  # since the target was begun
    left: float | None = None  # that compiling will still take, where that is known


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a start happens, and how long it takes there."""

    cache: Cache
    label: str  # what to call the model in log lines and listings
    device: str  # the device that pieces are loaded for
    devices: tuple[str, ...]  # types of all in use, sorted
    ready: Preloaded | None = None  # taken only where it is what was found
    asks: bool = True  # the remote; whoever forks a child that shall ask it must not have done so
    on_progress: OnProgress | None = None  # decides nothing
    began: float = field(default_factory=time.perf_counter)
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage

    def timed(self, stage: str, work: Callable[[], T]) -> T:
        """Do something and add its seconds to a stage."""
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - began

    def tell(self, stage: str, done: int = 0, total: int = 0, left: float | None = None) -> None:
        """Report progress."""
        if self.on_progress is not None:
            spent = time.perf_counter() - self.began
            self.on_progress(
                Progress(target=self.label, stage=stage, done=done, total=total, seconds=spent, left=left)
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be started: a model, an example call, a request, and the key that stands for them."""

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    leaves: Sequence[Any]  # those of ``args`` and ``kwargs``, in tree order
    request: Request
    site: Site
    target: TargetKey
    walk: Walk  # what computing the key has digested; checking sources need not digest it again
    # The key of another model under the same options, with other leaves and a walk of its own.
    key_again: Callable[[torch.nn.Module, Sequence[Any], Walk], TargetKey]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """An artifact that may be served: an entry that was found, or one that was made now."""

    artifact: Artifact
    way: str | None = "graph"  # or ``"direct"``, ``"load"``; ``None`` where it was compiled now
    record: TargetRecord | None = None  # that led to it; ``None`` where the graph hash did
    objects: CodeObjects | None = None  # of its generated source, as far as known; new ones are added
    # Its pieces by key and its constants by name, where they are loaded already.
    loaded: tuple[Mapping[str, Any], Mapping[str, torch.Tensor]] | None = None
    store: Callable[[Artifact], None] | None = None  # puts a new artifact after the look


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """Why nothing is served.

    ``reason`` is for people, ``cause`` for the statistics: ``new``, ``unkeyable``, ``sources``, ``entry``,
    ``example``, ``piece``, ``refused`` or ``look``.
    """

    reason: str
    cause: str
    record: TargetRecord | None = None  # the newest that the key leads to, if it leads anywhere
    # What it found out besides, if it looked; ``hint`` is the same in a few words.
    changed: Differences = field(default_factory=dict)
    nearest: NearestEntry | None = None
    hint: str = ""


def want(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    request: Request,
    cache: Cache,
    on_progress: OnProgress | None = None,
    ready: Preloaded | None = None,
) -> Wanted:
    """Compute the target key of a model with an example call; none of the model's code is run."""
    began, walk = time.perf_counter(), Walk()
    leaves, spec = tree.flatten((args, dict(kwargs)))
    paths, text = tree.leaf_paths(model.forward, args, dict(kwargs)), tree.dumps(spec)

    how = (request.dynamic_shapes, request.splitting_ops, request.size_ranges)
    options = (request.backend, request.backend_options, request.key_factors)

    def key_of(model: torch.nn.Module, leaves: Sequence[Any], walk: Walk, *known: Sequence[str]) -> TargetKey:
        given, apart = list(zip(paths, leaves, strict=True)), taken_apart(model)
        # What a tensor is made of may lie elsewhere.
        return target_key(apart, given, text, *how, *options, walk, *(known if apart is model else ()))

    device, devices = devices_of(model, leaves)
    if request.cuda_graphs is not None and devices != ("cuda",):
        said = ": graphs are of what runs on one GPU, and the model or an argument is on"
        raise _refused("cuda_graphs", f"{said} {', '.join(devices)}.")
    site = Site(
        cache=cache,
        label=request.label or type(model).__qualname__,
        device=device,
        devices=devices,
        ready=ready,
        asks=not request.eager_first,
        on_progress=on_progress,
        began=began,
    )
    return Wanted(
        model=model,
        args=args,
        kwargs=dict(kwargs),
        leaves=leaves,
        request=request,
        site=site,
        target=site.timed("key", lambda: key_of(model, leaves, walk, devices)),
        walk=walk,
        key_again=key_of,
    )


def find(wanted: Wanted) -> Hit | Miss:
    """The entry that the target key leads to.

    A key may have several records: one model, told apart by a global or an environment variable that no key
    covers. The newest whose sources and globals are what they were is taken; a miss tells of the newest.
    """
    key, site = wanted.target.key, wanted.site
    site.tell("lookup")
    if key is None:
        return Miss(reason=wanted.target.reason or "this target has no key", cause="unkeyable")
    looked = wanted.request.checked != "none"
    first: Miss | None = None
    for record in _records(key, site):
        try:
            with well_formed(f"target {key[:12]}"):
                changed = site.timed("sources", partial(check_sources, record, wanted.walk, looked=looked))
        except EntryFormatError as error:
            log.warning("%s: a record is not used: %s", site.label, error)
            changed = error.message
        found = _find_by_record(wanted, record, changed)
        if isinstance(found, Hit):
            return found
        first = first or found
        if record.refused is not None and changed is None:
            # It is about what is wanted here, so an older record must not be served past it.
            break
    reason, cause = site.cache.problem(key)
    return first or Miss(reason=reason or "no entry for this target", cause=cause)


def _records(key: str, site: Site) -> Iterator[TargetRecord]:
    """Records of a target key: the cache's, and if none of them is served, what the remote has besides."""
    yield from site.cache.get_target(key)
    if site.asks and site.cache.remote:
        yield from site.cache.tier.records(site.cache, key)


def _find_by_record(wanted: Wanted, record: TargetRecord, changed: str | None) -> Hit | Miss:
    if record.refused is not None:
        return Miss(reason=record.refused, cause="unkeyable", record=record)
    if changed is not None:
        return Miss(reason=changed, cause="sources", record=record)
    found = find_by_graph(record.graph_hash, wanted.site)
    if isinstance(found, Miss) and found.cause == "refused":
        return replace(found, record=record)
    if isinstance(found, Miss) or found.artifact.input_spec is None:
        gone = f"the entry {record.graph_hash[:12]} is gone or damaged"
        return Miss(reason=gone, cause="entry", record=record)
    # torch.export may tie two sizes together by the example's; another example is another target.
    objects = CodeObjects(record.code)
    wrong = misfit(found.artifact, wanted.model.forward, wanted.args, wanted.kwargs, objects)
    if wrong is not None:
        wrong = f"the example does not fit what was captured: {wrong}"
        return Miss(reason=wrong, cause="example", record=record)
    return Hit(artifact=found.artifact, way="direct", record=record, objects=objects)


def find_by_graph(graph_hash: str, site: Site) -> Hit | Miss:
    """The entry of a graph hash; one that cannot be trusted is a miss and a warning."""
    artifact = site.ready.artifact(graph_hash) if site.ready is not None else None
    if artifact is None:
        try:
            artifact = site.cache.get(graph_hash)
            if artifact is None and site.asks and site.cache.remote:
                artifact = site.cache.tier.entry(site.cache, graph_hash)
        except UntrustedEntryError as error:
            site.cache.warn(error.path, error.message, cause="refused")
            return Miss(reason=error.message, cause="refused")
    if artifact is None:
        reason, cause = site.cache.problem(graph_hash)
        return Miss(reason=reason or f"no entry for graph {graph_hash[:12]}", cause=cause)
    return Hit(artifact=artifact)
