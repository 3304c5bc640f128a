"""Plots of the benchmarks' results, each as SVG (text stays text) and PNG, the same colour a way in all."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import ways
from measure import median_of
from report import cold_seconds, in_order, number, warm_subjects

matplotlib.use("Agg")
from matplotlib import pyplot

# Okabe and Ito's, which people who see fewer colours can tell apart; eager is grey.
COLOURS = {
    ways.EAGER: "#8c8c8c",
    ways.OURS: "#0072b2",
    ways.UNCHECKED: "#3392c4",
    ways.BACKGROUND: "#66b1d6",
    ways.IMPORTED: "#0072a8",
    ways.PRELOADED: "#004c77",
    ways.WHOLE: "#003a5c",
    ways.COMPILE: "#e69f00",
    ways.MEGA: "#cc79a7",
    ways.AOT: "#009e73",
    ways.PACKAGE: "#d55e00",
    ways.VLLM: "#56b4e9",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stitchcache",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
}


def draw_all(directory: Path, target: Path) -> list[str]:
    """Draw what there are results for.

    Args:
        directory: Has the JSON files.
        target: Gets the plots.

    Returns:
        Names of the plots.
    """
    target.mkdir(parents=True, exist_ok=True)
    drawn = []
    with matplotlib.rc_context(_STYLE):
        for kind, plots in _PLOTS.items():
            path = directory / f"{kind}.json"
            if path.is_file():
                record = json.loads(path.read_text())
                if kind == "warm" and not warm_subjects(record):
                    continue
                for name, plot in plots.items():
                    figure = plot(record)
                    figure.savefig(target / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
                    figure.savefig(target / f"{name}.png", dpi=150, bbox_inches="tight")
                    pyplot.close(figure)
                    drawn.append(name)
    return drawn


def _panels(count: int, height: float, width: float = 2.4, share_x: bool = False) -> tuple[Any, list[Any]]:
    figure, axes = pyplot.subplots(
        1, count, figsize=(max(4.0, width * count), height), sharey=True, sharex=share_x, squeeze=False
    )
    return figure, list(axes[0])


def warm_after_build(record: dict[str, Any]) -> Any:
    """Time after the model is built: bars on a logarithmic scale, a panel a model."""
    subjects = warm_subjects(record)
    order = in_order({way for by_way in subjects.values() for way in by_way})[::-1]
    figure, axes = _panels(len(subjects), 2.2, share_x=True)
    for axis, (subject, by_way) in zip(axes, subjects.items(), strict=True):
        for place, way in enumerate(order):
            if way in by_way:
                value = median_of(by_way[way], "after_build") * 1e3
                axis.barh(place, value, color=COLOURS[way], height=0.7)
                axis.text(value * 1.15, place, number(value), va="center", fontsize=7)
        axis.set_xscale("log")
        axis.set_title(subject)
        axis.set_yticks(range(len(order)), [ways.LABELS[way] for way in order])
        axis.set_xlabel("built model to first output, ms")
        axis.margins(x=0.25)
    figure.tight_layout()
    return figure


def warm_process(record: dict[str, Any]) -> Any:
    """Time from the process's start: stacked bars, a panel a model."""
    subjects = warm_subjects(record)
    order = in_order({way for by_way in subjects.values() for way in by_way})[::-1]
    figure, axes = _panels(len(subjects), 2.3)
    shades = (("import_torch", "#dddddd", "import torch"), ("build", "#b5b5b5", "build the model"))
    for axis, (subject, by_way) in zip(axes, subjects.items(), strict=True):
        for place, way in enumerate(order):
            left = 0.0
            for key, colour, _ in shades if way in by_way else ():
                value = median_of(by_way[way], key)
                axis.barh(place, value, left=left, color=colour, height=0.7)
                left += value
            if way in by_way:
                value = median_of(by_way[way], "after_build")
                axis.barh(place, value, left=left, color=COLOURS[way], height=0.7)
                axis.text(left + value, place, f" {number(left + value)}", va="center", fontsize=7)
        axis.set_title(subject)
        axis.set_yticks(range(len(order)), [ways.LABELS[way] for way in order])
        axis.set_xlabel("process start to first output, s")
        axis.margins(x=0.15)
    boxes = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for _, colour, _ in shades]
    names = [name for _, _, name in shades]
    figure.tight_layout()
    figure.legend(
        boxes, names, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, frameon=False,
        title="coloured: from the built model on", title_fontsize=7,
    )  # fmt: skip
    return figure


def cold(record: dict[str, Any]) -> Any:
    """Seconds of a cold compile by the number of layers."""
    seconds = cold_seconds(record)
    figure, (axis,) = _panels(1, 2.8)
    for way, found in seconds.items():
        # The mega-cache is torch.compile's line and would hide it.
        if way != ways.MEGA:
            axis.plot(list(found), list(found.values()), "o-", color=COLOURS[way], label=ways.LABELS[way])
    layers = sorted({n for found in seconds.values() for n in found})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axis.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axis.set_xticks(layers, [str(n) for n in layers])
    axis.set_xlabel("layers")
    axis.set_ylabel("cold: built model to first output, s")
    axis.grid(color="#eeeeee")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def call(record: dict[str, Any]) -> Any:
    """Time of one call relative to eager's, one thread, a panel a model."""
    shown = {
        subject: {case: by_way for case, by_way in found["us"].items() if case.endswith("1 thread")}
        for subject, found in record["samples"].items()
    }
    order = in_order({way for cases in shown.values() for by_way in cases.values() for way in by_way})
    order = [way for way in order if way != ways.EAGER]
    figure, axes = _panels(len(shown), 2.3)
    for axis, (subject, cases) in zip(axes, shown.items(), strict=True):
        for place, by_way in enumerate(cases.values()):
            eager = statistics.median(by_way.get(ways.EAGER, by_way[ways.OURS]))
            for shift, way in enumerate(order):
                if way in by_way:
                    where = place + (shift - (len(order) - 1) / 2) * 0.8 / len(order)
                    height = statistics.median(by_way[way]) / eager
                    axis.bar(where, height, 0.8 / len(order), color=COLOURS[way])
        axis.axhline(1, color=COLOURS[ways.EAGER], linewidth=1)
        sizes = record["samples"][subject]["sizes"]
        names = [case.split(",")[0] for case in cases]
        labels = ["{}\n{}x{}".format(name, *sizes[name]) for name in names]
        axis.set_xticks(range(len(cases)), labels)
        axis.set_title(subject)
    axes[0].set_ylabel("one call / eager's, 1 thread")
    boxes = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[way]) for way in order]
    figure.tight_layout()
    names = [ways.LABELS[way] for way in order]
    figure.legend(
        boxes, names, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(order), frameon=False
    )
    return figure


_PLOTS = {
    "warm": {"warm-after-build": warm_after_build, "warm-process": warm_process},
    "cold": {"cold": cold},
    "call": {"call": call},
}
