"""What a GPU shows: cold compiles, starts, calls with and without CUDA graphs, beside other ways in one run.

    python tests/benchmarks/bench_gpu.py [--dir DIR] [--minutes 9] [--steps cold,start,...] [--rounds 3]

Every measurement is a fresh process that prints one JSON line; a step that fails is noted, and the next one
runs. Time on a GPU is often short, so nothing is begun that could not end in time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "gpu"), str(HERE.parents[1])]
TOKENS = 8
LARGE, SMALL = (16, 2048), (4, 512)
WAYS = ("eager", "eager_graph", "compile", "reduce", "ours", "ours_whole", "ours_pieces")
MODELS = ("encoder", "llama", "qwen3", "dit")
COMPILERS = ("torch._dynamo", "torch._inductor", "triton")


# -- one process ----------------------------------------------------------------------------------


def callable_of(way: str, model: Any, example: Any, directory: str) -> Any:
    """The model as one of the ways runs it."""
    import torch

    if way == "eager":
        return model
    if way == "eager_graph":
        with torch.no_grad():
            model(*example)
            torch.cuda.synchronize()
            graph, kept = torch.cuda.CUDAGraph(), [each.clone() for each in example]
            with torch.cuda.graph(graph):
                result = model(*kept)

        def replay(*args: Any) -> Any:
            for into, arg in zip(kept, args, strict=True):
                into.copy_(arg)
            graph.replay()
            return result

        return replay
    if way in ("compile", "reduce"):
        import torch._dynamo

        for each in example:
            if way == "compile":
                torch._dynamo.maybe_mark_dynamic(each, 0)
        mode = {"compile": None, "reduce": "reduce-overhead"}[way]
        return torch.compile(model, mode=mode)
    import gpu_models

    import stitchcache

    graphs = None
    if way != "ours":
        mode = way.removeprefix("ours_")
        graphs = stitchcache.CudaGraphs([TOKENS], mode=mode)
    return stitchcache.compile(
        model,
        example,
        cache=stitchcache.Cache(f"{directory}/cache"),
        cuda_graphs=graphs,
        **gpu_models.options(),
    )


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Start a way, cold or warm, and time its calls."""
    began = time.perf_counter()
    import torch

    imported = time.perf_counter()
    if job.get("no_triton"):
        sys.modules["triton"] = None  # type: ignore[assignment]
    import gpu_models

    layers, width = job["model"]
    model, example = gpu_models.decoder(layers, width), gpu_models.call(TOKENS)
    torch.cuda.synchronize()
    built = time.perf_counter()
    weights = torch.cuda.memory_allocated()
    before = set(sys.modules)
    torch.cuda.reset_peak_memory_stats()
    way, found = job["way"], {}
    run = callable_of(way, model, example, job["directory"])
    with torch.no_grad():
        out = run(*example)
        torch.cuda.synchronize()
        found = {
            "import_torch": imported - began,
            "build": built - imported,
            "after_build": time.perf_counter() - built,
            "peak_to_model": torch.cuda.max_memory_allocated() / weights,
            "compilers": [name for name in COMPILERS if name in sys.modules and name not in before],
            "hit": getattr(run, "cache_hit", None),
            "stages": {k: round(v, 3) for k, v in getattr(run, "timings", {}).items()},
        }
        wanted = model(*example)
        found["difference"] = float((out - wanted).abs().max() / wanted.abs().max())
        found["graphs"] = [
            vars(record) | {"sizes": str(record.sizes)} for record in getattr(run, "graphs", ())
        ]
        if job.get("calls", True):
            found |= timed(run, example, wanted)
            found["compilers_later"] = [n for n in COMPILERS if n in sys.modules and n not in before]
    return found


def timed(run: Callable[..., Any], example: Any, wanted: Any) -> dict[str, Any]:
    """Microseconds of a call until its result is there, of its host part, and of one of many in a row."""
    import torch

    for _ in range(8):
        out = run(*example)
    torch.cuda.synchronize()
    wrong = float((out - wanted).abs().max() / wanted.abs().max())
    whole, host, row = [], [], []
    for _ in range(150):
        start = time.perf_counter()
        run(*example)
        given = time.perf_counter()
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
        host.append(given - start)
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(40):
            run(*example)
        torch.cuda.synchronize()
        row.append((time.perf_counter() - start) / 40)
    micro = {"us": whole, "host_us": host, "in_a_row_us": row}
    return {"later_difference": wrong} | {k: statistics.median(v) * 1e6 for k, v in micro.items()}


