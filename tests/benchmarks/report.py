"""Turn the benchmarks' JSON files into the tables and plots of docs/benchmarks.md.

    python tests/benchmarks/report.py DIR [--docs docs/benchmarks.md] [--no-plots]

Reads ``warm.json``, ``cold.json`` and ``call.json`` in DIR, and ``warm-cuda.json`` and ``call-cuda.json`` of
a GPU, as far as they are there, writes the text between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``
anew, and draws ``docs/plots/*.svg`` and ``*.png``. Plots need matplotlib, which
``pip install 'stitchcache[bench]'`` installs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ways
from goals import layers_of
from measure import HERE, median_of, ratio_of

Record = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that can also be read as text: columns are padded."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]])


def number(value: float) -> str:
    """Three digits, as many decimals as they need."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def warm_subjects(record: Record) -> dict[str, dict[str, list[Record]]]:
    """The models of a warm result, without the lookup."""
    return {name: by_way for name, by_way in record["samples"].items() if name != "lookup"}


def warm_table(record: Record) -> str:
    """One row a model and way."""
    head = (
        "model", "way", "first output, s", "import torch, s", "build, s", "after build, ms", "to stitchcache",
        "peak, MB", "compilers imported", "difference",
    )  # fmt: skip
    rows = []
    for subject, by_way in warm_subjects(record).items():
        for way in in_order(by_way):
            samples = by_way[way]
            after = [s["after_build"] for s in samples]
            mine = [s["after_build"] for s in by_way.get(ways.OURS, [])]
            rows.append(
                (
                    subject,
                    ways.LABELS[way],
                    number(median_of(samples, "process")),
                    number(median_of(samples, "import_torch")),
                    number(median_of(samples, "build")),
                    number(median_of(samples, "after_build") * 1e3),
                    f"{number(ratio_of(after, mine))}x" if mine and way != ways.OURS else "",
                    number(median_of(samples, "peak_mb")),
                    _compilers(samples),
                    f"{max(s['difference'] for s in samples):.1e}",
                )
            )
    return table(head, rows)


def _compilers(samples: Sequence[Record]) -> str:
    """Who imported torch's compilers before the first output."""
    if any(sample["compilers"] for sample in samples):
        return "yes"
    return "by the model" if any(sample.get("compilers_before") for sample in samples) else "no"


def shares_table(record: Record) -> str:
    """What the time after build is made of, for stitchcache."""
    head = ("model", "hit", "imports, ms", "compile(), ms", "first call, ms", "pieces", "distinct")
    rows = []
    for subject, by_way in warm_subjects(record).items():
        samples = by_way.get(ways.OURS)
        if samples:
            parts = [number(median_of(samples, key) * 1e3) for key in ("imports", "open", "first_call")]
            hits = "/".join(sorted({str(s["hit"]) for s in samples}))
            last = samples[-1]
            rows.append((subject, hits, *parts, str(last["pieces"]), str(last["distinct"])))
    return table(head, rows)


def lookup_line(record: Record) -> str:
    """The direct lookup of a large model, in a sentence."""
    found = record["samples"].get("lookup")
    if found is None:
        return ""
    key, sources = (median_of(found["samples"], part) * 1e3 for part in ("key", "sources"))
    return (
        f"Direct lookup, {found['subject']}: {key + sources:.1f} ms ({key:.1f} for the key, {sources:.1f} to "
        f"check the sources; medians of {len(found['samples'])} fresh processes)."
    )


def cold_seconds(record: Record) -> dict[str, dict[int, float]]:
    """Way to layers to seconds; the mega-cache is torch.compile with its save."""
    seconds: dict[str, dict[int, float]] = {}
    for subject, by_way in record["samples"].items():
        layers = layers_of(subject)
        for way, samples in by_way.items():
            if samples:
                seconds.setdefault(way, {})[layers] = median_of(samples, "after_build")
            if samples and way == ways.COMPILE:
                whole = statistics.median(s["after_build"] + s["save"] for s in samples)
                seconds.setdefault(ways.MEGA, {})[layers] = whole
    return {way: dict(sorted(seconds[way].items())) for way in in_order(seconds)}


