"""``make``: from a captured source to an artifact, compiling the pieces that the cache lacks."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from stitchcache import errors
from stitchcache.artifact.consts import dump_consts
from stitchcache.capture import Capture
from stitchcache.capture.contract import tensor_spec
from stitchcache.capture.ranges import Variants
from stitchcache.codegen.generate import generate_execution_code
from stitchcache.encoding import make_factor
from stitchcache.graph import effects, symbols
from stitchcache.graph.canonical import graph_hash
from stitchcache.graph.effects import alias_hazards, attribute_of, called, mutates, target_name
from stitchcache.graph.split import split_graph
from stitchcache.graph.stitching import bind_placeholders, lower_sizes, pin_strides
from stitchcache.graph.symbols import SymbolNames, without_guards
from stitchcache.keys.walk import plain_bytes
from stitchcache.pieces import FAILURES, Backend, Piece, get_backend
from stitchcache.pieces.build import at_once, build
from stitchcache.pipeline.find import Hit, Request, Site
from stitchcache.state import clone_all, drawn_back, state_of, taken_apart, unwritten
from stitchcache.store.sources import Sources, generated_in, keep_sources, kept_sources
from stitchcache.torchside import has_fakes
from stitchcache.torchside.ops import HigherOrderOperator, OpOverload, is_view
from stitchcache.types import Artifact, BindingSpec, BlobRef, Factor, PieceRef, SourceRef, Variant

log = logging.getLogger("stitchcache")

# What runs a piece op by op.
_FALLBACK = "eager"
_FREE = ("empty", "new_empty", "sym_size", "sym_numel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A captured model, whoever captured it."""

    model: torch.nn.Module  # whose tensors stitching code binds
    request: Request  # of splitting ops those that the graph has
    site: Site
    whole: Capture  # has the contract
    variants: Variants
    environment: tuple[Factor, ...]  # what pieces depend on beside their graph: machine, torch, options
    known: tuple[Factor, ...]  # what a new entry keeps too, to explain it
    facts: tuple[Factor, ...] = ()  # what distinguishes entries, but not the pieces in them
    sources: tuple[SourceRef, ...] = ()  # files that ran during the capture
    globals: tuple[tuple[str, str], ...] = ()  # values that it read beside the model
    unsound: str | None = None  # why its target must not be looked up directly


@dataclass(frozen=True, slots=True)
class Plan:
    """A split graph, ready to be compiled."""

    split_gm: GraphModule  # the stitching graph with its pieces
    pieces: tuple[Piece, ...]  # in order of first use; several may have one key
    attributes: dict[str, str]  # path in ``split_gm`` to the tensor's name in the model
    structure: str  # hash of ``split_gm``


@dataclass(frozen=True, slots=True)
class EntryPlan:
    """A captured model, planned: everything that its entry will be but the compiled pieces."""

    source: Source
    plans: tuple[Plan, ...]  # one for each variant
    graph_hash: str
    factors: tuple[Factor, ...]  # what went into the graph hash beside pieces and environment
    bindings: tuple[BindingSpec, ...]  # tensors that the stitching code uses
    constants: Mapping[str, torch.Tensor]  # those that the artifact carries

    @property
    def distinct(self) -> dict[str, Piece]:
        """Pieces by key."""
        return {piece.key: piece for planned in self.plans for piece in planned.pieces}


def plan_entry(source: Source) -> EntryPlan:
    """Plan the compilation of a captured model; a ``SplitError`` if it cannot be split as asked."""
    how = (source.request.splitting_ops, get_backend(source.request.backend), source.environment)
    plans = [plan(captured, *how) for _, captured in source.variants]
    bindings = _bindings(source, plans)
    tensors = {item.name: item.tensor for item in source.whole.bound if item.kind == "constant"}
    carried = {b.name: tensors[b.name] for b in bindings if b.kind == "constant"}
    inputs, outputs = asdict(source.whole.input_spec), asdict(source.whole.output_spec)
    values = sorted((name, dump_consts([tensor]) or b"") for name, tensor in carried.items())
    # A range with its dimension, which its text leaves out.
    sizes = [size and (size.dim, size.min, size.max) for size, _ in source.variants]
    structure = [(size, planned.structure) for size, planned in zip(sizes, plans, strict=True)]
    facts = (
        make_factor("graph.structure", f"{len(plans)} variants", plain_bytes(structure)),
        make_factor("graph.inputs", f"{len(inputs['leaves'])} leaves", plain_bytes(inputs)),
        make_factor("graph.outputs", f"{source.whole.output_spec.count} leaves", plain_bytes(outputs)),
        make_factor("graph.bindings", f"{len(bindings)} tensors", plain_bytes([asdict(b) for b in bindings])),
        make_factor("graph.constants", f"{len(carried)} tensors", plain_bytes(values)),
        *source.facts,
    )
    named = [tuple((piece.name, piece.key) for piece in planned.pieces) for planned in plans]
    pieces = list(zip(sizes, named, strict=True))
    factors = sorted((factor.name, factor.digest) for factor in [*facts, *source.environment])
    return EntryPlan(
        source=source,
        plans=tuple(plans),
        graph_hash=hashlib.sha256(plain_bytes(("stitchcache entry 2", pieces, factors))).hexdigest(),
        factors=facts,
        bindings=bindings,
        constants=carried,
    )


