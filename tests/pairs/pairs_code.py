"""Functions, classes and modules that look alike: closures, defaults, lambdas on a line, patched methods."""

import contextlib
import contextvars
import dataclasses
import enum
import functools
import importlib.util
import operator
import sys
import types

import pairs_side as side
import torch
from pairs_base import Built, Calls, Held, pair
from torch import nn
from torch.nn.utils import parametrize

one_line = lambda x: x * 2, lambda x: x * 3
FACTOR = 2.0
WARM: dict[int, float] = {}


class Net(nn.Module):
    """The plainest model; pairs patch it."""

    rate = 2.0

    def forward(self, x):
        return self.step(x)

    def step(self, x):
        return x * self.rate


def scaled(by):
    def function(x):
        return x * by

    return function


def compiled(source, name="f", **names):
    """A function out of a text, whose globals belong to no module."""
    namespace = {"torch": torch, "__builtins__": __builtins__, **names}
    exec(source, namespace)
    return namespace[name]


@pair
def lambdas_on_one_line(other, patch):
    return Built(Calls(one_line[other]))


@pair
def lambdas_of_one_length(other, patch):
    first, second = (lambda x: x + 1), (lambda x: x - 1)
    return Built(Calls(second if other else first))


@pair
def closure(other, patch):
    return Built(Calls(scaled(3.0 if other else 2.0)))


@pair
def closure_over_a_function(other, patch):
    inner = scaled(3.0 if other else 2.0)
    return Built(Calls(lambda x: inner(x)))


@pair
def closure_over_itself(other, patch):
    by = 3.0 if other else 2.0

    def function(x, again=True):
        return function(x, False) if again else x * by

    return Built(Calls(function))


@pair
def cell_that_is_empty(other, patch):
    def make():
        def function(x):
            try:
                return x * late
            except NameError:
                return x * 3

        if not other:
            late = 2.0
        if other:
            late = 2.0
            del late
        return function

    return Built(Calls(make()))


@pair
def cell_that_is_assigned_later(other, patch):
    by = 2.0

    def function(x):
        return x * by

    by = 3.0 if other else 2.0
    return Built(Calls(function))


@pair
def default(other, patch):
    def function(x, by=3.0 if other else 2.0):
        return x * by

    return Built(Calls(function))


@pair
def defaults_assigned_later(other, patch):
    def function(x, by=2.0):
        return x * by

    if other:
        function.__defaults__ = (3.0,)
    return Built(Calls(function))


@pair
def keyword_default(other, patch):
    def function(x, *, by=2.0):
        return x * by

    if other:
        function.__kwdefaults__ = {"by": 3.0}
    return Built(Calls(function))


@pair
def mutable_default(other, patch):
    def function(x, kept=[2.0]):  # noqa: B006
        return x * kept[0]

    if other:
        function.__defaults__[0][0] = 3.0
    return Built(Calls(function))


@pair
def attribute_of_a_function(other, patch):
    def function(x):
        return x * function.by

    function.by = 3.0 if other else 2.0
    return Built(Calls(function))


@pair
def code_assigned_later(other, patch):
    def function(x):
        return x * 2

    def replaced(x):
        return x * 3

    if other:
        function.__code__ = replaced.__code__
    return Built(Calls(function))


@pair
def code_with_a_constant_replaced(other, patch):
    def function(x):
        return x * 2.5

    if other:
        function.__code__ = function.__code__.replace(
            co_consts=tuple(3.5 if c == 2.5 else c for c in function.__code__.co_consts)
        )
    return Built(Calls(function))


@pair
def wrapped(other, patch):
    def function(x):
        return x * 2

    @functools.wraps(function)
    def wrapper(x):
        return function(x) + 1

    return Built(Calls(wrapper if other else function))


@pair
def what_a_wrapper_hides(other, patch):
    inner = scaled(3.0 if other else 2.0)

    @functools.wraps(one_line[0])
    def wrapper(x):
        return inner(x)

    return Built(Calls(wrapper))


@pair
def partial_argument(other, patch):
    return Built(Calls(functools.partial(torch.mul, other=3.0 if other else 2.0)))


@pair
def partial_of_a_partial(other, patch):
    inner = functools.partial(side.power, by=3.0 if other else 2.0)
    return Built(Calls(functools.partial(inner, plus=1.0)))


