"""``stitchcache.prewarm``, and the targets that it compiles: found by reference, called by name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType, NoneType
from typing import TYPE_CHECKING, Any, Literal

from stitchcache import errors
from stitchcache.api.compile import compile_request
from stitchcache.api.progress import bar
from stitchcache.cache import Cache, chosen_cache
from stitchcache.options import CudaGraphs, SizeRange
from stitchcache.pipeline.find import Hit, OnProgress, Request, Wanted, check_model, find, want
from stitchcache.torchside import without_data

if TYPE_CHECKING:
    from stitchcache.runtime.graph import CompiledGraph
    from stitchcache.runtime.model import CompiledModel


@dataclass(frozen=True, slots=True)
class Target:
    """A model to compile, and how.

    Args:
        name: Unique among the targets of a run.
        build: Makes ``(model, args)`` or ``(model, args, kwargs)``; called when its turn comes.
        dynamic_shapes: As for :func:`stitchcache.compile`, like the rest.
        splitting_ops: Ops to split at.
        size_ranges: Ranges that get pieces of their own.
        backend: Piece backend.
        key_factors: The caller's own distinctions.
        options: Inductor options and ours.
        torch_compile: Let ``torch.compile(model, backend="stitchcache", ...)`` capture the model, with these
            arguments of its: ``{"dynamic": True}``, say, or ``{}``. ``None`` is :func:`stitchcache.compile`.
        cuda_graphs: Recorded by whoever compiles the target, so it is tried here too.

    Raises:
        OptionError: ``name`` is no text, ``build`` cannot be called, or an option means nothing to
            ``torch.compile``.
    """

    name: str
    build: Callable[[], tuple[Any, ...]]
    dynamic_shapes: Any = field(default=None, kw_only=True)
    splitting_ops: Sequence[str] = field(default=(), kw_only=True)
    size_ranges: Sequence[SizeRange] | None = field(default=None, kw_only=True)
    backend: str = field(default="aoti", kw_only=True)
    key_factors: Mapping[str, Any] | None = field(default=None, kw_only=True)
    options: Mapping[str, Any] | None = field(default=None, kw_only=True)
    torch_compile: Mapping[str, Any] | None = field(default=None, kw_only=True)
    cuda_graphs: CudaGraphs | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        errors.check_kind("name", self.name, str, "a name")
        errors.check_kind("build", self.build, Callable, "a function that returns (model, args)")
        how = self.torch_compile
        errors.check_kind("torch_compile", how, (Mapping, NoneType), "a dict, such as {'dynamic': True}")
        for name in (how or {}).keys() - {"dynamic", "fullgraph"}:
            said = f"torch_compile[{name!r}]: there is dynamic and fullgraph."
            raise errors.OptionError(said, option="torch_compile")
        if how is not None and self.cuda_graphs is not None:
            said = "cuda_graphs: graphs are recorded by stitchcache.compile, and not under torch.compile."
            raise errors.OptionError(said, option="cuda_graphs")
        if how is not None and (self.dynamic_shapes is not None or self.size_ranges):
            said = "dynamic_shapes and size_ranges mean nothing to torch.compile: use {'dynamic': True}."
            raise errors.OptionError(said, option="torch_compile")

    def made(self, *, fake: bool = False) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Build the model and its example arguments; with ``fake`` no weight takes any memory.

        Raises:
            TargetError: ``build`` failed, or returned something else.
        """
        with (
            _users_code(lambda error: self._error(f"failed: {type(error).__name__}: {error}")),
            without_data() if fake else nullcontext(),
        ):
            built = self.build()
        if not isinstance(built, tuple) or len(built) not in (2, 3):
            kind = type(built).__qualname__
            raise self._error(f"returned {kind}, not (model, args) or (model, args, kwargs).")
        model, args, kwargs = built if len(built) == 3 else (*built, {})
        if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
            raise self._error(
                f"returned {type(args).__qualname__} for the arguments and {type(kwargs).__qualname__} for "
                "the keyword arguments, not a tuple and a dict."
            )
        return model, tuple(args), dict(kwargs)

    def _error(self, what: str) -> errors.TargetError:
        return errors.TargetError(f"target {self.name!r}: build() {what}", target=self.name)


