"""Time to the first output in a fresh process: eager, stitchcache, torch.compile with its warm cache.

    python tests/benchmarks/bench_warm.py [--model decoder|minilm] [--layers 4] [--rounds 5] [--json FILE]

Every way fills its cache first, and then runs in fresh processes, one after the other in turn, so that
noise falls on all alike. Prints medians and ratios; exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import sys, time
way, name, layers, cache = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
spawned = float(sys.argv[5])
import torch
torch_ready = time.time()
if name == "decoder":
    from stitchcache.demo import decoder
    config = decoder.DecoderConfig(layers=layers)
    model, args = decoder.build(config)
    kwargs = {}
else:
    sys.path.insert(0, sys.argv[6])
    import minilm
    model, args, kwargs = minilm.build()
built = time.time()
before = set(sys.modules)
hit = ""
if way == "eager":
    function = model
elif way == "stitchcache":
    import stitchcache
    target = decoder.decoder_target(config) if name == "decoder" else minilm.target
    function = stitchcache.compile(
        model, args, kwargs, dynamic_shapes=target.dynamic_shapes, splitting_ops=target.splitting_ops,
        cache=stitchcache.Cache(cache))
    hit = function.cache_hit or "compiled"
elif way == "torch.compile":
    function = torch.compile(model, dynamic=True)
with torch.no_grad():
    output = function(*args, **kwargs)
done = time.time()
import json
calls = []
torch.set_num_threads(1)
with torch.no_grad():
    for _ in range(30):
        began = time.perf_counter()
        function(*args, **kwargs)
        calls.append(time.perf_counter() - began)
calls.sort()
ours = sorted({"torch._dynamo", "torch._inductor"} & (set(sys.modules) - before))
print(json.dumps(dict(process=done - spawned, import_torch=torch_ready - spawned, after_build=done - built,
                      call_us=calls[len(calls) // 2] * 1e6, hit=hit, imports=ours)))
"""
WAYS = ("eager", "stitchcache", "torch.compile")
GOALS = {"decoder": 0.060, "minilm": 0.250}


def run(way: str, options: argparse.Namespace, directory: Path) -> dict:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(directory / f"inductor-{way}"), "HF_HUB_OFFLINE": "1"}
    examples = Path(__file__).parents[2] / "docs" / "examples"
    command = [sys.executable, "-c", CHILD, way, options.model, str(options.layers), str(directory / "cache")]
    done = subprocess.run(
        [*command, str(time.time()), str(examples)], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(GOALS), default="decoder")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        cold = {way: run(way, options, directory) for way in WAYS}
        samples: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                samples[way].append(run(way, options, directory))
    keys = ("process", "import_torch", "after_build", "call_us")
    medians = {way: {key: statistics.median(s[key] for s in samples[way]) for key in keys} for way in WAYS}
    print(
        f"{options.model}, {options.layers} layers, medians of {options.rounds} fresh processes each, in turn"
    )
    print(f"{'way':<16}{'first output s':>16}{'after build ms':>16}{'one call us':>14}")
    for way in WAYS:
        m = medians[way]
        print(f"{way:<16}{m['process']:>16.2f}{m['after_build'] * 1e3:>16.1f}{m['call_us']:>14.0f}")
    ours, peer, eager = medians["stitchcache"], medians["torch.compile"], medians["eager"]
    hits = {s["hit"] for s in samples["stitchcache"]}
    imports = sorted({name for s in samples["stitchcache"] for name in s["imports"]})
    goals = {
        f"after build at most {GOALS[options.model] * 1e3:.0f} ms": ours["after_build"]
        <= GOALS[options.model],
        "process at least 2.5 times faster than torch.compile, warm": peer["process"]
        >= 2.5 * ours["process"],
        "every start a direct hit": hits == {"direct"},
        "no compiler imported by us": not imports,
    }
    print(
        f"torch.compile / stitchcache: {peer['process'] / ours['process']:.2f} of the process, "
        f"{peer['after_build'] / ours['after_build']:.0f} after the model is built; "
        f"stitchcache / eager: {ours['process'] / eager['process']:.3f} of the process"
    )
    for goal, met in goals.items():
        print(f"  {'met   ' if met else 'MISSED'}  {goal}")
    if options.json:
        import torch

        facts = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
        record = {"facts": facts, "cold": cold, "samples": samples, "medians": medians, "goals": goals}
        options.json.write_text(json.dumps(record, indent=1))
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
