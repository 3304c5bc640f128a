"""The consts table: what goes in comes out, and a hostile one calls nothing."""

from __future__ import annotations

import collections
import enum
import functools
import io
import math
import operator
import os
import pickle
import re
import signal
import subprocess
import sys
import tokenize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from stitchcache.artifact.consts import dump_consts, load_consts  # noqa: E402
from stitchcache.errors import EntryFormatError, UnserializableConstError  # noqa: E402

BASE = torch.arange(12.0)
VALUES = [
    float("inf"),
    float("-inf"),
    float("nan"),
    -0.0,
    10**50,
    -(10**50),
    complex(1, -0.0),
    complex("nan"),
    b"a\0\xff",
    bytearray(b"x"),
    "\ud800",
    slice(1, None, -2),
    range(3, 9, 2),
    ...,
    NotImplemented,
    None,
    {1, 2},
    frozenset([1]),
    {"a": [1, (2,)], (1, 2): None},
    collections.OrderedDict(b=1, a=2),
    signal.Signals.SIGINT,
    re.IGNORECASE | re.MULTILINE,
    tokenize.TokenInfo(1, "a", (1, 2), (1, 2), "l"),
    int,
    torch.Tensor,
    operator.add,
    math.floor,
    abs,
    torch.add,
    torch.nn.functional.relu,
    torch.nn.functional.gelu,
    torch.nn.functional.scaled_dot_product_attention,
    torch.float32,
    torch.bfloat16,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.device("cuda:0"),
    torch.device("cpu"),
    torch.channels_last,
    torch.preserve_format,
    torch.strided,
    torch.sparse_coo,
    torch.per_tensor_affine,
    torch.Size([1, 2]),
    torch.ops.aten.add.Tensor,
    torch.ops.aten.add.out,
    torch.ops.aten.relu.default,
    torch.ops.aten.add,
    torch.ops.higher_order.cond,
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_survive(value):
    for wrapped, take in (([value], lambda c: c[0]), ([{"k": (1, [value])}], lambda c: c[0]["k"][1][0])):
        found = take(load_consts(dump_consts(wrapped)))
        assert type(found) is type(value)
        assert repr(found) == repr(value)
        if type(value) not in (float, complex):
            assert found == value


TENSORS = {
    "plain": BASE,
    "transposed": BASE.view(3, 4).t(),
    "slice with offset": BASE[3:9:2],
    "expanded": torch.ones(3).expand(2, 3),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 3),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j]).conj(),
    "bfloat16": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    "float8": torch.ones(2).to(torch.float8_e5m2),
    "int64": torch.tensor([-(1 << 63), 5]),
    "parameter": torch.nn.Parameter(BASE, requires_grad=True),
    "grad": BASE.clone().requires_grad_(),
}


@pytest.mark.parametrize("name", list(TENSORS))
def test_tensors_survive(name):
    tensor = TENSORS[name]
    (found,) = load_consts(dump_consts([tensor]))
    assert type(found) is type(tensor)
    assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert found.device == tensor.device
    assert not found.requires_grad
    same = found.to(torch.complex128).resolve_conj(), tensor.detach().to(torch.complex128).resolve_conj()
    assert torch.equal(torch.view_as_real(same[0]).nan_to_num(7), torch.view_as_real(same[1]).nan_to_num(7))


def test_one_tensor_twice_is_one_tensor():
    first, (second,) = load_consts(dump_consts([BASE, [BASE]]))
    assert first is second


def test_placements_survive():
    placement_types = pytest.importorskip("torch.distributed.tensor.placement_types")
    values = [placement_types.Shard(1), placement_types.Replicate(), placement_types.Partial("avg")]
    assert load_consts(dump_consts(values)) == values


def test_registered_operators_survive_and_missing_ones_are_named():
    library = torch.library.Library("stitchtestconsts", "FRAGMENT")
    library.define("op(Tensor x) -> Tensor")
    op = torch.ops.stitchtestconsts.op.default
    data = dump_consts([op])
    assert load_consts(data) == [op]
    gone = data.replace(b"stitchtestconsts::op", b"stitchtestconsts::oq")
    with pytest.raises(EntryFormatError, match=r"stitchtestconsts::oq.*import the module"):
        load_consts(gone)


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(nested, min_size=1))
def test_plain_tables_survive(table):
    assert load_consts(dump_consts(table)) == table


def test_an_empty_table_is_none():
    assert dump_consts([]) is None
    assert load_consts(None) == []


class LocalEnum(enum.Enum):
    A = 1


class Anything:
    pass


