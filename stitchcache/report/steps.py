"""The steps of stitching code: what each one calls, reads, makes and frees. The code is parsed, never run."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stitchcache.types import BOUND, Variant

_LONGEST_PERIOD = 64
_MOST_FOLDED = 4096
_TABLES = ("__submods__", "__vllm_submods__")
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What parsing any text may raise."""
_MOST_SAID = 4000
_SHOWN = ("kind", "name", "reads", "weights", "makes", "said", "frees", "fold")


@dataclass(slots=True)
class Step:
    """One statement of the stitching function."""

    kind: str  # ``piece``, ``op``, ``input`` or ``output``
    name: str  # of the submodule, the op, the method or the placeholder
    first: int  # its lines in the code, from 1
    last: int
    like: str = ""  # equal for steps that do the same
    reads: list[tuple[int, str]] = field(default_factory=list)  # the step a value comes from, and its name
    weights: list[str] = field(default_factory=list)  # names of tensors of the model, as the code has them
    makes: list[str] = field(default_factory=list)
    said: str = ""  # what it makes: ``float32[s0, 64], 2 x int64[s0]``
    frees: list[str] = field(default_factory=list)
    fold: tuple[int, int] | None = None  # first step that it repeats, and the number of repetitions


def steps_of(variant: Variant) -> list[Step]:
    """The steps of a variant's code, inputs first and the output last.

    Raises:
        SyntaxError: The code cannot be read, or has no ``execution_fn``; see :data:`UNREADABLE`.
    """
    tree = ast.parse(variant.code)
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "execution_fn"]
    if not found:
        raise SyntaxError("it has no function execution_fn")
    reader = _Reader(tree, variant)
    reader.function(found[-1])
    _fold(reader.steps)
    return reader.steps


def _named(tree: ast.Module, variant: Variant) -> dict[str, tuple[str, str]]:
    """What names of ``bind`` stand for: ``slot`` or ``op``, and the submodule, tensor or op."""
    names: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=slots)], value=ast.Name(id="__submods__")):
                for slot, submod in zip(slots, variant.submod_names, strict=False):
                    if isinstance(slot, ast.Name):
                        names[slot.id] = ("slot", submod)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Attribute() as value):
                if name.startswith("op_"):
                    names[name] = ("op", _path(value))
    return names


def _path(node: ast.AST) -> str:
    match node:
        case ast.Attribute(value=owner, attr=name):
            return f"{_path(owner)}.{name}"
        case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str() as name), *_]):
            return f"{_path(owner)}.{name}"
        case ast.Name(id=name):
            return name
    # A method of a value that is no name.
    return ""


