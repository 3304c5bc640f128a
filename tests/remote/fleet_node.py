"""A node of a fleet: ``python fleet_node.py JSON`` compiles a target, and says how it went."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from pathlib import Path


def models():
    """Three stacks of layers, which share some."""
    import torch

    def stack(*widths: int):
        torch.manual_seed(0)
        layers = []
        for before, after in itertools.pairwise(widths):
            layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers).eval()

    return [stack(8, 8, 16), stack(8, 8, 32), stack(8, 16, 8, 32)]


def main(job: dict) -> None:
    import torch

    import stitchcache
    from stitchcache import remote
    from stitchcache.pieces.eager import EagerBackend

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    remote.LIFETIME = job.get("lifetime", remote.LIFETIME)
    compile_piece = EagerBackend.compile

    def slowly(self, *args, **kwargs):
        time.sleep(job.get("seconds", 0.0))
        return compile_piece(self, *args, **kwargs)

    if job["backend"] == "eager":
        EagerBackend.compile = slowly
    model = models()[job["target"]]
    x = torch.randn(4, 8)
    if "ready" in job:
        # What takes its time is done before all begin.
        torch.export.export(model, (x,), strict=False)
        Path(job["ready"]).touch()
        while not Path(job["go"]).exists():
            time.sleep(0.01)
    began = time.perf_counter()
    cache = stitchcache.Cache(job["root"], remote=job["remote"])
    compiled = stitchcache.compile(
        model, (x,), splitting_ops=["aten::relu"], backend=job["backend"], cache=cache, **job.get("more", {})
    )
    result = compiled(x)
    if "more" in job:
        # Compiled aside, while calls are eager.
        assert torch.equal(result, model(x))
        assert compiled.wait(120), compiled.status
        result = compiled(x)
    spent = time.perf_counter() - began
    print(
        json.dumps(
            {
                "hit": compiled.cache_hit,
                "equal": torch.allclose(result, model(x), atol=1e-4),
                "seconds": spent,
                "compiled": cache.counted().get(f"piece.compiled.{job['backend']}", 0),
                "requests": cache.tier.remote.requests if "tier" in vars(cache) else 0,
                "blobs": len({piece.blob.digest for piece in compiled.artifact.pieces}),
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
