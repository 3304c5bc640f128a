"""How keys write values: one grammar, equal bytes exactly for equal object graphs, in every process."""

import ast
import collections
import enum
import functools
import json
import os
import subprocess
import sys
import types
import typing
from pathlib import Path

import numpy as np
import object_graphs as graphs
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from object_graphs import build, written
from torch import nn

import stitchcache
from stitchcache.encoding import UnkeyableError
from stitchcache.keys.model import model_factors
from stitchcache.keys.walk import Walk

SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=300)


def parse(data, at=0):
    """Read one value by the grammar alone, knowing no kind; gives its end."""
    mark = data[at : at + 1]
    if mark in (b"N", b"T", b"F", b"E", b"I"):
        return at + 1
    if mark == b"i":
        return data.index(b";", at) + 1
    if mark in (b"d", b"c"):
        return at + (9 if mark == b"d" else 17)
    if mark in (b"s", b"b"):
        colon = data.index(b":", at)
        return colon + 1 + int(data[at + 1 : colon])
    if mark == b"@":
        return data.index(b";", parse(data, parse(data, at + 1))) + 1
    assert mark == b"[", data[at : at + 30]
    head = data.index(b":", at)
    count, at = int(data[at + 1 : head].rpartition(b" ")[2]), head + 1
    for _ in range(count):
        at = parse(data, at)
    return at


recipe = st.recursive(
    st.integers(-6, len(graphs.SCALARS) - 1),
    lambda inner: st.tuples(st.sampled_from([*graphs.MUTABLE, *graphs.FIXED]), st.lists(inner, max_size=3)),
    max_leaves=8,
)


def shape(value, met):
    """A value spelled out by other means than the encoder's: nested tuples, with numbers for what was met."""
    kind = type(value)
    if kind in (type(None), bool, int, str, bytes, type(...), torch.dtype, type(len), type):
        return kind.__name__, str(value)
    if kind in (float, complex):
        return kind.__name__, repr(value)
    if kind is tuple:
        return "tuple", [shape(item, met) for item in value]
    if kind in (frozenset, slice):
        return kind.__name__, str(value)
    if id(value) in met:
        return "met", met[id(value)][0]
    met[id(value)] = len(met), value
    state = vars(value) if hasattr(value, "__dict__") and not callable(value) else {}
    parts = [(name, shape(item, met)) for name, item in state.items()]
    parts += [(n, shape(getattr(value, n), met)) for n in getattr(kind, "__slots__", ()) if hasattr(value, n)]
    if isinstance(value, enum.Enum):
        return kind.__name__, value.name
    if isinstance(value, types.MappingProxyType):
        return kind.__name__, shape(value["a"], met)
    if isinstance(value, dict):
        parts += [
            ("", getattr(value, "default_factory", None)),
            *((k, shape(v, met)) for k, v in value.items()),
        ]
    elif isinstance(value, (list, tuple, collections.deque)):
        parts += [("", getattr(value, "maxlen", None)), *(("", shape(item, met)) for item in value)]
    elif isinstance(value, functools.partial):
        parts = [shape(item, met) for item in value.args]
    elif isinstance(value, types.FunctionType):
        parts = [shape(value(), met)]
    elif isinstance(value, np.ndarray):
        parts = [value.strides, value.tolist()]
    elif isinstance(value, torch.Tensor):
        parts = [value.tolist()]
    elif isinstance(value, int):
        parts = [int(value)]
    return kind.__name__, parts


@given(recipe, recipe)
@SLOW
def test_bytes_are_equal_exactly_where_graphs_are(one, other):
    first, second = build(one), build(other)
    assert (written(first) == written(second)) == (shape(first, {}) == shape(second, {}))
    assert written(first) == written(build(one))


@given(recipe)
@SLOW
def test_every_kind_keeps_to_the_grammar(made):
    data = written(build(made))
    assert parse(data) == len(data)


@given(st.lists(recipe, min_size=2, max_size=4))
@SLOW
def test_sharing_between_sections_counts(recipes):
    made = []
    values = [build(item, made) for item in recipes]
    apart = [build(item) for item in recipes]

    def sections(values):
        walk, out = Walk(), []
        for number, value in enumerate(values):
            writer = walk.writer("value", str(number))
            writer.put(value)
            out.append(bytes(writer.out))
        return out

    assert (sections(values) == sections(apart)) == (shape(tuple(values), {}) == shape(tuple(apart), {}))


def test_processes_and_hash_seeds_agree():
    def digests(seed):
        command = [sys.executable, graphs.__file__, "400"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    one, other = digests("1"), digests("2")
    assert one == other
    assert len(set(one)) > 200


def kinds_written():
    """Kinds of composites, each with the places in the code that write it."""
    found = collections.defaultdict(set)
    package = Path(stitchcache.__file__).parent
    files = [package / "encoding.py", package / "containers.py", *(package / "keys").glob("*.py")]
    for file in sorted(files):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"head", "parts"}:
                for part in ast.walk(node.args[0]):
                    if isinstance(part, ast.Constant) and isinstance(part.value, bytes):
                        found[part.value].add((file.name, node.lineno))
    return found


