"""Node kinds, inlining, slots, errors, and the form of the code."""

from __future__ import annotations

import ast
import inspect
import operator
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from codegen_cases import Methods, Opaque, assert_same, check, compiled, graph_module, record, slots_of
from torch import fx

from stitchcache.codegen import compile_execution_fn
from stitchcache.codegen.generate import generate_execution_code
from stitchcache.errors import CodegenError, OptionError, UnserializableConstError


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("shift", torch.arange(3.0))
        self.leaf = Opaque(lambda x: x * 3)

    def forward(self, x: Any, y: Any = 2, *rest: Any, scale: Any = 1.5, **kwargs: Any) -> Any:
        unused = torch.relu(x)  # noqa: F841
        return self.leaf(x) * self.weight + y * scale, (x, rest), kwargs


class LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: torch.nn.Module, name: str) -> bool:
        return True


def traced(module: torch.nn.Module) -> fx.GraphModule:
    return fx.GraphModule(module, LeafTracer().trace(module))


def inner() -> fx.GraphModule:
    root = Inner()
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y", default_value=2)
    scale = graph.placeholder("scale", default_value=1.5)
    graph.call_function(torch.relu, (x,))
    leaf = graph.call_module("leaf", (x,))
    product = graph.call_function(operator.mul, (leaf, graph.get_attr("weight")))
    shifted = graph.call_function(operator.add, (product, graph.get_attr("shift")))
    scaled = graph.call_function(operator.mul, (y, scale))
    graph.output((graph.call_function(operator.add, (shifted, scaled)), x, [leaf, 3]))
    return fx.GraphModule(root, graph)


def outer(calls: Any) -> fx.GraphModule:
    root = torch.nn.Module()
    root.block = torch.nn.Module()
    root.block.inner = inner()
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output([call(graph, x) for call in calls])
    return fx.GraphModule(root, graph)


def item(graph: fx.Graph, node: Any, index: Any) -> Any:
    return graph.call_function(operator.getitem, (node, index))


INLINED = {
    "whole result": lambda g, x: g.call_module("block.inner", (x,)),
    "items": lambda g, x: [
        item(g, n, i) for n in [g.call_module("block.inner", (x, 4))] for i in (0, 1, -1, 0)
    ],
    "one item": lambda g, x: item(g, g.call_module("block.inner", (x, x)), 0),
    "item of item": lambda g, x: item(g, item(g, g.call_module("block.inner", (x,)), 2), 0),
    "keywords": lambda g, x: g.call_module("block.inner", (x,), {"scale": 2.0, "y": x}),
    "nobody uses it": lambda g, x: g.call_module("block.inner", (x,)) and x,
}


@pytest.mark.parametrize("name", INLINED)
def test_inlined_graphs(name: str) -> None:
    gm = outer([INLINED[name], INLINED["one item"]])
    check_by_keyword(gm, torch.arange(3.0))
    names = generate_execution_code(gm)[1]
    assert names == ["block.inner.leaf", "block.inner.weight", "block.inner.shift"]


def check_by_keyword(gm: fx.GraphModule, *inputs: Any) -> None:
    # fx.Interpreter takes placeholders by position only, so the module's own forward is the reference.
    expected = gm(*inputs)
    assert_same(compiled(gm)(*inputs), expected)


def test_inlining_goes_to_any_depth_and_keeps_no_call() -> None:
    module: torch.nn.Module = inner()
    for _ in range(20):
        root = torch.nn.Module()
        root.sub = module
        graph = fx.Graph()
        x = graph.placeholder("x")
        result = graph.call_module("sub", (x,))
        graph.output((item(graph, result, 0), item(graph, result, 1), item(graph, result, 2)))
        module = fx.GraphModule(root, graph)
    check(module, torch.arange(3.0))
    code, names, _ = generate_execution_code(module)
    assert names[0] == "sub." * 20 + "leaf"
    assert code.count("torch.relu") == 1


def test_inlined_starred_placeholders() -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("*rest"), graph.placeholder("**kw")]
    graph.output(tuple(nodes))
    root = torch.nn.Module()
    root.sub = fx.GraphModule(torch.nn.Module(), graph)
    outer_graph = fx.Graph()
    x = outer_graph.placeholder("x")
    outer_graph.output(outer_graph.call_module("sub", (x, 1, x), {"k": x}))
    assert compiled(fx.GraphModule(root, outer_graph))(7) == (7, (1, 7), {"k": 7})


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3, 4), {}), ((1,), {"nope": 1})])
def test_inlined_call_that_does_not_fit(args: Any, kwargs: Any) -> None:
    gm = outer([lambda g, x: g.call_module("block.inner", args, kwargs)])
    with pytest.raises(CodegenError, match="inner") as caught:
        generate_execution_code(gm)
    assert caught.value.node == "block_inner"