def random_sizes(job: dict[str, Any]) -> dict[str, Any]:
    """Many calls over random sizes with graphs, weights changed in place every hundred, beside eager."""
    import gpu_models
    import torch

    import stitchcache

    model = gpu_models.decoder(4, 512)
    graphs = stitchcache.CudaGraphs(list(range(2, 34)), mode="whole", max_graphs=20)
    cache = stitchcache.Cache(f"{job['directory']}/cache")
    run = stitchcache.compile(
        model, gpu_models.call(TOKENS), cache=cache, cuda_graphs=graphs, **gpu_models.options()
    )
    sizes = torch.randint(2, 49, (job["calls"],), generator=torch.Generator().manual_seed(1)).tolist()
    given = {size: gpu_models.call(size) for size in range(2, 49)}
    worst, memory = torch.zeros((), device="cuda"), []
    with torch.no_grad():
        for number, size in enumerate(sizes):
            ids, positions = given[size]
            ids = (ids + number) % 32000
            out, wanted = run(ids, positions), model(ids, positions)
            apart = (out - wanted).abs().max().float() / wanted.abs().max().float()
            worst = torch.maximum(worst, apart.nan_to_num(nan=1e9))
            if number % 100 == 99:
                for parameter in model.parameters():
                    parameter.mul_(1.01 if number % 200 == 99 else 1 / 1.01)
            if number % 1000 == 999:
                torch.cuda.synchronize()
                memory.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), _resident()))
    recorded = [record for record in run.graphs if not record.reason]
    return {
        "calls": len(sizes),
        "worst": float(worst),
        "graphs": len(recorded),
        "graph_bytes": sum(record.bytes for record in recorded),
        "graph_seconds": sum(record.seconds for record in recorded),
        "allocated_mb": [round(each[0] / 1e6, 1) for each in memory],
        "reserved_mb": [round(each[1] / 1e6, 1) for each in memory],
        "resident_mb": [each[2] for each in memory],
    }


def _resident() -> int:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024


def piece(job: dict[str, Any]) -> dict[str, Any]:
    """One piece at random sizes: for the GPU's sanitizer, without torch's own cache of memory."""
    import torch
    from torch import nn

    import stitchcache

    torch.manual_seed(0)
    rows = stitchcache.Dim("rows", min=2, max=512)
    with torch.device("cuda"):
        model = nn.Sequential(
            nn.RMSNorm(96), nn.Linear(96, 200), nn.GELU(), nn.Linear(200, 96), nn.Softmax(-1)
        )
        model = model.eval()
        x = torch.randn(7, 96)
    cache = stitchcache.Cache(f"{job['directory']}/cache")
    run = stitchcache.compile(model, (x,), dynamic_shapes={"input": {0: rows}}, cache=cache)
    worst = 0.0
    with torch.no_grad():
        for size in torch.randint(
            2, 512, (job["calls"],), generator=torch.Generator().manual_seed(2)
        ).tolist():
            x = torch.randn(size, 96, device="cuda")
            worst = max(worst, float((run(x) - model(x)).abs().max()))
    return {"hit": run.cache_hit, "worst": worst, "pieces": len(run.artifact.pieces)}


