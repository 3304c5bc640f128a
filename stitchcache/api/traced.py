"""The road that traces: look up by graph, else compile."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from stitchcache.api.cold import compile_pieces
from stitchcache.api.estimate import compiled_before
from stitchcache.api.miss import miss_error, miss_facts
from stitchcache.api.ranges import capture_ranges, settle_ranges
from stitchcache.api.request import Request
from stitchcache.api.run import Run
from stitchcache.api.trace import Traced, fact, trace
from stitchcache.artifact.entry import pack_factors
from stitchcache.errors import StoreWriteError
from stitchcache.keys.environment import environment_factors, torch_state_factors
from stitchcache.keys.recorder import SourceRecorder
from stitchcache.keys.values import UnkeyableError
from stitchcache.pieces.warming import warming
from stitchcache.runtime.model import CompiledModel
from stitchcache.types import Factor, TargetRecord

log = logging.getLogger("stitchcache")


def compile_traced(run: Run) -> CompiledModel:
    """Trace a model; load what its graph leads to, or compile it.

    Args:
        run: A compilation that had no direct hit.

    Raises:
        CaptureError: The model cannot be captured.
        CacheMissError: The graph is not in the cache, and a miss is an error.
        BackendError: A piece cannot be compiled, or is wrong.
    """
    facts = run.near = run.timed("explain", lambda: miss_facts(run))
    edited = run.cause == "sources"
    # What compiling needs from the disk is made while the model is captured; a graph hit breaks it off.
    request = run.request
    before = compiled_before(run.cache, request.backend)
    with warming(request.backend, run.devices, request.backend_options, before, request.miss_is_error):
        traced, recorder = trace_run(run)
        if recorder.unsound is not None:
            run.reason, run.cause = recorder.unsound, "unkeyable"
            run.near = replace(facts, hint="")
        compiled = _by_graph(run, traced)
        if compiled is None and run.request.miss_is_error:
            raise miss_error(run, traced)
        if compiled is None:
            with run.cache.lock(traced.graph_hash, on_wait=_say_once(run)):
                # Another process may have compiled it while this one waited.
                compiled = _by_graph(run, traced) or _cold(run, traced)
    _note_target(run, traced, recorder, edited)
    return compiled


def trace_run(run: Run) -> tuple[Traced, SourceRecorder]:
    """Capture and plan a model, and record what that depended on.

    Args:
        run: Its compilation; gets the seconds of each stage.

    Raises:
        CaptureError: The model cannot be captured.
        SplittingOpNotFoundError: A splitting op is not in the graph.
    """
    run.tell("capture")
    environment = environment_of(run.request, run.devices, run.label)
    run.timed("import", _import_exporter)
    request = run.request
    # Calls run in neither mode, whatever the caller's: the capture must not depend on them.
    with torch.inference_mode(False), torch.no_grad(), SourceRecorder(run.shared) as recorder:
        captured, variants = run.timed(
            "capture",
            lambda: capture_ranges(
                run.model, run.args, run.kwargs, request.dynamic_shapes, request.size_ranges
            ),
        )
    captured, variants = run.timed("settle", lambda: settle_ranges(captured, variants))
    traced = run.timed("plan", lambda: trace(run.model, captured, variants, request, environment))
    return traced, recorder


def _note_target(run: Run, traced: Traced, recorder: SourceRecorder, edited: bool) -> None:
    """Let the target key lead to the entry, or say why it may not."""
    key, known, refused = run.target.key, run.record, recorder.unsound
    if key is None:
        return
    if known is not None and refused is not None and known.graph_hash == traced.graph_hash:
        undisturbed = known.refused is None and not edited
        # Something interfered with the capture here; that says nothing against one which it did not.
        if undisturbed or known.refused == refused:
            return
    record = TargetRecord(
        graph_hash=traced.graph_hash,
        sources=recorder.sources,
        globals=recorder.globals,
        label=run.label,
        created=time.time(),
        refused=refused,
        factors=pack_factors(run.target.factors),
        code=tuple(run.objects) if refused is None else (),
    )
    _store(run, lambda: run.cache.put_target(key, record))


def _say_once(run: Run) -> Callable[[float, str], None]:
    """What is told while another process compiles the same: once, and again as progress."""
    said: list[str] = []

    def on_wait(_seconds: float, holder: str) -> None:
        # Who holds it is written a moment after it is held.
        if holder and not said:
            said.append(holder)
            log.info("%s: waiting for %s, which compiles the same graph", run.label, holder)
        run.tell("wait")

    return on_wait


def _by_graph(run: Run, traced: Traced) -> CompiledModel | None:
    artifact = run.get(traced.graph_hash)
    return None if artifact is None else run.open(artifact, "graph")


def _cold(run: Run, traced: Traced) -> CompiledModel:
    began = time.perf_counter()
    artifact, pieces, constants = compile_pieces(
        traced,
        run.request,
        run.cache,
        device=run.device,
        devices=run.devices,
        factors=unique_factors((*run.target.factors, *traced.factors)),
        label=run.label,
        tell=run.tell,
    )
    run.timings["compile"] = time.perf_counter() - began
    return run.finish(artifact, pieces, constants, None)


def _store(run: Run, write: Callable[[], Any]) -> None:
    try:
        write()
    except StoreWriteError as error:
        log.warning("%s: the way to its entry is not stored: %s", run.label, error)


def environment_of(request: Request, devices: Sequence[str], label: str) -> tuple[Factor, ...]:
    """All that compiled pieces depend on beside their graph.

    Args:
        request: Options.
        devices: Device types in use.
        label: What to call the model in a warning.
    """
    try:
        state = torch_state_factors()
    except UnkeyableError as error:
        # Nothing may be found under this state, and nothing that it leaves may be found again.
        log.warning("%s: %s: nothing is taken from the cache", label, error)
        state = (fact("torch.unkeyable", str(error), uuid.uuid4().hex),)
    options, caller = sorted(request.backend_options.items()), sorted(request.key_factors.items())
    return (
        *environment_factors(request.backend, devices),
        *state,
        fact("request.backend", request.backend, request.backend),
        fact("request.options", f"{len(options)} set", repr(options)),
        fact("request.caller", f"{len(caller)} set", repr(caller)),
    )


def _import_exporter() -> None:
    """Make torch import what it imports at the first export, before a recorder slows imports down."""
    shapes = ({0: torch.export.Dim.AUTO},)
    torch.export.export(torch.nn.Flatten(0), (torch.zeros(2, 3),), dynamic_shapes=shapes, strict=False)


def unique_factors(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """One factor a name, the last of each."""
    return tuple({factor.name: factor for factor in factors}.values())
