"""The road that traces: capture, plan, look up by graph hash, else make. Both kinds of source take it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from stitchcache.artifact.entry import pack_factors
from stitchcache.codegen.execution import CodeObjects
from stitchcache.errors import CacheMissError, StaleEntryError, StoreWriteError
from stitchcache.explanation import differences_text
from stitchcache.pieces.build import warming
from stitchcache.pipeline.entry import EntryPlan, plan_entry
from stitchcache.pipeline.find import Hit, Miss, Ready, Wanted, changed_from, find_by_graph
from stitchcache.pipeline.look import looker
from stitchcache.pipeline.look_cold import look_cold
from stitchcache.pipeline.make import make
from stitchcache.pipeline.miss import graph_differences, miss_error, miss_facts
from stitchcache.pipeline.request import Request, Site
from stitchcache.pipeline.source import export_source
from stitchcache.pipeline.start import Way, start, started_or_miss
from stitchcache.runtime.model import CompiledModel
from stitchcache.store.layout import Area, keyed_path
from stitchcache.types import Artifact, Factor, TargetRecord

log = logging.getLogger("stitchcache")

T = TypeVar("T")


def compile_traced(wanted: Wanted, miss: Miss) -> CompiledModel:
    """Trace a model; load what its graph leads to, or compile it.

    Args:
        wanted: What is to be started.
        miss: Why there is no direct hit.

    Raises:
        CaptureError: The model cannot be captured, or what was captured does something else.
        CacheMissError: A miss, and misses are errors here.
        BackendError: A piece cannot be compiled, or is wrong.
    """
    request, site = wanted.request, wanted.site
    edited = miss.cause == "sources"
    miss = replace(miss, facts=site.clock.timed("explain", lambda: miss_facts(wanted, miss)))
    if request.must_be_direct:
        raise miss_error(wanted, miss)
    # What compiling needs from the disk is made while the model is captured; a graph hit breaks it off.
    with warming(request.backend, site.devices, request.backend_options, request.miss_is_error):
        source = export_source(wanted)
        planned = site.clock.timed("plan", lambda: plan_entry(source, request))
        if source.unsound is not None:
            facts = replace(miss.facts, hint="") if miss.facts is not None else None
            miss = replace(miss, reason=source.unsound, cause="unkeyable", facts=facts)
        objects = CodeObjects()
        compiled = compile_planned(
            planned,
            request,
            site,
            miss,
            begin=partial(
                start,
                model=wanted.model,
                site=site,
                target=wanted.target,
                objects=objects,
                ready=wanted.ready,
                look=looker(wanted, partial(look_cold, wanted, planned.capture)),
            ),
            refuse=lambda: miss_error(wanted, miss, planned.graph_hash),
            known=wanted.target.factors,
            ready=wanted.ready,
        )
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
    _put_target(wanted, record, miss.record, edited)
    compiled.changed = changed_from(wanted, record, compiled.artifact.bindings)
    return compiled


def compile_planned(
    planned: EntryPlan,
    request: Request,
    site: Site,
    miss: Miss,
    *,
    begin: Callable[[Artifact, Way], T],
    refuse: Callable[[], CacheMissError],
    known: tuple[Factor, ...],
    ready: Ready | None = None,
) -> T:
    """Start what a planned entry's hash leads to, or make it; of several processes one makes it.

    Args:
        planned: The entry.
        request: Options.
        site: Where.
        miss: Why there was no direct hit.
        begin: Starts an artifact.
        refuse: Makes the error where a miss is one.
        known: Further factors, which a new entry keeps.
        ready: What a preload made ready.

    Raises:
        CacheMissError: A miss, and misses are errors here.
        BackendError: A piece cannot be compiled, or is wrong.
    """

    def by_graph() -> T | Miss:
        found = find_by_graph(planned.graph_hash, site.cache, ready)
        if isinstance(found, Miss):
            return miss
        artifact = found.artifact
        begun = started_or_miss(artifact, site, lambda: begin(artifact, Way(hit="graph", miss=miss)))
        # What is wrong with the entry is the later reason, and what the direct lookup looked at stays.
        return replace(miss, reason=begun.reason, cause=begun.cause) if isinstance(begun, Miss) else begun

    served = by_graph()
    if not isinstance(served, Miss):
        return served
    if request.miss_is_error:
        raise refuse()
    with site.cache.lock(planned.graph_hash, on_wait=_say_once(site)):
        # Another process may have compiled it while this one waited. What the look refused is still wrong.
        served = by_graph() if served.cause != "look" else served
        if not isinstance(served, Miss):
            return served
        made = site.clock.timed("compile", lambda: make(planned, request, site, known))
        return begin(made.artifact, Way(hit=None, miss=served, loaded=made.loaded, store=made.store))


def _say_once(site: Site) -> Callable[[float, str], None]:
    """What is told while another process compiles the same: once, and again as progress."""
    said: list[str] = []

    def on_wait(_seconds: float, holder: str) -> None:
        # Who holds it is written a moment after it is held.
        if holder and not said:
            said.append(holder)
            log.info("%s: waiting for %s, which compiles the same graph", site.label, holder)
        site.clock.tell("wait")

    return on_wait


def _put_target(wanted: Wanted, record: TargetRecord, known: TargetRecord | None, edited: bool) -> None:
    """Let the target key lead to the entry, or say why it may not.

    Args:
        wanted: What was started.
        record: What the trace found.
        known: The record that the key led to.
        edited: Whether that record's sources or globals have changed.
    """
    key, refused = wanted.target.key, record.refused
    if key is None:
        return
    if known is not None and refused is not None and known.graph_hash == record.graph_hash:
        undisturbed = known.refused is None and not edited
        # Something interfered with the capture here; that says nothing against one which it did not.
        if undisturbed or known.refused == refused:
            return
    store_target(wanted, key, record)


def store_target(wanted: Wanted, key: str, record: TargetRecord) -> None:
    """Store a target record; a store that cannot be written costs a trace at the next start."""
    try:
        wanted.site.cache.put_target(key, record)
    except StoreWriteError as error:
        log.warning(
            "%s: the next start has to trace the model again, as its target record is not stored: %s",
            wanted.site.label,
            error,
        )


def audit(wanted: Wanted, hit: Hit) -> None:
    """Trace a model that has a direct hit, and compare: ``STITCHCACHE_AUDIT``.

    Args:
        wanted: What is to be started.
        hit: What the target key led to.

    Raises:
        StaleEntryError: The model's graph is another one.
        CaptureError: The model cannot be captured any more.
    """
    site, artifact = wanted.site, hit.artifact
    source = export_source(wanted)
    planned = site.clock.timed("plan", lambda: plan_entry(source, wanted.request))
    if planned.graph_hash == artifact.graph_hash:
        site.cache.count("audit.right")
        log.info("%s: audit: the graph is %s as the key says", site.label, artifact.graph_hash[:12])
        return
    site.cache.count("audit.wrong")
    differences = graph_differences(artifact, planned)
    differs = differences_text(differences, len(differences)) or "what pieces depend on beside the graph"
    key = wanted.target.key or ""
    raise StaleEntryError(
        f"{site.label}: target key {key[:12]} led to entry {artifact.graph_hash[:12]}, and the model's graph "
        f"is {planned.graph_hash[:12]}. Nothing is served. They differ in {differs}. The model depends on "
        "something that no key sees (see 'What is not seen' in docs/keys.md): name it in key_factors. Until "
        f"then remove {keyed_path(str(site.cache.root), Area.TARGETS, key)}.",
        expected=artifact.graph_hash,
        actual=planned.graph_hash,
        differences=differences,
    )
