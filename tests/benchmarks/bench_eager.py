"""``on_miss="eager"`` from an empty cache, beside eager: the first output, calls meanwhile, calls after.

    python tests/benchmarks/bench_eager.py [--subjects decoder-4x256] [--rounds 5] [--dir DIR] [--json FILE]

Each round starts fresh processes in turn. ``aside`` compiles with an empty cache and calls the model every
few milliseconds, until the compiled model serves and 300 times more. ``eager`` only runs the model, as often.
``direct`` starts from the cache that ``aside`` filled, and calls as often. Ratios are medians over rounds.
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


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=measure.split_list, default=SUBJECTS.split(","))
    parser.add_argument("--rounds", type=int, help="fresh processes of each way; by default 5")
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
    return {"first": first, "ready": ready, "calls": len(before)} | {
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
    """The three ways in turn, each round with an empty cache."""
    samples = results.samples.setdefault(subject, {})
    directory = Path(options.dir) / "eager" / subject
    for number in range(len(samples.get("direct", [])), options.rounds):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        calls = 0
        for way in ("aside", "eager", "direct"):
            job = {"way": way, "subject": subject, "directory": str(directory), "calls": max(calls, AFTER)}
            found = measure.run_child(job, Path(options.dir), script=Path(__file__))
            calls = calls or found["calls"]
            samples.setdefault(way, []).append(found)
        results.save()
        say(f"{subject}: round {number + 1} of {options.rounds}")


def goals_of(samples: dict[str, Any]) -> list[Goal]:
    """What serving at once costs beside eager, and what is there after the swap."""
    goals = []
    for subject, found in samples.items():

        def ratio(key: str, way: str, other: str, other_key: str = "", found: Any = found) -> float:
            return ratio_of([s[key] for s in found[way]], [s[other_key or key] for s in found[other]])

        goals += [
            Goal(f"{subject}: first output beside eager's", ratio("first", "aside", "eager"), "<=", 1.05),
            Goal(f"{subject}: median call meanwhile", ratio("before_50", "aside", "eager"), "<=", 1.2),
            Goal(f"{subject}: 99th percentile meanwhile", ratio("before_99", "aside", "eager"), "<=", 2.0),
            Goal(f"{subject}: median call after the swap", ratio("after_50", "aside", "direct"), "<=", 1.05),
        ]
    return goals


def table(samples: dict[str, Any]) -> str:
    """Medians over rounds, in milliseconds but for the first output."""
    lines = [
        "| model | way | first output | compiled after | call meanwhile: median, 99 % | call after |",
        "|---|---|---|---|---|---|",
    ]
    for subject, found in samples.items():
        for way, answers in found.items():
            first, ready, median, most, after = (
                statistics.median(each[key] for each in answers)
                for key in ("first", "ready", "before_50", "before_99", "after_50")
            )
            ready_text = f"{ready:.1f} s" if way == "aside" else ""
            lines.append(
                f"| {subject} | {way} | {first:.2f} s | {ready_text} "
                f"| {median * 1e3:.2f}, {most * 1e3:.2f} ms | {after * 1e3:.2f} ms |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = options_of(argv)
    results = Results(Path(options.json), "eager", again=options.again)
    for subject in options.subjects:
        measure_subject(options, results, subject)
    goals = goals_of(results.samples)
    results.record["goals"] = records(goals)
    results.save()
    print(table(results.samples))
    return settle(goals)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(child(json.loads(sys.argv[1]))))
    else:
        sys.exit(main())
