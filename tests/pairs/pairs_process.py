# ruff: noqa: E501 - a table reads best with long lines
"""State of the process by other roads: C calling C, late imports, computing modules, printing, warnings."""

import contextvars
import fractions
import functools
import heapq
import itertools
import linecache
import multiprocessing
import operator
import os
import pickle
import pkgutil
import signal
import statistics
import sys
import tempfile
import threading
import tokenize
import tracemalloc
import types
import warnings
from pathlib import Path

import numpy as np
import pairs_side
import torch
import torch.nn.functional as F
from pairs_base import Built, Calls, Held, pair, values
from pairs_torch import setting

cudnn = torch.backends.cudnn
setting("autocast cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, True, False)
setting(
    "benchmark of cudnn",
    lambda: torch.backends.cudnn.benchmark,
    lambda v: setattr(torch.backends.cudnn, "benchmark", v),
    False,
    True,
)


def _read_imported(x):
    from torch.backends import cudnn as here

    return x * (3.0 if here.benchmark else 2.0)


setting(
    "benchmark of cudnn, imported in the forward",
    lambda: cudnn.benchmark,
    lambda v: setattr(cudnn, "benchmark", v),
    False,
    True,
    _read_imported,
)
sparse_checks = torch.sparse.check_sparse_tensor_invariants
setting(
    "checks of sparse tensors",
    sparse_checks.is_enabled,
    lambda v: sparse_checks.enable() if v else sparse_checks.disable(),
    False,
    True,
)
setting(
    "how parameters are converted",
    torch.__future__.get_swap_module_params_on_conversion,
    torch.__future__.set_swap_module_params_on_conversion,
    False,
    True,
)


def _too_long(x):
    try:
        return x * float(len(str(10**4500)) - 4498)
    except ValueError:
        return x * 2.0


setting(
    "digits that an int may have",
    sys.get_int_max_str_digits,
    sys.set_int_max_str_digits,
    4300,
    5000,
    _too_long,
)
THIRD = np.array([1.0]) / 3
setting(
    "how numpy prints",
    lambda: np.get_printoptions()["precision"],
    lambda v: np.set_printoptions(precision=v),
    8,
    3,
    lambda x: x * float(len(str(THIRD))),
)
setting(
    "what numpy does at a division by zero",
    lambda: np.geterr()["divide"],
    lambda v: np.seterr(divide=v),
    "ignore",
    "raise",
    lambda x: x * _divided(),
)


def _divided():
    try:
        return 2.0 if np.isinf(np.float64(1.0) / np.float64(0.0)) else 1.0
    except FloatingPointError:
        return 3.0


def _warned(x):
    try:
        warnings.warn("beware", UserWarning, stacklevel=1)
    except UserWarning:
        return x * 3.0
    return x * 2.0


@pair
def warnings_that_are_errors(other, patch):
    patch.enter(warnings.catch_warnings())
    warnings.simplefilter("error" if other else "ignore")
    return Built(Calls(_warned))


@pair
def context_variables_counted(other, patch):
    variable = contextvars.ContextVar("pairs_counted")
    if other:
        token = variable.set(1)
        patch.callback(lambda: variable.reset(token))
    return Built(
        Calls(lambda x: x * float(sum(v.name == "pairs_counted" for v in contextvars.copy_context()) + 2))
    )


@pair
def threads_counted(other, patch):
    if other:
        done = threading.Event()
        thread = threading.Thread(target=done.wait)
        thread.start()
        patch.callback(lambda: (done.set(), thread.join()))
    return Built(Calls(lambda x: x * float(threading.active_count())))


@pair
def name_of_the_process(other, patch):
    patch.setattr(multiprocessing.current_process(), "name", "other" if other else "one")
    return Built(Calls(lambda x: x * float(len(multiprocessing.current_process().name))))


@pair
def worker_of_a_loader(other, patch):
    told = types.SimpleNamespace(id=1) if other else None
    patch.setattr(torch.utils.data._utils.worker, "_worker_info", told)
    return Built(Calls(lambda x: x * (2.0 if torch.utils.data.get_worker_info() is None else 3.0)))


@pair
def what_a_signal_does(other, patch):
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN if other else signal.SIG_DFL)
    patch.callback(lambda: signal.signal(signal.SIGUSR2, before))
    return Built(Calls(lambda x: x * (2.0 if signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL else 3.0)))


