"""For each factor of a key: what changes it, and what does not."""

import collections
import dataclasses
import enum
import functools
import logging
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.export import Dim

from stitchcache.encoding import UnkeyableError
from stitchcache.errors import OptionError
from stitchcache.explanation import explain_differences
from stitchcache.keys import input_factors, target_key
from stitchcache.keys.environment import environment_factors, torch_state_factors, tracing_obstacle
from stitchcache.keys.model import model_factors
from stitchcache.options import SizeRange
from stitchcache.torchside import replaced_kernels, tree


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Options:
    rate: float = 0.5
    names: list = dataclasses.field(default_factory=lambda: ["a"])


Pair = collections.namedtuple("Pair", "one two")


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Plain:
    def __init__(self, value):
        self.value = value


class Net(nn.Module):
    def __init__(self, value=None):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.value = value

    def forward(self, x):
        return self.linear(x)


def factors(model):
    return {factor.name: factor.digest for factor in model_factors(model)}


def differ(one, two):
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def double(x):
    return x * 2


def with_default(x, by=1):
    return x * by


def closing_over(value):
    def inner(x):
        return x * value

    return inner


CHANGES = {
    "none": (None, 0),
    "bool": (True, 1),
    "int": (1, 2),
    "int and float": (1, 1.0),
    "huge int": (10**40, 10**40 + 1),
    "float": (0.1, 0.2),
    "zero's sign": (0.0, -0.0),
    "infinity": (float("inf"), float("-inf")),
    "complex": (1j, 2j),
    "str": ("a", "b"),
    "str and bytes": ("a", b"a"),
    "list": ([1, 2], [1, 3]),
    "list and tuple": ([1], (1,)),
    "grouping": (["ab", "c"], ["a", "bc"]),
    "nesting": ([[1], 2], [[1, 2]]),
    "dict": ({"a": 1}, {"a": 2}),
    "order of a dict": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "ordered dict": (collections.OrderedDict(a=1), {"a": 1}),
    "default factory": (collections.defaultdict(int), collections.defaultdict(list)),
    "set": ({1, 2}, {1, 3}),
    "frozenset": (frozenset("ab"), frozenset("ac")),
    "slice": (slice(1), slice(2)),
    "range": (range(3), range(4)),
    "enum": (Color.RED, Color.BLUE),
    "enum and its value": (Level.LOW, 1),
    "dataclass": (Options(), Options(rate=0.6)),
    "field of a dataclass": (Options(), Options(names=["b"])),
    "namedtuple": (Pair(1, 2), Pair(1, 3)),
    "namedtuple and tuple": (Pair(1, 2), (1, 2)),
    "slots": (Slotted(1), Slotted(2)),
    "object": (Plain(1), Plain(2)),
    "dtype": (torch.float32, torch.float16),
    "device": (torch.device("cpu"), torch.device("meta")),
    "size": (torch.Size([1]), torch.Size([2])),
    "function": (double, with_default),
    "default": (with_default, functools.partial(with_default, by=2)),
    "closure": (closing_over(1), closing_over(2)),
    "lambda": (lambda x: x + 1, lambda x: x + 2),
    "class": (Plain, Slotted),
    "builtin": (len, max),
    "partial": (functools.partial(double, 1), functools.partial(double, 2)),
    "method": (Plain(1).__init__, Plain(2).__init__),
    "operator": (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor),
    "tensor": (torch.ones(2), torch.zeros(2)),
    "strides of a tensor": (torch.ones(2, 3), torch.ones(3, 2).t()),
    "list of tensors": ([torch.ones(2)], [torch.zeros(2)]),
    "hidden module": ([nn.Linear(2, 2, bias=False)], [nn.Linear(2, 3, bias=False)]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_value_of_an_attribute_is_another_key(name):
    one, two = (factors(Net(value)) for value in CHANGES[name])
    assert [item for item in differ(one, two) if item.endswith("Net.value")]


ALIKE = {
    "set": lambda: {"b", "a", "c", "d"},
    "dict": lambda: {"a": [1, {"b": 2.0}]},
    "object": lambda: Plain(Options()),
    "closure": lambda: closing_over([1, 2]),
    "nan": lambda: float("nan"),
    "tensor": lambda: torch.arange(6).reshape(2, 3),
    "device's index": lambda: torch.device("cuda", len(ALIKE) % 2),
    "sentinel": lambda: object(),
    "logger": lambda: logging.getLogger("any"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_an_equal_value_is_the_same_key(name):
    make = ALIKE[name]
    assert factors(Net(make())) == factors(Net(make()))


def test_the_index_of_a_device_is_left_out():
    assert factors(Net(torch.device("cuda:0"))) == factors(Net(torch.device("cuda:1")))


def test_a_set_counts_with_the_order_in_which_it_is_walked():
    # Hashes of small ints are their values, and 8 and 16 collide in a small set, whatever the hash seed.
    one, other = {8, 16}, {16, 8}
    assert list(one) != list(other)
    assert factors(Net(one)) != factors(Net(other))
    assert factors(Net(one)) == factors(Net({8, 16}))


def test_one_object_twice_is_told_from_two_equal_objects():
    shared = [1]
    assert factors(Net([shared, shared])) != factors(Net([[1], [1]]))


def test_cycles_end():
    loop = Plain(None)
    loop.value = [loop, {"again": loop}]
    assert factors(Net(loop)) == factors(Net(loop))
    model = Net()
    model.__dict__["parent"] = model
    assert factors(model)


UNSOUND = {
    "lock": threading.Lock,
    "generator": lambda: (i for i in range(3)),
    "file": lambda: open(__file__),  # noqa: SIM115
    "weak reference": lambda: weakref.ref(Plain),
    "torch generator": torch.Generator,
    "iterator": lambda: iter([1]),
    "thread": threading.Thread,
    "inside": lambda: {"deep": [Plain(threading.Lock())]},
    "closure": lambda: closing_over(threading.Lock()),
    "deep nesting": lambda: functools.reduce(lambda inner, _: [inner], range(200), 1),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_cannot_be_keyed_says_where_it_is(name):
    model = nn.Sequential(Net(), Net(UNSOUND[name]()))
    with pytest.raises(UnkeyableError, match=r"^1\.value"):
        model_factors(model)


def test_a_compiled_module_is_refused():
    model = Net()
    model._compiled_call_impl = lambda *args: None
    with pytest.raises(UnkeyableError, match=r"compile\(\) was called"):
        model_factors(model)


def test_a_tensor_subclass_among_parameters_is_refused():
    class Odd(torch.Tensor):
        pass

    model = Net()
    model.register_buffer("odd", torch.ones(2).as_subclass(Odd))
    with pytest.raises(UnkeyableError, match="odd"):
        model_factors(model)


EDITS = {
    "model.class": lambda m: nn.Sequential(m),
    "model.tree": lambda m: m.add_module("more", nn.Identity()),
    "model.training": lambda m: m.linear.train(not m.linear.training),
    "model.parameters": lambda m: m.linear.weight.requires_grad_(False),
    "model.buffers": lambda m: m.register_buffer("b", torch.ones(1)),
    "model.aliases": lambda m: setattr(m.linear, "weight", nn.Parameter(m.linear.bias.detach()[None])),
    "model.hooks": lambda m: m.register_forward_hook(lambda *args: None),
    "model.attributes.torch.nn.modules.linear.Linear.in_features": lambda m: setattr(
        m.linear, "in_features", 5
    ),
    "model.tensor_attributes": lambda m: setattr(m.linear.weight, "note", 1),
}


@pytest.mark.parametrize("name", EDITS)
def test_each_factor_of_a_model_answers_to_its_own_edit(name):
    model = Net()
    before = factors(model)
    changed = EDITS[name](model)
    after = factors(changed if isinstance(changed, nn.Sequential) else model)
    assert name in differ(before, after)


def test_which_shared_memory_comes_first_says_nothing():
    """Two models alike, whose two groups of views lie the other way round in memory."""
    low, high = sorted((torch.zeros(8), torch.zeros(8)), key=torch.Tensor.data_ptr)
    found = []
    for one, other in ((low, high), (high, low)):
        model = Net()
        model.a, model.part_of_a = one, one[2:4]
        model.b, model.part_of_b = other, other[4:]
        found.append(next(each for each in model_factors(model) if each.name == "model.aliases"))
    assert found[0].value.count(" at ") == 2
    assert found[0] == found[1]


def test_a_class_attribute_set_at_run_time_is_seen(monkeypatch):
    before = factors(Net())
    monkeypatch.setattr(Net, "FLAG", 3, raising=False)
    assert differ(before, factors(Net())) == [f"model.code.{__name__}"]


def test_a_method_replaced_at_run_time_is_seen(monkeypatch):
    before = factors(Net())
    monkeypatch.setattr(Net, "forward", lambda self, x: x)
    assert differ(before, factors(Net())) == [f"model.code.{__name__}"]


def test_code_that_has_run_keeps_its_digest():
    model = Net(double)
    before = factors(model)
    for _ in range(200):
        # Python rewrites hot bytecode in place.
        model(torch.ones(1, 2))
        double(3)
    assert factors(model) == before


def test_values_of_weights_do_not_count():
    model = Net()
    before = factors(model)
    with torch.no_grad():
        model.linear.weight.add_(1)
    assert factors(model) == before


def test_a_model_without_weights_has_the_key_of_one_with_them():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = Net().eval()
    assert factors(fake) == factors(Net().eval())


def test_config_fields_are_factors_of_their_own():
    model, other = Net(), Net()
    model.config, other.config = Options(), Options(rate=0.9)
    assert differ(factors(model), factors(other)) == ["model.config.rate"]


# ---- inputs


def inputs(args, dynamic_shapes=None, kwargs=None):
    kwargs = kwargs or {}

    def forward(x, y=None):
        raise AssertionError

    leaves, spec = tree.flatten((args, kwargs))
    paths = tree.leaf_paths(forward, args, kwargs)
    found = input_factors(list(zip(paths, leaves, strict=True)), tree.dumps(spec), dynamic_shapes)
    return {factor.name: factor.digest for factor in found}


BASE = torch.ones(4, 6)
OTHER_INPUTS = {
    "size": torch.ones(5, 6),
    "rank": torch.ones(4, 6, 1),
    "dtype": torch.ones(4, 6, dtype=torch.float64),
    "device": torch.ones(4, 6, device="meta"),
    "strides": torch.ones(6, 4).t(),
    "expanded": torch.ones(1, 6).expand(4, 6),
    "offset": torch.ones(30)[6:].view(4, 6),
    "a number": 3,
    "nothing": None,
    "a list": [torch.ones(4, 6)],
}


@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_other_metadata_of_an_input_is_another_key(name):
    assert inputs((BASE,)) != inputs((OTHER_INPUTS[name],))


@pytest.mark.parametrize("value", [torch.zeros(4, 6), torch.ones(4, 6, requires_grad=True)])
def test_values_of_input_tensors_do_not_count(value):
    assert inputs((BASE,)) == inputs((value,))


@pytest.mark.parametrize(("one", "two"), [(1, 2), (1, True), (1.0, 1), ("a", "b"), (None, 0)])
def test_values_of_other_inputs_count(one, two):
    assert inputs((BASE, one)) != inputs((BASE, two))


def test_one_tensor_passed_twice_is_another_key():
    assert inputs((BASE, BASE)) != inputs((BASE, BASE.clone()))


def shapes():
    return {"x": {0: Dim("batch", min=1, max=64)}}


def test_the_size_of_a_named_dimension_does_not_count():
    assert inputs((torch.ones(4, 6),), shapes()) == inputs((torch.ones(9, 6),), shapes())
    assert inputs((torch.ones(4, 6),), ({0: Dim("batch", min=1, max=64)},)) == inputs(
        (torch.ones(9, 6),), ({0: Dim("batch", min=1, max=64)},)
    )


@pytest.mark.parametrize(
    "other",
    [
        {"x": {0: Dim("batch", min=1, max=65)}},
        {"x": {1: Dim("batch", min=1, max=64)}},
        {"x": {0: Dim("rows", min=1, max=64)}},
        {"x": {0: Dim.AUTO}},
        {"x": None},
        None,
    ],
)
def test_other_dynamic_shapes_are_another_key(other):
    assert inputs((torch.ones(4, 6),), shapes()) != inputs((torch.ones(4, 6),), other)


def test_sizes_of_hinted_dimensions_count():
    hint = {"x": {0: Dim.AUTO}}
    assert inputs((torch.ones(4, 6),), hint) != inputs((torch.ones(9, 6),), hint)


@pytest.mark.parametrize("size", [0, 1])
def test_sizes_that_export_specialises_on_count(size):
    assert inputs((torch.ones(4, 6),), shapes()) != inputs((torch.ones(size, 6),), shapes())


def test_equal_sizes_of_two_named_dimensions_count():
    named = {"x": {0: Dim("a", min=2, max=64)}, "y": {0: Dim("b", min=2, max=64)}}
    three_four = inputs((torch.ones(3, 6), torch.ones(4, 6)), named)
    assert three_four == inputs((torch.ones(5, 6), torch.ones(8, 6)), named)
    assert three_four != inputs((torch.ones(4, 6), torch.ones(4, 6)), named)


def test_strides_of_a_dynamic_tensor_count():
    assert inputs((torch.ones(4, 6),), shapes()) != inputs((torch.ones(6, 4).t(),), shapes())
    assert inputs((torch.ones(6, 4).t(),), shapes()) != inputs((torch.ones(6, 5).t(),), shapes())


def test_dimensions_are_matched_through_containers():
    batch = Dim("batch", min=1, max=64)
    named = {"x": {"ids": {0: batch}, "mask": [{0: batch}]}}
    one = ({"ids": torch.ones(4, 2), "mask": [torch.ones(4, 2)]},)
    two = ({"ids": torch.ones(7, 2), "mask": [torch.ones(7, 2)]},)
    assert inputs(one, named) == inputs(two, named)


# ---- torch's state, environment, options


def state():
    return {factor.name: factor.digest for factor in torch_state_factors()}


def set_and_restore(module, name, value):
    def change(monkeypatch):
        monkeypatch.setattr(module, name, value)

    return change


STATES = {
    "torch.default_dtype": (
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_dtype(torch.float32),
    ),
    "torch.default_device": (
        lambda: torch.set_default_device("meta"),
        lambda: torch.set_default_device(None),
    ),
    "torch.float32_precision": (
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("highest"),
    ),
    "torch.deterministic": (
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(False),
    ),
    "torch.attention": (
        lambda: torch.backends.cuda.enable_flash_sdp(False),
        lambda: torch.backends.cuda.enable_flash_sdp(True),
    ),
    "torch.backends": (
        lambda: torch.backends.mha.set_fastpath_enabled(False),
        lambda: torch.backends.mha.set_fastpath_enabled(True),
    ),
    "torch.autocast": (
        lambda: torch.set_autocast_enabled("cpu", True),
        lambda: torch.set_autocast_enabled("cpu", False),
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_each_setting_of_torch_has_its_factor(name):
    change, restore = STATES[name]
    before = state()
    change()
    try:
        assert name in differ(before, state())
    finally:
        restore()
    assert state() == before


def test_settings_that_change_no_result_do_not_count():
    before = state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(4)
    with torch.no_grad(), torch.inference_mode():
        inside = state()
    torch.set_num_threads(threads)
    assert inside == before


def test_a_changed_setting_of_inductor_counts_and_one_about_its_work_does_not():
    config = pytest.importorskip("torch._inductor.config")
    before = state()
    with config.patch({"compile_threads": 7}):
        assert state() == before
    with config.patch({"cpp.simdlen": 8}):
        assert differ(before, state()) == ["torch.inductor"]
    assert state() == before


def test_a_setting_of_inductor_whose_name_only_begins_like_a_harmless_one_counts():
    config = pytest.importorskip("torch._inductor.config")
    before = state()
    with config.patch({"debug_index_asserts": True}):
        assert differ(before, state()) == ["torch.inductor"]


def test_options_of_python_that_change_results_count():
    code = "from stitchcache.keys.environment import python_code; print(python_code())"
    said = {}
    for options in ((), ("-O",), ("-OO",), ("-W", "error::UserWarning"), ("-W", "ignore")):
        command = [sys.executable, *options, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        said[options] = done.stdout.strip()
    assert said[("-W", "ignore")] == said[()]
    assert len(set(said.values())) == 4


def test_a_replaced_function_of_torch_counts(monkeypatch):
    before = state()
    monkeypatch.setattr(torch.nn.functional, "gelu", double)
    assert differ(before, state()) == ["torch.patched"]


def environment(backend="aoti", devices=("cpu",)):
    return {factor.name: factor.digest for factor in environment_factors(backend, devices)}


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch.nn.Linear, "forward", double),
        (torch.nn.Module, "__call__", double),
        (torch.nn.RNNBase, "flatten_parameters", double),
        (torch.nn.Transformer, "generate_square_subsequent_mask", staticmethod(double)),
        (torch.nn.ReLU, "forward", torch.nn.GELU.forward),
        (torch.nn.ReLU, "forward", functools.partialmethod(double)),
        (torch, "relu", torch.sigmoid),
        (torch, "relu", functools.partial(double)),
        (torch.linalg, "norm", torch.linalg.det),
        (torch.nn.functional, "silu", torch.nn.functional.gelu),
        (torch.Tensor, "foo", double),
    ],
)
def test_a_replaced_method_of_torch_counts(monkeypatch, owner, name, value):
    before = state()
    monkeypatch.setattr(owner, name, value, raising=False)
    assert differ(before, state()) == ["torch.patched"]


def test_a_model_of_transformers_made_before_changes_no_factor():
    """It leaves a method of its own on ``torch.nn.Module``."""
    transformers = pytest.importorskip("transformers")
    before = state()
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.nn.Module, "smart_apply", raising=False)
        without = state()
        transformers.LlamaModel(transformers.LlamaConfig(vocab_size=8, **size))
        assert hasattr(torch.nn.Module, "smart_apply")
        assert differ(without, state()) == []
    assert differ(before, state()) == []


@pytest.mark.parametrize(
    "variable",
    [
        "TORCHINDUCTOR_FREEZING",
        "ATEN_CPU_CAPABILITY",
        "TRITON_F32_DEFAULT",
        "TORCHINDUCTOR_PROLOGUE_FUSION",
        "AOT_INDUCTOR_DEBUG_INTERMEDIATE_VALUE_PRINTER",
        "TORCHINDUCTOR_CACHE_SDPA_CONSTRAINT",
        "TORCHINDUCTOR_TRITON_PROTON_PROFILING",
        "TORCHINDUCTOR_BENCHMARK_KERNEL",
        "TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS",
        "TORCHINDUCTOR_A_NEW_ONE_ABOUT_LOG",
    ],
)
def test_variables_that_change_code_count(monkeypatch, variable):
    before = environment()
    monkeypatch.setenv(variable, "odd")
    assert differ(before, environment()) == ["env.variables"]


@pytest.mark.parametrize(
    "variable",
    ["HOME", "HOSTNAME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_PTXAS_PATH", "USER"],
)
def test_variables_that_say_where_do_not_count(monkeypatch, variable):
    before = environment()
    monkeypatch.setenv(variable, "/odd")
    assert environment() == before


def test_backends_have_the_factors_that_matter_to_them():
    assert "env.cpu" in environment("aoti")
    assert "env.cpu" not in environment("eager")
    assert "env.python" in environment("eager")
    assert "env.python" not in environment("aoti")
    assert "env.gpu" not in environment()


def test_gpus_are_known_by_name_each_once(monkeypatch):
    kind = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, gcnArchName="gfx942")
    other = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, gcnArchName="gfx942")
    visible = [kind, other, kind]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: visible[index])
    monkeypatch.setattr(torch.version, "hip", None)
    found = {factor.name: factor for factor in environment_factors("aoti", {"cuda"})}
    assert found["env.gpu"].value == "NVIDIA H100 80GB HBM3 NVIDIA H200"
    monkeypatch.setattr(torch.version, "hip", "6.3")
    on_rocm = {factor.name: factor for factor in environment_factors("aoti", {"cuda"})}
    assert on_rocm["env.gpu"].value == "gfx942"


def test_another_processor_is_another_key(monkeypatch):
    from stitchcache.keys import environment as module

    before = environment()
    monkeypatch.setattr(module, "_cpu_flags", lambda: iter(["avx2"]))
    assert differ(before, environment()) == ["env.cpu"]


def target(model=None, **changes):
    given = {
        "model": model or Net().eval(),
        "leaves": [("x", torch.ones(3, 2))],
        "tree": "tree",
        "dynamic_shapes": None,
        "splitting_ops": ["aten::mm"],
        "size_ranges": None,
        "backend": "aoti",
        "options": {},
        "key_factors": None,
    }
    return target_key(**{**given, **changes})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("options.backend", {"backend": "eager"}),
        ("options.splitting_ops", {"splitting_ops": ["aten::mm", "aten::add"]}),
        ("options.size_ranges", {"size_ranges": [SizeRange(1, 4)]}),
        ("options.backend.max_autotune", {"options": {"max_autotune": True}}),
        ("user.revision", {"key_factors": {"revision": 7}}),
    ],
)
def test_options_are_factors(name, change):
    one, two = target(), target(**change)
    assert one.key != two.key
    assert name in explain_differences(one.factors, two.factors)


