"""One fresh process of the demo: build the decoder, run it, print what that took as JSON lines.

Run as ``python -m stitchcache.demo.child '<job as JSON>'``. Lines with ``progress`` come while it compiles;
the last line has ``result`` or ``error``. Eager and cached runs go through the same code but for the one
call of ``stitchcache``, so that their times compare.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

_WARM_CALLS = 20
_CALLS = 200
_SHAPES = ((2, 16), (1, 2), (5, 33), (64, 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a child does.

    Args:
        mode: ``eager`` or ``cached``.
        spawned: Unix seconds at which the parent started it.
        config: Fields of ``DecoderConfig``.
        backend: Piece backend.
        cache: The cache's directory.
    """

    mode: str
    spawned: float
    config: dict[str, int]
    backend: str
    cache: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a child measured.

    Args:
        process_seconds: From the start of the process to the first output.
        model_seconds: From the built model to the first output.
        call_microseconds: Median of one later call, with one thread.
        stages: The same from the built model on: ``import`` of stitchcache, its ``compile``, ``call``.
        difference: Largest absolute difference from eager over several sizes.
        hit: ``direct``, ``graph``, or ``None`` where pieces were compiled.
        graph_hash: The entry.
        pieces: Calls of compiled pieces.
        distinct: Different pieces.
        compilers: Compiler packages of torch that the run to the first output imported.
    """

    process_seconds: float
    model_seconds: float
    call_microseconds: float
    stages: dict[str, float]
    difference: float = 0.0
    hit: str | None = None
    graph_hash: str = ""
    pieces: int = 0
    distinct: int = 0
    compilers: tuple[str, ...] = ()


def measure(job: Job, say: Callable[[dict[str, Any]], None]) -> Measured:
    """Do a job.

    Args:
        job: What to do.
        say: Gets a record for each step of a compilation.

    Raises:
        StitchCacheError: The decoder cannot be compiled.
    """
    import torch

    from stitchcache.demo.decoder import DecoderConfig, build

    config = DecoderConfig(**job.config)
    model, (ids,) = build(config)
    built = time.time()
    stages: dict[str, float] = {}
    run = _eager(model) if job.mode == "eager" else _cached(job, config, model, ids, say, stages)
    began = time.time()
    run(ids)
    first = time.time()
    stages["call"] = first - began
    # Not at the top: the times above are measured, and this imports a file.
    from stitchcache.torchside.state import imported_compilers

    compilers = imported_compilers()
    torch.set_num_threads(1)
    call = _one_call(run, ids)
    facts: dict[str, Any] = {}
    if job.mode != "eager":
        artifact = run.artifact
        facts = {
            "difference": _difference(config, model, run),
            "hit": run.cache_hit,
            "graph_hash": run.graph_hash,
            "pieces": len(artifact.pieces),
            "distinct": len({piece.key for piece in artifact.pieces}),
        }
    return Measured(
        process_seconds=first - job.spawned,
        model_seconds=first - built,
        call_microseconds=call * 1e6,
        stages=stages,
        compilers=compilers,
        **facts,
    )


def _eager(model: Any) -> Any:
    import torch

    return torch.no_grad()(model)


def _cached(
    job: Job,
    config: Any,
    model: Any,
    ids: Any,
    say: Callable[[dict[str, Any]], None],
    stages: dict[str, float],
) -> Any:
    began = time.time()
    from stitchcache.api.compile import compile_request
    from stitchcache.cache import Cache
    from stitchcache.demo.decoder import decoder_target
    from stitchcache.pipeline.request import Progress, Request

    def on_progress(progress: Progress) -> None:
        say({"progress": asdict(progress)})

    target = decoder_target(config, job.backend)
    stages["import"] = time.time() - began
    request = Request(
        dynamic_shapes=target.dynamic_shapes,
        splitting_ops=tuple(target.splitting_ops),
        backend=target.backend,
        label=target.name,
    )
    began = time.time()
    compiled = compile_request(model, (ids,), {}, request, Cache(job.cache), on_progress)
    stages["compile"] = time.time() - began
    return compiled


def _one_call(run: Any, ids: Any) -> float:
    for _ in range(_WARM_CALLS):
        run(ids)
    times = []
    for _ in range(_CALLS):
        began = time.perf_counter()
        run(ids)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _difference(config: Any, model: Any, run: Any) -> float:
    from stitchcache.demo.decoder import token_ids

    eager = _eager(model)
    worst = 0.0
    for rows, tokens in _SHAPES:
        ids = token_ids(config, rows, tokens)
        worst = max(worst, float((run(ids) - eager(ids)).abs().max()))
    return worst


def main() -> None:
    """Read the job from the command line, and print JSON lines."""
    from stitchcache.errors import StitchCacheError

    try:
        measured = measure(Job(**json.loads(sys.argv[1])), _say)
    except StitchCacheError as error:
        _say({"error": {"type": type(error).__name__, "message": error.message}})
        raise SystemExit(1) from None
    _say({"result": asdict(measured)})


def _say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