def plan(captured: Capture, ops: Sequence[str], backend: Backend, factors: Sequence[Factor]) -> Plan:
    """Plan the compilation of a captured graph, which is not changed; a ``SplitError`` if it cannot be split.

    ``ops`` are those to split at, and ``factors`` distinguish compiled pieces beyond their graph.
    """
    split_gm, items = split_graph(captured.gm, (*ops, *sorted(backend.foreign_ops(captured.gm))))
    splitting = [node.target for item in items if item.is_splitting_graph for node in item.graph.graph.nodes]
    for op in splitting:
        if isinstance(op, HigherOrderOperator):
            raise errors.SplitError(
                f"splitting op {target_name(op)!r} calls graphs of its own and can only run inside a piece. "
                "Leave it out of splitting_ops."
            )
    compute = [item for item in items if not item.is_splitting_graph]
    # Allocating and making views is not worth a compiled call.
    passive = [item.submod_name for item in compute if all(map(_is_free, item.graph.graph.nodes))]
    names = [item.submod_name for item in compute if item.submod_name not in passive]
    bound = {item.placeholder: (item.name, item.tensor) for item in captured.bound}
    leaves = zip(captured.user_inputs, captured.input_spec.leaves, strict=True)
    constants = [name for name, leaf in leaves if leaf.kind == "constant"]
    attributes = bind_placeholders(split_gm, bound, constants)
    uncompiled = {*alias_hazards(split_gm, names), *lower_sizes(split_gm, names)}
    pin_strides(split_gm, names, passive, [name for name in names if name in uncompiled])
    pieces = []
    for name in names:
        graph, chosen = attribute_of(split_gm, name), _FALLBACK if name in uncompiled else backend.name
        key = graph_hash(graph, [*factors, Factor(name="piece.backend", value=chosen, digest=chosen)])
        pieces.append(Piece(name=name, key=key, gm=graph, backend=chosen))
    return Plan(split_gm, tuple(pieces), attributes, graph_hash(split_gm))


def _is_free(node: Node) -> bool:
    if node.op in {"placeholder", "output", "get_attr"}:
        return next(called(node), None) is None
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload):
        # Arithmetic on sizes, and taking results apart.
        return not isinstance(node.target, HigherOrderOperator)
    return is_view(node.target) or str(node.target).split(".")[1].startswith(_FREE)


def _bindings(source: Source, plans: Sequence[Plan]) -> tuple[BindingSpec, ...]:
    """What the stitching code of any variant takes from the model."""
    used = {name for planned in plans for name in planned.attributes.values()}
    mutations = source.variants[0][1].output_spec.mutations
    used |= {m.removeprefix("buffer:") for m in mutations if m.startswith("buffer:")}
    shared: dict[int, list[str]] = {}
    for name, tensor in state_of(taken_apart(source.model)).items():
        shared.setdefault(id(tensor), []).append(name)
    every = [item for _, captured in source.variants for item in captured.bound]
    found = []
    for item in {item.name: item for item in every if item.name in used}.values():
        names = shared.get(id(item.tensor), []) if item.kind != "constant" else []
        paths = [path for other in every if other.name == item.name for path in other.aliases]
        found.append(
            BindingSpec(
                name=item.name,
                kind=item.kind,  # type: ignore[arg-type]
                tensor=tensor_spec(item.tensor, SymbolNames(), item.name),
                aliases=tuple(dict.fromkeys(n for n in [*names, *paths] if n != item.name)),
            )
        )
    return tuple(found)


