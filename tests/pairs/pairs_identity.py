"""Aliases, shared state, identity against globals, and tensors that are reached by several roads."""

import copy
import weakref

import torch
from pairs_base import Built, Calls, Held, Two, X, pair
from torch import nn

MEAN = object()
SENTINEL = "sentinel-" + "x" * 30
NOTHING: list[int] = []
TABLE = {"a": 2.0}
SCALE = torch.full((4,), 2.0)


class Thing:
    """An object without state."""


THING = Thing()


def same(one, other):
    return 2.0 if one is other else 3.0


@pair
def sentinel_object(other, patch):
    return Built(Held(object() if other else MEAN, lambda v: 2.0 if v is MEAN else 3.0))


@pair
def stateless_object(other, patch):
    return Built(Held(Thing() if other else THING, lambda v: 2.0 if v is THING else 3.0))


@pair
def equal_text(other, patch):
    return Built(
        Held("".join(list(SENTINEL)) if other else SENTINEL, lambda v: 2.0 if v is SENTINEL else 3.0)
    )


@pair
def empty_list(other, patch):
    return Built(Held([] if other else NOTHING, lambda v: 2.0 if v is NOTHING else 3.0))


@pair
def equal_table(other, patch):
    return Built(Held(dict(TABLE) if other else TABLE, lambda v: 2.0 if v is TABLE else 3.0))


@pair
def global_inside_a_list(other, patch):
    return Built(Held([Thing() if other else THING], lambda v: 2.0 if v[0] is THING else 3.0))


@pair
def shared_lists(other, patch):
    one = [1, 2]
    return Built(Two(one, [1, 2] if other else one, same))


@pair
def shared_dicts(other, patch):
    one = {"a": 1}
    return Built(Two(one, {"a": 1} if other else one, same))


@pair
def shared_objects(other, patch):
    one = Thing()
    return Built(Two(one, Thing() if other else one, same))


@pair
def shared_item_and_attribute(other, patch):
    one = [1]
    return Built(Two([one], [1] if other else one, lambda a, b: same(a[0], b)))


@pair
def shared_in_two_modules(other, patch):
    table = [1, 2]
    first = Held(table, lambda v: 2.0)
    second = Held([1, 2] if other else table, lambda v: 2.0)
    model = Calls(lambda x: x * (2.0 if first.value is second.value else 3.0))
    model.first, model.second = first, second
    return Built(model)


@pair
def shared_with_a_closure(other, patch):
    table = [1, 2]
    kept = [1, 2] if other else table
    return Built(Held(table, lambda v: 2.0 if v is kept else 3.0))


@pair
def shared_with_a_default(other, patch):
    table = [1, 2]

    def read(value, kept=[1, 2] if other else table):
        return 2.0 if value is kept else 3.0

    return Built(Held(table, read))


@pair
def shared_with_a_class(other, patch):
    table = [1, 2]

    class Net(nn.Module):
        kept = [1, 2] if other else table

        def forward(self, x):
            return x * (2.0 if self.own is self.kept else 3.0)

    model = Net()
    model.own = table
    return Built(model)


@pair
def shared_with_a_hook(other, patch):
    table = [1, 2]
    kept = [1, 2] if other else table
    model = Held(table, lambda v: 2.0)
    model.register_forward_hook(lambda module, args, result: result * (2.0 if module.value is kept else 3.0))
    return Built(model)


@pair
def shared_with_an_argument(other, patch):
    table = [2.0, 3.0]
    return Built(Calls(lambda x, t: x * (2.0 if t is table else 3.0)), (X, list(table) if other else table))


@pair
def cycle_through_another(other, patch):
    one: list = []
    two: list = [one]
    one.append([one] if other else two)
    return Built(Held(one, lambda v: 2.0 if v[0][0] is v and v[0] is two else 3.0))


@pair
def module_twice_or_two(other, patch):
    torch.manual_seed(0)
    one = nn.Linear(4, 4)
    two = copy.deepcopy(one) if other else one
    model = Calls(lambda x: one(x) * (2.0 if model.one is model.two else 3.0))
    model.one, model.two = one, two
    return Built(model)


@pair
def module_in_a_plain_list(other, patch):
    torch.manual_seed(0)
    model = Calls(lambda x: model.hidden[0](x))
    model.hidden = [nn.Linear(4, 4)]
    if other:
        with torch.no_grad():
            model.hidden[0].weight.mul_(2)
    return Built(model)