def test_the_order_of_splitting_ops_does_not_count():
    assert target(splitting_ops=["a", "b"]).key == target(splitting_ops=("b", "a", "a")).key


def test_an_option_that_is_no_plain_value_is_an_error():
    with pytest.raises(OptionError, match="key_factors"):
        target(key_factors={"lock": threading.Lock()})


def test_explanations_name_old_and_new():
    one, two = target(Net(1).eval()), target(Net(2).eval())
    assert explain_differences(one.factors, two.factors) == {
        f"model.attributes.{__name__}.Net.value": ("1", "2")
    }
    assert explain_differences(one.factors, one.factors) == {}
    absent = explain_differences(one.factors, one.factors[1:])
    assert absent == {one.factors[0].name: (one.factors[0].value, "(absent)")}


def test_values_that_read_alike_are_told_apart():
    one, two = target(Net({"a": 1}).eval()), target(Net({"a": 2}).eval())
    ((old, new),) = explain_differences(one.factors, two.factors).values()
    assert old != new


def test_names_of_factors_are_unique():
    names = [factor.name for factor in target().factors]
    assert len(names) == len(set(names))


def test_no_key_inside_of_a_mode_or_under_hooks_for_all():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Mode():
        assert "Mode" in target().reason
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert "hooks" in target().reason
    finally:
        handle.remove()
    assert target().reason is None


@pytest.mark.filterwarnings("ignore:Warning only once")
@pytest.mark.parametrize(("module", "named"), [("torch._native.ops.bmm", []), ("mine", ["bmm"])])
def test_kernels_that_torch_itself_registers_in_a_build_for_cuda_are_its_own(monkeypatch, module, named):
    registry = pytest.importorskip("torch._native.registry")
    kernel = SimpleNamespace(__module__=module)
    node = SimpleNamespace(op_symbol="bmm", dispatch_key="CUDA", impl_fn=kernel)
    monkeypatch.setitem(registry._graphs, "bmm", [node])
    monkeypatch.setattr(torch.library, "_impls", {*torch.library._impls, "aten/bmm/CUDA"})
    assert replaced_kernels() == named


def test_no_key_where_a_kernel_of_torchs_was_replaced():
    assert tracing_obstacle() is None
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("relu", lambda x: x * 0 + 7, "CPU")
        assert "aten::relu" in tracing_obstacle()
    finally:
        library._destroy()
    assert tracing_obstacle() is None