@pair
def partial_with_an_attribute(other, patch):
    made = functools.partial(side.power)
    made.by = 3.0 if other else 2.0
    return Built(Calls(lambda x: x * made.by))


@pair
def operator_objects(other, patch):
    return Built(Held([2.0, 3.0], operator.itemgetter(1 if other else 0)))


@pair
def method_callers(other, patch):
    return Built(Calls(operator.methodcaller("mul", 3.0 if other else 2.0)))


@pair
def bound_method(other, patch):
    return Built(Calls(side.Scale(3.0 if other else 2.0).apply))


@pair
def callable_object(other, patch):
    return Built(Calls(side.Scale(3.0 if other else 2.0)))


@pair
def builtin_bound_to_another(other, patch):
    return Built(Held("a", ({"a": 3.0} if other else {"a": 2.0}).get))


@pair
def cached_function_that_is_warm(other, patch):
    @functools.lru_cache
    def look_up(key):
        return WARM.get(key, 2.0)

    if other:
        patch.setitem(WARM, 1, 3.0)
        look_up(1)
        patch.delitem(WARM, 1)
    return Built(Calls(lambda x: x * look_up(1)))


@pair
def cached_method_that_is_warm(other, patch):
    scale = side.Cached()
    if other:
        scale.value = 3.0
        scale.look_up(1)
        scale.value = 2.0
    return Built(Held(scale, lambda v: v.look_up(1)))


@pair
def cached_function_of_a_module(other, patch):
    side.cached.cache_clear()
    if other:
        patch.setattr(side, "SOURCE", 3.0)
        side.cached()
        patch.undo()
    return Built(Calls(lambda x: x * side.cached()))


@pair
def cached_property_that_is_warm(other, patch):
    made = side.Lazy(2.0)
    if other:
        made.value = 3.0
        _ = made.doubled
        made.value = 2.0
    return Built(Held(made, lambda v: v.doubled))


@pair
def executed_with_other_globals(other, patch):
    return Built(Calls(compiled("def f(x): return x * BY", BY=3.0 if other else 2.0)))


@pair
def executed_from_another_text(other, patch):
    return Built(Calls(compiled(f"def f(x): return x * {3.0 if other else 2.0}")))


@pair
def executed_helper(other, patch):
    inner = compiled("def f(x): return g(x)", g=scaled(3.0 if other else 2.0))
    return Built(Calls(lambda x: inner(x)))


@pair
def evaluated_lambda(other, patch):
    return Built(Calls(eval("lambda x: x * BY", {"BY": 3.0 if other else 2.0})))


@pair
def function_with_other_globals(other, patch):
    def function(x):
        return x * FACTOR

    made = types.FunctionType(function.__code__, {"FACTOR": 3.0 if other else 2.0, "__name__": __name__})
    return Built(Calls(made))


@pair
def function_with_other_builtins(other, patch):
    names = {"len": (lambda x: 3.0) if other else (lambda x: 2.0)}
    made = types.FunctionType(side.length.__code__, {"__builtins__": names, "__name__": side.__name__})
    return Built(Calls(made))


