"""The demo: the same program in fresh processes, without a cache, with an empty one, with a full one."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stitchcache import errors
from stitchcache.demo.child import Job, Measured
from stitchcache.errors import StitchCacheError

OnRecord = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to start, measured.

    Args:
        name: ``eager``, ``cold`` or ``warm``.
        process_seconds: From the start of the process to the first output.
        model_seconds: From the built model to the first output.
        call_microseconds: One later call, with one thread.
        stages: Parts of ``model_seconds``: ``import`` of stitchcache, its ``compile``, the first ``call``.
        runs: Fresh processes that the medians are over.
    """

    name: str
    process_seconds: float
    model_seconds: float
    call_microseconds: float
    stages: dict[str, float]
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What the demo saw.

    Args:
        rows: Eager, cold and warm.
        difference: Largest absolute difference from eager over all cached runs and several sizes.
        hits: What each warm run was: ``direct``, ``graph`` or ``None``.
        compilers: Compiler packages that a warm run imported.
        graph_hash: The entry.
        pieces: Calls of compiled pieces.
        distinct: Different pieces.
    """

    rows: tuple[Row, ...]
    difference: float
    hits: tuple[str | None, ...]
    compilers: tuple[str, ...]
    graph_hash: str
    pieces: int
    distinct: int


def run_demo(
    config: dict[str, int],
    backend: str,
    cache: str,
    runs: int,
    on_step: Callable[[str], None],
    on_progress: OnRecord,
) -> DemoReport:
    """Measure all three starts.

    Args:
        config: Fields of ``stitchcache.demo.decoder.DecoderConfig``.
        backend: Piece backend.
        cache: The cache's directory.
        runs: Fresh processes for each of eager and warm; cold has one, as the second is warm.
        on_step: Called with what is begun.
        on_progress: Called with each step of the compilation.

    Raises:
        StitchCacheError: The decoder cannot be compiled here.
    """
    eager = Job(mode="eager", spawned=0.0, config=config, backend=backend, cache=cache)
    cached = replace(eager, mode="cached")
    # Files that no process has read for a while cost the first one extra, whichever it is: not measured.
    on_step("a first process, not measured")
    run_child(eager, on_progress)
    on_step("cold: an empty cache")
    cold = run_child(cached, on_progress)
    plain, warm = [], []
    for index in range(runs):
        # Taken in turn, so that what else the machine does falls on both.
        on_step(f"eager and warm, fresh processes {index + 1} of {runs}")
        plain.append(run_child(eager, on_progress))
        warm.append(run_child(cached, on_progress))
    return DemoReport(
        # A cache that was named may hold it already; then the first start is no cold one.
        rows=(_row("eager", plain), _row("first" if cold.hit else "cold", [cold]), _row("warm", warm)),
        difference=max(run.difference for run in [cold, *warm]),
        hits=tuple(run.hit for run in warm),
        compilers=tuple(sorted({name for run in warm for name in run.compilers})),
        graph_hash=cold.graph_hash,
        pieces=cold.pieces,
        distinct=cold.distinct,
    )


def _row(name: str, runs: Sequence[Measured]) -> Row:
    return Row(
        name=name,
        process_seconds=statistics.median(run.process_seconds for run in runs),
        model_seconds=statistics.median(run.model_seconds for run in runs),
        call_microseconds=statistics.median(run.call_microseconds for run in runs),
        stages={name: statistics.median(run.stages[name] for run in runs) for name in runs[0].stages},
        runs=len(runs),
    )


def run_child(job: Job, on_progress: OnRecord) -> Measured:
    """Do a job in a fresh process.

    Args:
        job: What to do; its start time is filled in.
        on_progress: Called with each step of a compilation.

    Raises:
        StitchCacheError: What stopped the child.
    """
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "stitchcache.demo.child", ""]
        command[-1] = json.dumps(asdict(replace(job, spawned=time.time())))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            last: dict[str, Any] = {}
            for line in process.stdout or ():
                last = json.loads(line)
                if "progress" in last:
                    on_progress(last["progress"])
        if "result" in last:
            fields = last["result"]
            return Measured(**{**fields, "compilers": tuple(fields["compilers"])})
        if "error" in last:
            raise _error(last["error"])
        said.seek(0)
        raise StitchCacheError(
            f"the demo's process ended with status {process.returncode} and no result; it said:\n"
            f"{said.read()[-4000:]}"
        )


def _error(record: dict[str, str]) -> StitchCacheError:
    kind: type[StitchCacheError] = getattr(errors, record["type"], StitchCacheError)
    return kind(record["message"])