def real(job: dict[str, Any]) -> dict[str, Any]:
    """A model of transformers from its config, in bf16, against eager."""
    import torch
    import transformers

    import stitchcache

    name = job["name"]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    if name == "dit":
        return _denoised(stitchcache, stitchcache.Cache(f"{job['directory']}/cache"))
    sizes = {"vocab_size": 32000, "num_hidden_layers": 8, "num_attention_heads": 16}
    more = {"num_key_value_heads": 8, "max_position_embeddings": 2048}
    more |= {"hidden_size": 2048, "intermediate_size": 8192}
    with torch.device("cuda"):
        if name == "encoder":
            config = transformers.BertConfig(
                hidden_size=384, intermediate_size=1536, **{**sizes, "num_attention_heads": 12}
            )
            model = transformers.BertModel(config).eval()
        else:
            kind = {"llama": "Llama", "qwen3": "Qwen3"}[name]
            config = (
                getattr(transformers, f"{kind}Config")(**sizes, **more, head_dim=128)
                if kind == "Qwen3"
                else (transformers.LlamaConfig(**sizes, **more))
            )
            model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    cache = stitchcache.Cache(f"{job['directory']}/cache")
    began = time.perf_counter()
    with torch.no_grad():
        if name == "encoder":
            rows, tokens = stitchcache.Dim("rows", min=2, max=64), stitchcache.Dim("tokens", min=2, max=512)
            ids = torch.randint(32000, (4, 32), device="cuda")
            example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            shapes = {key: {0: rows, 1: tokens} for key in example}
            graphs = stitchcache.CudaGraphs([4, 16], dim="input_ids.shape[0]")
            try:
                run = stitchcache.compile(
                    model, (), example, dynamic_shapes=shapes, cache=cache, cuda_graphs=graphs
                )
            except stitchcache.errors.CaptureError as error:
                # torch 2.11 wants tokens in multiples of 8 where attention has a mask.
                print(f"free tokens: {error}", file=sys.stderr)
                shapes = {key: {0: rows} for key in example}
                run = stitchcache.compile(
                    model, (), example, dynamic_shapes=shapes, cache=cache, cuda_graphs=graphs
                )
            found = []
            for size in (4, 4, 4, 9, 16, 16, 16):
                ids = torch.randint(32000, (size, 32), device="cuda")
                given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                want, got = model(**given).last_hidden_state, run(**given).last_hidden_state
                found.append(float((want - got).abs().max() / want.abs().max()))
            made = time.perf_counter() - began
            return {"hit": run.cache_hit, "worst": max(found), "seconds": made, "graphs": len(run.graphs)}
        return _generated(model, stitchcache, cache, began)


def _generated(model: Any, stitchcache: Any, cache: Any, began: float) -> dict[str, Any]:
    """Prefill and decode over one static cache, decode as a CUDA graph, token by token beside eager."""
    import torch
    from transformers import StaticCache

    config = model.config

    class Cached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.cache = model, StaticCache(config=config, max_cache_len=128)
            dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self.cache.early_initialization(
                1, config.num_key_value_heads, dim, torch.bfloat16, torch.device("cuda")
            )

        def forward(self, input_ids: Any, cache_position: Any) -> Any:
            for layer in self.cache.layers:
                if hasattr(layer, "cumulative_length"):
                    layer.cumulative_length.copy_(cache_position[0])
            more = {"position_ids": cache_position[None], "cache_position": cache_position}
            return self.model(input_ids, past_key_values=self.cache, use_cache=True, **more).logits

    prompt = torch.arange(3, 35, device="cuda")[None]
    whole = Cached().eval()

    def tokens(prefill: Any, decode: Any, forced: Any = None) -> tuple[list[int], list[Any]]:
        logits = prefill(input_ids=prompt, cache_position=torch.arange(32, device="cuda"))
        found, rows = [], [logits[0, -1].float()]
        for step in range(24):
            found.append(int(logits[0, -1].argmax()) if forced is None else forced[step])
            ids, position = (
                torch.tensor([found[-1:]], device="cuda"),
                torch.tensor([32 + step], device="cuda"),
            )
            logits = decode(input_ids=ids, cache_position=position)
            rows.append(logits[0, -1].float())
        return found, rows

    want, wanted = tokens(whole, whole)
    runs = []
    for length in (32, 1):
        given = {"input_ids": prompt[:, :length], "cache_position": torch.arange(length, device="cuda")}
        graphs = stitchcache.CudaGraphs(mode="whole") if length == 1 else None
        runs.append(stitchcache.compile(whole, (), given, cache=cache, cuda_graphs=graphs))
    made = time.perf_counter() - began
    _, got = tokens(*runs, forced=want)
    free, _ = tokens(*runs)
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(wanted, got, strict=True))
    position = torch.tensor([60], device="cuda")
    call = {"input_ids": prompt[:, :1], "cache_position": position}
    times = {f"{label}_us": _in_a_row(each, call) for label, each in (("eager", whole), ("ours", runs[1]))}
    same = sum(a == b for a, b in zip(want, free, strict=True))
    hits = [run.cache_hit for run in runs]
    reasons = [record.reason for record in runs[1].graphs]
    return {
        "hits": hits,
        "worst": worst,
        "same_tokens": f"{same} of 24",
        "seconds": made,
        "reasons": reasons,
        **times,
    }


