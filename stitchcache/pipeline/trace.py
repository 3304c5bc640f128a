"""The road that traces: capture, plan, look up by graph hash, else make. Both kinds of source take it."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule

from stitchcache.artifact import pack
from stitchcache.artifact.entry import pack_factors
from stitchcache.cache import Cache
from stitchcache.capture.dynamo import capture_graph
from stitchcache.capture.ranges import capture_ranges
from stitchcache.codegen import CodeObjects
from stitchcache.encoding import UnkeyableError, make_factor
from stitchcache.errors import CacheMissError, StaleEntryError, StoreWriteError
from stitchcache.explanation import differences_text
from stitchcache.graph.effects import matches
from stitchcache.keys.environment import environment_factors, torch_state_factors
from stitchcache.keys.recorder import SourceRecorder
from stitchcache.keys.walk import plain_bytes
from stitchcache.pieces import get_backend
from stitchcache.pieces.build import warming
from stitchcache.pipeline import changed_from, start, started_or_miss, store_target
from stitchcache.pipeline.find import Hit, Miss, Request, Site, Wanted, find_by_graph
from stitchcache.pipeline.look import looker
from stitchcache.pipeline.look_cold import look_cold, prove_ranges
from stitchcache.pipeline.make import EntryPlan, Source, fill, make, plan_entry
from stitchcache.pipeline.miss import graph_differences, miss_error, with_facts
from stitchcache.runtime.graph import held_tensors
from stitchcache.runtime.model import CompiledModel
from stitchcache.state import devices_of
from stitchcache.store import Area, keyed_path
from stitchcache.types import BlobRef, Factor, TargetRecord

log = logging.getLogger("stitchcache")

T = TypeVar("T")


def export_source(wanted: Wanted) -> Source:
    """Trace a model with ``torch.export``, and record what that depended on."""
    request, site = wanted.request, wanted.site
    site.tell("capture")
    environment = _environment(request, site.devices, site.label)
    site.timed("import", _import_exporter)
    # Calls run in neither mode, whatever the caller's: the capture must not depend on them.
    with torch.inference_mode(False), torch.no_grad(), SourceRecorder(wanted.walk) as recorder:
        given = (wanted.model, wanted.args, wanted.kwargs, request.dynamic_shapes, request.size_ranges)
        captured, variants = site.timed("capture", lambda: capture_ranges(*given))
    captured, variants = site.timed("prove", lambda: prove_ranges(wanted, captured, variants, recorder.codes))
    return Source(
        model=wanted.model,
        request=request,
        site=site,
        whole=captured,
        variants=variants,
        environment=environment,
        known=wanted.target.factors,
        sources=recorder.sources,
        globals=recorder.globals,
        unsound=recorder.unsound,
    )


def dynamo_source(gm: GraphModule, example_inputs: Sequence[Any], request: Request, cache: Cache) -> Source:
    """Take over a graph that Dynamo captured, with an input for each placeholder."""
    began, label = time.perf_counter(), request.label
    captured = capture_graph(gm, example_inputs)
    nodes = [node for node in captured.gm.graph.nodes if node.op == "call_function"]
    present = [op for op in request.splitting_ops if any(matches(node.target, op) for node in nodes)]
    absent = sorted(set(request.splitting_ops).difference(present))
    if absent:
        # No error: another graph of the model may have them.
        log.info("%s: this graph has no %s to split at", label, ", ".join(absent))
    request = replace(request, splitting_ops=tuple(present))
    held = held_tensors([item.tensor.detach() for item in captured.bound])
    device, devices = devices_of(held, example_inputs)
    environment = _environment(request, devices, label)
    if cache.remote:
        cache.tier.remote.begin()
    return Source(
        model=held,
        request=request,
        site=Site(
            cache=cache,
            label=label,
            device=device,
            devices=devices,
            asks=not request.eager_first,
            began=began,
        ),
        whole=captured,
        variants=[(None, captured)],
        environment=environment,
        known=environment,
        facts=(make_factor("graph.capture", "torch.compile"),),
    )


def _environment(request: Request, devices: Sequence[str], label: str) -> tuple[Factor, ...]:
    """All that compiled pieces depend on beside their graph."""
    # A misspelt option would be found by the compiler only, after the trace.
    get_backend(request.backend).check_options(request.backend_options)
    try:
        state = tuple(torch_state_factors())
    except UnkeyableError as error:
        # Nothing may be found under this state, and nothing that it leaves may be found again.
        log.warning("%s: the cache is not used: %s", label, error)
        state = (make_factor("torch.unkeyable", str(error), uuid.uuid4().bytes),)
    options, caller = sorted(request.backend_options.items()), sorted(request.key_factors.items())
    return (
        *environment_factors(request.backend, devices),
        *state,
        make_factor("request.backend", request.backend),
        make_factor("request.options", f"{len(options)} set", plain_bytes(options)),
        make_factor("request.caller", f"{len(caller)} set", plain_bytes(caller)),
    )


def _import_exporter() -> None:
    """Make torch import what it imports at the first export, before a recorder slows imports down."""
    shapes = ({0: torch.export.Dim.AUTO},)
    torch.export.export(torch.nn.Flatten(0), (torch.zeros(2, 3),), dynamic_shapes=shapes, strict=False)


def compile_traced(wanted: Wanted, miss: Miss) -> CompiledModel:
    """Trace a model that has no direct hit; load what its graph leads to, or compile it."""
    request, site = wanted.request, wanted.site
    miss = site.timed("explain", partial(with_facts, wanted, miss))
    known, edited = miss.record, miss.cause == "sources"
    if request.must_be_direct:
        raise miss_error(wanted, miss)
    said = "%s: no direct hit (%s%s): capturing the model; then pieces that the cache lacks are compiled"
    log.info(said, site.label, miss.reason, miss.hint)
    objects = CodeObjects()
    # What compiling needs from the disk is made while the model is captured; a graph hit breaks it off.
    with warming(request.backend, site.devices, request.backend_options, request.miss_is_error):
        source = export_source(wanted)
        planned = site.timed("plan", lambda: plan_entry(source))
        if source.unsound is not None:
            miss = replace(miss, reason=source.unsound, cause="unkeyable", hint="")
        look = looker(wanted, partial(look_cold, wanted, source.whole))

        def begin(found: Hit, miss: Miss) -> CompiledModel:
            found = replace(found, objects=objects)
            how: dict[str, Any] = {"target": wanted.target, "look": look, "cuda_graphs": request.cuda_graphs}
            return start(found, wanted.model, site, miss=miss, **how)

        refuse = partial(miss_error, wanted, graph_hash=planned.graph_hash)
        compiled = compile_planned(planned, miss, begin=begin, refuse=refuse)
    record = TargetRecord(
        graph_hash=planned.graph_hash,
        sources=source.sources,
        globals=source.globals,
        label=site.label,
        created=time.time(),
        refused=source.unsound,
        factors=pack_factors(wanted.target.factors),
        code=tuple(objects) if source.unsound is None else (),
    )
    # Something may have interfered with this capture; that says nothing against one which it did not.
    same = record.refused is not None and known is not None and known.graph_hash == record.graph_hash
    if not same or known is None or (edited if known.refused is None else known.refused != record.refused):
        store_target(wanted, record)
    compiled.changed = changed_from(wanted, record, compiled.artifact.bindings)
    return compiled


def compile_share(wanted: Wanted, miss: Miss, shard: tuple[int, int]) -> tuple[str, dict[str, BlobRef]]:
    """Trace a model, and compile and store those of its pieces that fall to a shard.

    A piece's key alone says whose it is: not what else there is, what failed, or what is in the cache. So
    shards that know nothing of each other compile each piece once. Whoever finds all pieces stores the entry.

    Returns:
        The entry's graph hash, and blobs by the keys of these pieces.

    Raises:
        StoreWriteError: One of them could not be stored.
    """
    request, site, (index, count) = wanted.request, wanted.site, shard
    if request.miss_is_error:
        raise miss_error(wanted, miss)
    with warming(request.backend, site.devices, request.backend_options):
        source = export_source(wanted)
        planned = site.timed("plan", lambda: plan_entry(source))
    mine = {key: piece for key, piece in planned.distinct.items() if int(key, 16) % count == index}
    shelf = site.timed("compile", lambda: fill(planned, mine))
    if not shelf.stored:
        said = f"{site.label}: pieces of shard {index}/{count} are not stored: {site.cache.failure}"
        raise StoreWriteError(said, path=str(site.cache.root), reason=site.cache.failure)
    return planned.graph_hash, shelf.blobs


def compile_planned(
    planned: EntryPlan,
    miss: Miss,
    *,
    begin: Callable[[Hit, Miss], T],
    refuse: Callable[[Miss], CacheMissError],
    aside: Callable[[Miss], T] | None = None,
) -> T:
    """Start what a planned entry's hash leads to, or make it; of several processes one makes it.

    ``begin`` starts what was found or made, and ``refuse`` makes the error where a miss is one. ``aside``
    serves a miss in another way than by making the entry here.
    """
    site = planned.source.site

    def by_graph() -> T | Miss:
        found = find_by_graph(planned.graph_hash, site)
        if isinstance(found, Miss):
            return miss if found.cause == "new" else replace(miss, reason=found.reason, cause=found.cause)
        # The hash covers the contract, so an entry with another one was changed.
        specs = [pack((at.input_spec, at.output_spec)) for at in (found.artifact, planned.source.whole)]
        if specs[0] != specs[1]:
            reason = f"entry {planned.graph_hash[:12]} has another contract than its graph"
            site.cache.warn(reason, f"{site.label}: {reason}; it is not used")
            return replace(miss, reason=reason, cause="refused")
        begun = started_or_miss(found.artifact, site, lambda: begin(found, miss))
        # What is wrong with the entry is the later reason, and what the direct lookup looked at stays.
        return replace(miss, reason=begun.reason, cause=begun.cause) if isinstance(begun, Miss) else begun

    said: list[str] = []

    def on_wait(_seconds: float, holder: str) -> None:
        # Said once. Who holds it is written a moment after it is held.
        if holder and not said:
            said.append(holder)
            log.info("%s: waiting for %s, which compiles the same graph", site.label, holder)
        site.tell("wait")

    served = by_graph()
    if not isinstance(served, Miss):
        return served
    if planned.source.request.miss_is_error:
        raise refuse(served)
    if aside is not None:
        return aside(served)
    with site.cache.lock(planned.graph_hash, on_wait=on_wait):
        # Another process may have compiled it while this one waited. What the look refused is still wrong.
        served = by_graph() if served.cause != "look" else served
        if not isinstance(served, Miss):
            return served
        return begin(site.timed("compile", lambda: make(planned)), served)


def audit(wanted: Wanted, hit: Hit) -> None:
    """Trace a model that has a direct hit: a ``StaleEntryError`` if it is another (``STITCHCACHE_AUDIT``)."""
    site, expected = wanted.site, hit.artifact.graph_hash
    source = export_source(wanted)
    planned = site.timed("plan", lambda: plan_entry(source))
    if planned.graph_hash == expected:
        site.cache.count("audit.right")
        log.info("%s: audit: the graph is %s as the key says", site.label, expected[:12])
        return
    site.cache.count("audit.wrong")
    differences = graph_differences(hit.artifact, planned)
    differs = differences_text(differences, len(differences)) or "machine, torch or options"
    key = wanted.target.key or ""
    raise StaleEntryError(
        f"{site.label}: target key {key[:12]} led to entry {expected[:12]}, and the model's graph is "
        f"{planned.graph_hash[:12]}. Nothing is served. They differ in {differs}. The model depends on "
        "something that no key sees (see 'What is not seen' in docs/keys.md): name it in key_factors. Until "
        f"then remove {keyed_path(str(site.cache.root), Area.TARGETS, key)}.",
        expected=expected,
        actual=planned.graph_hash,
        differences=differences,
    )
