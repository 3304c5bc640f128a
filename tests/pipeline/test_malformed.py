"""Entries and records with right digests and wrong contents: each is a miss with a warning, at once."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace

import pytest
import torch

import stitchcache
from stitchcache.artifact.entry import encode, encode_target
from stitchcache.options import SizeRange
from stitchcache.types import LeafSpec, SourceRef, SymbolSpec

ROWS = stitchcache.Dim("rows", 2, 64)
X = torch.arange(12.0).reshape(4, 3)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.add_(1)
        return {"y": self.inner(x).relu(), "n": self.seen.clone()}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net().eval()


def start(cache, model):
    return stitchcache.compile(
        model, (X,), dynamic_shapes=({0: ROWS},), backend="eager", cache=cache, check="none"
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory, model):
    cache = stitchcache.Cache(tmp_path_factory.mktemp("malformed"))
    start(cache, model)
    found = start(cache, model)
    assert found.cache_hit == "direct"
    return cache, found.artifact


def put(cache, artifact):
    key = artifact.graph_hash
    (cache.root / "entries" / key[:2] / f"{key}.stitch").write_bytes(encode(artifact))


def inputs(change):
    return lambda a: replace(a, input_spec=change(a.input_spec))


def outputs(**fields):
    return lambda a: replace(a, output_spec=replace(a.output_spec, **fields))


def leaf(**fields):
    return inputs(lambda spec: replace(spec, leaves=(replace(spec.leaves[0], **fields), *spec.leaves[1:])))


def tensor(**fields):
    return inputs(
        lambda spec: replace(
            spec, leaves=(replace(spec.leaves[0], tensor=replace(spec.leaves[0].tensor, **fields)),)
        )
    )


def variant(**fields):
    return lambda a: replace(a, variants=(replace(a.variants[0], **fields),))


def binding(**fields):
    return lambda a: replace(a, bindings=(replace(a.bindings[0], **fields), *a.bindings[1:]))


def node(kind, context, *children):
    return {"type": kind, "context": context, "children_spec": list(children)}


def tree(args=(), kwargs=(), keys="[]"):
    given = [node("builtins.tuple", "null", *args), node("builtins.dict", keys, *kwargs)]
    return json.dumps([1, node("builtins.tuple", "null", *given)])


LEAF = node(None, None)
NESTED = "[" * 100_000 + "]" * 100_000
CASES = {
    "input tree is no json": inputs(lambda s: replace(s, tree="{")),
    "input tree is empty": inputs(lambda s: replace(s, tree="")),
    "input tree is a number": inputs(lambda s: replace(s, tree="7")),
    "input tree lacks its parts": inputs(lambda s: replace(s, tree="[1, {}]")),
    "input tree is one list": inputs(lambda s: replace(s, tree="[1]")),
    "input tree nests without end": inputs(lambda s: replace(s, tree=NESTED)),
    "input tree has more leaves": inputs(lambda s: replace(s, tree=tree([LEAF, LEAF]))),
    "input tree has odd keys": inputs(
        lambda s: replace(s, tree=tree([LEAF], [LEAF, LEAF], '[{"a": 1}, []]'))
    ),
    "input tree of an unknown kind": inputs(lambda s: replace(s, tree=tree([node("no.such", "null", LEAF)]))),
    "one leaf is missing": inputs(lambda s: replace(s, leaves=())),
    "a leaf without a tensor": leaf(kind="constant", tensor=None),
    "a symbol that nothing gives": inputs(
        lambda s: replace(
            s,
            leaves=(replace(s.leaves[0], tensor=replace(s.leaves[0].tensor, stride=("s9", 1))),),
            symbols=(*s.symbols, SymbolSpec(name="s9", min=0, max=None)),
        )
    ),
    "a symbol of an odd name": inputs(
        lambda s: replace(s, symbols=(SymbolSpec(name="__import__", min=0, max=None),))
    ),
    "no symbols": inputs(lambda s: replace(s, symbols=())),
    "a dtype that is none": tensor(dtype="load"),
    "a huge power as a size": tensor(shape=("9**999999999", 3)),
    "a huge power as a stride": tensor(stride=("9**999999999", 1)),
    "a tower of powers as a size": tensor(shape=("2**2**2**2**2**9", 3)),
    "code as a size": tensor(shape=("__import__('os').getpid()", 3)),
    "a size divided by zero": tensor(shape=("4//0", 3)),
    "a huge power as a constraint": inputs(lambda s: replace(s, constraints=("9**999999999 > s0",))),
    "a modulus of zero as a constraint": inputs(lambda s: replace(s, constraints=("s0 % 0 == 1",))),
    "half a constraint": inputs(lambda s: replace(s, constraints=("s0 <",))),
    "more results than the tree has": outputs(count=1 << 20),
    "fewer results than the tree has": outputs(count=0),
    "output tree is no json": outputs(tree="]"),
    "output tree lacks its parts": outputs(tree="[1, {}]"),
    "output tree nests without end": outputs(tree=NESTED),
    "output tree of odd keys": outputs(tree=json.dumps([1, node("builtins.dict", '{"y": 1}', LEAF, LEAF)])),
    "a write to no input": outputs(mutations=("input:99",)),
    "a write to no number": outputs(mutations=("input:x",)),
    "a write to no buffer": outputs(mutations=("buffer:nothing",)),
    "a write to nothing": outputs(mutations=("",)),
    "more writes than results": outputs(mutations=("buffer:seen",) * 9),
    "code that cannot be read": variant(code="def bind(:"),
    "no code": variant(code=""),
    "code of null bytes": variant(code="\0"),
    "code that nests without end": variant(code="(" * 100_000),
    "code that counts without end": variant(
        code="def bind(__submods__, __consts__):\n    return 9**999999999\n"
    ),
    "code that imports": variant(code="import os\n"),
    "consts of nonsense": variant(consts=b"nonsense"),
    "names without code": variant(submod_names=("a",) * 7),
    "no pieces": variant(pieces=()),
    "a size range of nothing": variant(size_range=SizeRange(2, 64, "columns")),
    "a binding that leads nowhere": binding(name="a..b[0]'"),
    "a binding of another shape": binding(tensor=None),
    "a constant without a blob": binding(kind="constant"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_entry_of_wrong_contents_is_a_miss_and_a_warning(good, model, name, caplog):
    cache, artifact = good
    put(cache, CASES[name](artifact))
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="stitchcache"):
        compiled = start(stitchcache.Cache(cache.root), model)
    spent = time.monotonic() - began
    assert compiled.cache_hit in (None, "graph"), compiled.cache_hit
    assert spent < 20
    said = [record.getMessage() for record in caplog.records if record.name == "stitchcache"]
    assert 0 < len(said) <= 2, said
    assert all(len(line) < 2000 for line in said)
    torch.testing.assert_close(compiled(X)["y"], model(X)["y"])
    # What was compiled took its place.
    assert start(stitchcache.Cache(cache.root), model).cache_hit == "direct"


def source(module):
    return lambda record: replace(record, sources=(SourceRef(module=module, digest="0" * 64, size=1),))


RECORDS = {
    "a module without a name": source(""),
    "a module of null bytes": source("a\0b"),
    "a module that climbs": source("../../etc/passwd"),
    "a module of many dots": source("." * 60_000),
    "a global of no kind": lambda record: replace(record, globals=(("", ""),)),
    "a global without a module": lambda record: replace(record, globals=(("global:", ""),)),
    "an item of nothing": lambda record: replace(record, globals=(("item:::", ""), ("class::", ""))),
    "an environment of null bytes": lambda record: replace(record, globals=(("env:a\0=b", ""),)),
    "an answer of anything": lambda record: replace(record, globals=(("call:os:getcwd", ""),)),
    "an import of null bytes": lambda record: replace(record, globals=(("import:a\0b", ""),)),
    "code objects of nonsense": lambda record: replace(
        record, code=tuple((name, b"\xff" * 40) for name, _ in record.code)
    ),
    "factors of nonsense": lambda record: replace(record, factors=b"\xc1"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_target_record_of_wrong_contents_is_no_error(good, model, name):
    cache, _ = good
    path = next((cache.root / "targets").glob("*/*"))
    before = path.read_bytes()
    (record,) = cache.get_target(path.name)
    path.write_bytes(encode_target(path.name, [RECORDS[name](record)]))
    try:
        compiled = start(stitchcache.Cache(cache.root), model)
        torch.testing.assert_close(compiled(X)["y"], model(X)["y"])
    finally:
        path.write_bytes(before)


def test_a_leaf_is_as_it_was():
    """The table above changes records of these fields."""
    assert {"path", "kind", "tensor", "symbol", "value"} == set(LeafSpec.__dataclass_fields__)
