"""What a capture costs beside a bare ``torch.export.export`` of the same model, by the number of layers.

    python tests/benchmarks/bench_capture.py [--layers 4,16] [--rounds 5] [--width 64] [--device cpu]

The GPU benchmark's decoder in bfloat16. Each round is a fresh process, as a cold compile is one; in it the
ways run in turn, each on a model of its own. Prints medians, and exits with 1 if 16 layers take over 1.5
times as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "gpu"), str(HERE.parents[1])]
MOST, AT = 1.5, 16
WAYS = ("bare", "unrecorded", "ours", "planned")


def child(layers: int, width: int, device: str, turn: int) -> dict[str, float]:
    """Seconds of processor time of each way, all in this process."""
    import gpu_models
    import torch

    from stitchcache.capture.ranges import capture_ranges
    from stitchcache.keys.recorder import SourceRecorder
    from stitchcache.pieces import get_backend
    from stitchcache.pipeline.make import plan
    from stitchcache.pipeline.trace import _import_exporter

    _import_exporter()
    options = gpu_models.options()
    tokens = {0: torch.export.Dim("tokens", min=2, max=gpu_models.MOST_TOKENS)}

    def bare(model: Any, args: Any) -> Any:
        return torch.export.export(model, args, dynamic_shapes=(tokens, tokens), strict=False)

    def unrecorded(model: Any, args: Any) -> Any:
        return capture_ranges(model, args, {}, options["dynamic_shapes"], ())[0]

    def ours(model: Any, args: Any) -> Any:
        with SourceRecorder():
            return capture_ranges(model, args, {}, options["dynamic_shapes"], ())[0]

    def planned(model: Any, args: Any) -> Any:
        return plan(ours(model, args), options["splitting_ops"], get_backend("aoti"), ())

    ways: dict[str, Callable[[Any, Any], Any]] = dict(
        zip(WAYS, (bare, unrecorded, ours, planned), strict=True)
    )
    seconds = {}
    for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
        model, args = gpu_models.decoder(layers, width, device), gpu_models.call(8, device)
        with torch.no_grad():
            began = time.process_time()
            ways[way](model, args)
            seconds[way] = time.process_time() - began
    return seconds


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default=f"4,{AT}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*json.loads(options.child))))
        return 0
    print(f"Python {sys.version.split()[0]}; seconds of processor time, and how many times bare export's")
    missed = False
    for layers in map(int, options.layers.split(",")):
        found = []
        for turn in range(options.rounds):
            job = json.dumps([layers, options.width, options.device, turn])
            command = [sys.executable, __file__, "--child", job]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        medians = {way: statistics.median(round_[way] for round_ in found) for way in WAYS}
        times = {way: f"{seconds:.2f} ({seconds / medians['bare']:.2f})" for way, seconds in medians.items()}
        print(f"{layers} layers: " + ", ".join(f"{way} {text}" for way, text in times.items()), flush=True)
        missed |= layers == AT and medians["ours"] > MOST * medians["bare"]
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