class InList(nn.Module):
    """A parameter that also lies in a plain list."""

    def __init__(self, scale, form):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), scale))
        self.kept = {"list": [self.weight], "dict": {"w": self.weight}, "tuple": (self.weight,)}[form]

    def forward(self, x):
        kept = self.kept["w"] if isinstance(self.kept, dict) else self.kept[0]
        return x * kept


@pair
def parameter_in_a_list(other, patch):
    return Built(InList(3.0 if other else 2.0, "list"))


@pair
def parameter_in_a_dict(other, patch):
    return Built(InList(3.0 if other else 2.0, "dict"))


@pair
def parameter_in_a_tuple(other, patch):
    return Built(InList(3.0 if other else 2.0, "tuple"))


@pair
def copy_of_a_parameter_in_a_list(other, patch):
    model = InList(2.0, "list")
    if other:
        model.kept = [model.weight.detach().clone()]
        model.kept[0][0] = 9
    return Built(model)


@pair
def list_that_was_the_parameter(other, patch):
    """The parameter is replaced, as loading with ``assign=True`` does; the list has the old one."""
    model = InList(2.0, "list")
    if other:
        model.load_state_dict({"weight": torch.full((4,), 5.0)}, assign=True)
        model.kept[0].data.fill_(7.0)
    return Built(model)


def tensor_pair(name, make):
    def build(other, patch):
        return make(torch.full((4,), 3.0 if other else 2.0))

    build.__name__, build.__module__ = f"tensor {name}", __name__
    pair(build)


tensor_pair("as a plain attribute", lambda t: Built(Held(t, lambda v: v)))
tensor_pair("in a list", lambda t: Built(Held([t], lambda v: v[0])))
tensor_pair("in a nested dict", lambda t: Built(Held({"a": [{"b": t}]}, lambda v: v["a"][0]["b"])))
tensor_pair("in a closure", lambda t: Built(Calls(lambda x: x * t)))
tensor_pair("as a default", lambda t: Built(Calls(lambda x, t=t: x * t)))
tensor_pair("in a set", lambda t: Built(Held({t}, lambda v: next(iter(v)))))
tensor_pair("in a frozen set", lambda t: Built(Held(frozenset([t]), lambda v: next(iter(v)))))
tensor_pair("as a key", lambda t: Built(Held({t: 1}, lambda v: next(iter(v)))))
tensor_pair("behind a weak reference", lambda t: weakly(t))
tensor_pair("as an attribute of a tensor", lambda t: on_tensor(t))
tensor_pair("as an attribute of a parameter", lambda t: on_parameter(t))
tensor_pair("as a gradient", lambda t: gradient(t))
tensor_pair("in an object", lambda t: Built(Held(keep(Thing(), t), lambda v: v.t)))
tensor_pair("in a bound method", lambda t: Built(Calls(t.mul)))
tensor_pair("in an attribute of a function", lambda t: on_function(t))
tensor_pair("in a class", lambda t: Built(Held(type("C", (), {"t": t}), lambda v: v.t)))
tensor_pair("in a generator's closure", lambda t: Built(Calls(lambda x: sum(x * s for s in [t]))))
tensor_pair(
    "in a partial",
    lambda t: __import__("functools") and Built(Calls(__import__("functools").partial(torch.mul, t))),
)


def keep(thing, tensor):
    thing.t = tensor
    return thing


def weakly(tensor):
    model = Held(weakref.ref(tensor), lambda v: v())
    model.kept = [tensor]
    return Built(model)


def on_tensor(tensor):
    model = Held(None, lambda v: model.table.extra)
    model.register_buffer("table", torch.zeros(4))
    model.table.extra = tensor
    return Built(model)


def on_parameter(tensor):
    model = Held(None, lambda v: model.weight.scale)
    model.weight = nn.Parameter(torch.zeros(4))
    model.weight.scale = tensor
    return Built(model)


def gradient(tensor):
    model = Held(None, lambda v: model.weight.grad)
    model.weight = nn.Parameter(torch.zeros(4))
    model.weight.grad = tensor
    return Built(model)


def on_function(tensor):
    def function(x):
        return x * function.t

    function.t = tensor
    return Built(Calls(function))