def make(planned: EntryPlan) -> Hit:
    """Compile, load, and store the pieces, and write the stitching code.

    A store that cannot be written costs the storing, not the compiling.
    """
    began, source, distinct = time.perf_counter(), planned.source, planned.distinct
    shelf = fill(planned, distinct)
    source.site.tell("store", len(distinct), len(distinct))
    constants = {name: shelf.keep(dump_consts([tensor]) or b"") for name, tensor in planned.constants.items()}
    seconds = time.perf_counter() - began
    variants = []
    for one, (size_range, captured) in zip(planned.plans, source.variants, strict=True):
        code, names, consts = generate_execution_code(
            one.split_gm,
            boxed=[piece.name for piece in one.pieces],
            graph_hash=planned.graph_hash,
            describe=partial(symbols.described, captured.names),
        )
        refs = [(piece, shelf.blobs[piece.key]) for piece in one.pieces]
        variants.append(
            Variant(
                size_range=size_range,
                code=code,
                submod_names=tuple(names),
                consts=dump_consts(consts),
                pieces=tuple(PieceRef(name=p.name, key=p.key, backend=p.backend, blob=b) for p, b in refs),
            )
        )
    bindings = [replace(b, blob=constants[b.name]) if b.kind == "constant" else b for b in planned.bindings]
    artifact = Artifact(
        graph_hash=planned.graph_hash,
        variants=tuple(variants),
        input_spec=source.whole.input_spec,
        output_spec=source.whole.output_spec,
        bindings=tuple(bindings),
        # One factor a name, the last of each.
        factors=tuple({factor.name: factor for factor in (*source.known, *planned.factors)}.values()),
        created=time.time(),
        label=source.site.label,
        compile_seconds=seconds,
    )
    # Copies, as every later process has them: a change to the model's own must not show in one only.
    copies = {name: tensor.clone() for name, tensor in planned.constants.items()}
    return Hit(artifact=artifact, way=None, loaded=(shelf.pieces, copies), store=shelf.put)


