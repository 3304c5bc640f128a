"""Binding code to pieces: slots, constants, and the source that debuggers see."""

from __future__ import annotations

import gc
import inspect
import linecache
import pickle
import threading
import traceback
from typing import Any

import pytest
import torch
from codegen_cases import Opaque, graph_module
from torch import fx

from stitchcache.codegen import compile_execution_fn
from stitchcache.codegen.generate import generate_execution_code
from stitchcache.errors import EntryFormatError, LinkError

BOUND = """import torch
import operator


def bind(__submods__, __consts__):
    first, second = __submods__
    const_0, = __consts__

    def execution_fn(x):
        x = first(x, const_0)
        return x

    return execution_fn
"""
LIST = """import torch
import operator

def __vllm_inlined_submods__1(a):
    mul = operator.mul(a, 2)
    return mul

def execution_fn(x, *, __vllm_submods__):
    submod_0 = __vllm_submods__[0](x, __vllm_consts__[0])
    submod_1 = __vllm_inlined_submods__1(submod_0)
    return submod_1
"""


@pytest.mark.parametrize("code", [BOUND, LIST])
def test_a_submodule_that_is_never_used_needs_no_callable(code: str) -> None:
    names = ["first", "second"]
    run = compile_execution_fn(code, {"first": lambda x, c: x + c}, names, [5])
    assert run(1) in (6, 12)


@pytest.mark.parametrize("code", [BOUND, LIST])
def test_a_missing_callable_is_named(code: str) -> None:
    with pytest.raises(LinkError, match="first") as caught:
        compile_execution_fn(code, {"second": abs}, ["first", "second"], [5])
    assert caught.value.missing == ["first"]
    assert pickle.loads(pickle.dumps(caught.value)).missing == ["first"]


@pytest.mark.parametrize(
    ("code", "names", "consts"),
    [
        (BOUND, ["first"], [1]),
        (BOUND, ["first", "second", "third"], [1]),
        (BOUND, ["first", "second"], []),
        (BOUND, ["first", "second"], None),
        (BOUND, ["first", "second"], [1, 2]),
        (LIST, [], [1]),
        (LIST, ["first"], []),
        (LIST, ["first"], None),
    ],
)
def test_counts_and_indices_are_checked_before_anything_runs(code: str, names: Any, consts: Any) -> None:
    with pytest.raises(EntryFormatError):
        compile_execution_fn(code, dict.fromkeys(names, abs), names, consts)


def test_an_op_that_no_library_registers() -> None:
    code = BOUND.replace("const_0, =", "op_0 = torch.ops.no_such_library.attention.default\n    const_0, =")
    with pytest.raises(LinkError, match="Import the library") as caught:
        compile_execution_fn(code, {"first": abs}, ["first", "second"], [1])
    assert caught.value.missing == ["torch.ops.no_such_library.attention.default"]


def failing() -> Any:
    def fail(x: Any) -> Any:
        raise ZeroDivisionError("here")

    root = torch.nn.Module()
    root.piece = Opaque(fail)
    gm = graph_module(lambda g: g.output(g.call_module("piece", (g.placeholder("x"),))) and None, root)
    code, names, consts = generate_execution_code(gm)
    return code, compile_execution_fn(code, {"piece": gm.piece}, names, consts)


def test_tracebacks_and_inspect_show_the_source() -> None:
    code, run = failing()
    with pytest.raises(ZeroDivisionError) as caught:
        run(1)
    text = "".join(traceback.format_exception(caught.value))
    assert "<stitchcache " in text
    assert "piece(x)" in text
    source = inspect.getsource(run)
    assert source.lstrip().startswith("def execution_fn(x):")
    assert source in code
    linecache.checkcache()
    assert inspect.getsource(run) == source


def test_list_abi_source_is_found_too() -> None:
    run = compile_execution_fn(LIST, {"first": lambda x, c: x}, ["first"], [5])
    assert "__vllm_inlined_submods__1(submod_0)" in inspect.getsource(run)


def entries() -> set[str]:
    gc.collect()
    return {name for name in linecache.cache if name.startswith("<stitchcache ")}


def test_the_source_goes_with_the_last_function_of_equal_code() -> None:
    before = entries()
    run = compile_execution_fn(BOUND, {"first": abs}, ["first", "second"], [1])
    (name,) = entries() - before
    assert name == run.__code__.co_filename
    again = compile_execution_fn(BOUND, {"first": abs}, ["first", "second"], [1])
    del run
    assert name in entries()
    assert inspect.getsource(again)
    del again
    assert entries() == before


def test_code_that_is_refused_leaves_no_source_behind() -> None:
    before = entries()
    with pytest.raises(LinkError):
        compile_execution_fn(BOUND, {}, ["first", "second"], [1])
    assert entries() == before


def test_threads_compile_and_drop_equal_code() -> None:
    before = entries()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                run = compile_execution_fn(BOUND, {"first": lambda x, c: x}, ["first", "second"], [1])
                assert run(3) == 3
        except BaseException as error:  # noqa: BLE001  (shown by the main thread)
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert entries() == before


def test_the_callers_lists_may_change_afterwards() -> None:
    consts, names = [5], ["first"]
    run = compile_execution_fn(LIST, {"first": lambda x, c: x + c}, names, consts)
    consts.clear()
    names.clear()
    assert run(1) == 12


def test_more_than_255_slots_constants_and_arguments() -> None:
    root = torch.nn.Module()
    constants = [float("nan") for _ in range(300)]

    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        for number in range(300):
            root.add_module(f"submod_{number}", Opaque(lambda x, *rest: x + len(rest)))
            x = graph.call_module(f"submod_{number}", (x, *constants))
        graph.output(x)

    gm = graph_module(build, root)
    code, names, consts = generate_execution_code(gm)
    assert (len(names), len(consts)) == (300, 300)
    run = compile_execution_fn(code, {name: getattr(gm, name) for name in names}, names, consts)
    assert run(1) == 1 + 300 * 300