@contextmanager
def _users_code(ours: Callable[[Exception], errors.StitchCacheError]) -> Iterator[None]:
    """A block that runs the user's code, the boundary where any error of theirs becomes one of ours.

    So no target stops those after it. Ctrl-C and exits are no ``Exception``, and go through.
    """
    try:
        yield
    except Exception as error:
        raise ours(error) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PrewarmResult:
    """What became of one target."""

    name: str
    # ``direct``, ``graph`` (it was there), ``compiled``, ``failed``; by shards ``shard``, ``left`` for later
    status: str
    graph_hash: str = ""  # its entry
    more_graphs: tuple[str, ...] = ()  # entries of its other graphs, where torch.compile captured several
    stored: bool = False  # the cache holds that entry now, so that other processes find it
    pieces: int = 0  # calls of compiled pieces
    distinct: int = 0  # different pieces
    blob_bytes: int = 0  # size of the different pieces
    seconds: float = 0.0  # the building of the model not counted
    timings: Mapping[str, float] | None = None  # seconds by stage
    error: errors.StitchCacheError | None = None  # why it failed, or is not stored


@dataclass(frozen=True, slots=True)
class PrewarmReport:
    """What became of all targets: ``results`` has one each, in their order."""

    results: tuple[PrewarmResult, ...]

    @property
    def failed(self) -> tuple[PrewarmResult, ...]:
        """Targets that could not be compiled, or not be stored."""
        return tuple(result for result in self.results if result.error is not None)

    @property
    def ok(self) -> bool:
        """Whether every target is in the cache now."""
        return not self.failed


def prewarm(
    targets: Iterable[Target | str] | Target | str,
    *,
    jobs: int | None = None,
    cache: Cache | None = None,
    on_progress: OnProgress | Literal["bar"] | None = None,
    on_miss: str = "compile",
    fake: bool = False,
    shard: tuple[int, int] | None = None,
    keep_sources: bool = False,
) -> PrewarmReport:
    """Compile targets that are not in the cache yet; one that fails does not stop the others.

    With ``fake`` no weights are needed, and none take any memory: models are built with tensors that
    have no data. Keys are those of the real model, which then gets a direct hit. Pieces are compared
    with eager execution on random inputs, each for itself.

    Args:
        targets: Targets, or references such as ``"pkg.module:name"``.
        jobs: Pieces to compile at a time; ``None`` takes one a core.
        cache: Where to store; the default cache if ``None``.
        on_progress: Called with a ``stitchcache.Progress`` as things happen; ``"bar"`` shows them on stderr.
        on_miss: ``"compile"``, or ``"error"`` to check that everything is there already.
        fake: Call each target's ``build`` where every tensor that it makes has no data.
        shard: ``(i, n)``: compile the pieces of shard ``i`` of ``n``, counted from 0, and store no entry yet.
            Where pieces of all shards are in the cache, a call without ``shard`` compiles nothing and stores
            the entries.
        keep_sources: Keep the generated C++ or Triton of what is compiled, for ``inspect --source``.

    Returns:
        What became of each.

    Raises:
        TargetError: A reference leads nowhere, or two targets have one name.
        OptionError: An argument makes no sense.
    """
    errors.check_kind("targets", targets, (Target, str, Iterable), "Targets, or references 'pkg.module:name'")
    if on_progress != "bar":
        errors.check_kind(
            "on_progress", on_progress, (Callable, NoneType), "a function of one argument, or 'bar'"
        )
    # Not of one target, so it is no failure of each: refused before any model is built.
    options: dict[str, Any] = {} if jobs is None else {"stitchcache.jobs": jobs}
    options |= {"stitchcache.keep_sources": True} if keep_sources else {}
    Request(options=options, on_miss=on_miss)  # type: ignore[arg-type]
    errors.check_kind("shard", shard, (tuple, NoneType), "(i, n)")
    if shard is not None and (list(map(type, shard)) != [int, int] or shard[0] not in range(shard[1])):
        raise errors.OptionError(f"shard={shard!r}: give (i, n) with i from 0 to n - 1.", option="shard")
    found: list[Target] = []
    for item in [targets] if isinstance(targets, (Target, str)) else targets:
        errors.check_kind("targets", item, (Target, str), "Targets, or references 'pkg.module:name'")
        found += find_targets(item) if isinstance(item, str) else [item]
    check_names(found)
    store = chosen_cache(cache)
    with bar() if on_progress == "bar" else nullcontext(on_progress) as told:
        results = [_one(target, options, on_miss, fake, shard, store, told) for target in found]
    return PrewarmReport(tuple(looked_up(results, store)))