@pair
def global_tensor(other, patch):
    patch.setattr("pairs_identity.SCALE", torch.full((4,), 3.0 if other else 2.0))
    return Built(Calls(lambda x: x * SCALE))


@pair
def global_tensor_in_place(other, patch):
    SCALE.fill_(3.0 if other else 2.0)
    return Built(Calls(lambda x: x * SCALE + 0))


@pair
def buffers_that_share_storage(other, patch):
    model = Calls(lambda x: step(model, x))
    storage = torch.ones(8)
    model.register_buffer("a", storage[:4])
    model.register_buffer("b", torch.ones(4) if other else storage[:4])

    def step(m, x):
        m.a.add_(1)
        return x * m.b

    return Built(model)


@pair
def tied_and_untied(other, patch):
    model = Calls(lambda x: x * (2.0 if model.a is model.b else 3.0))
    model.a = nn.Parameter(torch.ones(4))
    model.b = nn.Parameter(torch.ones(4)) if other else model.a
    return Built(model)


@pair
def parameter_or_buffer(other, patch):
    model = Calls(lambda x: x * (2.0 if isinstance(model.a, nn.Parameter) else 3.0))
    if other:
        model.register_buffer("a", torch.ones(4))
    else:
        model.a = nn.Parameter(torch.ones(4))
    return Built(model)


@pair
def order_of_parameters(other, patch):
    model = Calls(lambda x: x * next(iter(model._parameters.values())).shape[0])
    shapes = {"a": 4, "b": 1}
    for name in ("b", "a") if other else ("a", "b"):
        setattr(model, name, nn.Parameter(torch.ones(shapes[name])))
    return Built(model)


@pair
def order_of_modules(other, patch):
    model = Calls(lambda x: next(iter(model.children()))(x))
    parts = {"a": nn.ReLU(), "b": nn.Tanh()}
    for name in ("b", "a") if other else ("a", "b"):
        setattr(model, name, parts[name])
    return Built(model)


@pair
def module_that_is_none(other, patch):
    model = Calls(lambda x: x * (2.0 if "norm" in model._modules else 3.0))
    if not other:
        model.register_module("norm", None)
    return Built(model)


@pair
def buffer_that_is_none(other, patch):
    model = Calls(lambda x: x * (2.0 if "norm" in model._buffers else 3.0))
    if not other:
        model.register_buffer("norm", None)
    return Built(model)


@pair
def buffer_that_does_not_persist(other, patch):
    model = Calls(lambda x: x * (2.0 if "a" in model.state_dict() else 3.0))
    model.register_buffer("a", torch.ones(4), persistent=not other)
    return Built(model)


def parameter_flag(name, set_flag, read):
    def build(other, patch):
        model = Calls(lambda x: x * read(model.weight))
        model.weight = nn.Parameter(torch.ones(4, 4))
        if other:
            set_flag(model)
        return Built(model)

    build.__name__, build.__module__ = f"parameter's {name}", __name__
    pair(build)


def assign(model, weight):
    model.weight = weight


parameter_flag("requires_grad", lambda m: m.weight.requires_grad_(False), lambda w: 2.0 + w.requires_grad)
parameter_flag("attribute", lambda m: setattr(m.weight, "quiet", True), lambda w: 2.0 + hasattr(w, "quiet"))
parameter_flag("dtype", lambda m: m.double(), lambda w: float(w.element_size()))
parameter_flag(
    "strides", lambda m: assign(m, nn.Parameter(torch.ones(4, 4).t())), lambda w: float(w.stride(0))
)
parameter_flag(
    "offset", lambda m: assign(m, nn.Parameter(torch.ones(5, 4)[1:])), lambda w: float(w.storage_offset()) + 1
)
parameter_flag(
    "storage",
    lambda m: assign(m, nn.Parameter(torch.ones(5, 4)[:4])),
    lambda w: float(w.untyped_storage().size()),
)
parameter_flag(
    "class",
    lambda m: assign(m, type("P", (nn.Parameter,), {})(torch.ones(4, 4))),
    lambda w: float(len(type(w).__name__)),
)
parameter_flag(
    "gradient", lambda m: setattr(m.weight, "grad", torch.ones(4, 4)), lambda w: 2.0 + (w.grad is None)
)