def test_a_graph_with_a_pytree_signature_is_called_not_inlined() -> None:
    class Model(torch.nn.Module):
        def forward(self, batch: Any) -> Any:
            return {"out": batch["x"] + batch["y"]}

    example = {"x": torch.ones(2), "y": torch.ones(2)}
    root = torch.nn.Module()
    root.sub = torch.export.export(Model(), (example,)).module()
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("sub", ({"x": x, "y": x},)))
    gm = fx.GraphModule(root, graph)
    assert generate_execution_code(gm)[1] == ["sub"]
    assert_same(compiled(gm)(torch.ones(2)), {"out": torch.full((2,), 2.0)})


def test_submodules_share_slots_in_order_of_first_use() -> None:
    root = torch.nn.Module()
    root.b, root.a = Opaque(lambda x: x + 1), Opaque(lambda x: x * 2)
    root.deep = torch.nn.Module()
    root.deep.est = Opaque(lambda x: x - 1)
    root.unused = Opaque(lambda x: x)

    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        for name in ("b", "deep.est", "b", "a", "deep.est"):
            x = graph.call_module(name, (x,))
        graph.output(x)

    gm = graph_module(build, root)
    check(gm, 3)
    assert generate_execution_code(gm)[1] == ["b", "deep.est", "a"]


def test_attributes() -> None:
    root = Inner()
    root.plain, root.number, root.options = torch.zeros(0), 7, {"a": [1]}
    root.infinite, root.inner = float("inf"), inner()
    graph_names = ["weight", "shift", "number", "options", "infinite", "inner.leaf", "inner.weight", "inner"]

    def build(graph: fx.Graph) -> None:
        graph.output(tuple(graph.get_attr(name) for name in graph_names))

    gm = graph_module(build, root)
    code, names, consts = generate_execution_code(gm)
    assert names == ["weight", "shift", "inner.leaf", "inner.weight", "inner"]
    assert consts[0] is gm.options
    assert not any(isinstance(value, torch.Tensor) for value in consts)
    result = compile_execution_fn(code, slots_of(gm, names), names, consts)()
    assert result[0] is gm.weight
    assert result[5] is gm.inner.leaf
    assert result[-1] is gm.inner
    assert result[2:5] == (7, {"a": [1]}, float("inf"))


def test_a_weight_update_is_seen_by_the_next_call() -> None:
    def build(graph: fx.Graph) -> None:
        graph.output(graph.call_function(operator.add, (graph.get_attr("weight"), 1)))

    gm = graph_module(build, Inner())
    run = compiled(gm)
    gm.weight.fill_(5)
    assert run()[0] == 6


def test_graph_module_as_an_argument_is_a_slot() -> None:
    root = torch.nn.Module()
    root.true, root.false = fx.symbolic_trace(lambda x: x + 1), fx.symbolic_trace(lambda x: x - 1)

    def build(graph: fx.Graph) -> None:
        flag, x = graph.placeholder("flag"), graph.placeholder("x")
        branches = graph.get_attr("true"), graph.get_attr("false")
        graph.output(graph.call_function(torch.ops.higher_order.cond, (flag, *branches, (x,))))

    gm = graph_module(build, root)
    assert generate_execution_code(gm)[1] == ["true", "false"]
    check(gm, True, torch.ones(2))


def test_user_functions_and_class_methods_by_reference() -> None:
    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        graph.output([graph.call_function(f, (x,)) for f in (record, Methods.static, Methods.made)])

    check(graph_module(build), 1)


def test_boxed_submodules_take_one_list() -> None:
    root = torch.nn.Module()
    root.one, root.two = Opaque(lambda *a: (sum(a),)), Opaque(lambda *a: (a[0], a[-1]))

    def build(graph: fx.Graph) -> None:
        x, y = graph.placeholder("x"), graph.placeholder("y")
        one = graph.call_module("one", (x, y, 3))
        one.meta["val"] = (None,)
        two = graph.call_module("two", (item(graph, one, 0), y))
        two.meta["val"] = (None, None)
        graph.output((item(graph, two, 0), item(graph, two, 1)))

    gm = graph_module(build, root)
    check(gm, 1, 2, boxed=["one", "two"])
    code = generate_execution_code(gm, boxed=["one", "two"])[0]
    assert "(getitem,) = one([x, y, 3])" in code
    assert "getitem_1, getitem_2 = two([getitem, y])" in code


