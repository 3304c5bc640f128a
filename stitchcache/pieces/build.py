"""Compile the pieces that the cache lacks, each in a child process that also loads and checks it.

Beside the capture, :func:`warming` lets another child fill the caches on disk that compiling reads.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch.fx import GraphModule

from stitchcache.pieces import children, get_backend
from stitchcache.pieces.check import compare_on_stand_ins, compare_with_eager

log = logging.getLogger("stitchcache")


class Piece(Protocol):
    """What is to be compiled."""

    @property
    def name(self) -> str:
        """For logs and errors."""

    @property
    def key(self) -> str:
        """Piece key."""

    @property
    def backend(self) -> str:
        """What compiles it."""

    @property
    def gm(self) -> GraphModule:
        """The graph; not changed."""


@dataclass(frozen=True, slots=True)
class Examples:
    """What pieces are compared with eager on.

    Args:
        inputs: Inputs of pieces, by key, as a real run fed them.
        made_up: There is no real data: each piece is compared on numbers made up for it.
    """

    inputs: Mapping[str, list[Any]]
    made_up: bool = False


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
    missing: Sequence[Piece],
    examples: Examples | None,
    scratch: Path,
    options: Mapping[str, Any],
    *,
    jobs: int | None,
    devices: Sequence[str],
    on_built: Callable[[BuiltPiece], None],
) -> None:
    """Compile pieces.

    Args:
        missing: One piece for each key to compile.
        examples: What to compare them with eager on; ``None`` skips the comparison.
        scratch: A directory to work in.
        options: Backend options.
        jobs: Processes at a time; ``None`` takes about one a core, see :func:`at_once`.
        devices: Device types in use.
        on_built: Called in this process as pieces get ready.

    Raises:
        CompilerMissingError: There is no C++ compiler.
        PieceCrashError: A piece killed its child.
        PieceMismatchError: A piece disagrees with eager.
        BackendError: A piece cannot be compiled.
    """
    chosen: dict[str, Mapping[str, Any]] = {}
    for name, count in Counter(piece.backend for piece in missing).items():
        backend = get_backend(name)
        backend.require()
        backend.prepare(devices, options)
        chosen[name] = backend.options_for(devices, options, count)
    device = next((d for d in devices if d != "cpu"), "cpu")
    forked = children.available()
    pending = []
    for piece in missing:
        directory = scratch / piece.key
        directory.mkdir()
        work = partial(_build_one, piece, directory, chosen[piece.backend], examples, device, forked)
        run = partial(_ready, work, piece.backend, devices, options) if forked else work
        said = scratch / f"{piece.key}.log"
        pending.append(children.Job(name=piece.name, run=run, log=said, backend=piece.backend))
    results = children.run_all(pending, at_once(len(pending), jobs)) if forked else children.run_here(pending)
    with ExitStack() as stack:
        if not forked:
            for name in chosen:
                stack.enter_context(get_backend(name).around_compiling(devices, options))
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


def _ready(
    work: Callable[[], BuiltPiece], backend: str, devices: Sequence[str], options: Mapping[str, Any]
) -> BuiltPiece:
    with get_backend(backend).around_compiling(devices, options):
        return work()


def _build_one(
    piece: Piece,
    directory: Path,
    options: Mapping[str, Any],
    examples: Examples | None,
    device: str,
    forked: bool,
) -> BuiltPiece:
    began = time.perf_counter()
    backend = get_backend(piece.backend)
    path = backend.build(_copy(piece.gm), directory, options)
    difference, unverified = None, ""
    if not forked and piece.backend != "eager":
        children.load_elsewhere(backend.name, path, device, piece.name)
    inputs = examples.inputs.get(piece.key) if examples else None
    if inputs is not None:
        compiled = backend.load(path, device)
        difference = compare_with_eager(piece.gm, compiled, inputs, name=piece.name, backend=backend.name)
    elif examples and examples.made_up:
        compiled = backend.load(path, device)
        difference, unverified = compare_on_stand_ins(
            piece.gm, compiled, name=piece.name, backend=backend.name
        )
    return BuiltPiece(piece.key, backend.name, path, time.perf_counter() - began, difference, unverified)


def _copy(gm: GraphModule) -> GraphModule:
    """Backends may rewrite the graph that they are given."""
    graph = type(gm.graph)()
    output = graph.graph_copy(gm.graph, {}, return_output_node=True)
    if isinstance(output, tuple):
        graph.output(output[0])
    return GraphModule(gm, graph)


@contextmanager
def warming(
    name: str, devices: Collection[str], options: Mapping[str, Any], needless: bool = False
) -> Iterator[None]:
    """Warm a backend up beside a block of code; what is not done at its end is given up.

    Nothing depends on its outcome: what it did not do in time, or could not do, the pieces do themselves,
    waiting for each other at torch's own file locks.

    Args:
        name: The backend.
        devices: Device types in use.
        options: Backend options.
        needless: Nothing will be compiled: only run the block.
    """
    backend = get_backend(name)
    if needless or not children.available() or not backend.wants_warming():
        yield
        return
    with ExitStack() as stack:
        try:
            directory = Path(tempfile.mkdtemp(prefix="stitchcache-warming-"))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            warm = partial(backend.warm, tuple(devices), dict(options))
            job = children.Job(name="warming", run=warm, log=directory / "log", backend=name)
            child = children.start(job)
            stack.callback(_end, child)
        except OSError as error:
            # No room for a process, or for its log.
            log.debug("warming up: %s", error)
        yield


def _end(child: children.Child) -> None:
    children.end(child)
    said = child.job.log
    if said.exists() and (text := said.read_text(errors="replace").strip()):
        log.debug("warming up: %s", text.splitlines()[-1])
