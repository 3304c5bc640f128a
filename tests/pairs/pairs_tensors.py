# ruff: noqa: E501 - a table reads best with long lines
"""What a forward may ask of tensors, of containers that it is given, and of what wraps its weights."""

import collections
import ctypes
import dataclasses
import enum
import fractions
import ipaddress
import itertools
import string
import types
import typing
import uuid
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from pairs_base import Built, Calls, Held, Make, Two, X, pair, values
from torch import nn
from torch.nn.utils import parametrizations, parametrize


class Weighted(nn.Module):
    """Multiplies by what a function reads out of a tensor of the model's."""

    def __init__(self, weight, read, buffer=True):
        super().__init__()
        if buffer:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)
        self.read = read

    def forward(self, x):
        return x * self.read(self.weight)


def buffer(name, first, second, read):
    def build(other, patch):
        return Built(Weighted((second if other else first)(), read))

    build.__name__, build.__module__ = f"buffer {name}", __name__
    pair(build)


def given(name, first, second, forward):
    """A pair that differs in the arguments."""

    def build(other, patch):
        made = (second if other else first)()
        args, kwargs = made if isinstance(made, tuple) and isinstance(made[-1], dict) else ((made,), {})
        return Built(Calls(forward), args, kwargs)

    build.__name__, build.__module__ = f"given {name}", __name__
    pair(build)


two = torch.tensor([2.0, 0.0, 3.0])
buffer("conjugated", lambda: (two + 1j).conj(), lambda: two - 1j, lambda w: 2.0 if w.is_conj() else 3.0)
buffer("negated", lambda: (two * 1j).conj().imag, lambda: two * -1.0, lambda w: 2.0 if w.is_neg() else 3.0)
buffer("expanded", lambda: torch.ones(1).expand(4), lambda: torch.ones(4), lambda w: 2.0 + w.stride(0))
buffer(
    "sparse entries",
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.diag(two).to_sparse(),
    lambda w: float(w._nnz()),
)
buffer(
    "coalesced",
    lambda: torch.eye(3).to_sparse().coalesce(),
    lambda: torch.sparse_coo_tensor(torch.arange(3).expand(2, 3), torch.ones(3), (3, 3)),
    lambda w: 2.0 if w.is_coalesced() else 3.0,
)
buffer(
    "memory format",
    lambda: torch.ones(1, 2, 3, 4),
    lambda: torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last),
    lambda w: 2.0 if w.is_contiguous() else 3.0,
)
buffer(
    "view or base",
    lambda: torch.ones(4),
    lambda: torch.ones(8)[:4],
    lambda w: 2.0 if w._base is None else 3.0,
)
buffer(
    "pinned by a note",
    lambda: torch.ones(4),
    lambda: noted(torch.ones(4)),
    lambda w: 3.0 if hasattr(w, "note") else 2.0,
)


def noted(tensor):
    tensor.note = 1
    return tensor


def graded(tensor):
    tensor.grad = torch.ones_like(tensor)
    return tensor


given(
    "view or base",
    lambda: X.clone(),
    lambda: torch.cat([X, X])[:2],
    lambda x: x * (2.0 if x._base is None else 3.0),
)
given(
    "gradient", lambda: X.clone(), lambda: graded(X.clone()), lambda x: x * (2.0 if x.grad is None else 3.0)
)
given(
    "that a graph made",
    lambda: X.clone().requires_grad_(),
    lambda: X.clone().requires_grad_() * 1.0,
    lambda x: x * (2.0 if x.is_leaf else 3.0),
)
given(
    "missing keys",
    lambda: ((), {"d": collections.defaultdict(float, x=X)}),
    lambda: ((), {"d": collections.defaultdict(int, x=X)}),
    lambda d: d["x"] * (2.0 if isinstance(d["missing"], float) else 3.0),
)
given(
    "named tuples of one name",
    lambda: ((Left.Pair(X, 1),), {}),
    lambda: ((Right.Pair(X, 1),), {}),
    lambda p: p[0] * p.by,
)
given(
    "dict and ordered dict",
    lambda: (({"x": X},), {}),
    lambda: ((collections.OrderedDict(x=X),), {}),
    lambda d: d["x"] * (3.0 if isinstance(d, collections.OrderedDict) else 2.0),
)
given(
    "list and tuple",
    lambda: (([X],), {}),
    lambda: (((X,),), {}),
    lambda d: d[0] * (3.0 if isinstance(d, tuple) else 2.0),
)
given("deque's length", lambda: ((collections.deque([X], 1),), {}), lambda: ((collections.deque([X], 2),), {}),
      lambda d: d[0] * float(d.maxlen))  # fmt: skip
given("long ints", lambda: ((X, 10**30), {}), lambda: ((X, 10**30 + 1), {}), lambda x, by: x * float(by % 7))
given(
    "zeros",
    lambda: ((X, 0.0), {}),
    lambda: ((X, -0.0), {}),
    lambda x, by: x * (2.0 if str(by) == "0.0" else 3.0),
)
given(
    "bool and int",
    lambda: ((X, True), {}),
    lambda: ((X, 1), {}),
    lambda x, by: x * (2.0 if by is True else 3.0),
)
given("enum and int", lambda: ((X, Level.ONE), {}), lambda: ((X, 1), {}),
      lambda x, by: x * (2.0 if isinstance(by, enum.Enum) else 3.0))  # fmt: skip
