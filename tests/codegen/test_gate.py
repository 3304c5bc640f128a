"""Code from outside: what is let through, and what is not."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from stitchcache.codegen import compile_execution_fn
from stitchcache.codegen.gate import check_code
from stitchcache.errors import EntryFormatError

BOUND = """import torch
import operator


def bind(__submods__, __consts__):
    submod_0, = __submods__
    const_0, = __consts__
    op_0 = {op}

    def execution_fn({parameters}):
        {body}
        return x

    return execution_fn
"""
LIST = """import torch
import operator

def execution_fn(x, *, __vllm_submods__):
    {body}
    return x
"""


def bound(body: str = "x = submod_0(x)", op: str = "torch.relu", parameters: str = "x") -> str:
    return BOUND.format(body=body, op=op, parameters=parameters)


def run(code: str) -> Any:
    return compile_execution_fn(code, {"submod_0": lambda *a, **k: a[0]}, ["submod_0"], [1])(3)


GOOD_BODIES = [
    "x = submod_0(x)",
    "y = x + 1\n        del y",
    "x = x * (-1)",
    "y = {'a': [x, (x, 1)], 2: const_0}",
    "submod_0(x, a=1, **{'b c': x})",
    "y = x.bit_length()",
    "y = x.real",
    "y = x.__add__(1)",
    "y = x < const_0",
    "y = op_0",
]
GOOD_OPS = [
    "torch.relu",
    "torch.ops.aten.add.Tensor",
    "torch.ops.aten.add",
    "torch.ops.aten.__and__.Tensor",
    "getattr(torch.ops.aten, 'add').Tensor",
    "getattr(getattr(torch.ops, 'aten'), 'add')",
    "torch.Tensor.add_",
    "torch.Tensor.__mul__",
    "torch.nn.functional.relu",
    "torch.sym_max",
    "operator.mul",
    "slice",
    "torch._C._nn.gelu",
    "torch.float32",
]


@pytest.mark.parametrize("body", GOOD_BODIES)
def test_bodies_that_pass(body: str) -> None:
    assert run(bound(body)) in (3, -3)


def test_items_of_a_call_pass() -> None:
    code = bound("y = submod_0([x])[0]\n        z, = submod_0([y])\n        x = z[0:1, ...]")
    assert check_code(code, 1, 1)[2] == {0}


@pytest.mark.parametrize("op", GOOD_OPS)
def test_ops_that_pass(op: str) -> None:
    assert run(bound(op=op)) == 3


# Each is an expression that must not be reachable under any name.
BAD_OPS = [
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.hub",
    "torch.serialization.load",
    "torch.os.system",
    "torch.sys",
    "torch.sys.modules",
    "torch.importlib.import_module",
    "torch.builtins.eval",
    "torch.ctypes.CDLL",
    "torch.utils.cpp_extension.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.ops.load_library",
    "torch.ops.import_module",
    "torch.ops.loaded_libraries",
    "torch.ops",
    "torch.ops.aten",
    "torch.ops.aten.__class__",
    "torch.ops.aten.from_file",
    "torch.ops.aten.from_file.default",
    "torch.from_file",
    "torch.ops.aten.save",
    "torch.ops.aten.save.default",
    "torch.ops.debugprims.load_tensor",
    "torch.ops.debugprims.load_tensor.default",
    "torch.ops.__class__.mro",
    "torch.ops.aten.add.Tensor.py_impl",
    "torch.ops.aten.add.__call__",
    "torch.ops.aten.add._op",
    "torch",
    "torch.ops.aten.add.Tensor._op",
    "torch.ops.aten.add.Tensor.__class__",
    "torch.classes.load_library",
    "operator",
    "torch.jit.load",
    "torch.jit.script",
    "torch.compile",
    "torch._C._jit_set_profiling_executor",
    "torch._C",
    "torch._dynamo.optimize",
    "torch._inductor.aot_compile",
    "torch.package.PackageImporter",
    "torch.fx.Graph",
    "torch.multiprocessing.spawn",
    "torch.distributed.launch",
    "torch.Tensor.__class__",
    "torch.Tensor.mro",
    "torch.Tensor.__reduce_ex__",
    "torch.Tensor.__init_subclass__",
    "torch.Tensor.add_.__objclass__",
    "torch.Tensor.shape",
    "torch.nn.functional.os",
    "torch.nn.functional.importlib",
    "torch.nn.functional.torch.load",
    "torch.nn.Module",
    "torch.functional.torch",
    "torch.nn.functional.handle_torch_function",
    "torch.relu.__self__",
    "torch.__dict__",
    "torch.set_default_device",
    "torch.manual_seed",
    "torch.set_num_threads",
    "torch.library.Library",
    "torch.device.mro",
    "operator.attrgetter",
    "operator.methodcaller",
    "operator.call",
    "operator.__builtins__",
    "operator.__loader__",
    "eval",
    "exec",
    "open",
    "getattr",
    "setattr",
    "compile",
    "__import__",
    "globals",
    "vars",
    "type",
    "print",
    "input",
    "__builtins__",
    "getattr(torch, 'load')",
    "getattr(torch, 'os').system",
    "getattr(torch.ops, 'load_library')",
    "getattr(submod_0, 'x')",
    "torch.relu(const_0)",
    "(lambda: 1)",
    "[torch.relu][0]",
    "torch.ops['aten']",
    "__submods__",
    "torch.relu if 1 else torch.add",
    "'text'",
    "1",
    "os.system",
    "sys",
    "submod_0",
    "[i for i in ()]",
    "f'{1}'",
]


@pytest.mark.parametrize("op", BAD_OPS)
def test_names_that_lead_out(op: str) -> None:
    with pytest.raises(EntryFormatError) as caught:
        run(bound(op=op))
    assert "line " in caught.value.field


@pytest.mark.parametrize("op", [op for op in BAD_OPS if "submod_0" not in op and "const_0" not in op])
def test_names_that_lead_out_of_the_list_abi(op: str) -> None:
    for body in (f"y = {op}(x)", f"y = [({op}, x)]", f"y = x.real({op})"):
        # Some are values that a list-ABI entry may hold: a literal, a dtype.
        if op in ("1", "'text'") and "(x)" not in body:
            continue
        with pytest.raises(EntryFormatError):
            check_code(LIST.format(body=body), 1, 1)


BAD_BODIES = [
    "x = x.__class__",
    "x = x.__class__.__bases__[0].__subclasses__()",
    "x = x.__reduce__()",
    "x = x.f_globals",
    "x = x.gi_frame",
    "x = submod_0.__globals__",
    "x = submod_0.__globals__['os'].system('true')",
    "x = x.tofile('f')",
    "x = const_0.format(x)",
    "x = x.format_map(x)",
    "x = x.mro()",
    "x = x._secret()",
    "x = x._secret",
    "x = x.tb_frame",
    "import os",
    "from os import system",
    "import torch",
    "global x",
    "nonlocal submod_0",
    "x = lambda: 1",
    "x = [i for i in x]",
    "x = {i: i for i in x}",
    "x = (i for i in x)",
    "x = f'{x}'",
    "x = x if x else x",
    "x = not x",
    "x = x and x",
    "x = ~x",
    "x = -x",
    "x = await_(x)",
    "yield x",
    "x = yield",
    "x = (y := 1)",
    "x += 1",
    "x: int = 1",
    "x.y = 1",
    "x[0] = 1",
    "x, *y = x",
    "x = y = 1",
    "del x.y",
    "del x[0]",
    "del unknown",
    "del submod_0",
    "assert x",
    "raise x",
    "pass",
    "if x: pass",
    "while x: pass",
    "for y in x: pass",
    "with x: pass",
    "try: pass\n        finally: pass",
    "def f(): pass",
    "class C: pass",
    "return x",
    "x = print(x)",
    "x = eval('1')",
    "x = __import__('os')",
    "x = torch.relu(x)",
    "x = len(x)",
    "x = unknown",
    "x = unknown(x)",
    "x = x(1)",
    "x = x.y.z",
    "x = x.a().b()",
    "x = submod_0(*x)",
    "x = submod_0(**x)",
    "x = submod_0(**{x: 1})",
    "x = submod_0(**{'a': 1, **x})",
    "x = {**x}",
    "x = [*x]",
    "x = {x}",
    "x = 1 < x < 2",
    "x = x is x",
    "x = x in x",
    "submod_0 = x",
    "op_0 = x",
    "const_0 = x",
    "torch = x",
    "operator = x",
    "__builtins__ = x",
    "__vllm_submods__ = x",
    "x = __vllm_submods__[0](x)",
    "x = __vllm_consts__[0]",
    "x = __submods__",
    "x = __consts__[0]",
    "x = execution_fn(x)",
    "x = bind([], [])",
    "x = submod_0(x)(x)",
    "x = op_0.__self__",
    "x = op_0.name",
    "x = getattr(x, 'real')",
    "x = submod_0(__class__=x)",
    "y = 1\n        'text'",
    "1",
    "x = submod_0(x).__class__",
    "x = ''.join(x)",
    "x = [].append(x)",
    "match x:\n            case _: pass",
    "async def f(): pass",
    "x = 'a' 'b'.upper()",
    "y",
]


@pytest.mark.parametrize("body", BAD_BODIES)
def test_statements_that_generated_code_never_has(body: str) -> None:
    with pytest.raises(EntryFormatError) as caught:
        run(bound(body))
    assert "line " in caught.value.field
    assert caught.value.reason


INLINED = """import torch