@pair
def module_by_location(other, patch):
    import tempfile
    from pathlib import Path

    file = Path(tempfile.mkdtemp()) / "located.py"
    file.write_text(f"BY = {3.0 if other else 2.0}\ndef f(x): return x * BY\n")
    spec = importlib.util.spec_from_file_location("located", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Built(Calls(module.f))


@pair
def module_made_by_hand(other, patch):
    module = types.ModuleType("made_by_hand")
    module.BY = 3.0 if other else 2.0
    model = Calls(lambda x: x * model.config.BY)
    model.config = module
    return Built(model)


@pair
def module_as_an_attribute(other, patch):
    patch.setattr(side, "SOURCE", 3.0 if other else 2.0)
    model = Calls(lambda x: x * model.config.SOURCE)
    model.config = side
    return Built(model)


@pair
def global_of_a_module(other, patch):
    patch.setattr(side, "SOURCE", 3.0 if other else 2.0)
    return Built(Calls(lambda x: x * side.SOURCE))


@pair
def global_by_its_name(other, patch):
    patch.setattr(side, "SOURCE", 3.0 if other else 2.0)
    return Built(Calls(lambda x: x * getattr(side, "SOUR" + "CE")))


@pair
def globals_as_a_whole(other, patch):
    patch.setattr(side, "SOURCE", 3.0 if other else 2.0)
    return Built(Calls(side.by_globals))


@pair
def vars_of_a_module(other, patch):
    patch.setattr(side, "SOURCE", 3.0 if other else 2.0)
    return Built(Calls(lambda x: x * vars(side)["SOURCE"]))


@pair
def table_of_modules(other, patch):
    patch.setattr(side, "SOURCE", 3.0 if other else 2.0)
    return Built(Calls(lambda x: x * sys.modules["pairs_side"].SOURCE))


@pair
def imported_by_name(other, patch):
    patch.setattr(side, "SOURCE", 3.0 if other else 2.0)
    return Built(Calls(lambda x: x * importlib.import_module("pairs_side").SOURCE))


@pair
def own_global(other, patch):
    patch.setattr("pairs_code.FACTOR", 3.0 if other else 2.0)
    return Built(Calls(lambda x: x * FACTOR))


@pair
def builtin_hidden_by_a_global(other, patch):
    if other:
        patch.setattr(side, "len", lambda x: 9.0, raising=False)
    return Built(Calls(side.length))


@pair
def builtin_replaced(other, patch):
    import builtins

    if other:
        patch.setattr(builtins, "divmod", lambda a, b: (3, 0))
    return Built(Calls(lambda x: x * (divmod(5, 2)[0])))


@pair
def function_of_a_library_replaced(other, patch):
    import math

    if other:
        patch.setattr(math, "sqrt", lambda v: 9.0)
    return Built(Calls(lambda x: x * math.sqrt(4.0)))


@pair
def class_attribute(other, patch):
    patch.setattr(Net, "rate", 3.0 if other else 2.0)
    return Built(Net())


@pair
def instance_attribute_hides_a_class_attribute(other, patch):
    model = Net()
    if other:
        model.__dict__["rate"] = 3.0
    return Built(model)


@pair
def patched_method(other, patch):
    if other:
        patch.setattr(Net, "step", lambda self, x: x * 3)
    return Built(Net())


@pair
def method_of_one_object(other, patch):
    model = Net()
    if other:
        model.step = lambda x: x * 3
    return Built(model)


@pair
def forward_of_one_object(other, patch):
    model = Net()
    if other:
        model.forward = lambda x: x * 3
    return Built(model)


@pair
def call_of_one_class(other, patch):
    if other:
        patch.setattr(Net, "__call__", lambda self, x: nn.Module.__call__(self, x) + 1)
    return Built(Net())


@pair
def class_assigned_later(other, patch):
    class Same(Net):
        def step(self, x):
            return x * 3

    Same.__qualname__, Same.__module__ = Net.__qualname__, Net.__module__
    model = Net()
    if other:
        model.__class__ = Same
    return Built(model)


@pair
def class_of_one_name(other, patch):
    def make(by):
        class Local(nn.Module):
            def forward(self, x):
                return x * by

        return Local()

    return Built(make(3.0 if other else 2.0))


@pair
def class_made_by_type(other, patch):
    body = {"forward": one_line_method(3.0 if other else 2.0)}
    return Built(type("Made", (nn.Module,), body)())


def one_line_method(by):
    return lambda self, x: x * by


@pair
def order_of_bases(other, patch):
    class A:
        by = 2.0

    class B:
        by = 3.0

    class Mixed(*((B, A) if other else (A, B)), nn.Module):
        def forward(self, x):
            return x * self.by

    return Built(Mixed())


@pair
def bases_assigned_later(other, patch):
    class A:
        def by(self):
            return 2.0

    class B:
        def by(self):
            return 3.0

    class C(A):
        pass

    if other:
        C.__bases__ = (B,)
    return Built(Held(C(), lambda v: v.by()))


@pair
def metaclass_attribute(other, patch):
    class Meta(type):
        by = 3.0 if other else 2.0

    class Thing(metaclass=Meta):
        pass

    return Built(Held(Thing, lambda v: v.by))


@pair
def metaclass_call(other, patch):
    class Meta(type):
        def __call__(cls, *args):
            made = super().__call__(*args)
            made.by = 3.0 if other else 2.0
            return made

    class Thing(metaclass=Meta):
        pass

    return Built(Held(Thing, lambda v: v().by))


@pair
def property_of_a_class(other, patch):
    if other:
        patch.setattr(side.Scale, "factor", property(lambda self: 9.0))
    return Built(Held(side.Scale(2.0), lambda v: v.factor))


@pair
def descriptor_with_state(other, patch):
    class Field:
        def __init__(self, value):
            self.value = value

        def __get__(self, instance, owner=None):
            return self.value

    class Thing:
        field = Field(3.0 if other else 2.0)

    return Built(Held(Thing(), lambda v: v.field))


@pair
def getattr_of_a_class(other, patch):
    class Thing:
        def __getattr__(self, name):
            return 3.0 if other else 2.0

    return Built(Held(Thing(), lambda v: v.anything))


@pair
def length_of_a_class(other, patch):
    class Thing:
        def __len__(self):
            return 3 if other else 2

    return Built(Held(Thing(), len))


@pair
def name_of_a_class(other, patch):
    return Built(Held(type("LongName" if other else "Name", (), {}), lambda v: float(len(v.__name__))))


@pair
def documentation(other, patch):
    def function(x):
        """Two."""
        return x * len(function.__doc__)

    if other:
        function.__doc__ = "Another text."
    return Built(Calls(function))


@pair
def name_of_a_function(other, patch):
    def function(x):
        return x * len(function.__name__)

    if other:
        function.__name__ = "f"
    return Built(Calls(function))


@pair
def annotations_of_a_function(other, patch):
    def function(x: int):
        return x * (2.0 if function.__annotations__["x"] is int else 3.0)

    if other:
        function.__annotations__["x"] = float
    return Built(Calls(function))


@pair
def signature_of_a_function(other, patch):
    import inspect

    def function(x):
        return x * float(len(inspect.signature(function).parameters))

    if other:
        function.__signature__ = inspect.Signature(
            [
                inspect.Parameter("x", inspect.Parameter.POSITIONAL_ONLY),
                inspect.Parameter("y", inspect.Parameter.KEYWORD_ONLY, default=1),
            ]
        )
    return Built(Calls(function))


@pair
def members_of_an_enum(other, patch):
    kinds = enum.Enum("Kind", {"A": 3.0 if other else 2.0})
    return Built(Held(kinds.A, lambda v: v.value))


@pair
def attribute_of_an_enum_member(other, patch):
    class Kind(enum.Enum):
        A = 1

    Kind.A.by = 3.0 if other else 2.0
    return Built(Held(Kind.A, lambda v: v.by))


@pair
def number_of_enum_members(other, patch):
    kinds = enum.Enum("Kind", {"A": 1, **({"B": 2} if other else {})})
    return Built(Held(kinds, lambda v: len(v) + 1.0))


@pair
def defaults_of_a_dataclass(other, patch):
    kind = dataclasses.make_dataclass("Options", [("by", float, 3.0 if other else 2.0)])
    return Built(Held(kind, lambda v: v().by))


@pair
def metadata_of_a_field(other, patch):
    field = dataclasses.field(default=1, metadata={"by": 3.0 if other else 2.0})
    kind = dataclasses.make_dataclass("Options", [("a", int, field)])
    return Built(Held(kind(), lambda v: dataclasses.fields(v)[0].metadata["by"]))


@pair
def context_variable(other, patch):
    variable = contextvars.ContextVar("by")
    variable.set(3.0 if other else 2.0)
    return Built(Calls(lambda x: x * variable.get()))


@pair
def default_of_a_context_variable(other, patch):
    variable = contextvars.ContextVar("by", default=3.0 if other else 2.0)
    return Built(Calls(lambda x: x * variable.get()))


@pair
def thread_local(other, patch):
    import threading

    kept = threading.local()
    kept.by = 3.0 if other else 2.0
    return Built(Calls(lambda x: x * kept.by))


@pair
def context_manager(other, patch):
    @contextlib.contextmanager
    def scale(by):
        yield by

    made = scale(3.0 if other else 2.0)

    def function(x):
        with scale(*made.args) as by:
            return x * by

    return Built(Calls(function))


@pair
def generator_that_has_run(other, patch):
    def numbers():
        yield from (2.0, 3.0, 4.0)

    made = numbers()
    if other:
        next(made)
    return Built(Held([made], lambda v: v[0].gi_frame.f_lasti + 100.0))


@pair
def iterator(other, patch):
    made = iter([2.0, 3.0, 4.0])
    if other:
        next(made)
    return Built(Held(made, lambda v: float(v.__length_hint__())))


@pair
def counter_of_itertools(other, patch):
    import itertools

    return Built(Held(itertools.count(3 if other else 2), lambda v: float(repr(v)[6:-1])))


@pair
def forward_hook(other, patch):
    model = Net()
    if other:
        model.register_forward_hook(lambda m, a, r: r + 1)
    return Built(model)


@pair
def hooks_closure(other, patch):
    by = 3.0 if other else 2.0
    model = Net()
    model.register_forward_hook(lambda m, a, r: r * by)
    return Built(model)


@pair
def forward_pre_hook(other, patch):
    by = 3.0 if other else 2.0
    model = Net()
    model.register_forward_pre_hook(lambda m, a: (a[0] * by,))
    return Built(model)


@pair
def hook_with_keywords(other, patch):
    model = Calls(lambda x, by=2.0: x * by)
    model.register_forward_pre_hook(lambda m, a, k: (a, {"by": 3.0 if other else 2.0}), with_kwargs=True)
    return Built(model)


@pair
def order_of_hooks(other, patch):
    model = Net()
    hooks = [lambda m, a, r: r + 1, lambda m, a, r: r * 2]
    for hook in reversed(hooks) if other else hooks:
        model.register_forward_hook(hook)
    return Built(model)


@pair
def hook_before_the_others(other, patch):
    model = Net()
    model.register_forward_hook(lambda m, a, r: r + 1)
    model.register_forward_hook(lambda m, a, r: r * 2, prepend=other)
    return Built(model)


@pair
def hook_of_a_child(other, patch):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    model[1 if other else 0].register_forward_hook(lambda m, a, r: r * 2)
    model[0 if other else 1].register_forward_hook(lambda m, a, r: r + 1)
    return Built(model)


@pair
def parametrization(other, patch):
    class Scaled(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, w):
            return w * self.by

    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    parametrize.register_parametrization(model, "weight", Scaled(3.0 if other else 2.0))
    return Built(model)


@pair
def pruned_weight(other, patch):
    from torch.nn.utils import prune

    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    if other:
        prune.l1_unstructured(model, "weight", amount=0.5)
    return Built(model)


@pair
def training_flag_of_a_child(other, patch):
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Identity())
    model[1].forward = lambda x: x * (2.0 if model[1].training else 3.0)
    model.eval()
    if not other:
        model[1].training = True
    return Built(model)


