"""Where a call's time goes here: an entry's code is run on made-up inputs, and its pieces are timed.

No model is needed: the contract says what inputs and weights look like. Floats are made up near 1, integers
are 0, with which every table can be indexed.
"""

from __future__ import annotations

import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile as watched, record_function

from stitchcache.cache import Cache
from stitchcache.codegen import CodeObjects
from stitchcache.errors import GraphHashError, OptionError
from stitchcache.pieces import FAILURES
from stitchcache.pipeline import load_blobs
from stitchcache.pipeline.find import Site
from stitchcache.records import Size
from stitchcache.runtime import link
from stitchcache.runtime.expressions import evaluator
from stitchcache.runtime.model import check_environment, devices_in
from stitchcache.types import Artifact, TensorSpec, span

_WARM_CALLS, _FEWEST, _MOST, _SECONDS = 3, 5, 200, 1.0
_OPS_CALLS, _MOST_OPS, _LONGEST = 3, 100, 60
_USUAL = 16  # of a size that may vary, where nobody says it
_MARK = "stitchcache piece "


def profile(
    cache: Cache, graph_hash: str, sizes: Mapping[str, int], imports: Sequence[str] = ()
) -> dict[str, Any]:
    """Run an entry and time it, at sizes by symbol; ``imports`` are modules that register custom ops.

    Raises an ``OptionError`` for sizes that the entry does not cover, and what loading raises.
    """
    for name in imports:
        try:
            importlib.import_module(name)
        # A module of the user's, which may raise anything.
        except (Exception, SystemExit) as error:
            said = f"--import {name}: it cannot be imported ({type(error).__name__}: {error})"
            raise OptionError(f"{said}. PYTHONPATH says where modules are", option="--import") from error
    artifact = cache.get(graph_hash)
    if artifact is None:
        raise GraphHashError(cache.problem(graph_hash)[0] or f"no entry {graph_hash[:12]}", prefix=graph_hash)
    check_environment(artifact, f"entry {graph_hash[:12]}")
    values, devices = _chosen(artifact, sizes), tuple(sorted(devices_in(artifact)))
    device = f"cuda:{torch.cuda.current_device()}" if "cuda" in devices else devices[0]
    clock = _Clock(device != "cpu")
    site = Site(cache=cache, label=artifact.label, device=device, devices=devices)
    pieces, constants = load_blobs(artifact, site)
    pieces = {key: clock.around(key, piece) for key, piece in pieces.items()}
    rest = [binding for binding in artifact.bindings if binding.name not in constants]
    tensors = constants | {binding.name: _made_up(binding.tensor, values, device) for binding in rest}
    function = link(artifact, pieces, tensors, CodeObjects())
    leaves = [
        _made_up(leaf.tensor, values, device) if leaf.tensor else evaluator(str(leaf.symbol))(values)
        for leaf in (artifact.input_spec.leaves if artifact.input_spec is not None else ())
        if leaf.kind != "constant"
    ]
    try:
        with torch.no_grad():
            found = clock.times(lambda: function(*leaves)) | {"ops": clock.ops(lambda: function(*leaves))}
    except FAILURES as error:
        # Ops of the user's run on numbers that they were not made for.
        said = f"entry {graph_hash[:12]} cannot run on made-up inputs: {type(error).__name__}: {error}"
        raise OptionError(said, option="--profile") from error
    where = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    return {"sizes": values, "device": where, "threads": torch.get_num_threads(), **found}


def _chosen(artifact: Artifact, sizes: Mapping[str, int]) -> dict[str, int]:
    spec, left, values = artifact.input_spec, dict(sizes), dict[str, int]()
    symbols, rules = (spec.symbols, spec.constraints) if spec is not None else ((), ())
    for symbol in symbols:
        most = symbol.max if symbol.max is not None else 2**31
        value = left.pop(symbol.name, left.pop(symbol.label, max(symbol.min, min(_USUAL, most))))
        if not symbol.min <= value <= most:
            said = f"{symbol.name}={value}: the entry covers {symbol.min} to {most}"
            raise OptionError(said, option="--size")
        values[symbol.name] = value
    if left:
        known = ", ".join(symbol.name for symbol in symbols) or "none"
        raise OptionError(f"--size {', '.join(left)}: sizes that may vary are {known}", option="--size")
    # Rules of one word are about tensors.
    broken = [rule for rule in rules if not rule.isidentifier() and not evaluator(rule)(values)]
    if broken:
        raise OptionError(f"these sizes break what the entry relies on: {broken[0]}", option="--size")
    return values


