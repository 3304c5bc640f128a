"""Seconds to compile decoders of different depth into an empty cache: distinct pieces, not layers, count.

    python tests/benchmarks/bench_cold.py [--layers 4,16] [--rounds 1] [--peer] [--json FILE]

Each compile runs in a fresh process with an empty cache and an empty Inductor directory. With ``--peer``
torch.compile runs beside it. Exits with 1 if the deepest takes more than 1.3 times the shallowest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import sys, time
way, layers, cache = sys.argv[1], int(sys.argv[2]), sys.argv[3]
import torch
from stitchcache.demo import decoder
config = decoder.DecoderConfig(layers=layers)
model, args = decoder.build(config)
began = time.perf_counter()
pieces = distinct = 0
if way == "stitchcache":
    import stitchcache
    target = decoder.decoder_target(config)
    function = stitchcache.compile(model, args, dynamic_shapes=target.dynamic_shapes,
                                   splitting_ops=target.splitting_ops, cache=stitchcache.Cache(cache))
    pieces, distinct = len(function.artifact.pieces), len({p.key for p in function.artifact.pieces})
else:
    function = torch.compile(model, dynamic=True)
with torch.no_grad():
    function(*args)
import json
print(json.dumps(dict(seconds=time.perf_counter() - began, pieces=pieces, distinct=distinct)))
"""


def run(way: str, layers: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{name}/inductor"}
        command = [sys.executable, "-c", CHILD, way, str(layers), f"{name}/cache"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{way}, {layers} layers failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="4,16")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    depths = [int(part) for part in options.layers.split(",")]
    ways = ["stitchcache", "torch.compile"] if options.peer else ["stitchcache"]
    samples = {(way, depth): [] for way in ways for depth in depths}
    for _ in range(options.rounds):
        for key, found in samples.items():
            found.append(run(*key))
    print(f"{'way':<16}{'layers':>8}{'seconds':>10}{'pieces':>8}{'distinct':>10}")
    median = {}
    for (way, depth), found in samples.items():
        median[way, depth] = statistics.median(s["seconds"] for s in found)
        print(
            f"{way:<16}{depth:>8}{median[way, depth]:>10.1f}{found[0]['pieces']:>8}{found[0]['distinct']:>10}"
        )
    ratio = median["stitchcache", max(depths)] / median["stitchcache", min(depths)]
    same = len({found[0]["distinct"] for (way, _), found in samples.items() if way == "stitchcache"}) == 1
    print(
        f"{max(depths)} layers / {min(depths)} layers: {ratio:.2f} (goal 1.3); same distinct pieces: {same}"
    )
    if options.json:
        record = {f"{way} {depth}": found for (way, depth), found in samples.items()}
        options.json.write_text(json.dumps(record, indent=1))
    return 0 if ratio <= 1.3 and same else 1


if __name__ == "__main__":
    sys.exit(main())