class _Reader:
    """Follows values through one function."""

    def __init__(self, tree: ast.Module, variant: Variant) -> None:
        self._names, self._submods = _named(tree, variant), variant.submod_names
        self._keys = {piece.name: piece.key for piece in variant.pieces}
        self._lines = variant.code.splitlines()
        self._made: dict[str, int] = {}  # local name to the step whose value it is
        self.steps: list[Step] = []

    def function(self, function: ast.FunctionDef) -> None:
        args = function.args
        every = [*args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
        for arg in every:
            if arg.arg not in ("__vllm_submods__", "__vllm_consts__"):
                self._made[arg.arg] = len(self.steps)
                self.steps.append(Step("input", arg.arg, arg.lineno, arg.lineno, makes=[arg.arg]))
        for node in function.body:
            match node:
                case ast.Delete(targets=targets):
                    names = [target.id for target in targets if isinstance(target, ast.Name)]
                    if self.steps:
                        self.steps[-1].frees += names
                    for name in names:
                        self._made.pop(name, None)
                case ast.Assign(
                    targets=[ast.Name(id=name)], value=ast.Subscript(value=ast.Name(id=whole))
                ) if whole in self._made:
                    # One of the results of a call, in code of older formats: no step of its own.
                    self._made[name] = self._made[whole]
                case ast.Assign(targets=[target], value=value):
                    parts = target.elts if isinstance(target, ast.Tuple) else [target]
                    self._step(node, value, [part.id for part in parts if isinstance(part, ast.Name)])
                case ast.Expr(value=ast.Constant()):
                    pass
                case ast.Expr(value=value):
                    self._step(node, value, [])
                case ast.Return(value=value) if value is not None:
                    self._step(node, value, [], "output")

    def _step(self, node: ast.stmt, value: ast.expr, makes: list[str], kind: str = "") -> None:
        called = value.func if isinstance(value, ast.Call) else value
        found, name, key = ("output", "returns", "") if kind else self._called(called)
        step = Step(found, name, node.lineno, node.end_lineno or node.lineno, f"{found} {key or name}")
        at = len(self.steps)
        read: dict[str, None] = {}
        names = [part for part in ast.walk(value) if isinstance(part, ast.Name)]
        # In the order in which they are written.
        for part in sorted(names, key=lambda part: (part.lineno, part.col_offset)):
            if part.id in self._made:
                read[part.id] = None
            elif self._names.get(part.id, ("", ""))[0] == "slot" and part is not called:
                step.weights.append(self._names[part.id][1].removeprefix(f"{BOUND}."))
        step.reads = [(self._made[local], local) for local in read]
        step.makes = [local for local in makes if local != "_"]
        # A comment behind it says what it makes.
        behind = self._lines[step.last - 1].encode()[node.end_col_offset or 0 :].decode(errors="replace")
        step.said = behind.removeprefix("  # ")[:_MOST_SAID] if behind.startswith("  # ") else ""
        self.steps.append(step)
        self._made.update(dict.fromkeys(step.makes, at))
        if not makes and found == "op":
            # It returns nothing, so it writes into what it was given: later readers depend on it.
            self._made.update(dict.fromkeys(read, at))

    def _called(self, called: ast.expr) -> tuple[str, str, str]:
        """Kind and name of what is called, and the key of a piece."""
        match called:
            case ast.Name(id=name) if name in self._names:
                kind, meant = self._names[name]
                return ("piece", meant, self._keys.get(meant, meant)) if kind == "slot" else (kind, meant, "")
            case ast.Subscript(value=ast.Name(id=table), slice=ast.Constant(value=at)) if table in _TABLES:
                # Code of older formats indexes its table.
                known = isinstance(at, int) and 0 <= at < len(self._submods)
                name = self._submods[at] if isinstance(at, int) and known else f"submodule {at!r}"
                return "piece", name, self._keys.get(name, name)
            case ast.Attribute(value=ast.Name(id=owner), attr=method) if owner in self._made:
                return "op", f".{method}", ""
            case ast.Attribute() | ast.Call() | ast.Name():
                return "op", _path(called), ""
        return "op", type(called).__name__.lower(), ""


def _fold(steps: list[Step]) -> None:
    """Mark runs of steps that repeat, such as the layers of a model."""
    likes = [step.like for step in steps if step.kind in ("piece", "op")]
    begin = next((at for at, step in enumerate(steps) if step.kind in ("piece", "op")), 0)
    at = 0
    while at < len(likes) <= _MOST_FOLDED:
        best, period = 0, 1
        for length in range(1, min(_LONGEST_PERIOD, (len(likes) - at) // 2) + 1):
            end = at + length
            while end < len(likes) and likes[end] == likes[end - length]:
                end += 1
            # Of runs as long, that of the shortest period; the last repetition may break off.
            if end - at > max(best, length + length - 1):
                best, period = end - at, length
        for offset in range(best):
            first = offset % period
            times = len(range(first, best, period))
            if times > 1:
                steps[begin + at + offset].fold = (begin + at + first, times)
        at += best or 1


def step_records(steps: list[Step], pieces: Mapping[str, int]) -> list[dict[str, Any]]:
    """Steps as data of a page; ``pieces`` has the number of the different piece behind each name."""
    return [
        {
            **{name: getattr(step, name) for name in _SHOWN},
            "lines": [step.first, step.last],
            "piece": pieces.get(step.name, -1) if step.kind == "piece" else -1,
        }
        for step in steps
    ]