given(
    "keyword or position",
    lambda: ((X, X), {}),
    lambda: ((X,), {"y": X}),
    lambda *a, **k: a[0] * float(len(a) + 1),
)
given(
    "shared memory",
    lambda: ((torch.ones(2, 4), torch.ones(2, 4)), {}),
    lambda: (tuple(torch.ones(2, 4).expand(2, 2, 4).unbind(0)), {}),
    lambda x, y: x.add_(1.0) + y,
)


class Left:
    class Pair(typing.NamedTuple):
        x: object
        n: int
        by = 2.0


class Right:
    class Pair(typing.NamedTuple):
        x: object
        n: int
        by = 3.0


class Level(enum.IntEnum):
    ONE = 1


class Bits(enum.Flag):
    A = 1
    B = 2


class Word(ctypes.Structure):
    _fields_ = (("by", ctypes.c_double),)


class Union(ctypes.Union):
    _fields_ = (("by", ctypes.c_double), ("bits", ctypes.c_int64))


class Chained(string.Template):
    pass


@dataclasses.dataclass
class Late:
    by: float = 2.0
    more: list = dataclasses.field(default_factory=lambda: [2.0])


@pair
def default_factory_of_a_dataclass(other, patch):
    patch.setattr(Late.__dataclass_fields__["more"], "default_factory", lambda: [3.0 if other else 2.0])
    return Built(Held(Late, lambda v: v.__dataclass_fields__["more"].default_factory()[0]))


@pair
def default_of_a_dataclass_set_later(other, patch):
    patch.setattr(Late, "by", 3.0 if other else 2.0)
    return Built(Held(Late(1.0), lambda v: type(v).by))


@pair
def init_of_a_dataclass(other, patch):
    patch.setattr(Late.__init__, "__defaults__", (3.0 if other else 2.0, *Late.__init__.__defaults__[1:]))
    return Built(Held(Late, lambda v: v().by))


@pair
def weight_norm(other, patch):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    made = parametrizations.weight_norm(layer, dim=0)
    made.parametrizations.weight[0].dim = 1 if other else 0
    return Built(made)


class Times(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, w):
        return w * self.by


@pair
def parametrization_of_one_layer(other, patch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(model[int(other)], "bias", Times(3.0))
    return Built(model)


@pair
def order_of_parametrizations(other, patch):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    for step in (F.relu, torch.neg)[:: -1 if other else 1]:
        parametrize.register_parametrization(model, "weight", Called(step))
    return Built(model)


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, w):
        return self.function(w)


@pair
def property_of_the_model(other, patch):
    class Net(nn.Module):
        by = 1.0

        @property
        def scale(self):
            return self.__class__.by

        def forward(self, x):
            return x * self.scale

    Net.by = 3.0 if other else 2.0
    return Built(Net())


@pair
def descriptor_of_the_model(other, patch):
    class Numbered:
        def __set_name__(self, owner, name):
            self.name = name

        def __get__(self, item, owner=None):
            return len(self.name)

    class Net(nn.Module):
        def forward(self, x):
            return x * self.factor

    descriptor = Numbered()
    descriptor.__set_name__(Net, "abc" if other else "ab")
    Net.factor = descriptor
    return Built(Net())


@pair
def getattr_of_the_model(other, patch):
    table = {"by": 3.0 if other else 2.0}

    class Net(nn.Module):
        def __getattr__(self, name):
            return table[name] if name in table else super().__getattr__(name)

        def forward(self, x):
            return x * self.by

    return Built(Net())


@pair
def getattribute_of_the_model(other, patch):
    class Net(nn.Module):
        by = 1.0
        shift = 3.0 if other else 2.0

        def __getattribute__(self, name):
            found = super().__getattribute__(name)
            return found * type(self).shift if name == "by" else found

        def forward(self, x):
            return x * self.by

    return Built(Net())


@pair
def methods_order_of_the_model(other, patch):
    class A(nn.Module):
        def by(self):
            return 2.0

    class B(nn.Module):
        def by(self):
            return 3.0

        def forward(self, x):
            return x * self.by()

    return Built(type("Net", (B, A) if other else (A, B), {})())


