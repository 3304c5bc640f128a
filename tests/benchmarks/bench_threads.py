"""Several threads that call one model: calls a second, and how late other threads run meanwhile.

    python tests/benchmarks/bench_threads.py [--subjects decoder-4x256] [--callers 1,2] [--dir DIR] ...

Each way loads once into a process of its own. The parent asks one after the other, round by round, for a
burst of calls from 1 thread, from 2 ..., each call on one core, while a thread of the same process sleeps a
millisecond at a time and notes how much later it wakes. Ratios are medians over rounds. Prints goals; exits
with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import ways
from goals import Goal, records, settle
from measure import FailedError, Results, Server, ratio_of, say
from subjects import ONE_CORE

SUBJECTS = "decoder-4x256,decoder-4"
SIZES = {"decoder-4x256": (1, 256), "decoder-4": (1, 16)}
WAYS = (ways.EAGER, ways.UNCHECKED, ways.RUNNER, ways.COMPILE, ways.PACKAGE)


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=measure.split_list, default=SUBJECTS.split(","))
    parser.add_argument(
        "--callers", type=measure.split_list, default=["1", "2"], help="threads, by default 1,2"
    )
    parser.add_argument("--rounds", type=int, help="bursts of each way and case; by default 7")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a burst")
    measure.common_options(parser)
    options = parser.parse_args(argv)
    options.subjects = options.subjects[:1] if options.quick else options.subjects
    options.rounds = options.rounds or (1 if options.quick else 7)
    options.ways = options.ways or list(WAYS)
    options.json = options.json or Path(options.dir) / "threads.json"
    return options


def measure_subject(options: argparse.Namespace, results: Results, subject: str) -> dict[str, Any]:
    """All ways of one model, in turn: ``{callers: {way: [answer of each round]}}``."""
    servers: dict[str, Server] = {}
    found: dict[str, dict[str, list[Any]]] = {}
    sizes = {"one": SIZES.get(subject, (1, 64))}
    try:
        for way in options.ways:
            try:
                measure.ensure_prepared(options.dir, subject + ONE_CORE, way)
                servers[way] = Server(options.dir, subject + ONE_CORE, way, sizes)
            except FailedError as error:
                results.fail(subject, way, error)
        for number in range(options.rounds):
            for callers in options.callers:
                for way, server in servers.items():
                    question = {"callers": int(callers), "threads": "1 thread", "seconds": options.seconds}
                    answer = server.ask(size="one", **question)
                    found.setdefault(callers, {}).setdefault(way, []).append(answer)
                    time.sleep(0.02)
            say(f"{subject}: round {number + 1} of {options.rounds}")
    finally:
        for server in servers.values():
            server.close()
    return found


def goals_of(samples: dict[str, Any]) -> list[Goal]:
    """What more threads bring, and what they cost others, beside eager in the same round."""
    goals = []
    ours = ways.UNCHECKED
    for subject, found in samples.items():
        callers = list(found)
        if len(callers) < 2 or ours not in found[callers[0]]:
            continue
        one, most = found[callers[0]][ours], found[callers[-1]][ours]
        if subject != "decoder-4":
            ratio = ratio_of([each["calls"] for each in most], [each["calls"] for each in one])
            goals.append(Goal(f"{subject}: calls of {callers[-1]} threads beside 1", ratio, ">=", 1.9))
        if ways.EAGER in found[callers[-1]]:
            eager = found[callers[-1]][ways.EAGER]
            late = ratio_of([each["late_ms"] for each in most], [each["late_ms"] for each in eager])
            goals.append(
                Goal(f"{subject}: latest wake beside eager's, {callers[-1]} threads", late, "<=", 1.5)
            )
    return goals


def table(samples: dict[str, Any]) -> str:
    """Medians over rounds."""
    lines = [
        "| model | threads | way | calls a second | a thread wakes late: most, 99 of 100 |",
        "|---|---|---|---|---|",
    ]
    for subject, found in samples.items():
        for callers, by_way in found.items():
            for way, answers in by_way.items():
                calls, late, nearly = (
                    statistics.median(each[key] for each in answers)
                    for key in ("calls", "late_ms", "late_99_ms")
                )
                late_text = f"{late:.1f} ms, {nearly:.1f} ms"
                lines.append(f"| {subject} | {callers} | {ways.LABELS[way]} | {calls:.0f} | {late_text} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = options_of(argv)
    results = Results(Path(options.json), "threads", again=options.again)
    for subject in options.subjects:
        if subject not in results.samples:
            results.samples[subject] = measure_subject(options, results, subject)
            results.save()
    goals = goals_of(results.samples)
    results.record["goals"] = records(goals)
    results.save()
    print(table(results.samples))
    return settle(goals)


if __name__ == "__main__":
    sys.exit(main())