def test_boxed_graph_module_is_called_and_its_length_is_known() -> None:
    root = torch.nn.Module()
    root.sub = fx.symbolic_trace(lambda x: (x + 1, x + 2))

    def build(graph: fx.Graph) -> None:
        result = graph.call_module("sub", (graph.placeholder("x"),))
        graph.output((item(graph, result, 1), item(graph, result, 0)))

    gm = graph_module(build, root)
    check(gm, 1, boxed=["sub"])
    code, names, _ = generate_execution_code(gm, boxed=["sub"])
    assert names == ["sub"]
    assert "= sub([x])" in code
    assert "[0]" not in code


def test_boxed_submodule_takes_no_keywords() -> None:
    root = torch.nn.Module()
    root.sub = Opaque(lambda **k: k)
    gm = graph_module(lambda g: g.output(g.call_module("sub", (), {"k": 1})) and None, root)
    with pytest.raises(CodegenError, match="one list"):
        generate_execution_code(gm, boxed=["sub"])


class NoPickle:
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


def _generator() -> Any:
    yield 1


UNPICKLABLE: dict[str, Any] = {
    "lambda": lambda: 1,
    "local class": type("Local", (), {})(),
    "lock": threading.Lock(),
    "generator": _generator(),
    "file": open(__file__, "rb"),  # noqa: SIM115
    "module": sys,
    "object that refuses": NoPickle(),
}


@pytest.mark.parametrize("name", UNPICKLABLE)
def test_constants_that_cannot_be_stored_are_refused_at_generation(name: str) -> None:
    value = UNPICKLABLE[name]

    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        graph.output(
            graph.create_node("call_function", record, (x, {"scale": [0, value]}), {}, name="guilty")
        )

    with pytest.raises(UnserializableConstError) as caught:
        generate_execution_code(graph_module(build))
    assert caught.value.node == "guilty"
    assert caught.value.path == "args[1]['scale'][1]"
    assert type(value).__qualname__ in caught.value.type_name
    assert "guilty" in str(caught.value)


@pytest.mark.parametrize("target", [lambda x: x, _generator().send])
def test_targets_that_cannot_be_stored_are_refused(target: Any) -> None:
    gm = graph_module(lambda g: _output(g, target))
    with pytest.raises(UnserializableConstError) as caught:
        generate_execution_code(gm)
    assert caught.value.path == "target"


def _output(graph: fx.Graph, target: Any) -> None:
    graph.output(graph.create_node("call_function", target, (graph.placeholder("x"),), {}, name="f"))


def test_a_parameter_as_an_argument_is_refused() -> None:
    def build(graph: fx.Graph) -> None:
        graph.output(graph.call_function(record, (torch.nn.Parameter(torch.ones(2)),)))

    with pytest.raises(CodegenError, match="get_attr"):
        generate_execution_code(graph_module(build))


@pytest.mark.parametrize("name", ["__class__", "__reduce__", "tofile", "a-b", "format", "_secret"])
def test_methods_that_lead_out_are_refused_at_generation(name: str) -> None:
    gm = graph_module(lambda g: g.output(g.call_method(name, (g.placeholder("x"),))) and None)
    with pytest.raises(CodegenError, match="method"):
        generate_execution_code(gm)


def test_missing_submodules_and_attributes() -> None:
    for build in (
        lambda g: g.output(g.create_node("call_module", "no.such", ())) and None,
        lambda g: g.output(g.create_node("get_attr", "no.such")) and None,
    ):
        with pytest.raises(CodegenError, match=r"no\.such"):
            generate_execution_code(graph_module(build))


def test_options_are_checked() -> None:
    gm = graph_module(lambda g: g.output(None) and None)
    with pytest.raises(OptionError):
        generate_execution_code(gm, graph_hash='"""')


def symbolic() -> Any:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    from torch._dynamo.source import LocalSource

    symbol = env.create_symbol(5, LocalSource("n"), DimDynamic.DYNAMIC)
    return env.create_symintnode(symbol, hint=5)


def test_symbolic_numbers_take_the_value_of_the_node_that_has_them() -> None:
    size = symbolic()

    def build(graph: fx.Graph) -> None:
        x, n = graph.placeholder("x"), graph.placeholder("n")
        n.meta["val"] = size
        graph.call_method("upper", (x,))
        graph.output(graph.call_function(record, (x, [size, torch.Size([1, 2])])))

    run = compiled(graph_module(build))
    assert run("text", 9) == ("record", ("text", [9, torch.Size([1, 2])]), {})


def test_symbolic_numbers_of_no_node_are_refused() -> None:
    gm = graph_module(lambda g: g.output(g.call_function(record, (symbolic(),))) and None)
    with pytest.raises(CodegenError, match="symbolic number"):
        generate_execution_code(gm)


