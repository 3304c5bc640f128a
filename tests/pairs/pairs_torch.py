"""State of torch, of the process and of the machine that a forward may read; arguments and options."""

import collections
import decimal
import os
import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from pairs_base import Built, Calls, Held, X, pair
from torch import nn
from torch.utils._pytree import GetAttrKey, register_pytree_node


def setting(name, get, put, first, second, read=None):
    """A pair that differs in a global setting of torch."""

    def build(other, patch):
        before = get()
        patch.setattr("pairs_torch._undo", before)
        patch.callback(lambda: put(before))
        put(second if other else first)
        return Built(Calls(read or (lambda x: x * (2.0 if get() == first else 3.0))))

    build.__name__, build.__module__ = f"setting {name}", __name__
    pair(build)


_undo = None
cuda, mha = torch.backends.cuda, torch.backends.mha
setting("default dtype", torch.get_default_dtype, torch.set_default_dtype, torch.float32, torch.float64)
setting(
    "deterministic",
    torch.are_deterministic_algorithms_enabled,
    torch.use_deterministic_algorithms,
    False,
    True,
)
setting(
    "matmul precision",
    torch.get_float32_matmul_precision,
    torch.set_float32_matmul_precision,
    "highest",
    "high",
)
setting("flash attention", cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True, False)
setting("math attention", cuda.math_sdp_enabled, cuda.enable_math_sdp, True, False)
setting("fast path of attention", mha.get_fastpath_enabled, mha.set_fastpath_enabled, True, False)
setting(
    "mkldnn", lambda: torch.backends.mkldnn.enabled, lambda v: torch.backends.mkldnn.set_flags(v), True, False
)
setting("number of threads", torch.get_num_threads, torch.set_num_threads, 1, 2)
setting(
    "print options",
    lambda: torch._tensor_str.PRINT_OPTS.precision,
    lambda v: torch.set_printoptions(precision=v),
    4,
    5,
)
setting(
    "denormals",
    lambda: float(torch.tensor(1e-40) * 1 == 0),
    lambda v: torch.set_flush_denormal(bool(v)),
    0.0,
    1.0,
)
setting("warn always", torch.is_warn_always_enabled, torch.set_warn_always, False, True)
setting(
    "decimal precision",
    lambda: decimal.getcontext().prec,
    lambda v: setattr(decimal.getcontext(), "prec", v),
    28,
    7,
)
setting(
    "recursion limit",
    sys.getrecursionlimit,
    sys.setrecursionlimit,
    sys.getrecursionlimit(),
    sys.getrecursionlimit() + 50,
)
setting("switch interval", sys.getswitchinterval, sys.setswitchinterval, 0.005, 0.25)
setting("digits of ints", sys.get_int_max_str_digits, sys.set_int_max_str_digits, 4300, 5000)
setting("numpy errors", lambda: np.geterr()["divide"], lambda v: np.seterr(divide=v), "warn", "ignore")
setting(
    "numpy print options",
    lambda: np.get_printoptions()["precision"],
    lambda v: np.set_printoptions(precision=v),
    8,
    9,
)
setting("seed", torch.initial_seed, torch.manual_seed, 1, 2)
setting("working directory", os.getcwd, os.chdir, os.getcwd(), "/")


@pair
def autocast(other, patch):
    if other:
        patch.enter(torch.autocast("cpu", torch.bfloat16))
    return Built(Calls(lambda x: x * (2.0 if torch.is_autocast_enabled("cpu") else 3.0)))


@pair
def variable(other, patch):
    patch.setenv("PAIR_BY", "3" if other else "2")
    return Built(Calls(lambda x: x * float(os.environ["PAIR_BY"])))


@pair
def variable_through_getenv(other, patch):
    patch.setenv("PAIR_BY", "3" if other else "2")
    return Built(Calls(lambda x: x * float(os.getenv("PAIR_BY", "1"))))


@pair
def variable_that_is_missing(other, patch):
    patch.delenv("PAIR_MORE", raising=False)
    if other:
        patch.setenv("PAIR_MORE", "1")
    return Built(Calls(lambda x: x * (2.0 if "PAIR_MORE" in os.environ else 3.0)))


@pair
def variables_counted(other, patch):
    if other:
        patch.setenv("PAIR_ONE_MORE", "1")
    return Built(Calls(lambda x: x * (2.0 if any(n == "PAIR_ONE_MORE" for n in os.environ) else 3.0)))