def test_a_module_that_is_not_imported_is_named_and_not_imported():
    data = dump_consts([LocalEnum.A])
    name = LocalEnum.__module__
    script = (
        "import sys; from stitchcache.artifact.consts import load_consts\n"
        "from stitchcache.errors import EntryFormatError\n"
        "try: load_consts(sys.stdin.buffer.read())\n"
        "except EntryFormatError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert name in result.stdout.decode()
    assert "import it before" in result.stdout.decode()
    assert load_consts(data) == [LocalEnum.A]


UNSTORABLE = {
    "tests.Anything": Anything(),
    "functools.partial": functools.partial(int),
    "function": lambda: 1,
    "builtin_function_or_method": eval,
    "torch._C.Generator": torch.Generator(),
    "generator": (x for x in ()),
    "object": object(),
    "memoryview": memoryview(b"a"),
    "torch.nn.modules.linear.Linear": torch.nn.Linear(1, 1),
}


@pytest.mark.parametrize("name", list(UNSTORABLE))
def test_what_cannot_be_stored_is_named(name):
    with pytest.raises(UnserializableConstError) as caught:
        dump_consts([1, [UNSTORABLE[name]]])
    assert name.rpartition(".")[2] in caught.value.type_name
    assert caught.value.path == "consts[1]"


def test_odd_tensors_and_deep_nesting_cannot_be_stored():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"), os.system, open, deep):
        with pytest.raises(UnserializableConstError):
            dump_consts([value])


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class WithState:
    def __init__(self):
        self.state = 1


HOSTILE = {
    "os.system": b"cos\nsystem\n(S'touch evil'\ntR.",
    "posix.system": pickle.dumps([Calls(os.system, "touch evil")]),
    "subprocess.Popen": pickle.dumps([Calls(subprocess.Popen, "touch evil")]),
    "builtins.eval": pickle.dumps([Calls(eval, "open('evil', 'w')")]),
    "builtins.getattr": b"cbuiltins\ngetattr\n.",
    "functools.partial": pickle.dumps([functools.partial(int)]),
    "torch.serialization.load": pickle.dumps([Calls(torch.load, "evil")]),
    "torch.os.system": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.",
    "WithState": pickle.dumps([WithState()]),
    "some.module": b"csome.module\nName\n.",
    "operator.attrgetter": pickle.dumps([operator.attrgetter("__class__")]),
    "collections.defaultdict": pickle.dumps([collections.defaultdict(list)]),
    "numpy": b"cnumpy.core.multiarray\n_reconstruct\n(I1\ntR.",
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_tables_call_nothing_and_the_global_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EntryFormatError) as caught:
        load_consts(HOSTILE[name], path="entry.stitch")
    assert name in caught.value.reason
    assert caught.value.field == "consts"
    assert "entry.stitch" in str(caught.value)
    assert not list(tmp_path.iterdir())


def table(*ids) -> bytes:
    class Writer(pickle.Pickler):
        def persistent_id(self, obj):
            return obj.id if isinstance(obj, Id) else None

    class Id:
        def __init__(self, id):
            self.id = id

    buffer = io.BytesIO()
    Writer(buffer, 4).dump([Id(each) for each in ids])
    return buffer.getvalue()


@pytest.mark.parametrize(
    "bad",
    [
        ("unknown",),
        "text",
        (),
        ("global", "os", "system"),
        ("global", "torch", "os"),
        ("global", 1, 2),
        ("enum", "builtins", "int", "x", None),
        ("op", "aten::no_such_op", "x"),
        ("op", "", ""),
        ("op", "aten::add", "__class__"),
        ("torch", "load"),
        ("placement", "Placement.__init__", {}),
        ("same", 7),
        ("tensor", 0, "float32", "cpu", (1 << 40,), (1,), b"", ""),
        ("tensor", 0, "float32", "cpu", (2,), (1,), b"1234", ""),
        ("tensor", 0, "float32", "cpu", (-1,), (1,), b"", ""),
        ("tensor", 0, "load", "cpu", (1,), (1,), b"1234", ""),
        ("tensor", 0, "float32", "nowhere", (1,), (1,), b"1234", ""),
    ],
    ids=repr,
)
def test_forged_ids_are_refused(bad):
    with pytest.raises(EntryFormatError):
        load_consts(table(bad))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_tables_are_refused_or_harmless(data):
    good = dump_consts([1, (2.5, "a"), {"k": slice(1)}, torch.float32, BASE[:2], operator.add])
    at = data.draw(st.integers(0, len(good) - 1))
    changed = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    try:
        assert isinstance(load_consts(changed), list)
    except EntryFormatError:
        pass
