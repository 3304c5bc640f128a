"""One fresh process of a benchmark: ``python child.py '<job as JSON>'`` prints one JSON line.

Everything that is measured runs here, the same code for all ways but for the one call that differs.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ways
from subjects import EXAMPLE, OTHER_SIZE, Subject

COMPILERS = ("torch._dynamo", "torch._inductor")


def start(job: dict[str, Any]) -> dict[str, Any]:
    """From the process's start to its first output, cold or warm.

    Args:
        job: ``way``, ``subject``, ``directory``, ``cold``, ``spawned`` (Unix seconds at which the parent
            started this process) and ``other_size`` (whether to compare with eager at a second size).
    """
    import torch

    imported = time.time()
    subject, way, directory = Subject(job["subject"]), job["way"], Path(job["directory"])
    begun = None if job["cold"] else ways.before_build(way, directory)
    model = subject.build()
    args, kwargs = subject.inputs(*EXAMPLE)
    subject.wait()
    built = time.time()
    before = set(sys.modules)
    if way in ways.IN_TURN:
        ways.import_ours()
    imports = time.time() - built
    if job["cold"]:
        function = ways.prepare(way, subject, model, (args, kwargs), directory)
    else:
        function = ways.load(way, subject, model, (args, kwargs), directory, begun)
    opened = time.time()
    with torch.no_grad():
        output = function(*args, **kwargs)
        subject.wait()
    done = time.time()
    peak = _peak_memory()
    by_it = [name for name in COMPILERS if name in sys.modules and name not in before]
    if job["cold"]:
        ways.after_first_call(way, directory)
    found = {
        "process": done - job["spawned"],
        "import_torch": imported - job["spawned"],
        "build": built - imported,
        "after_build": done - built,
        "imports": imports,
        "open": opened - built - imports,
        "first_call": done - opened,
        "save": time.time() - done if job["cold"] else 0.0,
        "peak_mb": peak,
        "compilers": by_it,
        "compilers_before": [name for name in COMPILERS if name in before],
        "modules": len(set(sys.modules) - before),
        "difference": _difference(subject, model, function, output, job.get("other_size", False)),
    }
    return found | _facts_of_ours(function)


def _peak_memory() -> float:
    """Megabytes, as the kernel counted them."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _difference(subject: Subject, model: Any, function: Any, output: Any, other_size: bool) -> float:
    import torch

    sizes = [EXAMPLE, OTHER_SIZE] if other_size else [EXAMPLE]
    worst = 0.0
    with torch.no_grad():
        for size in sizes:
            args, kwargs = subject.inputs(*size)
            actual = output if size == EXAMPLE else function(*args, **kwargs)
            pairs = zip(subject.leaves(actual), subject.leaves(model(*args, **kwargs)), strict=True)
            worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    return worst


def _facts_of_ours(function: Any) -> dict[str, Any]:
    if not hasattr(function, "cache_hit"):
        return {}
    pieces = function.artifact.pieces
    return {
        "hit": function.cache_hit,
        "stages": function.timings,
        "pieces": len(pieces),
        "distinct": len({piece.key for piece in pieces}),
    }


def lookup(job: dict[str, Any]) -> dict[str, Any]:
    """What the key and the source check of a direct hit cost, without compiling any piece."""
    subject = Subject(job["subject"])
    model = subject.build()
    inputs = subject.inputs(*EXAMPLE)
    function: Any = ways.stitched(subject, model, inputs, Path(job["directory"]), backend="eager")
    timings = function.timings
    return {"hit": function.cache_hit, "key": timings["key"], "sources": timings.get("sources", 0.0)}


def serve(job: dict[str, Any]) -> None:
    """Load once, then time calls as the parent asks for them, a line at a time."""
    import torch

    subject, way = Subject(job["subject"]), job["way"]
    model = subject.build()
    function = ways.load(way, subject, model, subject.inputs(*EXAMPLE), Path(job["directory"]))
    ways.allow_any_threads(way, function)
    threads = torch.get_num_threads()
    differences = {}
    calls = {}
    with torch.no_grad():
        for name, size in job["sizes"].items():
            calls[name] = subject.inputs(*size)
            if way == ways.COMPILE:
                # It compiles again for another number of threads, then too for all sizes at once.
                ways.mark_dynamic(calls[name])
            args, kwargs = calls[name]
            pairs = zip(
                subject.leaves(function(*args, **kwargs)), subject.leaves(model(*args, **kwargs)), strict=True
            )
            differences[name] = max((a - b).abs().max().item() for a, b in pairs)
        _say({"ready": True, "threads": threads, "differences": differences})
        for line in sys.stdin:
            asked = json.loads(line)
            if "overhead" in asked:
                torch.set_num_threads(1)
                from overhead import measure

                _say(measure(function, *calls[asked["overhead"]], rounds=asked["rounds"]))
                continue
            torch.set_num_threads(1 if asked["threads"] == "1 thread" else threads)
            args, kwargs = calls[asked["size"]]
            if "callers" in asked:
                _say(
                    _at_once(subject, partial(function, *args, **kwargs), asked["callers"], asked["seconds"])
                )
                continue
            _say({"us": _one_call(subject, function, args, kwargs, asked["seconds"])})


def _one_call(
    subject: Subject,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seconds: float,
) -> float:
    """Median microseconds of a call until its result is there, over about that many seconds of calls."""
    wait = None if subject.device == "cpu" else subject.wait
    times: list[float] = []
    for _ in range(3):
        function(*args, **kwargs)
    subject.wait()
    stop = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        began = time.perf_counter()
        function(*args, **kwargs)
        if wait is not None:
            wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def _at_once(subject: Subject, call: Callable[[], Any], callers: int, seconds: float) -> dict[str, Any]:
    """Calls a second of so many threads at once, and how late a thread is that wakes every millisecond."""
    import torch

    counts = [0] * callers
    gate, stop = threading.Barrier(callers + 1), threading.Event()

    def work(number: int) -> None:
        # The number of threads that a call uses is each thread's own.
        torch.set_num_threads(1)
        with torch.no_grad():
            call()
            gate.wait()
            while not stop.is_set():
                call()
                subject.wait()
                counts[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(callers)]
    for worker in workers:
        worker.start()
    gate.wait()
    began, late = time.perf_counter(), []
    while time.perf_counter() - began < seconds:
        asked = time.perf_counter()
        time.sleep(0.001)
        late.append(time.perf_counter() - asked - 0.001)
    stop.set()
    lasted = time.perf_counter() - began
    for worker in workers:
        worker.join()
    late.sort()
    return {
        "calls": sum(counts) / lasted,
        "late_ms": late[-1] * 1e3,
        "late_99_ms": late[int(len(late) * 0.99)] * 1e3,
    }


def _say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def main() -> None:
    """Read the job from the command line."""
    job = json.loads(sys.argv[1])
    if job["mode"] == "serve":
        serve(job)
    else:
        _say({"start": start, "lookup": lookup}[job["mode"]](job))


if __name__ == "__main__":
    main()