def _denoised(stitchcache: Any, cache: Any) -> dict[str, Any]:
    """Blocks of a diffusion transformer of DiT-XL's width, at free rows, some of them as CUDA graphs."""
    import torch
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 8, "out_channels": 8}
    with torch.device("cuda"):
        model = DiTTransformer2DModel(**sizes, sample_size=32, in_channels=4).eval()

    def given(rows: int) -> dict[str, Any]:
        numbers = torch.arange(rows, device="cuda")
        noise = torch.randn(rows, 4, 32, 32, device="cuda")
        return {"hidden_states": noise, "timestep": numbers * 100, "class_labels": numbers}

    began, rows = time.perf_counter(), stitchcache.Dim("rows", min=2, max=64)
    graphs = stitchcache.CudaGraphs([2, 8], dim="hidden_states.shape[0]")
    shapes = {key: {0: rows} for key in given(2)}
    how: dict[str, Any] = {"dynamic_shapes": shapes, "cache": cache, "cuda_graphs": graphs}
    with torch.no_grad():
        run = stitchcache.compile(model, (), given(4), **how)
        made, worst = time.perf_counter() - began, 0.0
        for size in (2, 2, 2, 5, 8, 8, 8, 33):
            call = given(size)
            want, got = model(**call).sample, run(**call).sample
            worst = max(worst, float((want - got).abs().max() / want.abs().max()))
        call = given(2)
        times = {f"{label}_us": _in_a_row(each, call) for label, each in (("eager", model), ("ours", run))}
    return {"hit": run.cache_hit, "worst": worst, "seconds": made, "graphs": len(run.graphs), **times}


def _in_a_row(run: Callable[..., Any], call: dict[str, Any]) -> float:
    import torch

    for _ in range(5):
        run(**call)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        run(**call)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 50 * 1e6


def threads(job: dict[str, Any]) -> dict[str, Any]:
    """Calls a second from so many threads, each on a stream of its own, of layers without a custom op."""
    import threading

    import torch
    from torch import nn

    import stitchcache

    width, rows = job["size"]
    torch.manual_seed(0)
    with torch.device("cuda"):
        parts = [(nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))]
        model = nn.Sequential(*(nn.Sequential(*each) for each in 8 * parts)).eval()
        x = torch.randn(rows, width)
    shapes = {"input": {0: stitchcache.Dim("rows", min=2, max=512)}}
    cache = stitchcache.Cache(f"{job['directory']}/cache")
    ways = {"eager": model, "compile": torch.compile(model)}
    ways["ours"] = stitchcache.compile(model, (x,), dynamic_shapes=shapes, cache=cache)

    def rate(run: Callable[..., Any], count: int) -> float:
        counts, stop = [0] * count, time.perf_counter() + 1.5

        def work(number: int) -> None:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                mine = x.clone()
                while time.perf_counter() < stop:
                    run(mine)
                    torch.cuda.current_stream().synchronize()
                    counts[number] += 1

        workers = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return round(sum(counts) / 1.5)

    found: dict[str, Any] = {}
    for name, run in ways.items():
        rate(run, 2)
        found[name] = {count: rate(run, count) for count in (1, 2, 4, 16)}
    return found


# -- steps ----------------------------------------------------------------------------------------