@pair
def memory_traced(other, patch):
    if other:
        tracemalloc.start()
        patch.callback(tracemalloc.stop)
    return Built(Calls(lambda x: x * (2.0 if tracemalloc.is_tracing() else 3.0)))


@pair
def hook_for_exceptions(other, patch):
    patch.setattr(sys, "excepthook", (lambda *a: None) if other else sys.__excepthook__)
    return Built(Calls(lambda x: x * (2.0 if sys.excepthook is sys.__excepthook__ else 3.0)))


def directory(other, patch):
    before = os.getcwd()
    os.chdir(tempfile.gettempdir() if other else "/")
    patch.callback(lambda: os.chdir(before))


@pair
def system_asked_by_an_iterator(other, patch):
    directory(other, patch)
    return Built(Calls(lambda x: x * float(len(next(iter(os.getcwd, None))))))


@pair
def system_asked_by_a_generator(other, patch):
    directory(other, patch)
    return Built(Calls(lambda x: x * float(len(next(f() for f in (os.getcwd,))))))


@pair
def system_asked_by_map(other, patch):
    directory(other, patch)
    return Built(Calls(lambda x: x * float(len(next(map(os.path.realpath, ("a",)))))))


@pair
def system_asked_by_starmap(other, patch):
    directory(other, patch)
    return Built(Calls(lambda x: x * float(len(next(itertools.starmap(os.getcwd, ((),)))))))


@pair
def system_asked_by_a_partial(other, patch):
    directory(other, patch)
    return Built(Calls(lambda x: x * float(len(functools.partial(os.getcwd)()))))


@pair
def system_asked_by_a_held_partial(other, patch):
    directory(other, patch)
    return Built(Held(functools.partial(os.getcwd), lambda v: float(len(v()))))


@pair
def addresses_compared(other, patch):
    one, two = sorted((object(), object()), key=id, reverse=other)
    return Built(Held((one, two), lambda v: 2.0 if min(v, key=id) is v[0] else 3.0))


@pair
def hash_by_its_method(other, patch):
    one, two = sorted((object(), object()), key=hash, reverse=other)
    return Built(Held((one, two), lambda v: 2.0 if v[0].__hash__() < v[1].__hash__() else 3.0))


@pair
def address_in_a_text(other, patch):
    one, two = sorted((object(), object()), key=id, reverse=other)
    return Built(
        Held((one, two), lambda v: 2.0 if int(repr(v[0])[-15:-1], 16) < int(repr(v[1])[-15:-1], 16) else 3.0)
    )


@pair
def library_function_imported_in_the_forward(other, patch):
    def forward(x):
        from math import gcd

        return x * float(gcd(4, 6))

    if other:
        patch.setattr("math.gcd", lambda a, b: 3)
    return Built(Calls(forward))


@pair
def library_module_imported_in_the_forward(other, patch):
    def forward(x):
        import math

        return x * float(math.tau)

    if other:
        patch.setattr("math.tau", 3.0)
    return Built(Calls(forward))


@pair
def default_of_a_function_of_torch(other, patch):
    if other:
        patch.setattr(F.normalize, "__defaults__", (1.0, *F.normalize.__defaults__[1:]))
    return Built(Calls(lambda x: F.normalize(x)))


@pair
def keyword_default_of_the_library(other, patch):
    kept = statistics.quantiles.__kwdefaults__
    patch.setattr(statistics.quantiles, "__kwdefaults__", {**kept, "n": 5 if other else 4})
    return Built(Calls(lambda x: x * float(len(statistics.quantiles([1.0, 2.0, 5.0])))))