@pair
def weak_values(other, patch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Times(2.0), Times(3.0)
            self.chosen = weakref.WeakValueDictionary(x=self.two if other else self.one)

        def forward(self, x):
            return self.chosen["x"](x)

    return Built(Net())


@pair
def weak_keys(other, patch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = Times(2.0)
            self.by = weakref.WeakKeyDictionary()
            self.by[self.one] = 3.0 if other else 2.0

        def forward(self, x):
            return x * self.by[self.one]

    return Built(Net())


@pair
def constant_written_in_place(other, patch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = [torch.full((4,), 3.0 if other else 2.0)]

        def forward(self, x):
            return x * self.kept[0].mul_(1.0)

    return Built(Net())


@pair
def none_or_missing(other, patch):
    model = Calls(lambda x, **k: x * (2.0 if "y" in k else 3.0))
    return Built(model, (X,), {} if other else {"y": None})


@pair
def nothing_in_a_result(other, patch):
    model = Calls(lambda x: (x, *model.parts))
    model.parts = (None,) if other else ()
    return Built(model)


@pair
def two_zeros_in_a_complex(other, patch):
    held = complex(0.0, -0.0) if other else complex(0.0, 0.0)
    return Built(Held(held, lambda v: 2.0 if str(v.imag) == "0.0" else 3.0))


@pair
def key_that_is_a_bool(other, patch):
    return Built(Held({True if other else 1: 2.0}, lambda v: 3.0 if next(iter(v)) is True else 2.0))


@pair
def key_that_is_a_negative_zero(other, patch):
    return Built(Held({-0.0 if other else 0.0: 2.0}, lambda v: 3.0 if str(next(iter(v))) == "-0.0" else 2.0))


@pair
def two_that_are_equal_or_one(other, patch):
    one = types.SimpleNamespace(by=2.0)
    return Built(
        Two(one, one if other else types.SimpleNamespace(by=2.0), lambda a, b: 2.0 if a is b else 3.0)
    )


values(
    "tensors",
    [
        ("flags together", Bits.A | Bits.B, Bits.A, lambda v: float(v.value)),
        ("flag of another value", Bits.A, ~Bits.A, lambda v: float(v.value)),
        ("fractions", fractions.Fraction(2), fractions.Fraction(3), float),
        ("addresses", ipaddress.ip_address("10.0.0.2"), ipaddress.ip_address("10.0.0.3"), lambda v: float(int(v) % 9)),
        ("identifiers", uuid.UUID(int=2), uuid.UUID(int=3), lambda v: float(v.int)),
        ("templates", Chained("ab"), Chained("abc"), lambda v: float(len(v.template))),
        ("structures", Make(lambda: Word(2.0)), Make(lambda: Word(3.0)), lambda v: v.by),
        ("unions of c", Make(lambda: Union(2.0)), Make(lambda: Union(3.0)), lambda v: v.by),
        ("pointers", Make(lambda: ctypes.pointer(ctypes.c_double(2.0))), Make(lambda: ctypes.pointer(ctypes.c_double(3.0))), lambda v: v[0]),
        ("numbers of c", Make(lambda: ctypes.c_double(2.0)), Make(lambda: ctypes.c_double(3.0)), lambda v: v.value),
        ("masks", np.ma.array([2.0, 3.0], mask=[0, 1]), np.ma.array([2.0, 3.0], mask=[1, 0]), lambda v: float(v.sum())),
        ("fill of a mask", np.ma.array([2.0], mask=[1], fill_value=2.0), np.ma.array([2.0], mask=[1], fill_value=3.0),
         lambda v: float(v.filled()[0])),
        ("polynomials", np.poly1d([2.0]), np.poly1d([3.0]), lambda v: float(v(1.0))),
        ("times of numpy", np.datetime64("2020-01-01", "D"), np.datetime64("2020-01-01", "s"),
         lambda v: float(len(str(v)))),
        ("zero of numpy", np.float32(0.0), np.float32(-0.0), lambda v: 2.0 + np.signbit(v)),
        ("empty arrays", np.zeros((0, 2)), np.zeros((0, 3)), lambda v: float(v.shape[1])),
        ("chunks", Make(lambda: itertools.repeat(2.0)), Make(lambda: itertools.repeat(3.0)), lambda v: next(v)),
        ("counters", collections.Counter(a=2), collections.Counter(a=3), lambda v: float(v["a"])),
        ("chained maps", collections.ChainMap({"a": 2.0}, {"a": 3.0}), collections.ChainMap({"a": 3.0}, {"a": 2.0}),
         lambda v: v["a"]),
        ("moved to the end", Make(lambda: collections.OrderedDict(a=2.0, b=3.0)),
         Make(lambda: _turned(collections.OrderedDict(a=2.0, b=3.0))), lambda v: next(iter(v.values()))),
        ("weak sets", Make(lambda: weakref.WeakSet()), Make(lambda: _weakly(weakref.WeakSet())), lambda v: float(len(v) + 2)),
        ("empty tensors", torch.zeros(0, 2), torch.zeros(0, 3), lambda v: float(v.shape[1])),
        ("tensors of bools", torch.tensor([True]), torch.tensor([1], dtype=torch.uint8),
         lambda v: 2.0 if v.dtype is torch.bool else 3.0),
        ("tensor with a nan", torch.tensor([float("nan")]), torch.tensor([-float("nan")]),
         lambda v: 2.0 + float(torch.signbit(v)[0])),
        ("meta tensors", torch.zeros(2, device="meta"), torch.zeros(3, device="meta"), lambda v: float(v.shape[0])),
    ],
)  # fmt: skip


def _turned(items):
    items.move_to_end("a")
    return items


_KEPT = [Late()]


def _weakly(items):
    items.add(_KEPT[0].__class__)
    return items
