"""Values that look alike: numbers of several types, text, containers and their own state."""

import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import re
import types
import typing
import uuid

import numpy as np
import torch
from pairs_base import Built, Held, Make, X, pair, values


class Loud(int):
    """An int with another multiplication."""

    def __mul__(self, other):
        return 7


class Shouted(str):
    """A string with attributes."""

    def __len__(self):
        return 40


class Color(enum.IntEnum):
    RED = 1


class Hue(enum.Enum):
    RED = 1
    BLUE = 2


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Bag(list):
    """A list with attributes and slots."""

    __slots__ = ("weight",)


class Box(list):
    pass


class Table(dict):
    pass


class Asked(dict):
    def __missing__(self, key):
        return 9.0


class Row(tuple):
    pass


Point = collections.namedtuple("Point", "x y")
Pixel = collections.namedtuple("Pixel", "x y")


class Named(typing.NamedTuple):
    x: int
    y: int = 0


@dataclasses.dataclass
class Options:
    a: object = 1
    hidden: object = dataclasses.field(default=0, repr=False, compare=False)


class Slots:
    __slots__ = ("a", "b")

    def __init__(self, **values):
        for name, value in values.items():
            setattr(self, name, value)


class Plain:
    def __init__(self, **values):
        self.__dict__.update(values)


def bag(weight):
    made = Bag([1, 2])
    made.weight = weight
    return made


def attributed(kind, *args, **values):
    made = kind(*args)
    made.__dict__.update(values)
    return made


def sign(value):
    return 2.0 if str(value).startswith("-") else 3.0


def kind(*types):
    return lambda value: 2.0 if type(value) in types else 3.0


def is_bool(value):
    return 2.0 if isinstance(value, bool) else 3.0


def is_int(value):
    return 2.0 if isinstance(value, int) else 3.0


def is_text(value):
    return 2.0 if isinstance(value, str) else 3.0


def is_list(value):
    return 2.0 if isinstance(value, list) else 3.0


def first(value):
    return 2.0 if next(iter(value)) in (1, "a") else 3.0


def size(value):
    return float(len(value)) + 1.0


def depth(value):
    return 2.0 if isinstance(value[0], (list, tuple)) else 3.0