@pair
def variables_copied(other, patch):
    patch.setenv("PAIR_BY", "3" if other else "2")
    return Built(Calls(lambda x: x * float(dict(os.environ)["PAIR_BY"])))


@pair
def variables_of_inductor(other, patch):
    if other:
        patch.setenv("TORCHINDUCTOR_PROLOGUE_FUSION", "0")
    return Built(Calls(lambda x: x * (3.0 if other else 2.0)))


@pair
def file(other, patch):
    path = "/tmp/stitchcache-pair-file"
    with open(path, "w") as out:
        out.write("3" if other else "2")
    return Built(Calls(lambda x: x * float(open(path).read())))


@pair
def file_that_exists(other, patch):
    path = "/tmp/stitchcache-pair-exists"
    if other:
        open(path, "w").close()
    elif os.path.exists(path):
        os.remove(path)
    return Built(Calls(lambda x: x * (2.0 if os.path.exists(path) else 3.0)))


@pair
def command_line(other, patch):
    patch.setattr(sys, "argv", ["a", "b"] if other else ["a"])
    return Built(Calls(lambda x: x * float(len(sys.argv) + 1)))


@pair
def import_path(other, patch):
    patch.setattr(sys, "path", [*sys.path, "x"] if other else sys.path)
    count = len(sys.path) - other
    return Built(Calls(lambda x: x * (2.0 if len(sys.path) == count else 3.0)))


@pair
def filters_of_warnings(other, patch):
    patch.enter(warnings.catch_warnings())
    warnings.simplefilter("ignore" if other else "default")
    return Built(
        Calls(lambda x: x * (float(len(warnings.filters) and warnings.filters[0][0] == "ignore") + 2.0))
    )


@pair
def imported_or_not(other, patch):
    if other:
        patch.setitem(sys.modules, "pair_optional", type(sys)("pair_optional"))
    return Built(Calls(lambda x: x * (2.0 if "pair_optional" in sys.modules else 3.0)))


@pair
def optional_import(other, patch):
    if other:
        made = type(sys)("pair_optional")
        patch.setitem(sys.modules, "pair_optional", made)

    def function(x):
        try:
            import pair_optional  # noqa: F401
        except ImportError:
            return x * 3
        return x * 2

    return Built(Calls(function))


@pair
def functional_replaced(other, patch):
    if other:
        patch.setattr(F, "relu", lambda x, inplace=False: x * 9)
    return Built(nn.ReLU())


@pair
def function_of_torch_replaced(other, patch):
    if other:
        patch.setattr(torch, "mul", lambda a, b: a - b)
    return Built(Calls(lambda x: torch.mul(x, 3.0)))


@pair
def method_of_tensors_replaced(other, patch):
    if other:
        patch.setattr(torch.Tensor, "square", lambda self: self * 9)
    return Built(Calls(lambda x: x.square()))


@pair
def method_of_tensors_added(other, patch):
    patch.setattr(
        torch.Tensor, "pair_by", (lambda self: self * 3) if other else (lambda self: self * 2), raising=False
    )
    return Built(Calls(lambda x: x.pair_by()))


@pair
def forward_of_linear_replaced(other, patch):
    torch.manual_seed(0)
    if other:
        patch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight))
    return Built(nn.Linear(4, 4))


@pair
def helper_method_of_torch_replaced(other, patch):
    torch.manual_seed(0)
    model = nn.Conv1d(2, 2, 1)
    if other:
        patch.setattr(nn.Conv1d, "_conv_forward", lambda self, x, w, b: F.conv1d(x, w))
    return Built(model)


@pair
def call_of_modules_replaced(other, patch):
    plain = nn.Module._call_impl
    if other:
        patch.setattr(nn.Module, "_call_impl", lambda self, *a, **k: plain(self, *a, **k) * 2)
    return Built(nn.Sequential(nn.Identity()))


@pair
def constant_of_torch_replaced(other, patch):
    if other:
        patch.setattr(torch, "pi", 3.0)
    return Built(Calls(lambda x: x * torch.pi))


@pair
def attribute_of_a_torch_class(other, patch):
    if other:
        patch.setattr(nn.LayerNorm, "pair_by", 3.0, raising=False)
    return Built(Calls(lambda x: x * getattr(nn.LayerNorm, "pair_by", 2.0)))


