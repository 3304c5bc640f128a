"""One fresh process of the demo: build the decoder, run it, print what that took as JSON.

Eager and cached runs go through the same code but for the one call of ``stitchcache``, so that their times
compare.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any

_WARM_CALLS = 20
_CALLS = 200
_SHAPES = ((2, 16), (1, 2), (5, 33), (64, 3))

Record = dict[str, Any]


def measure(job: Record) -> Record:
    """Do a job: ``mode`` (``eager``, ``cached``), ``spawned`` (Unix time), ``progress`` and the rest."""
    # Not at the top, here and below: what is imported is a part of what is measured.
    import torch

    from stitchcache.demo.decoder import DecoderConfig, build, token_ids

    config = DecoderConfig(**job["config"])
    model, (ids,) = build(config)
    built = time.time()
    eager: Any = torch.no_grad()(model)
    run = eager if job["mode"] == "eager" else _compiled(job, config, model, ids)
    opened = time.time()
    run(ids)
    first = time.time()
    from stitchcache.torchside import imported_compilers

    measured = {
        "process_seconds": first - job["spawned"],
        "model_seconds": first - built,
        "compilers": imported_compilers(),
    }
    torch.set_num_threads(1)
    times = []
    for _ in range(_WARM_CALLS + _CALLS):
        before = time.perf_counter()
        run(ids)
        times.append(time.perf_counter() - before)
    measured["call_microseconds"] = statistics.median(times[_WARM_CALLS:]) * 1e6
    if job["mode"] == "eager":
        return measured
    inputs = [token_ids(config, rows, tokens) for rows, tokens in _SHAPES]
    return measured | {
        "difference": max(float((run(ids) - eager(ids)).abs().max()) for ids in inputs),
        # Imports are what compile() does not count itself.
        "stages": {
            "imports": opened - built - run.timings["total"],
            **run.timings,
            "first call": first - opened,
        },
        "hit": run.cache_hit,
        "graph_hash": run.graph_hash,
        "pieces": len(run.artifact.pieces),
        "distinct": len({piece.key for piece in run.artifact.pieces}),
    }


def _compiled(job: Record, config: Any, model: Any, ids: Any) -> Any:
    from stitchcache.api.compile import compile_request
    from stitchcache.api.prewarm import request_for
    from stitchcache.cache import Cache
    from stitchcache.demo.decoder import decoder_target

    request, told = request_for(decoder_target(config, job["backend"])), nullcontext[Any]()
    if job["progress"]:
        from stitchcache.api.progress import bar

        told = bar()  # type: ignore[assignment]
    with told as on_progress:
        return compile_request(model, (ids,), {}, request, Cache(job["cache"], remote=""), on_progress)


def main() -> None:
    """Read the job from the command line, and print what it measured as JSON."""
    from stitchcache.errors import StitchCacheError

    try:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    except StitchCacheError as error:
        print(f"stitchcache: {error.message}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
