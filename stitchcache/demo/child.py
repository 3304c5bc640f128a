"""One fresh process of the demo: build the decoder, run it, print what that took as JSON lines.

Lines with ``progress`` come while it compiles; the last line has ``result`` or ``error``. Eager and cached
runs go through the same code but for the one call of ``stitchcache``, so that their times compare.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict
from typing import Any

_WARM_CALLS = 20
_CALLS = 200
_SHAPES = ((2, 16), (1, 2), (5, 33), (64, 3))

Record = dict[str, Any]


def measure(job: Record) -> Record:
    """Do a job: ``mode`` (``eager``, ``cached``), ``spawned`` (Unix time) and the rest."""
    # Not at the top, here and below: what is imported is a part of what is measured.
    import torch

    from stitchcache.demo.decoder import DecoderConfig, build, token_ids

    config = DecoderConfig(**job["config"])
    model, (ids,) = build(config)
    built = time.time()
    eager: Any = torch.no_grad()(model)
    run = eager if job["mode"] == "eager" else _compiled(job, config, model, ids)
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
        "stages": dict(run.timings),
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

    request = request_for(decoder_target(config, job["backend"]))
    return compile_request(
        model, (ids,), {}, request, Cache(job["cache"]), lambda progress: _say(progress=asdict(progress))
    )


def _say(**record: Record) -> None:
    print(json.dumps(record), flush=True)


def main() -> None:
    """Read the job from the command line, and print JSON lines."""
    from stitchcache.errors import StitchCacheError

    try:
        _say(result=measure(json.loads(sys.argv[1])))
    except StitchCacheError as error:
        _say(error={"type": type(error).__name__, "message": error.message})
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