values(
    "scalars",
    [
        ("one and True", 1, True, is_bool),
        ("zero and False", 0, False, is_bool),
        ("one and one point zero", 1, 1.0, is_int),
        ("float and complex", 1.0, 1 + 0j, kind(float)),
        ("zero and negative zero", 0.0, -0.0, sign),
        ("complex with a negative zero", complex(0.0, 1.0), complex(-0.0, 1.0), lambda v: sign(v.real)),
        (
            "complex with a negative zero imaginary",
            complex(1.0, 0.0),
            complex(1.0, -0.0),
            lambda v: sign(v.imag),
        ),
        ("nan and inf", float("nan"), float("inf"), lambda v: 2.0 if v == v else 3.0),
        ("inf and minus inf", float("inf"), float("-inf"), sign),
        ("number and its text", 1, "1", is_text),
        ("None and its text", None, "None", is_text),
        ("True and its text", True, "True", is_text),
        ("text and bytes", "a", b"a", is_text),
        ("bytes and bytearray", b"ab", Make(lambda: bytearray(b"ab")), kind(bytes)),
        ("empty text and None", "", None, is_text),
        ("ellipsis and NotImplemented", ..., NotImplemented, lambda v: 2.0 if v is ... else 3.0),
        ("subclass of int", 2, Loud(2), lambda v: float(v * 3)),
        ("subclass of str", "ab", Shouted("ab"), size),
        ("int enum and int", 1, Color.RED, kind(int)),
        ("enum and its value", 1, Hue.RED, kind(int)),
        ("enum and its name", "RED", Hue.RED, is_text),
        ("enum members", Hue.RED, Hue.BLUE, lambda v: float(v.value)),
        ("flags", Rights.READ, Rights.READ | Rights.WRITE, lambda v: 2.0 if Rights.WRITE in v else 3.0),
        ("large ints", 2**70, 2**70 + 1, lambda v: float(v % 2) + 1.0),
        ("neighbouring floats", 0.1, 0.10000000000000002, lambda v: 2.0 if v == 0.1 else 3.0),
        (
            "decimals with trailing zeros",
            decimal.Decimal("1.0"),
            decimal.Decimal("1.00"),
            lambda v: float(len(str(v))),
        ),
        ("decimal and float", decimal.Decimal(1), 1.0, kind(float)),
        ("fraction and int", fractions.Fraction(1), 1, kind(int)),
        ("dates", datetime.date(2026, 1, 2), datetime.date(2026, 2, 1), lambda v: float(v.month)),
        (
            "folds of a time",
            datetime.datetime(2026, 1, 1, 1, fold=0),
            datetime.datetime(2026, 1, 1, 1, fold=1),
            lambda v: float(v.fold) + 1.0,
        ),
        ("uuids", uuid.UUID(int=1), uuid.UUID(int=2), lambda v: float(v.int)),
        ("composed and decomposed text", "\u00e9", "e\u0301", size),
        ("lone surrogate and its text", "\ud800", "\\ud800", size),
        ("text with a length in it", "s1:a", "s2:a", lambda v: float(v[1])),
        ("path and text", pathlib.PurePosixPath("a"), "a", is_text),
        (
            "flavours of path",
            pathlib.PurePosixPath("a"),
            pathlib.PureWindowsPath("a"),
            kind(pathlib.PurePosixPath),
        ),
        ("ranges", range(0, 4), range(0, 4, 2), size),
        ("slices", slice(0, 2), slice(0, 2, 1), lambda v: 2.0 if v.step is None else 3.0),
        ("slices with a bool", slice(None, 1), slice(None, True), lambda v: is_bool(v.stop)),
        ("dtypes", torch.float16, torch.bfloat16, lambda v: float(v.itemsize) + (v is torch.float16)),
        (
            "memory formats",
            torch.contiguous_format,
            torch.channels_last,
            lambda v: 2.0 if v is torch.channels_last else 3.0,
        ),
        ("devices", torch.device("cpu"), torch.device("meta"), lambda v: float(len(v.type))),
        ("device and its text", torch.device("cpu"), "cpu", is_text),
        (
            "device with an index",
            torch.device("cuda", 0),
            torch.device("cuda", 1),
            lambda v: float(v.index) + 1,
        ),
        ("size and tuple", torch.Size([1, 2]), (1, 2), kind(tuple)),
        ("patterns", re.compile("a"), re.compile("a", re.IGNORECASE), lambda v: 2.0 if v.match("A") else 3.0),
        ("patterns of bytes", re.compile("a"), re.compile(b"a"), lambda v: is_text(v.pattern)),
        ("finfo", torch.finfo(torch.float16), torch.finfo(torch.bfloat16), lambda v: float(v.eps)),
        ("classes", int, bool, lambda v: float(v("")) + 1 if v is bool else 3.0),
        ("generic aliases", list[int], list[str], lambda v: 2.0 if v.__args__ == (int,) else 3.0),
        ("unions", int | str, str | int, lambda v: 2.0 if v.__args__[0] is int else 3.0),
        ("literals", typing.Literal[1], typing.Literal[True], lambda v: is_bool(v.__args__[0])),
        (
            "simple namespaces",
            Make(lambda: types.SimpleNamespace(a=1)),
            Make(lambda: types.SimpleNamespace(a=2)),
            lambda v: float(v.a),
        ),
    ],
)

