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
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from stitchcache.demo.decoder import Decoder, DecoderConfig
    from stitchcache.pipeline.find import Progress
    from stitchcache.runtime.model import CompiledModel

_WARM_CALLS = 20
_CALLS = 200
_SHAPES = ((2, 16), (1, 2), (5, 33), (64, 3))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job.

    Args:
        job: ``mode`` (``eager`` or ``cached``), ``spawned`` (when the parent started this process, in Unix
            seconds), ``config`` (fields of ``DecoderConfig``), ``backend`` and ``cache``.

    Returns:
        Seconds from the start of the process and from the built model to the first output, the latter by
        stage too; the median of later calls with one thread; the compiler packages that were imported until
        then; of a cached run, the largest difference from eager and facts of the entry.

    Raises:
        StitchCacheError: The decoder cannot be compiled.
    """
    # Not at the top: importing torch is a part of what is measured.
    import torch

    from stitchcache.demo.decoder import DecoderConfig, build, token_ids

    config = DecoderConfig(**job["config"])
    model, (ids,) = build(config)
    built = time.time()
    stages: dict[str, float] = {}
    eager: Any = torch.no_grad()(model)
    run: Any = eager
    if job["mode"] == "cached":
        run = _compiled(job, config, model, ids, stages)
    began = time.time()
    run(ids)
    first = time.time()
    stages["call"] = first - began
    # Not at the top: the times above are measured, and this imports a file.
    from stitchcache.torchside.state import imported_compilers

    measured: dict[str, Any] = {
        "process_seconds": first - job["spawned"],
        "model_seconds": first - built,
        "stages": stages,
        "compilers": imported_compilers(),
    }
    torch.set_num_threads(1)
    times = []
    for _ in range(_WARM_CALLS + _CALLS):
        before = time.perf_counter()
        run(ids)
        times.append(time.perf_counter() - before)
    measured["call_microseconds"] = statistics.median(times[_WARM_CALLS:]) * 1e6
    if job["mode"] == "cached":
        inputs = [token_ids(config, rows, tokens) for rows, tokens in _SHAPES]
        measured |= {
            "difference": max(float((run(ids) - eager(ids)).abs().max()) for ids in inputs),
            "hit": run.cache_hit,
            "graph_hash": run.graph_hash,
            "pieces": len(run.artifact.pieces),
            "distinct": len({piece.key for piece in run.artifact.pieces}),
        }
    return measured


def _compiled(
    job: dict[str, Any], config: DecoderConfig, model: Decoder, ids: Tensor, stages: dict[str, float]
) -> CompiledModel:
    began = time.time()
    from stitchcache.api.compile import compile_request
    from stitchcache.cache import Cache
    from stitchcache.demo.decoder import decoder_target
    from stitchcache.pipeline.find import Request

    def on_progress(progress: Progress) -> None:
        _say({"progress": asdict(progress)})

    target = decoder_target(config, job["backend"])
    stages["import"] = time.time() - began
    request = Request(
        dynamic_shapes=target.dynamic_shapes,
        splitting_ops=tuple(target.splitting_ops),
        backend=target.backend,
        label=target.name,
    )
    began = time.time()
    compiled = compile_request(model, (ids,), {}, request, Cache(job["cache"]), on_progress)
    stages["compile"] = time.time() - began
    return compiled


def main() -> None:
    """Read the job from the command line, and print JSON lines."""
    from stitchcache.errors import StitchCacheError

    try:
        _say({"result": measure(json.loads(sys.argv[1]))})
    except StitchCacheError as error:
        _say({"error": {"type": type(error).__name__, "message": error.message}})
        raise SystemExit(1) from None


def _say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
