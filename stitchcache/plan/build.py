"""Compile what a plan needs and the cache does not have."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from stitchcache.graph.effects import attribute_of
from stitchcache.pieces import children, get_backend
from stitchcache.pieces.check import compare_with_eager
from stitchcache.pieces.stand_ins import compare_on_stand_ins
from stitchcache.pieces.trial import load_elsewhere
from stitchcache.plan.plan import Plan, PlannedPiece, piece_inputs
from stitchcache.torchside.tensors import has_fakes

log = logging.getLogger("stitchcache")


@dataclass(frozen=True, slots=True)
class BuiltPiece:
    """A piece, fresh from its backend.

    Args:
        key: Piece key.
        backend: What compiled it.
        path: The file; in the scratch directory that :func:`build` was given.
        seconds: What it took.
        difference: Largest absolute difference from eager; ``None`` if it was not compared.
        unverified: Why it was not compared although it should have been.
    """

    key: str
    backend: str
    path: Path
    seconds: float
    difference: float | None
    unverified: str = ""


def build(
    plan: Plan,
    missing: Sequence[PlannedPiece],
    leaves: Sequence[Any] | None,
    scratch: Path,
    options: Mapping[str, Any],
    *,
    jobs: int | None,
    devices: Sequence[str],
    before: Mapping[str, int],
    on_built: Callable[[BuiltPiece], None],
) -> None:
    """Compile pieces, each in a child process that also loads and checks it.

    Args:
        plan: The plan.
        missing: One piece for each key to compile.
        leaves: Arguments to compare with eager on; ``None`` skips the comparison. Where they or the
            model's tensors have no data, pieces are compared on made-up inputs, each on its own.
        scratch: A directory to work in.
        options: Backend options.
        jobs: Processes at a time; ``None`` takes about one a core, see :func:`at_once`.
        devices: Device types in use.
        before: How many pieces each backend has compiled on this store until now.
        on_built: Called in this process as pieces get ready.

    Raises:
        CompilerMissingError: There is no C++ compiler.
        PieceCrashError: A piece killed its child.
        PieceMismatchError: A piece disagrees with eager.
        BackendError: A piece cannot be compiled.
    """
    tuned: dict[str, Mapping[str, Any]] = {}
    for name, count in Counter(piece.backend for piece in missing).items():
        backend = get_backend(name)
        backend.require()
        backend.prepare(devices, options)
        tuned[name] = backend.tuned(devices, options, before.get(name, 0), count)
    inputs: dict[str, list[Any]] = {}
    faked = leaves is not None and has_fakes([*leaves, *_tensors(plan)])
    if leaves is not None and not faked:
        inputs = piece_inputs(plan, leaves, {piece.name: piece.key for piece in missing})
    device = next((d for d in devices if d != "cpu"), "cpu")
    forked = children.available()
    pending = []
    for piece in missing:
        directory = scratch / piece.key
        directory.mkdir()
        given = None if faked else inputs.get(piece.key)
        compile_one = partial(
            _build_one, piece, directory, tuned[piece.backend], given, faked, device, forked
        )
        run = partial(_settled, compile_one, piece.backend, devices, options) if forked else compile_one
        pending.append(
            children.Job(name=piece.name, run=run, log=scratch / f"{piece.key}.log", backend=piece.backend)
        )
    results = children.run_all(pending, at_once(len(pending), jobs)) if forked else children.run_here(pending)
    with ExitStack() as stack:
        if not forked:
            for name in tuned:
                stack.enter_context(get_backend(name).settled(devices, options))
        # Closed whatever happens, so that no child outlives an error or Ctrl-C.
        stack.enter_context(closing(results))
        for index, built in results:
            if built.unverified:
                log.info("piece %s: not compared with eager: %s", pending[index].name, built.unverified)
            on_built(built)


def at_once(pieces: int, jobs: int | None) -> int:
    """How many pieces to compile at a time, so that no core idles while the last few compile.

    Three pieces on two cores are done sooner side by side than two first and one after. The price is the
    memory of a compiler more for every second core, at the most.

    Args:
        pieces: How many there are.
        jobs: What the user wants; ``None`` leaves it open.
    """
    if not children.available():
        return 1
    if jobs is not None:
        return jobs
    cores = len(os.sched_getaffinity(0))
    rounds = max(1, pieces // cores)
    return max(1, min(-(-pieces // rounds), cores + (cores + 1) // 2))


def _settled(
    work: Callable[[], BuiltPiece], backend: str, devices: Sequence[str], options: Mapping[str, Any]
) -> BuiltPiece:
    with get_backend(backend).settled(devices, options):
        return work()


def _build_one(
    piece: PlannedPiece,
    directory: Path,
    options: Mapping[str, Any],
    inputs: list[Any] | None,
    faked: bool,
    device: str,
    forked: bool,
) -> BuiltPiece:
    began = time.perf_counter()
    backend = get_backend(piece.backend)
    path = backend.build(_copy(piece.gm), directory, options)
    difference, unverified = None, ""
    if not forked and piece.backend != "eager":
        load_elsewhere(backend.name, path, device, piece.name)
    if inputs is not None:
        compiled = backend.load(path, device)
        difference = compare_with_eager(piece.gm, compiled, inputs, name=piece.name, backend=backend.name)
    elif faked:
        compiled = backend.load(path, device)
        difference, unverified = compare_on_stand_ins(
            piece.gm, compiled, name=piece.name, backend=backend.name
        )
    return BuiltPiece(piece.key, backend.name, path, time.perf_counter() - began, difference, unverified)


def _tensors(plan: Plan) -> list[Any]:
    """What the stitching graph takes from the model."""
    return [
        attribute_of(plan.split_gm, str(node.target))
        for node in plan.split_gm.graph.nodes
        if node.op == "get_attr"
    ]


def _copy(gm: GraphModule) -> GraphModule:
    """Backends may rewrite the graph that they are given."""
    graph = type(gm.graph)()
    output = graph.graph_copy(gm.graph, {}, return_output_node=True)
    if isinstance(output, tuple):
        graph.output(output[0])
    return GraphModule(gm, graph)