values(
    "containers",
    [
        ("list and tuple", [1, 2], (1, 2), is_list),
        ("list and subclass", [1, 2], Box([1, 2]), kind(list)),
        ("tuple and subclass", (1, 2), Row((1, 2)), kind(tuple)),
        ("dict and subclass", {1: 2.0}, Table({1: 2.0}), kind(dict)),
        (
            "dict with __missing__",
            Table({1: 2.0}),
            Asked({1: 2.0}),
            lambda v: v.get(2) or (v[2] if isinstance(v, Asked) else 3.0),
        ),
        ("named tuples of two classes", Point(1, 2), Pixel(1, 2), kind(Point)),
        ("named tuple and tuple", Point(1, 2), (1, 2), kind(tuple)),
        ("typed named tuple", Named(1), Named(1, 1), lambda v: float(v.y) + 1.0),
        ("nesting", [[1], 2], [[1, 2]], lambda v: float(len(v))),
        ("nesting of tuples", ((1, 2), 3), (1, (2, 3)), depth),
        ("empty list and None", [], None, is_list),
        ("empty containers", (), [], is_list),
        ("joined and split texts", ["ab", "c"], ["a", "bc"], lambda v: size(v[0])),
        ("list of bools", [True, True], [1, 1], lambda v: is_bool(v[0])),
        ("deque and list", Make(lambda: collections.deque([1, 2])), [1, 2], is_list),
        (
            "maxlen of a deque",
            Make(lambda: collections.deque([1, 2], maxlen=2)),
            Make(lambda: collections.deque([1, 2], maxlen=3)),
            lambda v: float(v.maxlen),
        ),
        (
            "maxlen and none",
            Make(lambda: collections.deque([1, 2])),
            Make(lambda: collections.deque([1, 2], 2)),
            lambda v: 2.0 if v.maxlen else 3.0,
        ),
        (
            "default factories",
            Make(lambda: collections.defaultdict(int, a=1)),
            Make(lambda: collections.defaultdict(float, a=1)),
            lambda v: 2.0 if v.default_factory is int else 3.0,
        ),
        ("default dict and dict", Make(lambda: collections.defaultdict(int, a=1)), {"a": 1}, kind(dict)),
        ("ordered dict and dict", Make(lambda: collections.OrderedDict(a=1)), {"a": 1}, kind(dict)),
        ("order of a dict", {"a": 1, "b": 2}, {"b": 2, "a": 1}, first),
        (
            "order of an ordered dict",
            Make(lambda: collections.OrderedDict(a=1, b=2)),
            Make(lambda: collections.OrderedDict(b=2, a=1)),
            first,
        ),
        ("keys of a dict", {1: "a"}, {True: "a"}, lambda v: is_bool(next(iter(v)))),
        ("keys and values", {"a": "b"}, {"b": "a"}, first),
        (
            "counters",
            Make(lambda: collections.Counter("aab")),
            Make(lambda: collections.Counter("abb")),
            lambda v: float(v["a"]),
        ),
        (
            "counter with a zero",
            Make(lambda: collections.Counter(a=1)),
            Make(lambda: collections.Counter(a=1, b=0)),
            size,
        ),
        (
            "chain maps",
            Make(lambda: collections.ChainMap({"a": 1}, {"a": 2})),
            Make(lambda: collections.ChainMap({"a": 2}, {"a": 1})),
            lambda v: float(v["a"]),
        ),
        (
            "maps below the first",
            Make(lambda: collections.ChainMap({"a": 1}, {"a": 2})),
            Make(lambda: collections.ChainMap({"a": 1}, {"a": 3})),
            lambda v: float(v.maps[1]["a"]),
        ),
        (
            "proxies",
            Make(lambda: types.MappingProxyType({"a": 1})),
            Make(lambda: types.MappingProxyType({"a": 2})),
            lambda v: float(v["a"]),
        ),
        (
            "user lists",
            Make(lambda: collections.UserList([1])),
            Make(lambda: collections.UserList([2])),
            lambda v: float(v[0]),
        ),
        (
            "user dicts",
            Make(lambda: collections.UserDict(a=1)),
            Make(lambda: collections.UserDict(a=2)),
            lambda v: float(v["a"]),
        ),
        ("set and frozen set", Make(lambda: {1, 2}), Make(lambda: frozenset({1, 2})), kind(set)),
        (
            "colliding order of a set",
            Make(lambda: set(range(8, -1, -8))),
            Make(lambda: set(range(0, 9, 8))),
            lambda v: float(next(iter(v))) + 1.0,
        ),
        (
            "order of a frozen set",
            Make(lambda: frozenset(range(8, -1, -8))),
            Make(lambda: frozenset(range(0, 9, 8))),
            lambda v: float(next(iter(v))) + 1.0,
        ),
        ("sets of bools", Make(lambda: {1}), Make(lambda: {True}), lambda v: is_bool(next(iter(v)))),
        (
            "arrays",
            Make(lambda: array.array("i", [1])),
            Make(lambda: array.array("l", [1])),
            lambda v: float(v.itemsize),
        ),
        ("byte arrays", Make(lambda: bytearray(b"a")), Make(lambda: bytearray(b"b")), lambda v: float(v[0])),
        ("slots of a list", Make(lambda: bag(2.0)), Make(lambda: bag(3.0)), lambda v: v.weight),
        (
            "attributes of a list",
            Make(lambda: attributed(Box, [1], w=2.0)),
            Make(lambda: attributed(Box, [1], w=3.0)),
            lambda v: v.w,
        ),
        (
            "attributes of a dict",
            Make(lambda: attributed(Table, {1: 1}, w=2.0)),
            Make(lambda: attributed(Table, {1: 1}, w=3.0)),
            lambda v: v.w,
        ),
        (
            "attributes of a tuple",
            Make(lambda: attributed(Row, (1,), w=2.0)),
            Make(lambda: attributed(Row, (1,), w=3.0)),
            lambda v: v.w,
        ),
        (
            "attributes of a string",
            Make(lambda: attributed(Shouted, "a", w=2.0)),
            Make(lambda: attributed(Shouted, "a", w=3.0)),
            lambda v: v.w,
        ),
        (
            "attributes of an int",
            Make(lambda: attributed(Loud, 1, w=2.0)),
            Make(lambda: attributed(Loud, 1, w=3.0)),
            lambda v: v.w,
        ),
        (
            "slots",
            Make(lambda: Slots(a=1.0)),
            Make(lambda: Slots(b=1.0)),
            lambda v: 2.0 if hasattr(v, "a") else 3.0,
        ),
        (
            "order of attributes",
            Make(lambda: Plain(a=2.0, b=3.0)),
            Make(lambda: Plain(b=3.0, a=2.0)),
            lambda v: next(iter(vars(v).values())),
        ),
        (
            "attribute that is None",
            Make(lambda: Plain(a=None)),
            Make(lambda: Plain()),
            lambda v: 2.0 if hasattr(v, "a") else 3.0,
        ),
        (
            "fields of a dataclass",
            Make(lambda: Options(1)),
            Make(lambda: Options(True)),
            lambda v: is_bool(v.a),
        ),
        (
            "hidden fields of a dataclass",
            Make(lambda: Options(1, 2.0)),
            Make(lambda: Options(1, 3.0)),
            lambda v: v.hidden,
        ),
        (
            "deep list",
            Make(lambda: [[[[[1]]]]]),
            Make(lambda: [[[[[2]]]]]),
            lambda v: float(v[0][0][0][0][0]),
        ),
        ("long list", Make(lambda: [0] * 5000 + [2]), Make(lambda: [0] * 5000 + [3]), lambda v: float(v[-1])),
        ("cycle", Make(lambda: cycle(2)), Make(lambda: cycle(3)), lambda v: float(v[0][1])),
        (
            "iterators of ranges",
            Make(lambda: memoryview(b"ab")),
            Make(lambda: memoryview(b"ab")[::-1]),
            lambda v: float(v[0]),
        ),
    ],
)