@pair
def extra_state(other, patch):
    class Kept(nn.Module):
        def get_extra_state(self):
            return 3.0 if other else 2.0

        def forward(self, x):
            return x * self.get_extra_state()

    return Built(Kept())


@pair
def exception_class(other, patch):
    class Wrong(ValueError):
        by = 3.0 if other else 2.0

    def function(x):
        try:
            raise Wrong
        except Wrong as error:
            return x * error.by

    return Built(Calls(function))


@pair
def exception_object(other, patch):
    return Built(Held(ValueError(3.0 if other else 2.0), lambda v: v.args[0]))


@pair
def single_dispatch(other, patch):
    @functools.singledispatch
    def by(value):
        return 2.0

    if other:
        by.register(int, lambda value: 3.0)
    return Built(Held(by, lambda v: v(1)))


@pair
def virtual_subclass(other, patch):
    import abc

    class Kind(abc.ABC):  # noqa: B024
        pass

    class Thing:
        pass

    if other:
        Kind.register(Thing)
    return Built(Held(Thing(), lambda v: 3.0 if isinstance(v, Kind) else 2.0))


@pair
def subclasses_of_a_class(other, patch):
    class Kind:
        pass

    kept = [type("More", (Kind,), {})] if other else []
    model = Held(Kind, lambda v: len(v.__subclasses__()) + 1.0)
    patch.setattr(side, "KEPT", kept, raising=False)
    return Built(model)


@pair
def compiled_function_of_sympy(other, patch):
    import sympy

    symbol = sympy.Symbol("x")
    return Built(Calls(sympy.lambdify(symbol, symbol * (3 if other else 2))))


@pair
def number_of_references(other, patch):
    thing = side.Scale(1.0)
    patch.setattr(side, "KEPT", [thing, thing, thing] if other else [], raising=False)
    return Built(Held(thing, lambda v: float(sys.getrefcount(v))))