class Run:
    """Runs children, prints what they found, and keeps it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.end = options, time.monotonic() + 60 * options.minutes
        self.found: dict[str, list[dict[str, Any]]] = {}

    def child(
        self,
        step: str,
        job: dict[str, Any],
        *,
        most: float = 150,
        before: Any = (),
        env: dict[str, str] | None = None,
    ) -> dict[str, Any] | None:
        """One fresh process; ``None`` where it failed, or had no time left."""
        left = self.end - time.monotonic()
        if left < 5:
            self.say(step, job, {"error": "no time left"})
            return None
        inductor = f"{job['directory']}/inductor"
        path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        known = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": inductor, "PYTHONPATH": path, **(env or {})}
        command = [*before, sys.executable, str(HERE / "bench_gpu.py"), "--child", json.dumps(job)]
        began, most = time.monotonic(), min(most, left)
        try:
            done = subprocess.run(
                command, env=known, capture_output=True, text=True, timeout=most, check=False
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            found = json.loads(lines[-1]) if lines else {"error": done.stderr[-1500:]}
            found["rc"] = done.returncode
            if before:
                found["said"] = [line for line in done.stdout.splitlines() if line.startswith("=====")][-3:]
            if self.options.logs:
                name = f"{step}-{job.get('way', job.get('name', 'x'))}-{len(self.found.get(step, ()))}.log"
                Path(self.options.logs, name).write_text(done.stderr)
        except (subprocess.TimeoutExpired, OSError) as error:
            found = {"error": str(error)[-500:]}
        found["process"] = round(time.monotonic() - began, 2)
        self.say(step, job, found)
        return None if "error" in found else found

    def say(self, step: str, job: dict[str, Any], found: dict[str, Any]) -> None:
        """Print a line."""
        record = {"step": step, **{k: v for k, v in job.items() if k != "directory"}, **found}
        self.found.setdefault(step, []).append(record)
        print(json.dumps(record, default=str), flush=True)

    def directory(self, way: str, model: tuple[int, int]) -> str:
        """Where a way keeps what it compiled for a model; ours share one."""
        return f"{self.options.dir}/{way.partition('_')[0]}-{model[0]}x{model[1]}"


def cold(
    run: Run, models: Any = (LARGE,), ways: Any = ("ours", "compile", "reduce"), rounds: int | None = None
) -> None:
    """From nothing, each way in a directory of its own."""
    for model in models * (rounds or run.options.rounds):
        for way in ways:
            directory = run.directory(way, model)
            shutil.rmtree(directory, ignore_errors=True)
            job = {"way": way, "model": model, "directory": directory, "calls": False}
            run.child("cold", job)


def start(run: Run) -> None:
    """Warm starts and calls, ways in turn."""
    for model in (LARGE, SMALL):
        for _ in range(run.options.rounds):
            for way in run.options.ways or WAYS:
                run.child("start", {"way": way, "model": model, "directory": run.directory(way, model)})


def random_step(run: Run) -> None:
    """10,000 calls."""
    run.child("random", {"kind": "random", "calls": 10_000, "directory": run.directory("ours", SMALL)})


def memcheck(run: Run) -> None:
    """One piece under compute-sanitizer."""
    job = {"kind": "piece", "calls": 3, "directory": f"{run.options.dir}/piece"}
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "STITCHCACHE_CHECK": "none"}
    run.child("memcheck_prepare", job, env=env)
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    before = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    run.child("memcheck", {**job, "calls": 12}, before=before, env=env)


def travel(run: Run) -> None:
    """What one process compiled, under another path, without a compiler, Triton or caches."""
    here, there = run.directory("ours", SMALL), f"{run.options.dir}/travelled"
    shutil.rmtree(there, ignore_errors=True)
    shutil.copytree(f"{here}/cache", f"{there}/cache")
    os.makedirs(f"{there}/none/triton")
    # A directory without __init__ that has its name: importing anything of it fails.
    env = {"PATH": f"{there}/none", "TRITON_CACHE_DIR": f"{there}/none", "STITCHCACHE_REQUIRE": "direct"}
    run.child("travel", {"way": "ours_whole", "model": SMALL, "directory": there, "no_triton": True}, env=env)


def reals(run: Run) -> None:
    """Real models."""
    for name in run.options.models:
        run.child(
            "real", {"kind": "real", "name": name, "directory": f"{run.options.dir}/real-{name}"}, most=120
        )


def threads_step(run: Run) -> None:
    """Small calls and larger ones from threads."""
    for size in ((256, 8), (1024, 128)):
        run.child(
            "threads", {"kind": "threads", "size": size, "directory": f"{run.options.dir}/threads{size[0]}"}
        )


STEPS: dict[str, Callable[[Run], None]] = {
    "cold": cold,
    "cold_small": lambda run: cold(run, (SMALL,), rounds=1),
    "cold_32": lambda run: cold(run, ((4, 2048), (32, 2048)), ("ours",), rounds=1),
    "start": start,
    "random": random_step,
    "memcheck": memcheck,
    "travel": travel,
    "real": reals,
    "threads": threads_step,
}


def main() -> int:
    """Run steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default="/tmp/stitchcache-gpu")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--steps", type=lambda text: text.split(","), default=list(STEPS))
    parser.add_argument("--ways", type=lambda text: text.split(","))
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logs", help="directory for what children write to standard error")
    parser.add_argument("--child", type=json.loads)
    options = parser.parse_args()
    if options.child is not None:
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("stitchcache").setLevel(logging.DEBUG)
        found = CHILDREN[options.child.get("kind", "start")](options.child)
        print(json.dumps(found, default=str), flush=True)
        return 0
    run = Run(options)
    for step in options.steps:
        STEPS[step](run)
    return 0


CHILDREN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "start": child,
    "random": random_sizes,
    "piece": piece,
    "real": real,
    "threads": threads,
}

if __name__ == "__main__":
    sys.exit(main())