def cycle(value):
    made = [None, value]
    made[0] = made
    return made


def order(array_):
    return 2.0 if array_.flags["C_CONTIGUOUS"] else 3.0


class Tagged(np.ndarray):
    pass


def tagged(tag):
    made = np.ones(3).view(Tagged)
    made.tag = tag
    return made


def locked(flag):
    made = np.ones(3)
    made.flags.writeable = not flag
    return made


values(
    "numpy",
    [
        (
            "memory order",
            Make(lambda: np.ones((2, 3), order="C")),
            Make(lambda: np.ones((2, 3), order="F")),
            order,
        ),
        (
            "strides",
            Make(lambda: np.ones((4,))),
            Make(lambda: np.ones((8,))[::2]),
            lambda v: float(v.strides[0]),
        ),
        (
            "negative strides",
            Make(lambda: np.ones(4)),
            Make(lambda: np.ones(4)[::-1]),
            lambda v: sign(v.strides[0]),
        ),
        (
            "byte order",
            Make(lambda: np.ones(2, "<f8")),
            Make(lambda: np.ones(2, ">f8")),
            lambda v: 2.0 if v.dtype.isnative else 3.0,
        ),
        (
            "dtypes of one size",
            Make(lambda: np.ones(2, "i8")),
            Make(lambda: np.ones(2, "u8")),
            lambda v: 2.0 if v.dtype.kind == "i" else 3.0,
        ),
        (
            "names of fields",
            Make(lambda: np.zeros(2, [("a", "f4"), ("b", "f4")])),
            Make(lambda: np.zeros(2, [("b", "f4"), ("a", "f4")])),
            lambda v: first(v.dtype.names),
        ),
        ("shape", Make(lambda: np.ones((2, 3))), Make(lambda: np.ones((3, 2))), lambda v: float(v.shape[0])),
        ("scalar and array", Make(lambda: np.float64(2)), Make(lambda: np.array(2.0)), kind(np.float64)),
        ("scalar and float", Make(lambda: np.float64(2)), 2.0, kind(float)),
        ("scalar types", Make(lambda: np.float32(2)), Make(lambda: np.float64(2)), kind(np.float32)),
        ("subclass", Make(lambda: np.ones(3)), Make(lambda: tagged(1)), kind(np.ndarray)),
        ("attributes of a subclass", Make(lambda: tagged(2.0)), Make(lambda: tagged(3.0)), lambda v: v.tag),
        (
            "values behind the thousandth",
            Make(lambda: np.zeros(5000)),
            Make(lambda: np.r_[np.zeros(2500), 1, np.zeros(2499)]),
            lambda v: float(v.sum()) + 1,
        ),
        (
            "masked arrays",
            Make(lambda: np.ma.array([1.0, 2.0], mask=[0, 1])),
            Make(lambda: np.ma.array([1.0, 2.0], mask=[0, 0])),
            lambda v: float(v.sum()),
        ),
        (
            "fill values",
            Make(lambda: np.ma.array([1.0], mask=[1], fill_value=2)),
            Make(lambda: np.ma.array([1.0], mask=[1], fill_value=3)),
            lambda v: float(v.filled()[0]),
        ),
        (
            "writeable flag",
            Make(lambda: locked(False)),
            Make(lambda: locked(True)),
            lambda v: 2.0 if v.flags.writeable else 3.0,
        ),
        (
            "negative zeros",
            Make(lambda: np.array([0.0])),
            Make(lambda: np.array([-0.0])),
            lambda v: sign(v[0]),
        ),
        (
            "arrays of objects",
            Make(lambda: np.array([1, None], dtype=object)),
            Make(lambda: np.array([True, None], dtype=object)),
            lambda v: is_bool(v[0]),
        ),
        (
            "generators",
            Make(lambda: np.random.RandomState(1)),
            Make(lambda: np.random.RandomState(2)),
            lambda v: float(v.get_state()[1][0]) + 1,
        ),
        (
            "matrix and array",
            Make(lambda: np.ones((2, 2))),
            Make(lambda: np.asmatrix(np.ones((2, 2)))),
            lambda v: float((v * v)[0, 0]),
        ),
        (
            "record array",
            Make(lambda: np.zeros(1, [("a", "f4")])),
            Make(lambda: np.zeros(1, [("a", "f4")]).view(np.recarray)),
            kind(np.ndarray),
        ),
        (
            "times",
            Make(lambda: np.datetime64("2026-01-01", "D")),
            Make(lambda: np.datetime64("2026-01-01", "s")),
            lambda v: float(len(str(v))),
        ),
    ],
)