def cold_table(record: Record) -> str:
    """Ways by layers, seconds."""
    seconds = cold_seconds(record)
    layers = sorted({n for found in seconds.values() for n in found})
    head = ("way", *(f"{n} layers, s" for n in layers))
    rows = [
        (ways.LABELS[way], *(f"{found[n]:.1f}" if n in found else "" for n in layers))
        for way, found in seconds.items()
    ]
    return table(head, rows)


def call_table(record: Record) -> str:
    """One row a model and case, microseconds."""
    shown = in_order({way for s in record["samples"].values() for case in s["us"].values() for way in case})
    head = ("model", "call", "rows x tokens", *(f"{ways.LABELS[way]}, µs" for way in shown))
    rows = []
    for subject, found in record["samples"].items():
        for case, by_way in found["us"].items():
            size = found["sizes"][case.split(",")[0]]
            times = [number(statistics.median(by_way[way])) if way in by_way else "" for way in shown]
            rows.append((subject, case, f"{size[0]} x {size[1]}", *times))
    return table(head, rows)


def overhead_table(record: Record) -> str:
    """What is our own in a call."""
    head = ("model", "pieces", "a call, µs", "a piece, µs", "whole call without pieces' work, µs")
    rows = []
    for subject, found in record["samples"].items():
        if "overhead" in found:
            own = {key: statistics.median(values) for key, values in found["overhead"].items()}
            parts = [f"{own[key]:.2f}" for key in ("call_us", "piece_us", "whole_us")]
            rows.append((subject, f"{own['pieces']:.0f}", *parts))
    return table(head, rows)


def failures(record: Record) -> str:
    """Which way does not work for which model."""
    return "\n".join(
        f"{ways.LABELS[way]} does not work for {subject}: `{reason}`"
        for subject, found in record.get("failed", {}).items()
        for way, reason in found.items()
    )


def goals_list(record: Record) -> str:
    """Every goal, met or missed."""
    lines = []
    for goal in record.get("goals", []):
        unit = f" {goal['unit']}" if goal["unit"] else ""
        state = "met" if goal["met"] else "**missed**"
        wanted = f"{goal['relation']} {goal['limit']:g}{unit}"
        lines.append(f"- {goal['name']}: {number(goal['value'])}{unit} (goal {wanted}): {state}")
    return "\n".join(lines)


def conditions(record: Record) -> str:
    """Where and with what it was measured."""
    found = record["facts"]
    vector = " (AVX-512)" if found.get("avx512") else ""
    names = ("torch", "transformers", "python", "g++")
    versions = ", ".join(f"{name} {found[name]}" for name in names if found.get(name))
    gpu = f"One {found['gpu']} (driver {found['driver']}); " if "gpu" in found else ""
    return (
        f"{gpu}{found['cores']} cores of an {found['cpu']}{vector}, {found['memory_gb']} GB, Linux "
        f"{found['kernel']}; {versions}; seed {found['seed']}; highest load average seen "
        f"{record.get('highest_load', 0):.1f}."
    )


def in_order(names: Any) -> list[str]:
    """Ways in the order of all tables and plots."""
    return [way for way in ways.ALL if way in names]


def sections(directory: Path, plots: Sequence[str]) -> dict[str, str]:
    """Text for each marker, of the results that are there."""
    texts: dict[str, str] = {}
    for name in ("warm", "cold", "call", "warm-cuda", "call-cuda"):
        path, kind = directory / f"{name}.json", name.partition("-")[0]
        if not path.is_file():
            continue
        record = json.loads(path.read_text())
        # Plots are of the CPU's results, and goals are set for them.
        on_cpu = name == kind
        parts = [*_parts(kind, record, plots if on_cpu else ()), failures(record)]
        texts[name] = "\n\n".join(part for part in (*parts, goals_list(record) if on_cpu else "") if part)
    return texts


