"""Values are freed right after their last use: weak references tell."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from codegen_cases import Opaque, graph_module, slots_of
from hypothesis import given, settings, strategies as st
from torch import fx

from stitchcache.codegen import compile_execution_fn
from stitchcache.codegen.generate import generate_execution_code


class Token:
    """A value that can be watched."""


class Watch:
    """Makes tokens, and knows which of them are alive."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Token]] = []
        self.alive: list[set[int]] = []

    def token(self) -> Token:
        token = Token()
        self.made.append(weakref.ref(token))
        return token

    def look(self) -> None:
        self.alive.append({i for i, made in enumerate(self.made) if made() is not None})


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    # Only reference counts may free: a cycle would be a leak until the collector runs.
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def make(gm: fx.GraphModule, boxed: Any = ()) -> Any:
    code, names, consts = generate_execution_code(gm, boxed=boxed)
    return compile_execution_fn(code, slots_of(gm, names, boxed), names, consts)


def test_arguments_die_where_the_caller_lets_go() -> None:
    watch = Watch()

    def look(*args: Any) -> None:
        watch.look()

    root = torch.nn.Module()
    root.look = Opaque(look)

    def build(graph: fx.Graph) -> None:
        x, _, y = graph.placeholder("x"), graph.placeholder("unused"), graph.placeholder("y")
        graph.call_module("look", (x,))
        graph.call_module("look", (y,))
        graph.call_module("look", ())
        graph.output(None)

    make(graph_module(build, root))(watch.token(), watch.token(), watch.token())
    assert watch.alive == [{0, 2}, {2}, set()]


def test_nothing_is_kept_between_calls() -> None:
    watch = Watch()
    root = torch.nn.Module()
    root.piece = Opaque(lambda x: (watch.token(), watch.token()))

    def build(graph: fx.Graph) -> None:
        result = graph.call_module("piece", (graph.placeholder("x"),))
        result.meta["val"] = (None, None)
        graph.output(graph.call_function(operator.getitem, (result, 1)))

    run = make(graph_module(build, root))
    for _ in range(3):
        run(watch.token())
        watch.look()
    assert watch.alive == [set(), set(), set()]


def _add_constant(value: torch.Tensor) -> fx.GraphModule:
    def build(graph: fx.Graph) -> None:
        graph.output(graph.call_function(torch.add, (graph.placeholder("x"), value)))

    return graph_module(build)


def test_constants_live_as_long_as_the_function() -> None:
    value = torch.ones(2)
    gone = weakref.ref(value)
    run = make(_add_constant(value))
    del value
    gc.collect()
    assert gone() is not None
    assert torch.equal(run(torch.zeros(2)), torch.ones(2))
    del run
    assert gone() is None


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, list[int], int]]:
    """Steps: what it is, which earlier values it reads, how many values it makes."""
    steps: list[tuple[str, list[int], int]] = []
    count = 2
    for _ in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(["call", "call", "boxed", "inlined", "method", "pair"]))
        reads = draw(st.lists(st.integers(0, count - 1), max_size=3))
        made = draw(st.integers(1, 3)) if kind in ("call", "boxed") else 2
        steps.append((kind, reads, made))
        count += made if kind in ("call", "boxed") else {"inlined": 2, "method": 1, "pair": 1}[kind]
    return [*steps, ("output", draw(st.lists(st.integers(0, count - 1), max_size=4)), 0)]


