"""``on_miss="eager"`` from an empty cache, beside eager: the first output, calls meanwhile, calls after.

    python tests/benchmarks/bench_eager.py [--subjects decoder-4x256] [--minutes 5.5] [--dir DIR]

Each round starts fresh processes in turn. ``eager`` only runs the model, every few milliseconds. ``aside``
compiles with an empty cache and calls as often, until the compiled model serves and 300 times more. After
``eager`` again (its times are the mean of both), ``direct`` starts from the cache that ``aside`` filled. Then
``eager`` and ``aside`` start for the first output alone, in pairs. Ratios are medians over rounds, or pairs;
there are as many rounds as the minutes hold.
Prints goals; exits with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
from goals import Goal, records, settle
from measure import Results, ratio_of, say
from subjects import EXAMPLE, Subject

SUBJECTS = "decoder-4x256"
AFTER = 300
PAUSE = 0.005
MOST_CALLS = 800
"""Calls of ``eager``; as many as ``aside`` makes would take as long as compiling does."""
FIRSTS = 8
"""Pairs of processes a round for the first output, which varies more than anything else."""


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=measure.split_list, default=SUBJECTS.split(","))
    parser.add_argument("--minutes", type=float, default=5.5, help="no round is begun that would take longer")
    parser.add_argument("--rounds", type=int, help="at most so many; by default 5")
    measure.common_options(parser)
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.json = options.json or Path(options.dir) / "eager.json"
    return options


def child(job: dict[str, Any]) -> dict[str, Any]:
    """One process: ``way`` is ``eager``, ``aside`` or ``direct``; ``calls`` is how often to call before."""
    import torch

    subject = Subject(job["subject"])
    model = subject.build()
    args, kwargs = subject.inputs(*EXAMPLE)
    expected = None
    function = model if job["way"] == "eager" else _ours(job, subject, model, (args, kwargs))
    before: list[float] = []
    after: list[float] = []
    with torch.no_grad():
        output = function(*args, **kwargs)
        first = time.time() - job["spawned"]
        if job["calls"] == 0:
            return {"first": first}
        expected = subject.leaves(model(*args, **kwargs))
        began = time.perf_counter()

        def call(times: list[float]) -> None:
            start = time.perf_counter()
            output = function(*args, **kwargs)
            times.append(time.perf_counter() - start)
            for got, want in zip(subject.leaves(output), expected, strict=True):
                if not torch.allclose(got, want, atol=1e-4, rtol=1e-4):
                    raise SystemExit("another result than eager's")
            time.sleep(PAUSE)

        if job["way"] == "aside":
            while function.status not in ("compiled",):
                if function.status.startswith("failed"):
                    raise SystemExit(function.status)
                call(before)
        else:
            for _ in range(job["calls"]):
                call(before)
        ready = time.perf_counter() - began
        for _ in range(AFTER):
            call(after)
    del output
    most = {"most": max(before), "swap": before[-1]}
    return {"first": first, "ready": ready, "calls": len(before), **most} | {
        f"{name}_{percent}": statistics.quantiles(times, n=100)[percent - 1]
        for name, times in (("before", before), ("after", after))
        for percent in (50, 99)
        if len(times) > 1
    }


def _ours(job: dict[str, Any], subject: Subject, model: Any, inputs: tuple[Any, Any]) -> Any:
    import stitchcache

    return stitchcache.compile(
        model,
        *inputs,
        dynamic_shapes=subject.dynamic_shapes(stitchcache.Dim),
        splitting_ops=subject.splitting_ops,
        cache=stitchcache.Cache(Path(job["directory"]) / "cache"),
        on_miss="eager",
    )


def measure_subject(options: argparse.Namespace, results: Results, subject: str) -> None:
    """The ways in turn, each round with an empty cache."""
    samples = results.samples.setdefault(subject, {})
    directory = Path(options.dir) / "eager" / subject
    directory.mkdir(parents=True, exist_ok=True)
    began, longest = time.monotonic(), 0.0

    def once(way: str, calls: int) -> dict[str, Any]:
        if way == "aside":
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        job = {"way": way, "subject": subject, "directory": str(directory), "calls": calls}
        return measure.run_child(job, Path(options.dir), script=Path(__file__))

    for number in range(len(samples.get("direct", [])), options.rounds):
        round_began = time.monotonic()
        if round_began - began + longest > options.minutes * 60:
            break
        before, aside, after = once("eager", MOST_CALLS), once("aside", 1), once("eager", MOST_CALLS)
        mean = {key: statistics.fmean((before[key], after[key])) for key in before}
        for way, found in (("eager", mean), ("aside", aside), ("direct", once("direct", AFTER))):
            samples.setdefault(way, []).append(found)
        for _ in range(FIRSTS):
            for way in ("eager", "aside"):
                samples.setdefault(f"{way}, first", []).append(once(way, 0)["first"])
        results.save()
        longest = max(longest, time.monotonic() - round_began)
        say(f"{subject}: round {number + 1} took {longest:.0f} s")


def goals_of(samples: dict[str, Any]) -> list[Goal]:
    """What serving at once costs beside eager, and what is there after the swap."""
    goals = []
    for subject, found in samples.items():

        def ratio(key: str, way: str, other: str, found: Any = found) -> float:
            return ratio_of([s[key] for s in found[way]], [s[key] for s in found[other]])

        first = ratio_of(found["aside, first"], found["eager, first"])
        goals += [
            Goal(f"{subject}: first output beside eager's", first, "<=", 1.05),
            Goal(f"{subject}: median call meanwhile", ratio("before_50", "aside", "eager"), "<=", 1.2),
            Goal(f"{subject}: 99th percentile meanwhile", ratio("before_99", "aside", "eager"), "<=", 2.0),
            Goal(f"{subject}: median call after the swap", ratio("after_50", "aside", "direct"), "<=", 1.05),
        ]
    return goals


def table(samples: dict[str, Any]) -> str:
    """Medians over rounds."""
    lines = [
        "| model | way | first output | call meanwhile: median | 99 % | longest | at the swap "
        "| call after: median | compiled after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for subject, found in samples.items():
        for way in ("eager", "aside", "direct"):
            keys = ("before_50", "before_99", "most", "swap", "after_50")
            times = [statistics.median(each[key] for each in found[way]) * 1e3 for key in keys]
            first = statistics.median(found.get(f"{way}, first") or [each["first"] for each in found[way]])
            ready = statistics.median(each["ready"] for each in found[way])
            cells = [f"{time:.2f} ms" if way == "aside" or n != 3 else "" for n, time in enumerate(times)]
            cells.append(f"{ready:.0f} s" if way == "aside" else "")
            lines.append(f"| {subject} | {way} | {first:.2f} s | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = options_of(argv)
    done = measure.estimate(options.minutes * 60 * len(options.subjects), "serving before it is compiled")
    results = Results(Path(options.json), "serving", again=options.again)
    for subject in options.subjects:
        measure_subject(options, results, subject)
    goals = goals_of(results.samples)
    results.record["goals"] = records(goals)
    results.save()
    done()
    print(table(results.samples))
    return settle(goals)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(child(json.loads(sys.argv[1]))))
    else:
        sys.exit(main())