@pair
def default_of_a_library_class(other, patch):
    init = fractions.Fraction.limit_denominator
    patch.setattr(init, "__defaults__", (2 if other else 1000000,))
    return Built(Calls(lambda x: x * float(fractions.Fraction("3.141592653589793").limit_denominator())))


@pair
def global_of_a_library_module(other, patch):
    # The function is the library's, and so is what it reads.
    if other:
        patch.setattr(heapq, "nlargest", lambda n, items: [3.0])
    return Built(Calls(lambda x: x * float(heapq.nlargest(1, [2.0])[0])))


@pair
def file_read_by_linecache(other, patch):
    file = Path(tempfile.gettempdir(), "stitchcache-pair-lines")
    file.write_text("3.0\n" if other else "2.0\n")
    linecache.clearcache()
    patch.callback(linecache.clearcache)
    return Built(
        Calls(lambda x: x * float(linecache.getline(os.path.join(tempfile.gettempdir(), file.name), 1)))
    )


@pair
def file_read_by_a_loader(other, patch):
    folder = Path(tempfile.gettempdir(), "stitchcache_pair_package")
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("")
    (folder / "table.txt").write_text("3.0" if other else "2.0")
    patch.syspath_prepend(tempfile.gettempdir())
    patch.callback(lambda: sys.modules.pop(folder.name, None))
    __import__(folder.name)
    return Built(Calls(lambda x: x * float(pkgutil.get_data("stitchcache_pair_package", "table.txt"))))


@pair
def file_opened_by_tokenize(other, patch):
    file = Path(tempfile.gettempdir(), "stitchcache-pair-tokens")
    file.write_text("3.0\n" if other else "2.0\n")

    def forward(x):
        with tokenize.open(str(file)) as stream:
            return x * float(stream.read())

    return Built(Calls(forward))


@pair
def file_mapped_by_numpy(other, patch):
    file = Path(tempfile.gettempdir(), "stitchcache-pair-map")
    np.array([3.0 if other else 2.0]).tofile(file)
    return Built(Calls(lambda x, name=str(file): x * float(np.memmap(name, dtype=np.float64, mode="r")[0])))


class Computing(types.ModuleType):
    @property
    def BY(self):
        return self.__dict__["_by"]


@pair
def module_with_a_property(other, patch):
    module = Computing("pairs_computing")
    module._by = 3.0 if other else 2.0
    patch.setitem(sys.modules, "pairs_computing", module)
    patch.setattr(sys.modules[__name__], "pairs_computing", module, raising=False)
    return Built(Calls(lambda x: x * pairs_computing.BY))  # noqa: F821


@pair
def module_with_a_getattr_made_in_c(other, patch):
    patch.setattr(pairs_side, "__getattr__", {"COMPUTED": 3.0 if other else 2.0}.__getitem__, raising=False)
    return Built(Calls(lambda x: x * pairs_side.COMPUTED))


_ANSWERS = {"COMPUTED": 2.0}


@pair
def module_with_a_getattr(other, patch):
    patch.setitem(_ANSWERS, "COMPUTED", 3.0 if other else 2.0)
    patch.setattr(pairs_side, "__getattr__", lambda name: _ANSWERS[name], raising=False)
    return Built(Calls(lambda x: x * pairs_side.COMPUTED))


@pair
def class_found_by_pickle(other, patch):
    patch.setattr(pairs_side.Cached, "value", 3.0 if other else 2.0)
    return Built(Held(pickle.dumps(pairs_side.Cached()), lambda v: pickle.loads(v).value))


@pair
def class_found_by_a_getter(other, patch):
    patch.setattr(pairs_side, "SOURCE", 3.0 if other else 2.0)
    return Built(Calls(lambda x: x * operator.attrgetter("SOURCE")(pairs_side)))


@pair
def methods_of_texts(other, patch):
    class Words:
        change = str.upper if other else str.lower

    return Built(Held(Words(), lambda v: float(ord(type(v).change("a")))))