def test_the_docstring_names_graph_and_pieces() -> None:
    root = torch.nn.Module()
    root.a, root.b = Opaque(lambda x: x), Opaque(lambda x: x)

    def build(graph: fx.Graph) -> None:
        x = graph.call_module("a", (graph.placeholder("x"),))
        graph.output(graph.call_module("b", (graph.call_module("a", (x,)),)))

    code, names, consts = generate_execution_code(graph_module(build, root), graph_hash="ab" * 32)
    ast.parse(code)
    run = compile_execution_fn(code, {"a": abs, "b": abs}, names, consts)
    assert "ab" * 32 in (run.__doc__ or "")
    assert "2 pieces" in (run.__doc__ or "")
    assert inspect.signature(run).parameters.keys() == {"x"}


PURE = """
import sys
sys.path[:0] = {path!r}
import torch, hashlib
from codegen_cases import graph_module, record, Point
from stitchcache.codegen.generate import generate_execution_code
import operator
def build(g):
    x = g.placeholder("x"); y = g.placeholder("y")
    constants = {{"a": torch.float16, "b": frozenset("abc")}}
    n = [g.call_function(record, (x, y, float("inf"), constants)) for _ in range(9)]
    z = g.call_function(torch.add, (n[0], n[1]), {{"alpha": 2, "class": x}})
    g.output(Point(z, slice(y, None)))
print(hashlib.sha256(repr(generate_execution_code(graph_module(build))[:2]).encode()).hexdigest())
"""


def test_the_code_is_the_same_bytes_in_any_process() -> None:
    script = PURE.format(path=[p for p in sys.path if p])
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1234")
    }
    assert len(digests) == 1


def _chain(nodes: int) -> fx.GraphModule:
    graph = fx.Graph()
    x = y = graph.placeholder("x")
    for i in range(nodes):
        x, y = y, graph.call_function(operator.add, (x, float(i)))
    graph.output((x, y))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_generation_is_linear_and_fast() -> None:
    small, large = _chain(1_000), _chain(10_000)
    times = []
    for gm in (small, large):
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            generate_execution_code(gm)
            best = min(best, time.perf_counter() - start)
        times.append(best)
    # A second is the promise; a quadratic step would show as a hundredfold.
    assert times[1] < 2.0
    assert times[1] / times[0] < 40


def test_a_large_graph_runs() -> None:
    check(_chain(3_000), torch.zeros(1))


def test_a_variable_holds_what_its_name_says() -> None:
    root = torch.nn.Module()
    root.one, root.two = Opaque(lambda a: (a + 1, a + 2)), Opaque(lambda a, b: a * b)

    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        one = graph.call_module("one", (x,))
        two = graph.call_module("two", (item(graph, one, 0), item(graph, one, 1)))
        graph.output(graph.call_function(torch.ops.aten.neg.default, (two,)))

    gm = graph_module(build, root)
    code, names, consts = generate_execution_code(gm, results={"one": 2})
    body = code.partition("execution_fn(x):")[2]
    assert [line.strip() for line in body.splitlines()[2:9]] == [
        "getitem, getitem_1 = one(x)",
        "del x",
        "two_1 = two(getitem, getitem_1)",
        "del getitem, getitem_1",
        "neg_default = op_neg(two_1)",
        "del two_1",
        "return neg_default",
    ]
    call = compile_execution_fn(code, {name: root.get_submodule(name) for name in names}, names, consts)
    assert call(torch.tensor(2.0)) == -12.0
    # Without the number, items are taken one by one: a longer tuple would not unpack.
    assert "one_1[0]" in generate_execution_code(gm)[0]


def test_long_lines_are_folded_and_pass_the_gate() -> None:
    root = torch.nn.Module()
    root.one = Opaque(lambda *a: a)

    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("a_rather_long_name_of_an_argument")
        one = graph.call_module("one", (x, "text, with, commas, 'and quotes', " * 3, *[x] * 20))
        graph.output(tuple(item(graph, one, index) for index in range(22)))

    gm = graph_module(build, root)
    code, names, consts = generate_execution_code(gm, results={"one": 22})
    assert sum(len(line) > 110 for line in code.splitlines()) == 1  # The text itself.
    assert len(compile_execution_fn(code, {"one": root.one}, names, consts)(torch.ones(1))) == 22


def test_a_description_stands_behind_what_makes_a_value():
    def describe(node: fx.Node) -> str:
        return {"leaf": "float32[3]", "mul": "float32[3]"}.get(node.name, "?")

    code, names, consts = generate_execution_code(inner(), describe=describe)
    assert "leaf_1 = leaf(x)  # float32[3]\n" in code
    # It is a comment, and changes nothing else.
    plain = generate_execution_code(inner())
    assert (names, consts) == plain[1:]
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(plain[0]))
