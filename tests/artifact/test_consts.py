"""The consts table: what goes in comes out, and a hostile one calls nothing."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import importlib
import io
import math
import operator
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import tokenize
from typing import NamedTuple

import pytest
from hypothesis import given, settings, strategies as st

torch = pytest.importorskip("torch")

from stitchcache.artifact.consts import dump_consts, load_consts  # noqa: E402
from stitchcache.artifact.unpickle import register_const_type  # noqa: E402
from stitchcache.errors import EntryFormatError, ForbiddenGlobalError, OptionError, UnserializableConstError  # noqa: E402

for standard in (signal.Signals, re.RegexFlag, tokenize.TokenInfo):
    register_const_type(standard)

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


def without_address(value):
    """A test's name must be the same in every process, or the tests cannot be shared out."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize("value", VALUES, ids=without_address)
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
    with pytest.raises(EntryFormatError, match=r"stitchtestconsts::oq.*import what registers it"):
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


@register_const_type
class LocalEnum(enum.Enum):
    A = 1


@register_const_type
@dataclasses.dataclass(frozen=True)
class Frozen:
    rate: float
    inner: object = None


@register_const_type
@dataclasses.dataclass(slots=True)
class Slotted:
    rate: float


@register_const_type
class Reduced:
    def __init__(self, rate):
        self.rate = rate

    def __reduce__(self):
        return Reduced, (self.rate,)


@register_const_type
class Stateful:
    def __setstate__(self, state):
        self.rate = state["rate"] * 1

    def __getstate__(self):
        return {"rate": self.rate}


@register_const_type
class Pair(NamedTuple):
    left: object
    right: object


def stateful(rate):
    made = Stateful()
    made.rate = rate
    return made


@pytest.mark.parametrize(
    "value", [Frozen(2.5, (1, torch.float32)), Slotted(2.5), Reduced(2.5), stateful(2.5)], ids=without_address
)
def test_registered_classes_survive(value):
    first, second = load_consts(dump_consts([value, {"k": [value]}]))
    for found in (first, second["k"][0]):
        assert type(found) is type(value)
        assert found.rate == 2.5
    if type(value) is Frozen:
        assert first == value


# As the first releases of Python 3.11 pickle it, a member is what getattr gives; nothing may call that here.
BY_GETATTR = b"getattr" in pickle.dumps(LocalEnum.A)


def test_registered_namedtuples_and_classes_themselves_survive():
    table = [Pair(1, Pair(float("inf"), [])), Pair, Frozen, LocalEnum, LocalEnum.A]
    assert load_consts(dump_consts(table)) == table
    plain = [Pair(1, 2), *([] if BY_GETATTR else [LocalEnum.A])]
    assert load_consts(pickle.dumps(plain)) == plain


class Free(enum.Enum):
    A = 1


class FreePair(NamedTuple):
    left: int


@dataclasses.dataclass
class FreeRecord:
    rate: float


@pytest.mark.parametrize("value", [Free.A, FreePair(1), FreeRecord(1.0), Free, FreeRecord], ids=repr)
def test_a_type_that_is_not_registered_is_refused_and_the_error_says_what_to_do(value):
    with pytest.raises(UnserializableConstError, match=r"register_const_type\(test_consts\.Free"):
        dump_consts([value])
    with pytest.raises(ForbiddenGlobalError, match="register_const_type") as caught:
        load_consts(pickle.dumps([value]))
    named = ("builtins", "geta") if value is Free.A and BY_GETATTR else (__name__, "Free")
    assert (caught.value.module, caught.value.name[:4]) == named


def test_only_classes_that_another_process_finds_can_be_registered():
    class Local:
        pass

    moved = type("Frozen", (), {"__module__": __name__, "__qualname__": "Frozen"})
    for bad in (Local, moved, 5, len):
        with pytest.raises(OptionError):
            register_const_type(bad)
    assert register_const_type(Frozen) is Frozen


class Doubtful:
    """Its subclasses are registered, and rebuilt by what they should not be."""

    how: tuple = ()

    def __reduce__(self):
        return self.how


@register_const_type
class ByFunction(Doubtful):
    how = (len, ((1,),))


@register_const_type
class WithItems(Doubtful):
    pass


WithItems.how = (WithItems, (), None, iter([1]))


def test_a_registered_class_is_rebuilt_by_nothing_but_itself():
    for value, said in (
        (ByFunction(), "builtins.len is not allowed to be called"),
        (WithItems(), "items added to a WithItems"),
    ):
        with pytest.raises(UnserializableConstError, match=said):
            dump_consts([value])
    for state in (b"}\x8c\x09__class__Ns", b"}K\x01K\x02s", b"]K\x01a", b"K\x01"):
        with pytest.raises(EntryFormatError):
            load_consts(made(b"test_consts\nFrozen\n", state))
    assert load_consts(made(b"test_consts\nFrozen\n", b"}\x8c\x04rateK\x01s"))[0].rate == 1
    others = (b"Anything", b"Free", b"LocalEnum", b"Pair")
    for name in (b"builtins\nobject\n", *(b"test_consts\n" + other + b"\n" for other in others)):
        with pytest.raises(EntryFormatError):
            load_consts(made(name, b"}"))
    for target in (LocalEnum.A, Pair(1, 2)):
        said = "getattr" if target is LocalEnum.A and BY_GETATTR else "given state"
        with pytest.raises(ForbiddenGlobalError, match=said):
            load_consts(pickle.dumps([target])[:-2] + b"}ba.")