def looked_up(results: Iterable[PrewarmResult], cache: Cache) -> Iterator[PrewarmResult]:
    """Results with what the cache holds after all of them: a later target may have evicted an earlier one."""
    for result in results:
        if result.error is not None or result.status in ("shard", "left"):
            yield result
            continue
        error: errors.StitchCacheError | None = None
        try:
            if any(cache.get(each) is None for each in (result.graph_hash, *result.more_graphs)):
                gone = "it was evicted: the limits (max_bytes, max_files) have no room for all targets"
                if cache.max_bytes is None and cache.max_files is None:
                    gone = "it was removed"
                why = cache.problem(result.graph_hash)[0] or cache.failure or gone
                message = f"target {result.name!r} is compiled, and not stored in {cache.root}: {why}"
                error = errors.StoreWriteError(message, path=str(cache.root), reason=why)
        except errors.UntrustedEntryError as untrusted:
            error = untrusted
        yield replace(result, stored=error is None, error=error)


def _one(
    target: Target,
    options: Mapping[str, Any],
    on_miss: str,
    fake: bool,
    shard: tuple[int, int] | None,
    cache: Cache,
    on_progress: OnProgress | None,
) -> PrewarmResult:
    began = time.perf_counter()
    try:
        request = request_for(target, options, on_miss)
        if fake and target.torch_compile is not None:
            raise target._error("needs real weights: torch.compile runs the model.")
        if shard is not None and target.torch_compile is not None:
            # Its graphs are known only while it runs.
            return PrewarmResult(name=target.name, status="left")
        model, args, kwargs = target.made(fake=fake)
        began = time.perf_counter()
        if shard is not None:
            check_model(model, args, kwargs)
            return _share(want(model, args, kwargs, request, cache, on_progress), shard, began)
        if target.torch_compile is None:
            compiled = compile_request(model, args, kwargs, request, cache, on_progress)
            result = _counted(target.name, [compiled], began)
            return replace(result, status=compiled.cache_hit or "compiled", timings=compiled.timings)
        # Not at the top: most targets need nothing of Dynamo.
        from stitchcache.api.dynamo import compile_graphs

        def refused(error: Exception) -> errors.StitchCacheError:
            # Dynamo wraps what a backend raises.
            inner = getattr(error, "inner_exception", error)
            if isinstance(inner, errors.StitchCacheError):
                raise inner from None
            said = f"torch.compile cannot run the model: {type(error).__name__}: {error}"
            return errors.CaptureError(f"target {target.name!r}: {said}", reason=said)

        with _users_code(refused):
            graphs = compile_graphs(model, args, kwargs, request, cache, target.torch_compile)
        return _counted(target.name, graphs, began)
    except errors.StitchCacheError as error:
        spent = time.perf_counter() - began
        return PrewarmResult(name=target.name, status="failed", seconds=spent, error=error)


def _share(wanted: Wanted, shard: tuple[int, int], began: float) -> PrewarmResult:
    """Compile a shard's pieces of a target that has no entry yet."""
    name, found = wanted.site.label, find(wanted)
    if isinstance(found, Hit):
        return PrewarmResult(name=name, status="direct", graph_hash=found.artifact.graph_hash)
    from stitchcache.pipeline.trace import compile_share  # A hit needs nothing of what compiles.

    graph_hash, blobs = compile_share(wanted, found, shard)
    size = sum({blob.digest: blob.size for blob in blobs.values()}.values())
    spent: dict[str, Any] = {"seconds": time.perf_counter() - began, "timings": wanted.site.timings}
    counted = PrewarmResult(name=name, status="shard", distinct=len(blobs), blob_bytes=size, stored=True)
    return replace(counted, graph_hash=graph_hash, **spent)


def _counted(name: str, graphs: Sequence[CompiledGraph | CompiledModel], began: float) -> PrewarmResult:
    """What became of a target; ``torch.compile`` may have captured several graphs of it."""
    pieces = [piece for graph in graphs for piece in graph.artifact.pieces]
    return PrewarmResult(
        name=name,
        status="graph" if all(graph.cache_hit for graph in graphs) else "compiled",
        graph_hash=graphs[0].graph_hash,
        more_graphs=tuple(graph.graph_hash for graph in graphs[1:]),
        pieces=len(pieces),
        distinct=len({piece.key for piece in pieces}),
        blob_bytes=sum({piece.blob.digest: piece.blob.size for piece in pieces}.values()),
        seconds=time.perf_counter() - began,
    )