def _parts(kind: str, record: Record, plots: Sequence[str]) -> list[str]:
    pictures = [f"![{_ALT[name]}](plots/{name}.svg)" for name in plots if name.startswith(kind)]
    if kind == "warm":
        subjects = warm_subjects(record)
        if not subjects:
            return [conditions(record), lookup_line(record)]
        said = f"Medians of {_processes(subjects)}. {conditions(record)}"
        return [said, warm_table(record), *pictures, "stitchcache's time after the model is built:",
                shares_table(record), lookup_line(record)]  # fmt: skip
    if kind == "cold":
        return [f"{_compiles(record)} {conditions(record)}", cold_table(record), *pictures]
    rounds = max(
        len(t) for s in record["samples"].values() for case in s["us"].values() for t in case.values()
    )
    said = f"Medians of {rounds} rounds. {conditions(record)}"
    own = []
    if any("overhead" in found for found in record["samples"].values()):
        own = ["stitchcache's own part of a call:", overhead_table(record)]
    return [said, call_table(record), *pictures, *own]


def _processes(subjects: dict[str, dict[str, list[Record]]]) -> str:
    """How many fresh processes medians are of; not all ways may have been measured as often."""
    by_count: dict[int, set[str]] = {}
    for by_way in subjects.values():
        for way, samples in by_way.items():
            by_count.setdefault(len(samples), set()).add(way)
    (most, _), *others = sorted(by_count.items(), reverse=True)
    fewer = [
        f"{count} for {', '.join(ways.LABELS[way] for way in in_order(by_count[count]))}"
        for count, _ in others
    ]
    return f"{most} fresh processes" + (f" ({'; '.join(fewer)})" if fewer else "")


def _compiles(record: Record) -> str:
    """How many compiles a median is of; some may have been repeated and others not."""
    by_count: dict[int, dict[str, list[int]]] = {}
    for subject, by_way in record["samples"].items():
        for way, samples in by_way.items():
            by_count.setdefault(len(samples), {}).setdefault(way, []).append(layers_of(subject))
    (most, repeated), *others = sorted(by_count.items(), reverse=True)
    if not others:
        return f"Medians of {most} compiles." if most > 1 else "One compile each."
    named = "; ".join(
        f"{ways.LABELS[way]} at {' and '.join(map(str, sorted(repeated[way])))} layers"
        for way in in_order(repeated)
    )
    rest = " or ".join(str(count) for count, _ in reversed(others))
    return f"Medians of {most} compiles for {named}; of {rest} for the rest."


_ALT = {
    "warm-after-build": "Bars: time from the built model to the first output, by model and way",
    "warm-process": "Stacked bars: import torch, build the model and start, by model and way",
    "cold": "Lines: seconds of a cold compile by the number of layers, one line a way",
    "call": "Bars: time of one call relative to eager, by model, size and way",
}


def rewrite(text: str, texts: dict[str, str]) -> str:
    """Replace what stands between the markers.

    Args:
        text: The page.
        texts: By name of the marker.

    Returns:
        The page with the new text.
    """
    for name, body in texts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise SystemExit(f"the page needs one {begin} and, behind it, one {end}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{body.strip()}\n{end}{rest.split(end)[1]}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="what the benchmarks got as --dir")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs" / "benchmarks.md")
    parser.add_argument("--no-plots", action="store_true", help="tables alone")
    options = parser.parse_args(argv)
    drawn: list[str] = []
    if not options.no_plots:
        from plots import draw_all

        drawn = draw_all(options.directory, options.docs.parent / "plots")
    texts = sections(options.directory, drawn)
    if not texts:
        raise SystemExit(f"{options.directory} has no warm.json, cold.json or call.json")
    options.docs.write_text(rewrite(options.docs.read_text(), texts))
    print(f"{options.docs}: {', '.join(texts)}; plots: {', '.join(drawn) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