@pair
def hook_for_all_modules(other, patch):
    from torch.nn.modules.module import register_module_forward_hook

    if other:
        made = register_module_forward_hook(lambda m, a, r: r * 2 if isinstance(m, nn.Identity) else None)
        patch.callback(made.remove)
    return Built(nn.Sequential(nn.Identity()))


@pair
def function_mode(other, patch):
    from torch.overrides import TorchFunctionMode

    class Doubling(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return result * 1 + 1 if function is torch.relu else result

    if other:
        patch.enter(Doubling())
    return Built(Calls(lambda x: torch.relu(x)))


@pair
def default_device_mode(other, patch):
    if other:
        patch.enter(torch.device("meta"))
    return Built(Calls(lambda x: x * (2.0 if torch.get_default_device().type == "cpu" else 3.0)))


def argument(name, function, first, second, **options):
    """A pair whose examples differ, under one model."""

    def build(other, patch):
        given = second() if other else first()
        args, kwargs = (
            given
            if isinstance(given[-1], dict) and len(given) == 2 and isinstance(given[0], tuple)
            else (given, {})
        )
        return Built(Calls(function), args, kwargs, options)

    build.__name__, build.__module__ = f"argument {name}", __name__
    pair(build)


def by_kind(x, v):
    return x * (2.0 if isinstance(v, bool) else 3.0)


def is_parameter(x):
    return x * (2.0 if isinstance(x, nn.Parameter) else 3.0)


Pair = collections.namedtuple("Pair", "a b")
Couple = collections.namedtuple("Couple", "a b")


class Bag:
    def __init__(self, x, by):
        self.x, self.by = x, by


register_pytree_node(
    Bag,
    lambda b: ([b.x], b.by),
    lambda v, by: Bag(v[0], by),
    serialized_type_name="pairs.Bag",
    flatten_with_keys_fn=lambda b: ([(GetAttrKey("x"), b.x)], b.by),
)

argument("one and True", by_kind, lambda: (X, 1), lambda: (X, True))
argument(
    "one and one point zero",
    lambda x, v: x * (2.0 if isinstance(v, int) else 3.0),
    lambda: (X, 1),
    lambda: (X, 1.0),
)
argument(
    "zeros of two signs",
    lambda x, v: x * (2.0 if str(v)[0] == "-" else 3.0),
    lambda: (X, 0.0),
    lambda: (X, -0.0),
)
argument("None and zero", lambda x, v: x * (2.0 if v is None else 3.0), lambda: (X, None), lambda: (X, 0))
argument("texts", lambda x, v: x * len(v), lambda: (X, "a"), lambda: (X, "ab"))
argument(
    "list and tuple", lambda p: p[0] * (2.0 if isinstance(p, list) else 3.0), lambda: ([X],), lambda: ((X,),)
)
argument(
    "named tuples",
    lambda p: p.a * (2.0 if type(p) is Pair else 3.0),
    lambda: (Pair(X, X),),
    lambda: (Couple(X, X),),
)
argument("context of a node", lambda b: b.x * b.by, lambda: (Bag(X, 2.0),), lambda: (Bag(X, 3.0),))
argument(
    "order of a dict",
    lambda d: next(iter(d.values())) * 1,
    lambda: ({"a": X, "b": X * 2},),
    lambda: ({"b": X * 2, "a": X},),
)
argument(
    "order of keywords",
    lambda **k: next(iter(k.values())) * 1,
    lambda: ((), {"a": X, "b": X * 2}),
    lambda: ((), {"b": X * 2, "a": X}),
)
argument(
    "ordered dict and dict",
    lambda d: d["a"] * (2.0 if type(d) is dict else 3.0),
    lambda: ({"a": X},),
    lambda: (collections.OrderedDict(a=X),),
)
argument(
    "requires_grad",
    lambda x: x * (2.0 if x.requires_grad else 3.0),
    lambda: (X.clone(),),
    lambda: (X.clone().requires_grad_(),),
)
argument(
    "parameter", is_parameter, lambda: (X.clone(),), lambda: (nn.Parameter(X.clone(), requires_grad=False),)
)
argument("dtype", lambda x: x * x.element_size(), lambda: (X,), lambda: (X.double(),))
argument("shape", lambda x: x * x.shape[1], lambda: (X,), lambda: (X[:, :3].contiguous(),))
argument("strides", lambda x: x * x.stride(0), lambda: (X,), lambda: (X.t().contiguous().t(),))
argument(
    "offset",
    lambda x: x * (x.storage_offset() + 1.0),
    lambda: (torch.ones(2, 4),),
    lambda: (torch.ones(3, 4)[1:],),
)
argument(
    "one tensor twice",
    lambda a, b: a * (2.0 if a is b else 3.0),
    lambda: (t := X.clone(), t),
    lambda: (X.clone(), X.clone()),
)
argument(
    "views of one storage",
    lambda a, b: (a.add_(1), b * 1)[1],
    lambda: (t := X.clone(), t[:]),
    lambda: (X.clone(), X.clone()),
)
argument(
    "subclass",
    lambda x: x * (2.0 if type(x) is torch.Tensor else 3.0),
    lambda: (X,),
    lambda: (X.as_subclass(type("T", (torch.Tensor,), {})),),
)
argument(
    "attribute of a tensor", lambda x: x * getattr(x, "by", 2.0), lambda: (X.clone(),), lambda: (marked(3.0),)
)
argument(
    "conjugated",
    lambda x: x * (2.0 if x.is_conj() else 3.0),
    lambda: (torch.ones(2, dtype=torch.complex64),),
    lambda: (torch.ones(2, dtype=torch.complex64).conj(),),
)
argument(
    "position and keyword",
    lambda *a, **k: (a[0] if a else k["x"] * 2) * 1,
    lambda: (X,),
    lambda: ((), {"x": X}),
)
argument(
    "gradient",
    lambda x: x * (2.0 if x.grad is None else 3.0),
    lambda: (X.clone(),),
    lambda: (with_gradient(),),
)
argument(
    "size one",
    lambda x: x * (2.0 if x.shape[0] == 1 else 3.0),
    lambda: (torch.ones(1, 4),),
    lambda: (torch.ones(2, 4),),
)


def marked(by):
    made = X.clone()
    made.by = by
    return made


def with_gradient():
    made = X.clone()
    made.grad = torch.ones_like(made)
    return made


class Blind(float):
    """Differs in what `repr` leaves out."""

    def __repr__(self):
        return "Blind"


@pair
def blind_repr(other, patch):
    return Built(Held(Blind(3.0 if other else 2.0), lambda v: float(v) + 0.0))


@pair
def blind_repr_in_a_list(other, patch):
    return Built(Held([Blind(3.0 if other else 2.0)], lambda v: float(v[0]) + 0.0))


@pair
def custom_op_replaced(other, patch):
    library = torch.library.Library("pairs_ops", "FRAGMENT")
    patch.callback(library._destroy)
    library.define("scale(Tensor x) -> Tensor")
    library.impl("scale", lambda x: x * (3.0 if other else 2.0), "CompositeImplicitAutograd")
    return Built(Calls(lambda x: torch.ops.pairs_ops.scale(x) + 1))


@pair
def shape_function_of_a_custom_op(other, patch):
    library = torch.library.Library("pairs_shapes", "FRAGMENT")
    patch.callback(library._destroy)
    library.define("grow(Tensor x) -> Tensor")
    library.impl("grow", lambda x: torch.ones(3 if other else 2), "CPU")
    library.impl("grow", lambda x: torch.ones(3 if other else 2, device="meta"), "Meta")
    return Built(Calls(lambda x: x.sum() * torch.ops.pairs_shapes.grow(x).shape[0]))


def _metadata(name, build):
    """A pair whose buffers differ in what only Python tells of a tensor."""

    def built(other, patch):
        model = Calls(lambda x: x * float(read(model.w) + 2))
        read, (first, second) = build()
        model.register_buffer("w", second() if other else first())
        return Built(model)

    built.__name__, built.__module__ = f"metadata {name}", __name__
    pair(built)


_metadata("version", lambda: (lambda w: w._version, (lambda: torch.ones(4), lambda: torch.ones(4).add_(0))))
_metadata(
    "shared memory",
    lambda: (lambda w: w.is_shared(), (lambda: torch.ones(4), lambda: torch.ones(4).share_memory_())),
)
_metadata(
    "size of the storage",
    lambda: (lambda w: w.untyped_storage().size(), (lambda: torch.ones(4), lambda: torch.ones(8)[:4])),
)
