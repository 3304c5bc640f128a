"""Code objects that are kept: taken for exactly what they came from, and for nothing else."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import linecache
import marshal
import struct
import sys
import traceback
import types

import models
import pytest
import torch
from codegen_cases import graph_module
from torch import fx

import stitchcache
import stitchcache.codegen as execution
from stitchcache.codegen import CodeObjects, bind_execution_fn, compile_execution_fn, gate
from stitchcache.codegen.generate import generate_execution_code
from stitchcache.errors import CacheMissError, EntryFormatError, LinkError
from stitchcache.store import Area

BOUND = """import torch
import operator


def bind(__submods__, __consts__):
    first, = __submods__
    const_0, = __consts__

    def execution_fn(x):
        x = first(x, const_0)
        return x

    return execution_fn
"""


def add(x, y):
    return x + y


def kept_for(code=BOUND, names=("first",), consts=(5,)):
    objects = CodeObjects()
    bind_execution_fn(code, dict.fromkeys(names, add), list(names), list(consts), objects)
    return CodeObjects(list(objects))


def test_a_kept_code_object_needs_no_gate(monkeypatch):
    kept = kept_for()
    monkeypatch.setitem(sys.modules, "stitchcache.codegen.gate", None)
    assert bind_execution_fn(BOUND, {"first": add}, ["first"], [5], kept)(2) == 7
    # It is bound anew each time.
    assert bind_execution_fn(BOUND, {"first": max}, ["first"], [1], kept)(2) == 2


@pytest.mark.parametrize(
    ("code", "names", "consts"),
    [
        (BOUND.replace("x = first(x, const_0)", "x = first(const_0, x)"), ["first"], [5]),
        (BOUND, ["first", "second"], [5]),
        (BOUND, ["first"], [5, 6]),
        (BOUND, ["first"], None),
    ],
)
def test_other_source_or_other_counts_go_through_the_gate(code, names, consts, monkeypatch):
    kept = kept_for()
    monkeypatch.setitem(sys.modules, "stitchcache.codegen.gate", None)
    with pytest.raises(ImportError):
        bind_execution_fn(code, dict.fromkeys(names, add), names, consts, kept)


@pytest.mark.parametrize("what", ["version", "magic", "flags"])
def test_another_python_or_another_stitchcache_finds_nothing(what, monkeypatch):
    kept = kept_for()
    if what == "version":
        monkeypatch.setattr(stitchcache, "__version__", "0.0.9")
    elif what == "magic":
        monkeypatch.setattr(execution, "MAGIC_NUMBER", b"\0\0\r\n")
    else:
        optimized = types.SimpleNamespace(
            flags=types.SimpleNamespace(optimize=2), implementation=sys.implementation
        )
        monkeypatch.setattr(execution, "sys", optimized)
    assert kept.get("<stitchcache>", BOUND) is None
    digests = {name for name, _ in kept}
    fresh = CodeObjects()
    bind_execution_fn(BOUND, {"first": add}, ["first"], [5], fresh)
    assert not digests & {name for name, _ in fresh}


@pytest.mark.parametrize("junk", [b"", b"\xe3", b"N", b"i\x05\0\0\0", b"\xff" * 40])
def test_junk_is_passed_over(junk):
    ((name, _),) = kept_for()
    junked = CodeObjects([(name, junk)])
    assert bind_execution_fn(BOUND, {"first": add}, ["first"], [5], junked)(2) == 7


@pytest.mark.parametrize(
    "source",
    ["1", "x = (1, -7, 2**70, -(2**70), 10**400, 1.5, -0.0, 2j, b'\\0', 'a', 'name', 'é€', None, True, ...)",
     "y = z in {1, 2, 'a'}\nnested = ((((), (1,)),), 'x' * 3, '" + "long " * 99 + "', '" + "é" * 300 + "')",
     "class A:\n  def f(self, *a, b=1, **k) -> int:\n    return lambda: [a for b in k for a in self]\n",
     "t = (" + "1000, " * 300 + ")", BOUND],
)  # fmt: skip
def test_what_python_writes_of_code_is_read(source):
    objects = CodeObjects()
    code = compile(source, "<a file>", "exec")
    objects.add("<a file>", source, code)
    assert objects.get("<a file>", source) == code


@pytest.mark.parametrize("count", [1000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_a_code_object_that_claims_more_than_there_is_is_not_read(count, monkeypatch):
    """Marshal makes room for all items of a tuple before it looks for the first."""
    objects = CodeObjects()
    objects.add("<a file>", "source", compile("x = (1, 2, 3)\ny = {4} | {5, 6}", "<a file>", "exec"))
    ((name, good),) = objects
    monkeypatch.setattr(marshal, "loads", lambda data: pytest.fail("it was read"))
    begun = good[:21] + b"s\0\0\0\0"
    size = struct.pack("<I", count)
    bombs = [begun + kind + size + b"N" * 500 for kind in (b"(", b">", b"\xa8", b"s", b"u", b"a", b"l")]
    # Each claims no more than there is, all together do; and kinds that code has not.
    bombs += [begun + (b"(" + struct.pack("<I", 200)) * 30 + b"N" * 200, begun + b"[\1\0\0\0N", good + b"N"]
    for bomb in (*bombs, good[:-1], good[:40]):
        assert CodeObjects([(name, bomb)]).get("<a file>", "source") is None


def test_an_op_that_is_missing_here_is_named_as_ever():
    library = torch.library.Library("stitch_bytecode", "DEF")
    library.define("gone(Tensor x) -> Tensor")
    library.impl("gone", lambda x: x + 1, "CompositeExplicitAutograd")

    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        graph.output(graph.call_function(torch.ops.stitch_bytecode.gone.default, (x,)))

    code, names, consts = generate_execution_code(graph_module(build))
    objects = CodeObjects()
    run = bind_execution_fn(code, {}, names, consts, objects)
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 2.0))
    elsewhere = code.replace("stitch_bytecode.gone", "stitch_bytecode.lost")
    lost = CodeObjects()
    with pytest.raises(LinkError, match="lost"):
        bind_execution_fn(elsewhere, {}, names, consts, lost)
    # As if the entry had been linked in a process that has the op.
    ((_, marshalled),) = objects
    filename = f"<stitchcache {hashlib.sha256(elsewhere.encode()).hexdigest()[:16]}>"
    lost.add(filename, f"{len(names)} {len(consts)}\0{elsewhere}", renamed(marshal.loads(marshalled)))
    with pytest.raises(LinkError, match="lost"):
        bind_execution_fn(elsewhere, {}, names, consts, lost)


def renamed(code):
    """A code object that asks for the op ``lost``."""
    constants = tuple(renamed(item) if isinstance(item, type(code)) else item for item in code.co_consts)
    names = tuple("lost" if name == "gone" else name for name in code.co_names)
    return code.replace(co_consts=constants, co_names=names)


def test_tracebacks_show_the_source():
    def fail(x, y):
        raise ValueError("inside")

    run = bind_execution_fn(BOUND, {"first": fail}, ["first"], [5], kept_for())
    with pytest.raises(ValueError, match="inside") as caught:
        run(1)
    assert "x = first(x, const_0)" in "".join(traceback.format_exception(caught.value))
    filename = run.__code__.co_filename
    assert filename in linecache.cache
    del run, caught
    gc.collect()
    assert filename not in linecache.cache


def test_what_never_passed_the_gate_is_not_kept():
    objects = CodeObjects()
    with pytest.raises(EntryFormatError):
        bind_execution_fn("import os\n", {}, [], [], objects)
    assert not list(objects)
    assert compile_execution_fn(BOUND, {"first": add}, ["first"], [5])(1) == 6


# ---- through compile


def compiled(cache):
    model = models.decoder()
    made = stitchcache.compile(model, (models.ids(),), cache=cache, **models.decoder_options())
    torch.testing.assert_close(made(models.ids(3, 5)), model(models.ids(3, 5)))
    return made


def records(cache):
    return {item.key: cache.get_target(item.key)[0] for item in cache._top.items(Area.TARGETS)}


def test_a_miss_keeps_what_a_direct_hit_takes(tmp_path, monkeypatch):
    first = compiled(stitchcache.Cache(tmp_path))
    (record,) = records(stitchcache.Cache(tmp_path)).values()
    # The stitching function, and the code around it.
    assert len(record.code) == 2
    added = []
    real = CodeObjects.add
    monkeypatch.setattr(CodeObjects, "add", lambda *args: added.append(args[2]) or real(*args))
    again = compiled(stitchcache.Cache(tmp_path))
    assert (first.cache_hit, again.cache_hit) == (None, "direct")
    # What was compiled are pieces of the eager backend, which have code of their own.
    assert first.artifact.variants[0].code not in "".join(added)
    other = models.decoder(seed=1)
    torch.testing.assert_close(again.rebind(other)(models.ids()), other(models.ids()))
    assert first.artifact.variants[0].code not in "".join(added)


def test_a_record_without_code_or_with_foreign_code_is_served_all_the_same(tmp_path):
    cache = stitchcache.Cache(tmp_path)
    compiled(cache)
    ((key, record),) = records(cache).items()
    foreign = tuple(("ab" * 32, data) for _, data in record.code)
    junk = tuple((name, b"N") for name, _ in record.code)
    for code in ((), foreign, junk):
        cache.put_target(key, dataclasses.replace(record, code=code))
        assert compiled(stitchcache.Cache(tmp_path)).cache_hit == "direct"


def test_after_an_update_of_stitchcache_the_source_passes_the_gate_again(tmp_path, monkeypatch):
    first = compiled(stitchcache.Cache(tmp_path))
    checked = []
    real = gate.check_code
    monkeypatch.setattr(gate, "check_code", lambda code, *more: checked.append(code) or real(code, *more))
    assert compiled(stitchcache.Cache(tmp_path)).cache_hit == "direct"
    assert first.artifact.code not in checked
    monkeypatch.setattr(stitchcache, "__version__", "99.0")
    assert compiled(stitchcache.Cache(tmp_path)).cache_hit == "direct"
    assert first.artifact.code in checked


@pytest.mark.parametrize(("where", "name"), [(torch, "__version__"), (torch.version, "git_version")])
def test_an_update_of_torch_is_a_miss_that_says_so(tmp_path, monkeypatch, where, name):
    compiled(stitchcache.Cache(tmp_path))
    monkeypatch.setattr(where, name, f"{getattr(where, name)}1")
    with pytest.raises(CacheMissError, match=r"env\.torch") as caught:
        stitchcache.compile(
            models.decoder(),
            (models.ids(),),
            cache=stitchcache.Cache(tmp_path),
            require="direct",
            **models.decoder_options(),
        )
    assert list(caught.value.differences) == ["env.torch"]
