"""What a call of the stitching function costs beside its pieces, and what making one costs.

Every way runs the same no-op pieces, so the numbers are overhead alone. Rounds are interleaved, so
that a noisy machine disturbs all ways alike, and each number is the median over rounds. Time is this
thread's CPU time: what other processes take is not counted.

    python tests/benchmarks/bench_stitch.py [--json PATH] [--rounds N] [--quick]

Exits with 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import operator
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from stitchcache.codegen import compile_execution_fn
from stitchcache.codegen.generate import generate_execution_code

PIECES = (9, 65, 257)
ROUND_SECONDS = 0.002


class Piece(torch.nn.Module):
    """A submodule that does nothing: hands back as many values as it is asked for."""

    def __init__(self, results: int) -> None:
        super().__init__()
        self.results = results

    def forward(self, *args: Any) -> Any:
        return args[0] if self.results == 1 else args[: self.results]


def _first(x: Any, y: Any) -> Any:
    return (x, y)


def _second(x: Any, y: Any) -> Any:
    return x


def stitching_graph(pieces: int) -> fx.GraphModule:
    """Pieces in turn, as splitting a decoder gives them: one with a tuple result, one with one result."""
    root = torch.nn.Module()
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for number in range(pieces):
        name = f"submod_{number}"
        root.add_module(name, Piece(2 if number % 2 == 0 else 1))
        node = graph.call_module(name, (x, y))
        if number % 2 == 0:
            node.meta["val"] = (None, None)
            x = graph.call_function(operator.getitem, (node, 0))
            y = graph.call_function(operator.getitem, (node, 1))
        else:
            x = node
    graph.output((x, y))
    return fx.GraphModule(root, graph)


def op_graph(pieces: int, op: Any) -> fx.GraphModule:
    """Pieces with a splitting op between them, called through torch.ops."""
    root = torch.nn.Module()
    graph = fx.Graph()
    x = graph.placeholder("x")
    for number in range(pieces):
        if number % 2 == 0:
            name = f"submod_{number}"
            root.add_module(name, Piece(1))
            x = graph.call_module(name, (x,))
        else:
            graph.call_function(op, (x, f"layers.{number // 2}"))
    graph.output(x)
    return fx.GraphModule(root, graph)


def list_abi_source(gm: fx.GraphModule) -> str:
    """The same graph as vLLM writes it: pieces out of a list, items by index, ops by attribute."""
    lines, order = [], list(gm.graph.nodes)
    last: dict[str, str] = {}
    for node in order:
        for argument in node.all_input_nodes:
            last[argument.name] = node.name
    index = {node.target: i for i, node in enumerate(n for n in order if n.op == "call_module")}
    for node in order:
        args = ", ".join(a.name if isinstance(a, fx.Node) else repr(a) for a in node.args)
        if node.op == "call_module":
            lines.append(f"{node.name} = __vllm_submods__[{index[node.target]}]({args})")
        elif node.op == "call_function" and node.target is operator.getitem:
            lines.append(f"{node.name} = {node.args[0].name}[{node.args[1]}]")
        elif node.op == "call_function":
            lines.append(f"{node.name} = torch.ops.{node.target}({args})")
        elif node.op == "output":
            result = node.args[0]
            inner = result.name if isinstance(result, fx.Node) else f"({', '.join(a.name for a in result)})"
            lines.append(f"return {inner}")
        dead = sorted(name for name, user in last.items() if user == node.name)
        if dead and node.op != "output" and node.next.op != "output":
            lines.append(f"del {', '.join(dead)}")
    names = ", ".join(n.name for n in order if n.op == "placeholder")
    head = f"import torch\nimport operator\n\ndef execution_fn({names}, *, __vllm_submods__):\n    "
    return head + "\n    ".join(lines) + "\n"


def hand_written(pieces: int, callables: Sequence[Any], op: Any | None) -> Callable[..., Any]:
    """The same calls as a person would write them in a closure over the pieces."""
    names = [f"piece_{i}" for i in range(pieces) if op is None or i % 2 == 0]
    lines = [f"def make({', '.join(names)}, op):"]
    lines.append("    def run(x, y):" if op is None else "    def run(x):")
    for number in range(pieces):
        if op is None:
            lines.append(f"        {'x, y' if number % 2 == 0 else 'x'} = piece_{number}(x, y)")
        elif number % 2 == 0:
            lines.append(f"        x = piece_{number}(x)")
        else:
            lines.append(f"        op(x, 'layers.{number // 2}')")
    lines.append("        return x, y" if op is None else "        return x")
    lines.append("    return run")
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    return scope["make"](*callables, op)  # type: ignore[no-any-return]


def interleaved(
    ways: dict[str, Callable[..., Any]], inputs: Sequence[Any], rounds: int
) -> dict[str, list[float]]:
    """Microseconds a call of each way, round by round."""
    repeats: dict[str, int] = {}
    for name, call in ways.items():
        call(*inputs)
        start = time.thread_time()
        call(*inputs)
        repeats[name] = max(1, int(ROUND_SECONDS / max(time.thread_time() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            count = repeats[name]
            start = time.thread_time()
            for _ in range(count):
                call(*inputs)
            samples[name].append((time.thread_time() - start) / count * 1e6)
    return samples


def measure_calls(pieces: int, op: Any | None, rounds: int) -> dict[str, list[float]]:
    """Microseconds a call of every way over one graph."""
    gm = stitching_graph(pieces) if op is None else op_graph(pieces, op)
    inputs = (torch.zeros(2), torch.zeros(2)) if op is None else (torch.zeros(2),)
    code, names, consts = generate_execution_code(gm)
    plain: Any = (lambda x: x) if op is not None else None
    table = {name: plain or (_first if int(name[7:]) % 2 == 0 else _second) for name in names}
    bound = compile_execution_fn(code, table, names, consts)
    listed = compile_execution_fn(list_abi_source(gm), table, names)
    hand = hand_written(pieces, list(table.values()), op)
    ways: dict[str, Callable[..., Any]] = {
        "GraphModule.forward": gm.forward,
        "fx.Interpreter": fx.Interpreter(gm).run,
        "list ABI": listed,
        "bound ABI": bound,
        "hand-written": hand,
    }
    with torch.inference_mode():
        return interleaved(ways, inputs, rounds)


def measure_making(rounds: int) -> dict[str, float]:
    """Milliseconds of compile_execution_fn for 257 pieces and of generate_execution_code for 10,000 nodes."""
    gm = stitching_graph(257)
    code, names, consts = generate_execution_code(gm)
    table = dict.fromkeys(names, _first)
    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(9_998):
        node = graph.call_function(torch.ops.aten.add.Tensor, (node, 1))
    graph.output(node)
    large = fx.GraphModule(torch.nn.Module(), graph)
    made: dict[str, list[float]] = {"compile_execution_fn, 257 pieces": [], "generate, 10,000 nodes": []}
    for _ in range(max(3, rounds // 4)):
        start = time.thread_time()
        compile_execution_fn(code, table, names, consts)
        middle = time.thread_time()
        generate_execution_code(large)
        made["compile_execution_fn, 257 pieces"].append((middle - start) * 1e3)
        made["generate, 10,000 nodes"].append((time.thread_time() - middle) * 1e3)
    return {name: statistics.median(values) for name, values in made.items()}


def ratio(upper: Sequence[float], lower: Sequence[float]) -> float:
    """Median over rounds: the two were measured side by side in each."""
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))


def goals(calls: dict[str, dict[str, list[float]]], making: dict[str, float]) -> list[dict[str, Any]]:
    """Every goal with what was reached."""
    found = []
    for case, times in calls.items():
        bound = times["bound ABI"]
        # A "del" a value is not in what is written by hand: it counts where submodules do nothing.
        most = 1.1 if "ops" in case else 1.2
        found.append(_goal(f"{case}: bound / hand-written", ratio(bound, times["hand-written"]), "<=", most))
        if "op" not in case:
            by_list, by_graph = times["list ABI"], times["GraphModule.forward"]
            found.append(_goal(f"{case}: list ABI / bound", ratio(by_list, bound), ">=", 1.2))
            found.append(_goal(f"{case}: GraphModule / bound", ratio(by_graph, bound), ">=", 40))
    found.append(_goal("compile, ms", making["compile_execution_fn, 257 pieces"], "<=", 15))
    found.append(_goal("generate, ms", making["generate, 10,000 nodes"], "<=", 1000))
    return found


def _goal(name: str, value: float, relation: str, limit: float) -> dict[str, Any]:
    met = value <= limit if relation == "<=" else value >= limit
    return {"goal": name, "value": round(value, 3), "relation": relation, "limit": limit, "met": met}


def report(
    calls: dict[str, dict[str, float]], making: dict[str, float], found: Sequence[dict[str, Any]]
) -> None:
    """Print the tables."""
    ways = list(next(iter(calls.values())))
    print(f"{'one call, us':<22}" + "".join(f"{way:>22}" for way in ways))
    for case, times in calls.items():
        print(f"{case:<22}" + "".join(f"{times[way]:>22.2f}" for way in ways))
    print()
    for name, value in making.items():
        print(f"{name:<44}{value:>10.1f} ms")
    print()
    for goal in found:
        state = "met" if goal["met"] else "MISSED"
        print(f"{goal['goal']:<44}{goal['value']:>10.2f}  goal {goal['relation']} {goal['limit']:<8}{state}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write everything there too")
    parser.add_argument("--rounds", type=int, default=41, help="rounds a number is the median of")
    parser.add_argument("--quick", action="store_true", help="few rounds, for a look")
    options = parser.parse_args(argv)
    rounds = 5 if options.quick else options.rounds
    torch.set_num_threads(1)
    library = torch.library.Library("stitchcache_bench", "DEF")
    library.define("mark(Tensor x, str layer) -> ()")
    library.impl("mark", lambda x, layer: None, "CompositeExplicitAutograd")
    op = torch.ops.stitchcache_bench.mark.default
    samples = {f"{n} pieces": measure_calls(n, None, rounds) for n in PIECES}
    samples |= {f"{n} pieces and ops": measure_calls(n, op, rounds) for n in PIECES}
    calls = {
        case: {way: statistics.median(values) for way, values in times.items()}
        for case, times in samples.items()
    }
    making = measure_making(rounds)
    found = goals(samples, making)
    report(calls, making, found)
    if options.json:
        facts = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        body = {"version": 1, "environment": facts, "calls_us": calls, "making_ms": making, "goals": found}
        options.json.write_text(json.dumps(body, indent=2) + "\n")
    return 0 if all(goal["met"] for goal in found) else 1


if __name__ == "__main__":
    sys.exit(main())
