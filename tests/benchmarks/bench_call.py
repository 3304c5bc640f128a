"""One call, by size and number of threads, and what stitchcache itself adds to it.

    python tests/benchmarks/bench_call.py [--subjects decoder-4,minilm] [--rounds 7] [--dir DIR] [--json FILE]
    python tests/benchmarks/bench_call.py --device cuda [--subjects decoder-4x512] ...

Each way loads once into a process of its own; then the parent asks one after the other for a short burst of
calls, round by round, so that noise falls on all alike while only one runs. Ratios are medians over rounds.
Prints goals; exits with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import ways
from goals import call_goals, records, settle
from measure import FailedError, Results, Server, say
from report import call_table, failures, overhead_table
from subjects import CALL_SIZES, Subject

SUBJECTS = "decoder-4,decoder-16,decoder-4x768,minilm"
GPU_SUBJECTS = "decoder-4x512"
# The mega-cache ends in the same code as torch.compile.
WAYS = (*(way for way in ways.WAYS if way not in ways.PREPARED_BY), ways.RUNNER)
# A GPU's calls do not ask how many threads the CPU may use.
THREADS = {"cpu": ("1 thread", "all threads"), "cuda": ("",)}


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=measure.split_list, help=f"by default {SUBJECTS}")
    parser.add_argument(
        "--sizes", type=measure.split_list, default=list(CALL_SIZES), help="small,medium,large"
    )
    parser.add_argument("--rounds", type=int, help="bursts of each way and case; by default 7")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of a burst")
    parser.add_argument("--prepare-only", action="store_true", help="compile, and measure nothing")
    measure.device_option(parser)
    measure.common_options(parser)
    options = parser.parse_args(argv)
    usual = (SUBJECTS if options.device == "cpu" else GPU_SUBJECTS).split(",")
    options.subjects = options.subjects or (usual[:1] if options.quick else usual)
    options.rounds = options.rounds or (1 if options.quick else 7)
    options.ways = options.ways or list(WAYS)
    measure.on_device(options)
    options.json = options.json or measure.result_path(options, "call")
    return options


def ways_of(options: argparse.Namespace, subject: str) -> list[str]:
    """The ways that are measured for a model; the decoder's attention is made to be split at."""
    left_out = {ways.WHOLE} if Subject(subject).kind == "decoder" else set()
    return [way for way in options.ways if way not in left_out]


def measure_subject(options: argparse.Namespace, results: Results, subject: str) -> dict[str, Any]:
    """All ways of one model, in turn."""
    sizes = {name: CALL_SIZES[name] for name in options.sizes}
    servers: dict[str, Server] = {}
    us: dict[str, dict[str, list[float]]] = {}
    try:
        for way in ways_of(options, subject):
            try:
                measure.ensure_prepared(options.dir, subject, way)
                servers[way] = Server(options.dir, subject, way, sizes)
            except FailedError as error:
                results.fail(subject, way, error)
        for number in range(options.rounds):
            for threads in THREADS[options.device]:
                for size in sizes:
                    case = us.setdefault(f"{size}, {threads}" if threads else size, {})
                    for way, server in servers.items():
                        answer = server.ask(size=size, threads=threads, seconds=options.seconds)
                        case.setdefault(way, []).append(answer["us"])
                        # The threads of the last one go to sleep.
                        time.sleep(0.02)
            say(f"{subject}: round {number + 1} of {options.rounds}")
        record: dict[str, Any] = {"us": us, "sizes": sizes}
        record["differences"] = {way: server.facts["differences"] for way, server in servers.items()}
        record["threads"] = next(iter(servers.values())).facts["threads"]
        # Splitting ops run as they are: where they take long, what is left is their noise.
        small = Subject(subject).width == 64 and options.device == "cpu"
        if ways.OURS in servers and small:
            rounds = 3 if options.quick else 25
            record["overhead"] = servers[ways.OURS].ask(overhead=options.sizes[0], rounds=rounds)
    finally:
        for server in servers.values():
            server.close()
    return record


def prepare(options: argparse.Namespace, results: Results) -> int:
    """Compile what is missing; the exit status."""
    for subject in options.subjects:
        for way in ways_of(options, subject):
            try:
                measure.ensure_prepared(options.dir, subject, way)
            except FailedError as error:
                results.fail(subject, way, error)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = options_of(argv)
    results = Results(Path(options.json), "call", again=options.again, device=options.device)
    if options.prepare_only:
        return prepare(options, results)
    left = [subject for subject in options.subjects if subject not in results.samples]
    cases = len(options.sizes) * len(THREADS[options.device]) * len(options.ways)
    each = len(options.ways) * 6 + cases * options.rounds * (options.seconds + 0.05)
    done = measure.estimate(len(left) * each, "calls, beside compiling what is not prepared")
    for subject in left:
        results.samples[subject] = measure_subject(options, results, subject)
        results.save()
    done()
    goals = call_goals(results.samples)
    results.record["goals"] = records(goals)
    results.save()
    print(call_table(results.record))
    print(overhead_table(results.record), failures(results.record), sep="\n")
    return settle(goals)


if __name__ == "__main__":
    sys.exit(main())
