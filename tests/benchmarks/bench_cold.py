"""From a built model to its first output with nothing cached, by the number of layers of the demo's decoder.

    python tests/benchmarks/bench_cold.py [--layers 2,4,8,16,32] [--ways stitchcache,compile] [--dir DIR]

Every compile is a fresh process with empty directories; what it leaves is what bench_warm.py and
bench_call.py start from. Written down after every compile: a run that was stopped goes on where it was.
Prints goals; exits with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import measure
import ways
from goals import cold_goals, records, settle
from measure import FailedError, Results, say
from report import cold_table, failures

WAYS = (ways.OURS, ways.COMPILE, ways.PACKAGE, ways.VLLM, ways.AOT)


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", help="by default 2,4,8,16,32")
    parser.add_argument("--rounds", type=int, default=1, help="compiles of each")
    measure.common_options(parser)
    options = parser.parse_args(argv)
    text = options.layers or ("2,4" if options.quick else "2,4,8,16,32")
    options.layers = [int(part) for part in measure.split_list(text)]
    options.ways = options.ways or list(WAYS[:2] if options.quick else WAYS)
    if ways.MEGA in options.ways:
        raise SystemExit("mega-cache is torch.compile's cold process with its save; it is printed with it.")
    options.json = options.json or options.dir / "cold.json"
    return options


def expected_seconds(options: argparse.Namespace, results: Results) -> float:
    """About how long it takes: ours hardly grows with layers, the others do."""
    total = 0.0
    for layers in options.layers:
        for way in options.ways:
            left = options.rounds - len(results.samples.get(f"decoder-{layers}", {}).get(way, []))
            grows = way not in (ways.OURS, ways.VLLM)
            total += max(0, left) * (40 if not grows else 20 + 3 * layers)
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = options_of(argv)
    results = Results(Path(options.json), "cold", again=options.again)
    done = measure.estimate(expected_seconds(options, results), "cold compiles")
    for number in range(options.rounds):
        # The way is the outer loop, so that the goals' two ways are there first.
        for way in options.ways:
            for layers in options.layers:
                subject = f"decoder-{layers}"
                by_way = results.samples.setdefault(subject, {})
                if len(by_way.get(way, [])) > number or way not in results.working(subject, [way]):
                    continue
                try:
                    found = measure.run_cold(options.dir, subject, way)
                except FailedError as error:
                    results.fail(subject, way, error)
                    continue
                by_way.setdefault(way, []).append(found)
                results.save()
                say(f"{subject}, {ways.LABELS[way]}: {found['after_build']:.1f} s")
    done()
    goals = cold_goals(results.samples)
    results.record["goals"] = records(goals)
    results.save()
    print(cold_table(results.record), failures(results.record), sep="\n")
    return settle(goals)


if __name__ == "__main__":
    sys.exit(main())