def made(name: bytes, state: bytes) -> bytes:
    """A table that holds an instance with that state."""
    return b"\x80\x04](c" + name + b")\x81" + state + b"be."


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
    "types.CodeType": b"ctypes\nCodeType\n.",
    "torch.utils.collect_env.run": b"ctorch.utils.collect_env\nrun\n(S'touch evil'\ntR.",
    "sympy.core.sympify.sympify": b"csympy.core.sympify\nsympify\n.",
    "numpy.load": b"cnumpy\nload\n(Vevil\ntR.",
    "pydoc.pipepager": b"cpydoc\npipepager\n(Va\nVtouch evil\ntR.",
    "importlib.import_module": pickle.dumps([Calls(importlib.import_module, "antigravity")]),
    "operator.methodcaller": pickle.dumps([operator.methodcaller("system", "touch evil")]),
    "operator.call": b"coperator\ncall\n.",
    "torch.load": b"ctorch\nload\n.",
    "torch.from_file": b"ctorch\nfrom_file\n.",
    "torch.hub.load": b"ctorch.hub\nload\n.",
    "torch.nn.functional.torch": b"ctorch.nn.functional\ntorch\n.",
    "builtins.len": pickle.dumps([Calls(len, (1,))]),
    "operator.add": pickle.dumps([Calls(operator.add, 1, 2)]),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_tables_call_nothing_and_the_global_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForbiddenGlobalError) as caught:
        load_consts(HOSTILE[name], path="entry.stitch")
    assert name.removeprefix("operator.") in caught.value.reason
    assert caught.value.name in caught.value.reason
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
        ("op", "aten::from_file", ""),
        ("op", "debugprims::load_tensor", "default"),
        ("op", "aten::save", "default"),
        ("torch", "load"),
        ("placement", "Placement.__init__", {}),
        ("same", 7),
        ("tensor", 0, "float32", "cpu", (1 << 40,), (1,), b"", ""),
        ("tensor", 0, "float32", "cpu", (2,), (1,), b"1234", ""),
        ("tensor", 0, "float32", "cpu", (-1,), (1,), b"", ""),
        ("tensor", 0, "float32", "cpu", (1 << 62, 1 << 62), (0, 0), b"1234", ""),
        ("tensor", 0, "float32", "cpu", (0,) + (1 << 62,) * 64, (1,) * 65, b"", ""),
        ("enum", "re", "RegexFlag", None, 1 << 9_000),
        ("enum", __name__, "LocalEnum", "B", None),
        ("placement", "DeviceMesh", {}),
        ("tensor", 0, "load", "cpu", (1,), (1,), b"1234", ""),
        ("tensor", 0, "float32", "nowhere", (1,), (1,), b"1234", ""),
    ],
    ids=repr,
)
def test_forged_ids_are_refused(bad):
    with pytest.raises(EntryFormatError):
        load_consts(table(bad))


def opcodes(*parts) -> bytes:
    return b"".join(getattr(pickle, part) if isinstance(part, str) else part for part in parts)


BOMB = b")\x94" + b"".join(b"0h%ch%c\x86\x94" % (i, i) for i in range(60))
"""A tuple that holds itself twice, 60 times over: nobody can hash it."""

COSTLY = {
    "hash a bomb, dict": opcodes("EMPTY_DICT", BOMB, "NONE", "SETITEM", "STOP"),
    "hash a bomb, dict at once": opcodes("MARK", BOMB, "NONE", "DICT", "STOP"),
    "hash a bomb, set": opcodes(b"\x80\x04", "EMPTY_SET", "MARK", BOMB, "ADDITEMS", "STOP"),
    "hash a bomb, frozenset": opcodes(b"\x80\x04", "MARK", BOMB, "FROZENSET", "STOP"),
    "hash a bomb, set called": opcodes(
        b"cbuiltins\nset\n", "EMPTY_LIST", BOMB, "APPEND", "TUPLE1", "REDUCE", "STOP"
    ),
    "hash a bomb, serial": b"(\x8c\x04same" + BOMB + b"tQ.",
    "hash a bomb, name": b"(\x8c\x06global" + BOMB + b"\x8c\x01xtQ.",
    "show a bomb": b"(" + BOMB + b"tQ.",
    "one list, many sets": opcodes(
        b"\x80\x04](K\x01e\x94(", *[b"N"] * 1000, b"eh\x00", *[b"cbuiltins\nset\nh\x00\x85R"] * 1000, "STOP"
    ),
    "one text, many bytearrays": opcodes(
        b"\x80\x04B" + (1 << 20).to_bytes(4, "little") + bytes(1 << 20) + b"\x94",
        b"cbuiltins\nbytearray\nh\x00\x85R" * 9,
        "STOP",
    ),
    "a deep key": opcodes("EMPTY_DICT", "EMPTY_TUPLE", b"\x85" * 200_000, "NONE", "SETITEM", "STOP"),
    "a large bytearray": b"cbuiltins\nbytearray\n(I1000000000000\ntR.",
    "a large range, listed": b"cbuiltins\nset\n(cbuiltins\nrange\n(I1000000000000\ntRtR.",
    "deep marks": b"(" * 100_000 + b".",
    "many opcodes": b"NO0"[:1] + b"N0" * 600_000 + b".",
    "bytearray8": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "build": pickle.dumps([WithState()])[:-1] + b".",
    "python 2": b"S'text'\n.",
}


@pytest.mark.parametrize("name", list(COSTLY))
def test_what_would_cost_much_is_refused_at_once(name):
    began = time.perf_counter()
    with pytest.raises(EntryFormatError):
        load_consts(COSTLY[name])
    assert time.perf_counter() - began < 10


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
