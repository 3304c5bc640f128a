"""From the start of a process to its first output, caches warm: stitchcache beside every peer.

    python tests/benchmarks/bench_warm.py [--subjects decoder-4,minilm] [--rounds 5] [--dir DIR] [--json FILE]
    python tests/benchmarks/bench_warm.py --device cuda [--subjects decoder-4x512] ...

Each way compiles once into ``--dir`` and is then started in fresh processes, the ways in turn, so that noise
falls on all alike. A run that was stopped goes on where it was; results of earlier runs stay, unless
``--again``. Prints medians, ratios and goals; exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import measure
import ways
from goals import records, settle, warm_goals
from measure import FailedError, Results, say
from report import failures, lookup_line, warm_table

SUBJECTS = "decoder-4,decoder-16,minilm"
ALL_SUBJECTS = f"{SUBJECTS},llama-16,gpt2-12"
GPU_SUBJECTS = "decoder-4x512"
LOOKUP = "llama-32"


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=measure.split_list, help=f"by default {SUBJECTS}")
    parser.add_argument("--all", action="store_true", help=f"the subjects {ALL_SUBJECTS}")
    parser.add_argument("--rounds", type=int, help="fresh processes of each way; by default 5")
    parser.add_argument("--lookup", help=f"only look up a model directly; {LOOKUP} is part of every full run")
    parser.add_argument("--prepare-only", action="store_true", help="compile, and measure nothing")
    measure.device_option(parser)
    measure.common_options(parser)
    options = parser.parse_args(argv)
    usual = SUBJECTS if options.device == "cpu" else GPU_SUBJECTS
    quick = usual.split(",")[0] if options.quick else ALL_SUBJECTS if options.all else usual
    options.subjects = options.subjects or ([] if options.lookup else quick.split(","))
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.ways = options.ways or [way for way in ways.WAYS if way != ways.WHOLE]
    measure.on_device(options)
    options.json = options.json or measure.result_path(options, "warm")
    return options


def expected_seconds(options: argparse.Namespace) -> float:
    """About how long it takes."""
    cold = sum(
        measure.COLD_SECONDS.get(way, 30)
        for subject in options.subjects
        for way in options.ways
        if not (measure.directory_of(options.dir, subject, way) / "prepared.json").is_file()
        and way not in ways.PREPARED_BY
    )
    if options.prepare_only:
        return cold
    lookup = 0 if options.quick or options.device != "cpu" else 30 + 5 * options.rounds
    each = sum(measure.WARM_SECONDS.get(way, 6) for way in options.ways)
    return cold + lookup + options.rounds * len(options.subjects) * each


def measure_subject(options: argparse.Namespace, results: Results, subject: str) -> None:
    """Prepare what is missing, then start every way in turn."""
    for way in results.working(subject, options.ways):
        try:
            measure.ensure_prepared(options.dir, subject, way)
        except FailedError as error:
            results.fail(subject, way, error)
    if options.prepare_only:
        return
    samples = results.samples.setdefault(subject, {})
    for number in range(options.rounds):
        for way in results.working(subject, options.ways):
            if len(samples.get(way, [])) > number:
                continue
            try:
                # A second size is looked at once: torch.compile may compile again for it.
                found = measure.run_warm(options.dir, subject, way, other_size=number == 0)
            except FailedError as error:
                results.fail(subject, way, error)
                continue
            samples.setdefault(way, []).append(found)
            results.save()
        say(f"{subject}: round {number + 1} of {options.rounds}")


def measure_lookup(options: argparse.Namespace, results: Results, subject: str) -> None:
    """The key and the source check of a direct hit; no piece is compiled."""
    directory = options.dir / "prepared" / subject / "lookup"
    job = {"mode": "lookup", "way": ways.OURS, "subject": subject, "directory": str(directory)}
    shutil.rmtree(directory, ignore_errors=True)
    measure.run_child(job, options.dir)
    found = [measure.run_child(job, options.dir) for _ in range(options.rounds)]
    if any(sample["hit"] != "direct" for sample in found):
        raise SystemExit(f"{subject}: a lookup was no direct hit")
    results.samples["lookup"] = {"subject": subject, "samples": found}
    results.save()
    say(f"{subject}: direct lookup measured")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = options_of(argv)
    results = Results(Path(options.json), "warm", again=options.again, device=options.device)
    done = measure.estimate(expected_seconds(options), "warm start")
    for subject in options.subjects:
        measure_subject(options, results, subject)
    if options.prepare_only:
        done()
        return 0
    # Keys are the CPU's work alone: a full run on the CPU tells.
    usual = not options.quick and options.device == "cpu"
    if options.lookup or (usual and "lookup" not in results.samples):
        measure_lookup(options, results, options.lookup or LOOKUP)
    done()
    goals = warm_goals(results.samples)
    results.record["goals"] = records(goals)
    results.save()
    if options.subjects:
        print(warm_table(results.record))
    print(lookup_line(results.record), failures(results.record), sep="\n")
    return settle(goals)


if __name__ == "__main__":
    sys.exit(main())
