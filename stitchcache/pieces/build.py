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
from copy import deepcopy
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
    device: str,
    devices: Sequence[str],
    on_built: Callable[[Piece, Path, float], None],
) -> None:
    """Compile pieces, one for each key; a BackendError if one cannot be compiled, or is wrong.

    ``examples`` has inputs by key, as a real run fed them, to compare with eager on. A piece without is
    compared on made-up numbers; ``None`` skips the comparison. ``on_built`` is called in this process as
    pieces get ready, with their file and their seconds. Pieces are loaded for ``device``; ``devices`` are
    types of all in use.
    """
    counts = Counter(piece.backend for piece in missing)
    forked = children.available()
    chosen: dict[str, Options] = {}
    # Where compilers run beside what is lowered later, what takes them longest is lowered first.
    missing = missing if forked else sorted(missing, key=lambda piece: -len(piece.gm.graph.nodes))

    def begin(piece: Piece, directory: Path) -> Callable[[], Path]:
        # A copy, as backends may rewrite the graph that they are given; what it holds is not copied.
        copied = GraphModule(piece.gm, deepcopy(piece.gm.graph))
        return get_backend(piece.backend).begin(copied, directory, chosen[piece.backend])

    def in_child(piece: Piece, directory: Path) -> tuple[Path, float, str | None]:
        began = time.perf_counter()
        with get_backend(piece.backend).around_compiling(devices, options):
            path = begin(piece, directory)()
            return path, time.perf_counter() - began, _compare(piece, path, examples, device)

    def here(piece: Piece, directory: Path, trial: children.Trial) -> Callable[[], Any]:
        began = time.perf_counter()
        rest = begin(piece, directory)
        lowered = time.perf_counter()

        def finish() -> tuple[Path, float, str | None]:
            path = rest()
            compiled = time.perf_counter()
            if piece.backend != "eager":
                trial.load(piece.backend, path, piece.name)
            spent = (lowered - began, compiled - lowered, time.perf_counter() - compiled)
            log.debug("piece %s: lowered in %.1f s, compiled in %.1f, tried in %.1f", piece.name, *spent)
            return path, sum(spent), None

        return finish

    with ExitStack() as stack:
        if not forked:
            # It gets ready while this process does.
            trial = stack.enter_context(children.Trial(device))
        chosen |= {name: get_backend(name).prepare(devices, options, n) for name, n in counts.items()}
        if not forked:
            for name in chosen:
                stack.enter_context(get_backend(name).around_compiling(devices, options))
        pending = []
        for piece in missing:
            directory = scratch / piece.key
            directory.mkdir()
            run = partial(in_child, piece, directory) if forked else partial(here, piece, directory, trial)
            log_file = scratch / f"{piece.key}.log"
            pending.append(children.Job(name=piece.name, run=run, log=log_file, backend=piece.backend))
        run_all = children.run_all if forked else children.run_here
        limit = at_once(len(pending), jobs) if forked else jobs or len(os.sched_getaffinity(0))
        # Closed whatever happens, so that no child outlives an error or Ctrl-C.
        results = stack.enter_context(closing(run_all(pending, limit)))
        for index, (path, seconds, unverified) in results:
            if unverified is None:
                # Not in its thread: Inductor tunes kernels on the GPU meanwhile.
                with children.told(pending[index]):
                    unverified = _compare(missing[index], path, examples, device)
            log.debug("piece %s: %s, %.1f s", missing[index].name, missing[index].backend, seconds)
            if unverified:
                log.info("piece %s: not compared with eager: %s", missing[index].name, unverified)
            on_built(missing[index], path, seconds)


def _compare(piece: Piece, path: Path, examples: Mapping[str, list[Any]] | None, device: str) -> str:
    """Load a piece and compare it with eager: why that was not possible; ``""`` where it agreed."""
    if examples is None:
        return ""
    compiled = get_backend(piece.backend).load(path, device)
    if piece.key not in examples:
        return compare_on_stand_ins(piece, compiled)
    compare_with_eager(piece, compiled, examples[piece.key])
    return ""


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