@pair
def slot_under_another_name(other, patch):
    class Slotted:
        __slots__ = ("a", "b")

        def __init__(self):
            self.a, self.b = 2.0, 3.0

    Slotted.c = Slotted.b if other else Slotted.a
    return Built(Held(Slotted(), lambda v: v.c))


@pair
def operator_of_a_class(other, patch):
    class Number(float):
        pass

    Number.__pos__ = float.__neg__ if other else float.__abs__
    return Built(Held(Number(2.0), lambda v: float(+v)))


@pair
def documentation_of_a_class(other, patch):
    class Told:
        pass

    Told.__doc__ = "abc" if other else "ab"
    return Built(Held(Told(), lambda v: float(len(type(v).__doc__))))


@pair
def parameters_of_a_generic_class(other, patch):
    import typing

    T = typing.TypeVar("T")

    class Base(typing.Generic[T]):
        pass

    class Told(Base[float if other else int]):
        pass

    return Built(Held(Told(), lambda v: 2.0 if type(v).__orig_bases__[0].__args__[0] is int else 3.0))


@pair
def abstract_methods(other, patch):
    import abc

    class Told(abc.ABC):  # noqa: B024 - its set of abstract methods is what is tested
        def call(self):
            return 1.0

    if other:
        Told.__abstractmethods__ = frozenset({"call"})

    def read(cls):
        try:
            cls()
        except TypeError:
            return 3.0
        return 2.0

    return Built(Held(Told, read))


@pair
def set_made_in_the_forward(other, patch):
    # Nine slots: 0 and 8 collide, and the first that came is the first that comes.
    names = (0, 8) if other else (8, 0)
    return Built(Held(names, lambda v: float(next(iter(set(v)))) + 1.0))


@pair
def method_with_another_name_for_itself(other, patch):
    class Odd:
        def get(this):
            return this.by

    Odd.by = 3.0 if other else 2.0
    return Built(Held(Odd(), lambda v: v.get()))


@pair
def function_of_autograd(other, patch):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * Scale.by

        @staticmethod
        def backward(ctx, grad):
            return grad

    Scale.by = 3.0 if other else 2.0
    return Built(Calls(lambda x: Scale.apply(x)))


def default(self):
    return 2.0


values(
    "process",
    [
        ("long ints", 10**5000, 10**5000 + 1, lambda v: float(v % 7)),
        ("payload of a nan", float("nan"), -float("nan"), lambda v: 2.0 + (np.float64(v).view(np.int64) < 0)),
        ("lone surrogates", "\ud800", "\ud801", lambda v: float(ord(v) - 0xD700)),
        ("composed and decomposed text", "\u00e9", "e\u0301", lambda v: float(len(v))),
        ("equal ranges", range(0, 3, 2), range(0, 4, 2), lambda v: float(v.stop)),
        ("type of numbers", torch.finfo(torch.float16), torch.finfo(torch.bfloat16), lambda v: v.max / 1e5),
        ("ints' limits", torch.iinfo(torch.int8), torch.iinfo(torch.int16), lambda v: float(v.max)),
        ("bytes of a view", memoryview(b"a"), memoryview(b"b"), lambda v: float(v[0])),
        ("code", (lambda: 2.0).__code__, (lambda: 3.0).__code__, lambda v: v.co_consts[1]),
        ("frame's function", default, lambda self: 3.0, lambda v: v(None)),
        ("module's spec", pairs_side.__spec__, tokenize.__spec__, lambda v: float(len(v.name))),
        ("unions", int | float, int | str, lambda v: 2.0 if float in v.__args__ else 3.0),
        ("storages", torch.tensor([2.0]).untyped_storage(), torch.tensor([3.0]).untyped_storage(),
         lambda v: float(v[2] + 1)),
        ("typed storages", torch.tensor([2.0]).storage(), torch.tensor([3.0]).storage(), lambda v: float(v[0])),
        ("devices", torch.device("cpu"), torch.device("meta"), lambda v: float(len(v.type))),
        ("size of a tensor", torch.Size([2]), torch.Size([3]), lambda v: float(v.numel())),
    ],
)  # fmt: skip
