"""The road that traces: look up by graph, else compile."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch

from stitchcache.api.cold import compile_pieces
from stitchcache.api.ranges import capture_ranges, settle_ranges
from stitchcache.api.run import Run
from stitchcache.api.trace import Traced, fact, trace
from stitchcache.errors import CacheMissError, StoreWriteError
from stitchcache.keys.environment import environment_factors
from stitchcache.keys.recorder import SourceRecorder
from stitchcache.keys.torch_state import torch_state_factors
from stitchcache.keys.values import UnkeyableError
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
    run.tell("capture")
    environment = _environment(run)
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
    if recorder.unsound is not None:
        run.reason, run.cause = recorder.unsound, "unkeyable"
    compiled = _by_graph(run, traced)
    if compiled is None and request.miss_is_error:
        raise _miss(run, traced)
    if compiled is None:
        with run.cache.lock(traced.graph_hash, on_wait=_say_once(run)):
            # Another process may have compiled it while this one waited.
            compiled = _by_graph(run, traced) or _cold(run, traced)
    if run.target.key is not None and recorder.unsound is None:
        record = TargetRecord(
            graph_hash=traced.graph_hash,
            sources=recorder.sources,
            globals=recorder.globals,
            label=run.label,
            created=time.time(),
        )
        key = run.target.key
        _store(run, lambda: run.cache.put_target(key, record))
    return compiled


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
        factors=_unique((*run.target.factors, *traced.factors)),
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


def _environment(run: Run) -> tuple[Factor, ...]:
    """All that compiled pieces depend on beside their graph."""
    request = run.request
    try:
        state = torch_state_factors()
    except UnkeyableError as error:
        # Nothing may be found under this state, and nothing that it leaves may be found again.
        log.warning("%s: %s: nothing is taken from the cache", run.label, error)
        state = (fact("torch.unkeyable", str(error), uuid.uuid4().hex),)
    options, caller = sorted(request.backend_options.items()), sorted(request.key_factors.items())
    return (
        *environment_factors(request.backend, run.devices),
        *state,
        fact("request.backend", request.backend, request.backend),
        fact("request.options", f"{len(options)} set", repr(options)),
        fact("request.caller", f"{len(caller)} set", repr(caller)),
    )


def _miss(run: Run, traced: Traced) -> CacheMissError:
    return CacheMissError(
        f"{run.label}: not in the cache at {run.cache.root} ({run.reason}; no entry for graph "
        f"{traced.graph_hash[:12]} either), and a miss is an error here. "
        "Run 'stitchcache prewarm' where compiling is allowed, with the same model and options.",
        target=run.label,
        key=run.target.key or "",
        reason=run.reason,
    )


def _import_exporter() -> None:
    """Make torch import what it imports at the first export, before a recorder slows imports down."""
    shapes = ({0: torch.export.Dim.AUTO},)
    torch.export.export(torch.nn.Flatten(0), (torch.zeros(2, 3),), dynamic_shapes=shapes, strict=False)


def _unique(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    return tuple({factor.name: factor for factor in factors}.values())