def __vllm_inlined_submods__0(x):
    y = __vllm_submods__[0](x)
    return y
"""
BAD_SHAPES = {
    "empty": "",
    "no function": "import torch\n",
    "not Python": "def (",
    "null byte": "x = '\0'",
    "nested brackets": "x = " + "(" * 500 + ")" * 500,
    "long chain": LIST.format(body="y = x" + " + x" * 100_000),
    "other import": bound().replace("import operator", "import os"),
    "import as": bound().replace("import operator", "import operator as torch"),
    "import from": bound().replace("import operator", "from os import *"),
    "late import": bound() + "import torch\n",
    "statement after": bound() + "x = 1\n",
    "call after": bound() + "bind([], [])\n",
    "two binds": bound() + bound(),
    "decorator": bound().replace("    def execution_fn", "    @op_0\n    def execution_fn"),
    "outer decorator": bound().replace("def bind", "@torch.load\ndef bind"),
    "async": bound().replace("    def execution_fn", "    async def execution_fn"),
    "annotation": bound(parameters="x: torch.load('f')"),
    "return annotation": bound().replace("(x):", "(x) -> torch.load('f'):"),
    "default call": bound(parameters="x=op_0(1)"),
    "default op": bound(parameters="x=op_0"),
    "default submodule": bound(parameters="x=submod_0"),
    "default lambda": bound(parameters="x=lambda: 1"),
    "default attribute": bound(parameters="x=torch.load"),
    "default of bind": bound().replace("__consts__):", "__consts__=torch.load('f')):"),
    "positional only": bound(parameters="x, /"),
    "parameter twice": bound(parameters="x, x"),
    "list: submods twice": LIST.format(body="y = x").replace("(x,", "(x, __vllm_submods__,"),
    "list: getattr as a variable": LIST.format(body="getattr = x"),
    "parameter hides an op": bound(parameters="x, op_0"),
    "parameter hides torch": bound(parameters="x, torch"),
    "other parameters of bind": bound().replace("(__submods__, __consts__)", "(__consts__, __submods__)"),
    "starred slots": bound().replace("submod_0, =", "submod_0, *rest ="),
    "slots twice": bound().replace("const_0, =", "other, = __submods__\n    const_0, ="),
    "slot hides a builtin": bound().replace("submod_0", "len"),
    "slots of something else": bound().replace("= __submods__", "= torch.relu(1)"),
    "wrong return of bind": bound().replace("return execution_fn", "return submod_0"),
    "wrong inner name": bound().replace("execution_fn", "run"),
    "call in bind": bound().replace("    op_0 =", "    torch.load('f')\n    op_0 ="),
    "two functions in bind": bound().replace("    return exec", "    def other(): return 1\n    return exec"),
    "no return": bound().replace("        return x\n", ""),
    "early return": bound("return x\n        y = 1"),
    "class": "class bind: pass\n",
    "list: other name": LIST.format(body="y = x").replace("execution_fn", "run"),
    "list: no submods": LIST.format(body="y = x").replace(", *, __vllm_submods__", ""),
    "list: default for submods": LIST.format(body="y = x").replace(
        "__vllm_submods__)", "__vllm_submods__=[])"
    ),
    "list: helper of another name": "def f(x):\n    return x\n" + LIST.format(body="y = x"),
    "list: submodule in an inlined function": INLINED + LIST.format(body="y = x")[31:],
    "list: inlined function that is not there": LIST.format(body="y = __vllm_inlined_submods__7(x)"),
    "list: negative index": LIST.format(body="y = __vllm_submods__[-1](x)"),
    "list: index out of range": LIST.format(body="y = __vllm_submods__[1](x)"),
    "list: bool index": LIST.format(body="y = __vllm_submods__[False](x)"),
    "list: computed index": LIST.format(body="y = __vllm_submods__[x](x)"),
    "list: slice of submods": LIST.format(body="y = __vllm_submods__[:]"),
    "list: submods as a value": LIST.format(body="y = __vllm_submods__"),
    "list: submods changed": LIST.format(body="__vllm_submods__[0] = x"),
    "list: const out of range": LIST.format(body="y = __vllm_consts__[1]"),
    "list: consts as a value": LIST.format(body="y = x(__vllm_consts__)"),
    "list: method of submods": LIST.format(body="y = __vllm_submods__.append(x)"),
    "list: dunder by getattr": LIST.format(body="y = getattr(x, '__class__')"),
    "list: computed getattr": LIST.format(body="y = getattr(x, x)"),
    "list: dunder of a const": LIST.format(body="y = __vllm_consts__[0].__class__"),
    "list: use after del": LIST.format(body="del x"),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_shapes_that_generated_code_never_has(name: str) -> None:
    with pytest.raises(EntryFormatError):
        check_code(BAD_SHAPES[name], 1, 1)


def test_not_even_text() -> None:
    with pytest.raises(EntryFormatError):
        compile_execution_fn(b"import torch", {}, [])  # type: ignore[arg-type]


def test_nothing_runs_before_all_is_checked(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    code = bound("x = submod_0(x)").replace(
        "    return execution_fn", f"    return open({str(witness)!r}, 'w')"
    )
    with pytest.raises(EntryFormatError):
        run(code)
    assert not witness.exists()


def test_too_many_or_too_few_names_are_counted() -> None:
    with pytest.raises(EntryFormatError, match="names for 1 of 2 submods and 1 of 1 consts"):
        check_code(bound("x = submod_0(x)"), 2, 1)


def test_the_message_names_line_and_construct() -> None:
    code = bound("y = 1\n        x = torch.os.system('true')")
    line = 1 + code[: code.index("torch.os")].count("\n")
    with pytest.raises(EntryFormatError) as caught:
        run(code)
    assert caught.value.field.startswith(f"code, line {line}")
    assert "torch.os.system" in caught.value.reason
    ast.parse(code)