def _made_up(spec: TensorSpec, values: Mapping[str, int], device: str) -> torch.Tensor:
    def numbers(sizes: Sequence[Size]) -> list[int]:
        return [size if isinstance(size, int) else evaluator(size)(values) for size in sizes]

    shape, stride, dtype = numbers(spec.shape), numbers(spec.stride), getattr(torch, spec.dtype)
    count = span(shape, stride)
    fractions = dtype.is_floating_point or dtype.is_complex
    # Masks let everything through.
    flat = torch.rand(count) + 0.5 if fractions else torch.full((count,), float(dtype is torch.bool))
    return flat.to(spec.device if spec.device == "cpu" else device, dtype).as_strided(shape, stride)


class _Clock:
    """Times calls and their pieces; on a GPU by events, as a call there returns before it is done."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._named = False  # torch's profiler is told which piece runs, and nothing is timed
        self._seen: list[tuple[str, Any, Any]] = []

    def around(self, key: str, piece: Callable[[list[Any]], Sequence[Any]]) -> Callable[[list[Any]], Any]:
        def call(inputs: list[Any]) -> Sequence[Any]:
            if self._named:
                with record_function(_MARK + key):
                    return piece(inputs)
            begin = self._now()
            results = piece(inputs)
            self._seen.append((key, begin, self._now()))
            return results

        return call

    def times(self, call: Callable[[], Any]) -> dict[str, Any]:
        """Medians over calls."""
        for _ in range(_WARM_CALLS):
            call()
        totals, parts = list[float](), defaultdict[str, list[list[float]]](list)
        until = time.perf_counter() + _SECONDS
        while len(totals) < _FEWEST or (len(totals) < _MOST and time.perf_counter() < until):
            self._seen.clear()
            begin = self._now()
            call()
            totals.append(self._between(begin, self._now()))
            taken = defaultdict[str, list[float]](list)
            for key, *ends in self._seen:
                taken[key].append(self._between(*ends))
            for key, each in taken.items():
                parts[key].append(each)
        seconds, spent = median(totals), {key: median(map(sum, each)) for key, each in parts.items()}
        return {
            "calls": len(totals),
            "seconds": seconds,
            "pieces": [
                {"key": key, "calls": len(parts[key][0]), "seconds": each, "share": each / seconds}
                for key, each in spent.items()
            ],
            "between_seconds": max(0.0, seconds - sum(spent.values())),
        }

    def ops(self, call: Callable[[], Any]) -> list[dict[str, Any]]:
        """Ops that torch's profiler saw, by the piece in which they ran; times are their own, in one call.

        On a GPU also the kernels that a piece launches itself, which a compiler fused.
        """
        self._named = True
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        # One cycle is all, but torch warns where events of an earlier one would be lost.
        with watched(activities=kinds, acc_events=True) as seen:
            for _ in range(_OPS_CALLS):
                call()
            self._now()
        found, events = defaultdict[tuple[str, str], list[float]](list), seen.events()
        launches = {event.id: event.cpu_parent for event in events if "LaunchKernel" in event.name}
        for event in events:
            key = _piece_of(event, launches)
            if key is not None:
                spent = event.self_device_time_total if self._on_gpu else event.self_cpu_time_total
                found[key, event.name[:_LONGEST]].append(spent / 1e6 / _OPS_CALLS)
        rows: list[dict[str, Any]] = [
            {"piece": key, "op": name, "calls": len(times) / _OPS_CALLS, "seconds": sum(times)}
            for (key, name), times in found.items()
        ]
        return sorted(rows, key=lambda row: -row["seconds"])[:_MOST_OPS]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if self._on_gpu:
            end.synchronize()
        return float(begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin)


def _piece_of(event: Any, launches: Mapping[int, Any]) -> str | None:
    """Key of the piece in which an event counts, ``""`` between pieces; ``None`` where it counts nowhere."""
    if event.device_type.name != "CPU":
        # Of kernels those that a piece launches itself: the others are in the time of their ops.
        above = launches.get(event.id)
        return above.name.removeprefix(_MARK) if above is not None and above.name.startswith(_MARK) else None
    if "::" not in event.name:
        return None
    while event is not None and not event.name.startswith(_MARK):
        event = event.cpu_parent
    return "" if event is None else str(event.name.removeprefix(_MARK))