def build_program(steps: Any, watch: Watch) -> fx.GraphModule:
    """Every piece looks at what is alive, then makes new tokens."""
    root = torch.nn.Module()

    def piece(made: int) -> Any:
        def call(*args: Any) -> Any:
            watch.look()
            return tuple(watch.token() for _ in range(made))

        return Opaque(call)

    def build(graph: fx.Graph) -> None:
        values: list[Any] = [graph.placeholder("x"), graph.placeholder("y")]
        for number, (kind, reads, made) in enumerate(steps):
            args = tuple(values[i] for i in reads)
            name = f"{kind}_{number}"
            if kind == "output":
                graph.output(list(args))
            elif kind == "inlined":
                root.add_module(name, inlined(piece, len(args)))
                result = graph.call_module(name, args)
                values += [graph.call_function(operator.getitem, (result, i)) for i in (0, 1)]
            elif kind == "method":
                root.add_module(name, piece(1))
                result = graph.call_module(name, (list(args),))
                values.append(graph.call_function(operator.getitem, (result, 0)))
            elif kind == "pair":
                root.add_module(name, piece(2))
                result = graph.call_module(name, args)
                values.append(graph.call_function(operator.getitem, (result, 1)))
            else:
                root.add_module(name, piece(made))
                result = graph.call_module(name, args)
                if number % 2:
                    result.meta["val"] = (None,) * made
                values += [graph.call_function(operator.getitem, (result, i)) for i in range(made)]

    return graph_module(build, root)


def inlined(piece: Any, arguments: int) -> fx.GraphModule:
    root = torch.nn.Module()
    root.first, root.second = piece(2), piece(1)
    graph = fx.Graph()
    inputs = [graph.placeholder(f"a{i}") for i in range(arguments)]
    first = graph.call_module("first", tuple(inputs))
    items = [graph.call_function(operator.getitem, (first, i)) for i in (0, 1)]
    second = graph.call_module("second", (items[1],))
    graph.output((items[0], graph.call_function(operator.getitem, (second, 0))))
    return fx.GraphModule(root, graph)


def needed_at_each_call(gm: fx.GraphModule) -> list[set[int]]:
    """What must be alive at each call of a piece: tokens read by it, later, or returned."""
    uses: list[set[int]] = []
    numbers: dict[int, int] = {}
    kept: list[Any] = []

    def number_of(token: Any) -> int:
        kept.append(token)
        return numbers.setdefault(id(token), len(numbers))

    class Reader(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            module = self.fetch_attr(target)
            if isinstance(module, fx.GraphModule):
                return Reader(module).run(*args)
            flat = fx.node.map_aggregate(args, lambda v: v)
            found: set[int] = set()
            fx.node.map_aggregate(flat, lambda v: found.add(number_of(v)) if isinstance(v, Token) else None)
            uses.append(found)
            result = super().call_module(target, args, kwargs)
            for token in result:
                number_of(token)
            return result

    inputs = [Token(), Token()]
    for token in inputs:
        number_of(token)
    result = Reader(gm, garbage_collect_values=False).run(*inputs)
    needed = {number_of(token) for token in result}
    wanted: list[set[int]] = []
    for found in reversed(uses):
        needed = needed | found
        wanted.append(set(needed))
    wanted.reverse()
    return wanted


@settings(max_examples=150, deadline=None)
@given(programs())
def test_exactly_what_is_needed_later_is_alive(steps: Any) -> None:
    watch = Watch()
    gm = build_program(steps, watch)
    boxed = [f"{kind}_{i}" for i, (kind, _, _) in enumerate(steps) if kind == "boxed"]
    wanted = needed_at_each_call(gm)
    made_before, calls_before = len(watch.made), len(watch.alive)
    run = make(gm, boxed=boxed)
    result = run(watch.token(), watch.token())
    seen = [{i - made_before for i in alive if i >= made_before} for alive in watch.alive[calls_before:]]
    # A call sees only what was made before it.
    made, limit = 2, []
    for number in range(len(seen)):
        limit.append({i for i in wanted[number] if i < made})
        made = max(
            [made, *(i + 1 for i in range(len(watch.made) - made_before) if _made_by(steps, i) <= number)]
        )
    assert seen == limit
    del result


def _made_by(steps: Any, token: int) -> int:
    """Number of the piece call that makes a token."""
    call, count = 0, 2
    for kind, _, made in steps:
        for each in {"inlined": [2, 1], "method": [1], "pair": [2], "output": []}.get(kind, [made]):
            if token < count:
                return call - 1
            count += each
            call += 1
    return call - 1