def request_for(target: Target, more: Mapping[str, Any] | None = None, on_miss: str = "compile") -> Request:
    """A target's options in one record, with some of the caller's."""
    own = ("name", "build", "torch_compile")
    asked = {each.name: getattr(target, each.name) for each in fields(Target) if each.name not in own}
    request = Request(**asked, on_miss=on_miss, label=target.name)  # type: ignore[arg-type]
    return replace(request, options={**request.options, **more}) if more else request


def find_targets(reference: str) -> list[Target]:
    """Find the targets that ``pkg.module:name`` or ``path/to/file.py:name`` means.

    The name is that of a :class:`Target`, a list of them, or a function that returns either.

    Raises:
        TargetNotFoundError: There is no such module, file or name.
        TargetError: The name is something else, or importing it failed.
    """

    def wrong(said: str) -> errors.TargetError:
        return errors.TargetError(f"{reference!r}: {said}", target=reference)

    def not_found(said: str) -> errors.TargetNotFoundError:
        return errors.TargetNotFoundError(f"{reference!r}{said}", target=reference)

    where, _, name = reference.rpartition(":")
    if not where or not name:
        raise not_found(" is not a target: write 'pkg.module:name' or 'path/to/file.py:name'.")
    if where.endswith(".py") and not Path(where).is_file():
        raise not_found(f": there is no file {where}.")

    def not_imported(error: Exception) -> errors.TargetError:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{where}.".startswith(f"{missing}."):
            advice = "run from the directory that has it, or install it."
            return not_found(f": no module {where!r}; {advice}")
        return wrong(f"{where} cannot be imported: {_told(error)}")

    with _users_code(not_imported):
        module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n, v in vars(module).items() if isinstance(v, Target)]
            hint = f"; it has {', '.join(names)}" if names else ""
            raise not_found(f": {where} has no {name!r}{hint}.")
        found = getattr(found, part)
    if callable(found) and not isinstance(found, type):
        said = f"{name}() of {where} is to return targets, and failed"
        with _users_code(lambda error: wrong(f"{said}: {_told(error)}")):
            found = found()
    several = isinstance(found, Iterable) and not isinstance(found, (str, bytes))
    targets = list(found) if several else [found]
    if not targets:
        # Compiling nothing would pass for success.
        raise wrong("it holds no target.")
    for target in targets:
        if not isinstance(target, Target):
            kind = type(target).__qualname__
            raise wrong(f"it is or holds a {kind}; give a Target, a list, or a function that returns either.")
    return targets


def _told(error: BaseException) -> str:
    """An error of a user's module, with the line of theirs that raised it."""
    ours = str(Path(__file__).parent.parent)
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{f.filename}:{f.lineno}" for f in frames if not f.filename.startswith((ours, "<frozen"))]
    place = f" ({places[-1]})" if places else ""
    return f"{type(error).__name__}: {error}{place}"


def check_names(targets: Sequence[Target]) -> None:
    """Refuse two targets of one name."""
    for name, count in Counter(target.name for target in targets).items():
        if count > 1:
            said = f"two targets are called {name!r}; give each a name of its own."
            raise errors.DuplicateTargetError(said, target=name)


def _import_module(name: str) -> ModuleType:
    if "" not in sys.path:
        _make_importable(Path.cwd())
    return importlib.import_module(name)


def _make_importable(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _import_file(path: Path) -> ModuleType:
    """Import a file, under its dotted name where it is part of a package."""
    parts, directory = [path.stem], path.resolve().parent
    while (directory / "__init__.py").exists():
        parts.insert(0, directory.name)
        directory = directory.parent
    # As when Python runs the file: its neighbours can be imported.
    _make_importable(directory)
    if len(parts) > 1:
        return _import_module(".".join(parts))
    name = _free_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with ExitStack() as failed:
        # Whatever it raises: nobody is to find half a module.
        failed.callback(sys.modules.pop, name, None)
        spec.loader.exec_module(module)
        failed.pop_all()
    return module


def _free_name(path: Path) -> str:
    """The name that ``import`` would give the file, so that keys are the same whoever imports it."""
    stem = path.stem
    loaded = sys.modules.get(stem)
    known = importlib.util.find_spec(stem) if stem.isidentifier() and loaded is None else None
    origin = getattr(loaded, "__file__", None) if loaded is not None else known.origin if known else None
    if origin is None or Path(origin).resolve() == path.resolve():
        return stem
    # Another module has the name: one that no module can have, and that the file's content decides.
    return f"{stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
