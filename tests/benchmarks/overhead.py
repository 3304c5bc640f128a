"""What a call of a compiled model costs beside its pieces and splitting ops.

The model's pieces are replaced by ones that do nothing but hand out results recorded beforehand; splitting
ops stay as they are. Time is this thread's CPU time, ways run in turn.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from stitchcache.codegen import CodeObjects
from stitchcache.runtime import link
from stitchcache.runtime.model import CompiledModel
from stitchcache.state import bind_tensors
from stitchcache.torchside import tree

_SECONDS = 0.02


def measure(
    compiled: CompiledModel, args: tuple[Any, ...], kwargs: dict[str, Any], *, rounds: int
) -> dict[str, Any]:
    """Microseconds of our own, round by round.

    Args:
        compiled: A loaded model.
        args: Arguments for a call.
        kwargs: Likewise.
        rounds: How often each is measured.

    Returns:
        ``call_us``: binding, checks, dispatch and results, once a call. ``piece_us``: the stitching code over
        a bare loop-free run of the same pieces and ops, a piece. Also ``pieces`` in a call, and ``whole_us``,
        ``stitch_us`` and ``floor_us``, from which the two are made.
    """
    recorder = _Recorder(compiled)
    recorder.record(args, kwargs)
    pieces = recorder.quiet()
    constants, model = recorder.constants, compiled.model
    quiet = CompiledModel(compiled.artifact, model, pieces, constants)
    function = link(
        compiled.artifact, pieces, bind_tensors(compiled.artifact.bindings, model, constants), CodeObjects()
    )
    spec = compiled.artifact.input_spec
    assert spec is not None
    given = zip(tree.flatten((args, kwargs))[0], spec.leaves, strict=True)
    leaves = [value for value, leaf in given if leaf.kind != "constant"]
    ways: dict[str, Callable[[], Any]] = {
        "whole_us": lambda: quiet(*args, **kwargs),
        "stitch_us": lambda: function(*leaves),
        "floor_us": recorder.floor(pieces),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(_microseconds(way))
    count = len(recorder.calls)
    whole, stitch, bare = found["whole_us"], found["stitch_us"], found["floor_us"]
    return found | {
        "pieces": [count],
        "call_us": [a - b for a, b in zip(whole, stitch, strict=True)],
        "piece_us": [(a - b) / count for a, b in zip(stitch, bare, strict=True)],
    }


class _Recorder:
    """A compiled model that keeps what its pieces and splitting ops were called with."""

    def __init__(self, compiled: CompiledModel) -> None:
        self.artifact, self.bound_to = compiled.artifact, compiled.model
        self.pieces, self.constants = dict(compiled._pieces), dict(compiled._constants)
        # In the order of a call: a piece's key or an op, its arguments, its results.
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []
        self.ops: list[tuple[int, Any, tuple[Any, ...]]] = []
        self._names = set(re.findall(r"torch\.ops\.([\w.]+)", self.artifact.code))

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the model once."""
        recorder = self

        class Ops(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if str(func) in recorder._names:
                    recorder.ops.append((len(recorder.calls), func, args))
                return func(*args, **(kwargs or {}))

        wrapped = {key: self._wrapped(key, piece) for key, piece in self.pieces.items()}
        model = CompiledModel(self.artifact, self.bound_to, wrapped, self.constants)
        with Ops():
            model(*args, **kwargs)

    def _wrapped(self, key: str, piece: Any) -> Any:
        def call(*arguments: Any) -> Any:
            kept = tuple(list(a) if isinstance(a, list) else a for a in arguments)
            results = piece(*arguments)
            self.calls.append((key, kept, results))
            return results

        return call

    def quiet(self) -> dict[str, Any]:
        """Pieces that hand out recorded results."""

        def made(results: Any) -> Any:
            return lambda *_: results

        return {key: made(results) for key, _, results in self.calls}

    def floor(self, quiet: dict[str, Any]) -> Callable[[], Any]:
        """The same pieces and ops in a row, their arguments ready, written out without a loop."""
        scope: dict[str, Any] = {}
        lines = []

        def call(function: Any, arguments: tuple[Any, ...]) -> None:
            number = len(lines)
            scope[f"f{number}"] = function
            names = [f"a{number}_{place}" for place in range(len(arguments))]
            scope.update(zip(names, arguments, strict=True))
            lines.append(f"        f{number}({', '.join(names)})")

        ops = list(self.ops)
        for place in range(len(self.calls) + 1):
            while ops and ops[0][0] == place:
                _, op, arguments = ops.pop(0)
                call(op, arguments)
            if place < len(self.calls):
                key, arguments, _ = self.calls[place]
                call(quiet[key], arguments)
        source = f"def make({', '.join(scope)}):\n    def run():\n" + "\n".join(lines) + "\n    return run\n"
        namespace: dict[str, Any] = {}
        exec(source, namespace)
        return namespace["make"](**scope)  # type: ignore[no-any-return]


def _microseconds(way: Callable[[], Any]) -> float:
    """CPU microseconds of a call."""
    way()
    began = time.thread_time()
    way()
    count = max(1, int(_SECONDS / max(time.thread_time() - began, 1e-6)))
    began = time.thread_time()
    for _ in range(count):
        way()
    return (time.thread_time() - began) / count * 1e6
