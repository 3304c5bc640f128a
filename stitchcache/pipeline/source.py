"""Captured sources: a model that ``torch.export`` traced, or a graph that Dynamo did, as one record."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule

from stitchcache.cache import Cache
from stitchcache.capture import Capture
from stitchcache.capture.dynamo import capture_graph
from stitchcache.capture.ranges import Variants, capture_ranges
from stitchcache.encoding import UnkeyableError
from stitchcache.graph.effects import matches
from stitchcache.keys.environment import environment_factors, torch_state_factors
from stitchcache.keys.recorder import SourceRecorder
from stitchcache.keys.walk import plain_bytes
from stitchcache.pipeline.find import Wanted
from stitchcache.pipeline.prove import prove_ranges
from stitchcache.pipeline.request import Clock, Request, Site
from stitchcache.runtime.graph import held_tensors
from stitchcache.state import devices_of
from stitchcache.types import Factor, SourceRef

log = logging.getLogger("stitchcache")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A captured model, whoever captured it.

    Args:
        model: Whose tensors stitching code binds.
        whole: The capture that has the contract.
        variants: A capture for each size range, or one for all sizes.
        environment: Factors of the machine, torch's state and the options: all that compiled pieces depend
            on beside their graph.
        facts: Further factors that distinguish entries, but not the pieces in them.
        sources: Source files that ran during the capture.
        globals: Values from outside of the model that it read.
        unsound: Why its target must not be looked up directly; ``None`` where it may.
    """

    model: torch.nn.Module
    whole: Capture
    variants: Variants
    environment: tuple[Factor, ...]
    facts: tuple[Factor, ...] = ()
    sources: tuple[SourceRef, ...] = ()
    globals: tuple[tuple[str, str], ...] = ()
    unsound: str | None = None


def export_source(wanted: Wanted) -> Source:
    """Trace a model with ``torch.export``, and record what that depended on.

    Args:
        wanted: The model and its example.

    Raises:
        CaptureError: The model cannot be captured.
        OptionError: Size ranges do not fit.
    """
    request, site = wanted.request, wanted.site
    clock = site.clock
    clock.tell("capture")
    environment = environment_of(request, site.devices, site.label)
    clock.timed("import", _import_exporter)
    # Calls run in neither mode, whatever the caller's: the capture must not depend on them.
    with torch.inference_mode(False), torch.no_grad(), SourceRecorder(wanted.walk) as recorder:
        captured, variants = clock.timed(
            "capture",
            lambda: capture_ranges(
                wanted.model, wanted.args, wanted.kwargs, request.dynamic_shapes, request.size_ranges
            ),
        )
    captured, variants = clock.timed(
        "prove",
        lambda: prove_ranges(
            wanted.model, captured, variants, recorder.codes, wanted.leaves, request.effects
        ),
    )
    return Source(
        model=wanted.model,
        whole=captured,
        variants=variants,
        environment=environment,
        sources=recorder.sources,
        globals=recorder.globals,
        unsound=recorder.unsound,
    )


def dynamo_source(
    gm: GraphModule, example_inputs: Sequence[Any], request: Request, cache: Cache, clock: Clock
) -> tuple[Source, Request, Site]:
    """Take over a graph that Dynamo captured.

    Args:
        gm: The graph.
        example_inputs: One a placeholder.
        request: Options; labelled.
        cache: Where to look and store.
        clock: Measures it.

    Returns:
        The source, the request with those splitting ops that this graph has, and where it is started.

    Raises:
        CaptureError: The graph cannot be traced.
    """
    captured = capture_graph(gm, example_inputs)
    nodes = [node for node in captured.gm.graph.nodes if node.op == "call_function"]
    present = [op for op in request.splitting_ops if any(matches(node.target, op) for node in nodes)]
    absent = sorted(set(request.splitting_ops).difference(present))
    if absent:
        # No error: another graph of the model may have them.
        log.info("%s: this graph has no %s to split at", request.label, ", ".join(absent))
    request = replace(request, splitting_ops=tuple(present))
    held = held_tensors([item.tensor.detach() for item in captured.bound])
    device, devices = devices_of(held, example_inputs)
    source = Source(
        model=held,
        whole=captured,
        variants=[(None, captured)],
        environment=environment_of(request, devices, request.label),
        facts=(fact("graph.capture", "torch.compile", "torch.compile"),),
    )
    return (
        source,
        request,
        Site(cache=cache, label=request.label, device=device, devices=devices, clock=clock),
    )


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
        fact("request.options", f"{len(options)} set", plain_bytes(options)),
        fact("request.caller", f"{len(caller)} set", plain_bytes(caller)),
    )


def fact(name: str, value: str, whole: str | bytes) -> Factor:
    """A factor with the digest of its whole value."""
    return Factor(
        name=name,
        value=value,
        digest=hashlib.sha256(whole.encode() if isinstance(whole, str) else whole).hexdigest(),
    )


def _import_exporter() -> None:
    """Make torch import what it imports at the first export, before a recorder slows imports down."""
    shapes = ({0: torch.export.Dim.AUTO},)
    torch.export.export(torch.nn.Flatten(0), (torch.zeros(2, 3),), dynamic_shapes=shapes, strict=False)
