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
from functools import partial
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from stitchcache.pieces import Options, Piece, children, get_backend
from stitchcache.pieces.check import compare_on_stand_ins, compare_with_eager

log = logging.getLogger("stitchcache")


def build(
    missing: Sequence[Piece],
    examples: Mapping[str, list[Any]] | None,
    scratch: Path,
    options: Options,
    *,
    jobs: int | None,
    devices: Sequence[str],
    on_built: Callable[[Piece, Path, float], None],
) -> None:
    """Compile pieces, one for each key; a BackendError if one cannot be compiled, or is wrong.

    ``examples`` has inputs by key, as a real run fed them, to compare with eager on. A piece without is
    compared on made-up numbers; ``None`` skips the comparison. ``on_built`` is called in this process as
    pieces get ready, with their file and their seconds.
    """
    counts = Counter(piece.backend for piece in missing)
    chosen = {name: get_backend(name).prepare(devices, options, count) for name, count in counts.items()}
    forked = children.available()

    def compile_one(piece: Piece, directory: Path) -> tuple[Path, float, str]:
        began = time.perf_counter()
        with ExitStack() as stack:
            if forked:
                stack.enter_context(get_backend(piece.backend).around_compiling(devices, options))
            path, unverified = _compile(piece, directory, chosen[piece.backend], examples, devices, forked)
        return path, time.perf_counter() - began, unverified

    pending = []
    for piece in missing:
        directory = scratch / piece.key
        directory.mkdir()
        run = partial(compile_one, piece, directory)
        pending.append(
            children.Job(name=piece.name, run=run, log=scratch / f"{piece.key}.log", backend=piece.backend)
        )
    results = children.run_all(pending, at_once(len(pending), jobs)) if forked else children.run_here(pending)
    with ExitStack() as stack:
        if not forked:
            for name in chosen:
                stack.enter_context(get_backend(name).around_compiling(devices, options))
        # Closed whatever happens, so that no child outlives an error or Ctrl-C.
        stack.enter_context(closing(results))
        for index, (path, seconds, unverified) in results:
            log.debug("piece %s: %s, %.1f s", missing[index].name, missing[index].backend, seconds)
            if unverified:
                log.info("piece %s: not compared with eager: %s", missing[index].name, unverified)
            on_built(missing[index], path, seconds)


def _compile(
    piece: Piece,
    directory: Path,
    options: Options,
    examples: Mapping[str, list[Any]] | None,
    devices: Sequence[str],
    forked: bool,
) -> tuple[Path, str]:
    """Compile a piece, load it, and compare it: its file, and why it was not compared."""
    backend = get_backend(piece.backend)
    device = next((d for d in devices if d != "cpu"), "cpu")
    path = backend.compile(_copy(piece.gm), directory, options)
    if not forked and piece.backend != "eager":
        children.load_elsewhere(backend.name, path, device, piece.name)
    if examples is None:
        return path, ""
    compiled = backend.load(path, device)
    if piece.key not in examples:
        return path, compare_on_stand_ins(piece, compiled)
    compare_with_eager(piece, compiled, examples[piece.key])
    return path, ""


def _copy(gm: GraphModule) -> GraphModule:
    """Backends may rewrite the graph that they are given."""
    graph = type(gm.graph)()
    output = graph.graph_copy(gm.graph, {}, return_output_node=True)
    if isinstance(output, tuple):
        graph.output(output[0])
    return GraphModule(gm, graph)


def at_once(pieces: int, jobs: int | None) -> int:
    """How many pieces to compile at a time, unless the user says it: so that no core idles at the end.

    Three pieces on two cores are done sooner side by side than two first and one after. The price is the
    memory of a compiler more for every second core, at the most.
    """
    if not children.available():
        return 1
    if jobs is not None:
        return jobs
    cores = len(os.sched_getaffinity(0))
    rounds = max(1, pieces // cores)
    return max(1, min(-(-pieces // rounds), cores + (cores + 1) // 2))


@contextmanager
def warming(name: str, devices: Collection[str], options: Options, needless: bool = False) -> Iterator[None]:
    """Warm a backend up beside a block of code; what is not done at its end is given up.

    Nothing depends on its outcome: what it did not do in time, or could not do, the pieces do themselves,
    waiting for each other at torch's own file locks. Where it is needless, only the block runs.
    """
    warm = None if needless or not children.available() else get_backend(name).warmth(devices, options)
    with ExitStack() as stack:
        if warm is not None:
            try:
                directory = Path(tempfile.mkdtemp(prefix="stitchcache-warming-"))
                stack.callback(shutil.rmtree, directory, ignore_errors=True)
                job = children.Job(name="warming", run=warm, log=directory / "log", backend=name)
                stack.callback(children.end, children.start(job))
            except OSError as error:
                # No room for a process, or for its log.
                log.debug("warming up: %s", error)
        yield