def test_each_kind_has_one_place():
    twice = {kind: places for kind, places in kinds_written().items() if len(places) > 1}
    assert twice == {}


class Held(nn.Module):
    def __init__(self, **values):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.__dict__.update(values)

    def forward(self, x):
        return self.linear(x)


class SubArray(np.ndarray):
    pass


def sub_array(note):
    array = np.zeros(3).view(SubArray)
    array.note = note
    return array


class SubDefault(collections.defaultdict):
    pass


class Text(str):
    pass


def text(value, note):
    made = Text(value)
    made.note = note
    return made


def cells(shared):
    def pair():
        count = 0

        def read():
            return count

        def write(value):
            nonlocal count
            count = value

        return read, write

    one, other = pair(), pair()
    return one if shared else (one[0], other[1])


def of_model(make):
    """Values that are made from a model's own parts."""
    return "model", make


DIFFERENT = {
    "maxlen": (collections.deque([1], 3), collections.deque([1], 4)),
    "factory of a subclass": (SubDefault(int), SubDefault(list)),
    "attribute of a text": (text("a", 1), text("a", 2)),
    "attribute of an array": (sub_array(1), sub_array(2)),
    "order in memory": (np.zeros((2, 3)), np.zeros((2, 3), order="F")),
    "a long array": (np.arange(2000), np.where(np.arange(2000) == 1000, 7, np.arange(2000))),
    "order of attributes": (types.SimpleNamespace(a=1, b=2), types.SimpleNamespace(b=2, a=1)),
    "kind of a number of numpy": (np.float32(1), np.float64(1)),
    "alias and its text": (list[int], "list[int]"),
    "arguments of an alias": (typing.Optional[int], typing.Optional[str]),  # noqa: UP045
    "shared cell": (cells(True), cells(False)),
    "parts of a property": (property(len), property(None, len)),
    "metadata of a data type": (np.dtype("f4"), np.dtype("f4", metadata={"a": 1})),
    "weight in a list": (of_model(lambda m: [m.linear.weight]), of_model(lambda m: [m.linear.weight + 1])),
    "module and its copy": (of_model(lambda m: [m.linear]), of_model(lambda m: [nn.Linear(2, 2)])),
    "view of a buffer": (of_model(lambda m: [m.mean[1:]]), of_model(lambda m: [m.mean[1:].clone()])),
    "array over a buffer": (of_model(lambda m: m.mean.numpy()), of_model(lambda m: m.mean.numpy().copy())),
}


def key_of(value):
    torch.manual_seed(0)
    model = Held()
    model.__dict__["value"] = value[1](model) if type(value) is tuple and value[:1] == ("model",) else value
    return {factor.name: factor.digest for factor in model_factors(model)}


@pytest.mark.parametrize("name", DIFFERENT)
def test_state_beside_the_items_counts(name):
    one, other = map(key_of, DIFFERENT[name])
    assert one != other
    assert one == key_of(DIFFERENT[name][0])


def test_a_list_shared_by_two_modules_is_not_two_equal_lists():
    shared = []
    one = nn.Sequential(Held(log=shared), Held(log=shared))
    two = nn.Sequential(Held(log=[]), Held(log=[]))
    assert model_factors(one) != model_factors(two)


def test_another_checkpoint_of_a_weight_in_a_list_is_another_key():
    keys = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = Held()
        model.weights = {"first": model.linear.weight}
        keys.append(model_factors(model))
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


def test_recurrent_modules_list_their_own_weights():
    keys = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        keys.append(model_factors(nn.LSTM(2, 2).eval()))
    assert keys[0] == keys[1]


REFUSED = {
    "array of objects": np.array([object()]),
    "memory": memoryview(b"a"),
    "iterator": iter([1]),
    "view of a dict": {}.keys(),
    "weak reference to a stranger": __import__("weakref").ref(Held),
    "tensor subclass": torch.ones(2).as_subclass(type("Odd", (torch.Tensor,), {})),
    "time with hidden fields": __import__("time").localtime(0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_on_the_list_is_refused(name):
    with pytest.raises(UnkeyableError, match=r"^value\[0\]"):
        model_factors(Held(value=[REFUSED[name]]))


def test_a_large_weight_elsewhere_is_refused_and_says_what_to_do():
    model = Held()
    model.big = nn.Parameter(torch.empty(1 << 25))
    model.held = [model.big]
    with pytest.raises(UnkeyableError, match="read it from its module"):
        model_factors(model)


def test_globals_are_numbered_on_from_the_key():
    sentinel = object()
    walk = Walk()
    walk.writer("a").put(sentinel)

    def digest(value):
        writer = walk.child().writer("global", "m:NAME")
        writer.put(value)
        return bytes(writer.out)

    assert digest(sentinel) == digest(sentinel)
    assert digest(sentinel) != digest(object())


def test_an_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(UnkeyableError("a.b", "is odd")))
    assert (error.path, error.why) == ("a.b", "is odd")