class Answers:
    """Has no dictionary, and raises whatever it is asked for."""

    __slots__ = ("weight",)

    def __init__(self, weight):
        self.weight = weight

    def __getattr__(self, name):
        raise RuntimeError(f"not ready: {name}")


@pair
def slots_behind_a_getattr_that_raises(other, patch):
    return Built(Held(Answers(3.0 if other else 2.0), lambda v: v.weight))


@pair
def nested_tensor(other, patch):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(5 if other else 4)])
    return Built(Held(nested, lambda v: float(v.unbind()[1].shape[0])))


@pair
def annotation_and_attribute(other, patch):
    class Note:
        pass

    if other:
        Note.__annotations__ = {}
        Note.a = "int"
    else:
        Note.__annotations__ = {"a": "int"}
    return Built(Held(Note, lambda v: 2.0 if hasattr(v, "a") else 3.0))


@pair
def array_in_key_factors(other, patch):
    factor = np.zeros(5000)
    factor[2500] = float(other)
    return Built(Held(factor.sum() + 2.0, float), options={"key_factors": {"table": factor}})


@pair
def splitting_a_text_in_two(other, patch):
    model = Held(None, lambda v: 2.0)
    model.register_buffer("ab", torch.ones(4) * 2)
    model.a, model.b = ("x", "yz") if other else ("xy", "z")
    model.read = lambda v: float(len(model.a)) + 1.0
    return Built(model, (X,))