def fill(planned: EntryPlan, distinct: Mapping[str, Piece]) -> Shelf:
    """Take those of some pieces that are stored already, and compile, load and store the others."""
    began = time.perf_counter()
    request, site = planned.source.request, planned.source.site
    cache, tell = site.cache, site.tell
    shelf = Shelf(site)
    seen: list[float] = []
    unkept: set[str] = set()
    if request.options.get("stitchcache.keep_sources"):
        shelf.sources = kept_sources(cache, planned.graph_hash)
        # A piece that was compiled before without its source is compiled again.
        unkept = {key for key, piece in distinct.items() if piece.backend != "eager"} - shelf.sources.keys()
    missing = {key for key, piece in distinct.items() if key in unkept or not shelf.find(piece)}
    shared: AbstractContextManager[Iterable[Collection[str]]] = nullcontext([missing])
    if cache.remote and site.asks and not unkept:
        cache.tier.pieces(cache, missing)
        missing = {key for key in missing if not shelf.find(distinct[key])}
        shared = cache.tier.share(cache, missing, lambda key: shelf.find(distinct[key]), lambda: tell("wait"))
    together = max(1, at_once(len(missing), request.jobs))
    rounds = -(-len(missing) // together)
    counts = (len(missing), len(distinct), request.backend, together)
    log.info("%s: compiling %d of %d different pieces with %s, %d at a time", site.label, *counts)
    tell("compile", len(shelf.pieces), len(distinct))

    def on_built(piece: Piece, path: Path, seconds: float) -> None:
        cache.count(f"piece.compiled.{piece.backend}")
        cache.count(f"microseconds.piece.{piece.backend}", int(seconds * 1e6))
        if piece.backend == request.backend:
            seen.append(seconds)
        shelf.take(piece, path)
        if piece.key in unkept:
            shelf.sources[piece.key] = generated_in(path.parent)
        done = len(shelf.pieces)
        left = seconds_left(rounds, seen, time.perf_counter() - began) if done < len(distinct) else None
        tell("compile", done, len(distinct), left)

    with shared as batches:
        for keys in batches:
            for one, (_, captured) in zip(planned.plans, planned.source.variants, strict=True):
                lacking = {key for key in keys if key not in shelf.pieces}
                pieces = list({piece.key: piece for piece in one.pieces if piece.key in lacking}.values())
                if not pieces:
                    continue
                verify = request.options.get("stitchcache.verify", True)
                # A process that only loads makes no assumptions about sizes, so compiling must add none.
                with cache.scratch() as scratch, without_guards(captured.gm.graph):
                    build(
                        pieces,
                        _examples(one, pieces, captured, site.label) if verify else None,
                        scratch,
                        request.backend_options,
                        jobs=request.jobs,
                        device=site.device,
                        devices=site.devices,
                        on_built=on_built,
                    )
    return shelf


def seconds_left(rounds: int, seen: Sequence[float], spent: float) -> float | None:
    """Seconds to go, by pieces that are done; ``None`` without any, or where it takes longer than that."""
    left = rounds * fmean(seen) - spent if seen else 0.0
    return left if left > 0 else None


def _examples(planned: Plan, missing: Sequence[Piece], captured: Capture, label: str) -> dict[str, list[Any]]:
    """Record real inputs for pieces: by key, those of the piece's call, before that call; none without data.

    The model's own tensors are left as they were: where anything in the graph writes, it runs on copies.
    """
    specs = zip(captured.user_inputs, captured.example, captured.input_spec.leaves, strict=True)
    named = {name: leaf for name, leaf, spec in specs if spec.kind != "constant"}
    leaves = list(named.values())
    split_gm = planned.split_gm
    nodes = [node for node in split_gm.graph.nodes if node.op == "get_attr"]
    tensors = {str(node.target): attribute_of(split_gm, str(node.target)) for node in nodes}
    if has_fakes([*leaves, *tensors.values()]):
        return {}
    keep: set[int] = set()
    writes = any(mutates(module.graph) for module in split_gm.modules() if isinstance(module, GraphModule))
    if writes:
        written = effects.written_placeholders(captured.gm)
        names = {item.name for item in captured.bound if item.placeholder in written}
        targets = [tensor for path, tensor in tensors.items() if planned.attributes.get(path) in names]
        targets += [leaf for name, leaf in named.items() if name in written]
        # Weights are most of a model, and nothing writes them. The rest together: what was shared stays so.
        keep = unwritten([*tensors.values(), *leaves], targets)
        copies = clone_all([*tensors.values(), *leaves], keep)
        tensors, leaves = dict(zip(tensors, copies, strict=False)), copies[len(tensors) :]
    inputs: dict[str, list[Any]] = {}
    keys = {piece.name: piece.key for piece in missing}

    class Recorder(Interpreter):
        """Runs the split graph, and keeps what it gives to pieces."""

        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            return tensors[str(target)]

        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target in keys:
                inputs[keys[str(target)]] = clone_all(args, keep) if writes else list(args)
            return super().call_module(target, args, kwargs)

    try:
        with torch.no_grad(), drawn_back(leaves):
            Recorder(split_gm).run(*leaves)
    except errors.StitchCacheError:
        raise
    except FAILURES as error:
        # Ops run here on real data for the first time.
        said = (str(error).strip().splitlines() or [""])[0]
        raise errors.CaptureError(
            f"{label} cannot run on its example: {type(error).__name__}: {said}. torch.export traced it "
            "without data and did not notice. Call the model with the example, and give one that it takes.",
            reason=said,
        ) from error
    return inputs


class Shelf:
    """Compiled pieces of one run, loaded; ``stored`` is whether all of them could be stored too."""

    def __init__(self, site: Site) -> None:
        self._cache, self._label, self._device = site.cache, site.label, site.device
        self.stored = True
        self.blobs: dict[str, BlobRef] = {}
        self.pieces: dict[str, Any] = {}
        self.sources: Sources = {}

    def find(self, piece: Piece) -> bool:
        """Take a piece that is stored already."""
        record = self._cache.get_piece(piece.key)
        if record is None or record.backend != piece.backend:
            return False
        try:
            self._cache.require_voucher(record.backend)
            with self._cache.opened([record.blob]) as (path,):
                if path is None:
                    return False
                self.pieces[piece.key] = get_backend(record.backend).load(path, self._device)
        except (
            errors.UntrustedEntryError,
            errors.BackendError,
            errors.EntryFormatError,
            errors.LinkError,
            OSError,
        ) as error:
            log.warning("%s: a stored piece cannot be used and is compiled again: %s", self._label, error)
            return False
        self.blobs[piece.key] = record.blob
        return True

    def take(self, piece: Piece, path: Path) -> None:
        """Load and store a fresh piece."""
        self.pieces[piece.key] = get_backend(piece.backend).load(path, self._device)
        blob = self.blobs[piece.key] = self.keep(path)
        self._try(lambda: self._cache.put_piece(piece.key, piece.backend, blob))

    def keep(self, source: bytes | Path) -> BlobRef:
        """Store bytes, or at least name them."""
        stored: BlobRef | None = self._try(lambda: self._cache.put_blob(source))
        if stored is not None:
            return stored
        try:
            data = source if isinstance(source, bytes) else source.read_bytes()
        except OSError:
            # Too many open files, say. Nothing of this run is stored any more, so nobody goes by the name.
            data = b""
        return BlobRef(digest=hashlib.sha256(data).hexdigest(), size=len(data))

    def put(self, artifact: Artifact) -> None:
        """Store the entry, if its blobs are stored, and the source of its pieces, if there is any."""
        self._try(lambda: self._cache.put(artifact))
        if self.sources:
            self._try(lambda: keep_sources(self._cache, artifact.graph_hash, self.sources))

    def _try(self, write: Callable[[], Any]) -> Any:
        try:
            return write() if self.stored else None
        except errors.StoreWriteError as error:
            self.stored = False
            log.warning("%s: compiled, but not stored: %s", self._label, error)
            return None
