"""What the keys of a direct lookup cost, the first time in a process: target key and check of its record.

    python tests/benchmarks/bench_keys.py [--models decoder,bert,llama] [--rounds 7] [--json FILE]

One process captures each model and writes down its key and record; then fresh processes build the model and
look it up. Processor time and wall time of the two steps; importing and building are left out.
Medians; exits with 1 if a goal is missed. ``lookup_cost`` does it for one model, for other scripts.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Milliseconds of processor time; docs/benchmarks.md has figures.
GOALS = {"decoder": 6.0, "bert": 16.0, "llama": 20.0}
SDPA = "aten::scaled_dot_product_attention"


def build(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any, list[str]]:
    """A model with its example, dynamic shapes and splitting ops; widths are tiny, depths are real."""
    import torch

    if name == "decoder":
        from stitchcache.demo import decoder

        config = decoder.DecoderConfig(layers=4)
        model, args = decoder.build(config)
        target = decoder.decoder_target(config)
        return model, args, {}, target.dynamic_shapes, list(target.splitting_ops)
    import transformers

    from stitchcache import Dim

    ids = torch.ones(2, 7, dtype=torch.long)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    if name == "bert":
        shapes = {0: Dim("batch", min=1, max=64), 1: Dim("sequence", min=2, max=512)}
        inputs = {"input_ids": ids, "attention_mask": ids}
        model = transformers.BertModel(transformers.BertConfig(**sizes, num_hidden_layers=6))
        return model.eval(), (), inputs, dict.fromkeys(inputs, shapes), [SDPA]
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=32, num_key_value_heads=2, use_cache=False)
    shapes = {"input_ids": {1: Dim("sequence", min=2, max=64)}}
    return transformers.LlamaForCausalLM(config).eval(), (), {"input_ids": ids}, shapes, [SDPA]


def look_up(name: str, stored: Path) -> dict[str, Any]:
    """In the child: key and check, timed, once; writes key and record first where there are none."""
    model, args, kwargs, shapes, ops = build(name)
    # As api/run.py has imported them by the time it computes a key.
    from stitchcache.keys import target_key
    from stitchcache.keys.check import check_sources
    from stitchcache.keys.walk import Walk
    from stitchcache.torchside import tree

    leaves, spec = tree.flatten((args, kwargs))
    named = list(zip(tree.leaf_paths(model.forward, args, kwargs), leaves, strict=True))
    text = tree.dumps(spec)
    record = pickle.loads(stored.read_bytes()) if stored.exists() else None
    shared = Walk()
    began, wall = time.process_time(), time.perf_counter()
    key = target_key(model, named, text, shapes, ops, None, "aoti", {}, None, shared)
    between = time.process_time()
    changed = check_sources(record[1], shared) if record is not None else None
    end, wall = time.process_time(), time.perf_counter() - wall
    if key.key is None:
        raise SystemExit(f"{name} has no key: {key.reason}")
    if record is None:
        return capture(key, shared, model, args, kwargs, shapes, stored)
    if record[0] != key.key or changed is not None:
        raise SystemExit(f"{name} does not hit: {changed or 'another key'}")
    spent = {"key_ms": between - began, "check_ms": end - between, "cpu_ms": end - began, "wall_ms": wall}
    facts = {"modules": sum(1 for _ in model.modules()), "sources": len(record[1].sources)}
    return {**{name: seconds * 1e3 for name, seconds in spent.items()}, **facts}


def capture(
    key: Any, shared: Any, model: Any, args: Any, kwargs: Any, shapes: Any, stored: Path
) -> dict[str, Any]:
    """Write a key and what its capture read."""
    import torch
    import torch.export

    from stitchcache.capture.ranges import capture_ranges
    from stitchcache.keys.recorder import SourceRecorder
    from stitchcache.types import TargetRecord

    with torch.no_grad(), SourceRecorder(shared) as recorder:
        capture_ranges(model, args, kwargs, shapes, None)
    if recorder.unsound is not None:
        raise SystemExit(f"no direct lookup: {recorder.unsound}")
    record = TargetRecord(graph_hash="0" * 64, sources=recorder.sources, globals=recorder.globals)
    stored.write_bytes(pickle.dumps((key.key, record)))
    return {"globals": len(record.globals)}


def child(name: str, stored: Path) -> dict[str, Any]:
    """Run one fresh process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, str(stored)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def lookup_cost(name: str, rounds: int = 5, directory: Path | None = None) -> dict[str, Any]:
    """What a direct lookup's keys cost.

    Args:
        name: ``decoder``, ``bert`` or ``llama``.
        rounds: Fresh processes.
        directory: Where records lie; a temporary one where left out.

    Returns:
        Medians: ``key_ms``, ``check_ms`` and their sum ``cpu_ms`` in milliseconds of processor time, and
        ``wall_ms``; ``modules`` and ``sources`` count what was digested; ``samples`` has every round;
        ``goal_ms`` and ``met`` compare ``cpu_ms`` with the goal.
    """
    with tempfile.TemporaryDirectory() as own:
        stored = (directory or Path(own)) / f"{name}.record"
        if not stored.exists():
            child(name, stored)
        samples = [child(name, stored) for _ in range(rounds)]
    medians = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
    return {**medians, "goal_ms": GOALS[name], "met": medians["cpu_ms"] <= GOALS[name], "samples": samples}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(GOALS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(look_up(options.child[0], Path(options.child[1]))))
        return 0
    names = options.models.split(",")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            child(name, Path(directory) / f"{name}.record")
        for name in names:
            found[name] = lookup_cost(name, options.rounds, Path(directory))
    print(f"medians of {options.rounds} fresh processes each, milliseconds")
    print(f"{'model':<10}{'modules':>9}{'files':>7}{'key':>8}{'check':>8}{'cpu':>8}{'wall':>8}")
    for name, cost in found.items():
        times = "".join(f"{cost[key]:>8.1f}" for key in ("key_ms", "check_ms", "cpu_ms", "wall_ms"))
        print(f"{name:<10}{cost['modules']:>9.0f}{cost['sources']:>7.0f}{times}")
    for name, cost in found.items():
        goal = f"{name}: keys of a direct lookup at most {cost['goal_ms']:.0f} ms of processor time"
        print(f"  {'met   ' if cost['met'] else 'MISSED'}  {goal}")
    if options.json:
        import torch

        facts = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
        options.json.write_text(json.dumps({"facts": facts, "models": found}, indent=1))
    return 0 if all(cost["met"] for cost in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
