"""Both sides run from the same state, and all that they write is put back."""

import random
import sys
import types

import pytest
import torch
from torch import nn

import stitchcache
from stitchcache.compare import Beside, disagreement, judged, measure, unchanged, unlike
from stitchcache.torchside.watch import _EITHER, _HARMLESS, _VIEW, StoppedError, Watch, memory_of
from stitchcache.types import OutputBound


@pytest.fixture(autouse=True)
def _nothing_compiled_before(monkeypatch):
    """No look is a quick one where Dynamo has compiled something, as another file's tests may have."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is not None:
        monkeypatch.delitem(dynamo.counters, "frames", raising=False)


def run_both(model, subject, args, kwargs, times=1, **options):
    return Beside(model, args, kwargs, **options).run(subject, times)


_library = torch.library.Library("looktest", "DEF")
_library.define("log(Tensor x) -> ()")
_library.define("counted(Tensor x) -> Tensor")
CALLS: list[str] = []
_library.impl("log", lambda x: CALLS.append("log"), "CompositeExplicitAutograd")
_library.impl("counted", lambda x: CALLS.append("counted") or x + len(CALLS), "CompositeExplicitAutograd")


class Holder:
    """A plain object, as Hugging Face's static cache is one."""

    def __init__(self) -> None:
        self.keys = torch.zeros(4, 2)


class Writer(nn.Module):
    """Writes in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("grown", torch.zeros(2))
        self.plain = torch.zeros(2)
        self.holder = Holder()
        self.calls, self.seen, self.table = 0, [], {}
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x, out):
        self.calls += 1
        self.seen.append(self.calls)
        self.table["last"] = x
        self.count += 1
        self.plain.add_(1)
        self.holder.keys[1:3] += x
        self.weight.mul_(2)
        self.grown = torch.cat([self.grown, x[0]])
        self.inner.train()
        out.copy_(x * self.count + torch.rand(2, generator=self.generator) + torch.rand(2) + random.random())
        self.latest = out
        own = x * 2
        own.add_(1)
        return {"own": own, "count": self.count, "out": out[:1]}


def _state(model):
    tensors = [model.weight, model.count, model.grown, model.plain, model.holder.keys]
    plain = (model.calls, list(model.seen), dict(model.table), hasattr(model, "latest"))
    return (
        [t.detach().clone() for t in tensors],
        plain,
        [m.training for m in model.modules()],
        list(vars(model)),
    )


def _same(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


def test_all_that_a_forward_writes_is_put_back():
    model, x, out = Writer().eval(), torch.ones(2, 2), torch.zeros(2, 2)
    torch.manual_seed(1)
    random.seed(1)
    before, objects = _state(model), (model.grown, model.weight, model.count)
    generators = torch.get_rng_state(), random.getstate(), model.generator.get_state()
    with torch.no_grad():
        both = run_both(model, model, (x, out), {})
    assert not both.fails
    assert not both.unchecked
    assert both.drew
    # The second run started from the same state, so it gave the same.
    assert {item.name: disagreement(item) for item in both.items} == {
        "output['own']": "",
        "output['count']": "",
        "output['out']": "",
        "input:out": "",
        "buffer:count": "",
        "buffer:grown": "has shape (2,) instead of (4,)",
        "parameter:weight": "",
        "attribute:plain": "",
        "attribute:holder.keys": "",
    }
    _same(before, _state(model))
    assert all(a is b for a, b in zip(objects, (model.grown, model.weight, model.count), strict=True))
    assert torch.equal(out, torch.zeros(2, 2))
    assert torch.equal(x, torch.ones(2, 2))
    after = torch.get_rng_state(), random.getstate(), model.generator.get_state()
    assert torch.equal(generators[0], after[0])
    assert generators[1] == after[1]
    assert torch.equal(generators[2], after[2])


def test_put_back_after_an_error_too():
    class Fails(Writer):
        def forward(self, x, out):
            super().forward(x, out)
            raise ValueError("half way")

    model, out = Fails().eval(), torch.zeros(2, 2)
    before = _state(model)
    both = run_both(model, model, (torch.ones(2, 2), out), {})
    assert both.fails == "the model itself raises ValueError: half way"
    _same(before, _state(model))
    assert torch.equal(out, torch.zeros(2, 2))


def test_an_interrupt_puts_back_and_passes():
    class Stopped(Writer):
        def forward(self, x, out):
            super().forward(x, out)
            raise KeyboardInterrupt

    model = Stopped().eval()
    before = _state(model)
    with pytest.raises(KeyboardInterrupt):
        run_both(model, model, (torch.ones(2, 2), torch.zeros(2, 2)), {})
    _same(before, _state(model))


def test_what_only_the_other_side_writes_is_seen_and_put_back():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(3))

        def forward(self, x):
            return x + self.cache

    model, x = Reads().eval(), torch.ones(3)

    def other(x):
        result = x + model.cache
        model.cache.add_(1)
        return result

    both = run_both(model, other, (x,), {}, writes={"buffer:cache": model.cache})
    assert [(item.name, disagreement(item) != "") for item in both.items] == [
        ("output", False),
        ("buffer:cache", True),
    ]
    assert torch.equal(model.cache, torch.zeros(3))


def test_arguments_that_share_memory_stay_shared():
    class Adds(nn.Module):
        def forward(self, x, y):
            x.add_(1)
            return x is y, y * 2

    x = torch.zeros(3)
    seen = []
    both = run_both(
        Adds().eval(), lambda a, b: (seen.append(a is b), a.add_(1), (True, b * 2))[2], (x, x), {}
    )
    assert seen == [True]
    assert not any(map(disagreement, both.items))
    assert torch.equal(x, torch.zeros(3))


def test_containers_in_arguments_are_not_changed():
    class Pops(nn.Module):
        def forward(self, batch):
            return batch.pop("x") + 1

    batch = {"x": torch.ones(2)}
    both = run_both(Pops().eval(), Pops().eval(), (batch,), {})
    assert list(batch) == ["x"]
    assert not any(map(disagreement, both.items))


def test_structure_and_errors_are_told():
    class Pair(nn.Module):
        def forward(self, x):
            return {"a": x, "b": None}

    model, x = Pair().eval(), torch.ones(2)
    assert (
        run_both(model, lambda x: [x], (x,), {}).fails
        == "the result is list of 1 leaves instead of dict of 2 leaves"
    )
    failing = run_both(model, lambda x: 1 // 0, (x,), {})
    assert failing.fails.startswith("the model returns, and the compiled one raises ZeroDivisionError")

    def refuses(x):
        raise stitchcache.errors.InputMismatchError("argument x: expected 3, got 2.", argument="x")

    assert run_both(model, refuses, (x,), {}).unchecked.startswith("the example does not fit")


def test_an_op_that_only_acts_is_not_run():
    class Logs(nn.Module):
        def forward(self, x):
            try:
                torch.ops.looktest.log(x)
            except RuntimeError:
                return x
            return x

    CALLS.clear()
    model, x = Logs().eval(), torch.ones(2)
    assert "looktest.log" in run_both(model, model, (x,), {}).unchecked
    assert CALLS == []
    assert run_both(model, model, (x,), {}, effects={"looktest::log": False}).unchecked == ""
    assert CALLS == ["log", "log"]


def test_an_op_that_the_user_names_is_not_run():
    class Counts(nn.Module):
        def forward(self, x):
            return torch.ops.looktest.counted(x)

    CALLS.clear()
    model, x = Counts().eval(), torch.ones(2)
    assert (
        "looktest.counted" in run_both(model, model, (x,), {}, effects={"looktest::counted": True}).unchecked
    )
    assert CALLS == []


def test_beside_the_users_calls_no_shared_state_is_written():
    model = Writer().eval()
    before = _state(model)
    both = run_both(model, model, (torch.ones(2, 2), torch.zeros(2, 2)), {}, apart=True)
    assert "outlives the call" in both.unchecked
    _same(before, _state(model))

    class Draws(nn.Module):
        def forward(self, x):
            return x + torch.rand(2)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert "random" in run_both(Draws().eval(), Draws().eval(), (torch.ones(2),), {}, apart=True).unchecked
    assert torch.equal(state, torch.get_rng_state())


def test_numpy_draws_are_put_back():
    np = pytest.importorskip("numpy.random")

    class Draws(nn.Module):
        def forward(self, x):
            return x + float(np.rand())

    np.seed(0)
    before = np.get_state()[1].copy()
    both = run_both(Draws().eval(), Draws().eval(), (torch.ones(2),), {})
    assert not any(map(disagreement, both.items))
    assert (np.get_state()[1] == before).all()


def test_inference_tensors_can_be_written():
    class Adds(nn.Module):
        def forward(self, x):
            return x.add_(1)

    with torch.inference_mode():
        x = torch.zeros(2)
    both = run_both(Adds().eval(), Adds().eval(), (x,), {})
    assert not both.fails
    assert torch.equal(x, torch.zeros(2))


def test_a_running_statistic_is_a_write():
    model = nn.BatchNorm1d(2).train()
    before = model.running_mean.clone()
    both = run_both(model, model, (torch.randn(4, 2),), {})
    assert "buffer:running_mean" in {item.name for item in both.items}
    assert torch.equal(model.running_mean, before)


QUICK = """
import json, sys
import torch
from stitchcache.compare import Beside, disagreement

class Normalizes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        x = x.reshape(2, 3, 4).contiguous()
        x += 1
        return torch.nn.functional.instance_norm(x, self.mean, self.var, use_input_stats=True)

class Differentiates(torch.nn.Module):
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((x ** 3).sum(), x)[0].detach()

model, x = Normalizes().eval(), torch.randn(2, 12)
before, found = [value.clone() for value in (*model.buffers(), x)], {}
for quick in (True, False):
    both = Beside(model, (x,), {}, quick=quick).run(model)
    agreed = not both.fails and not any(map(disagreement, both.items))
    back = all(map(torch.equal, before, (*model.buffers(), x)))
    found[f"written {quick}"] = [agreed, back, sorted(item.name for item in both.items)]
    both = Beside(Differentiates(), (x,), {}, quick=quick).run(lambda x: 3 * x ** 2)
    found[f"autograd {quick}"] = both.fails or both.unchecked
print(json.dumps([found, "torch._dynamo" in sys.modules]))
"""


def test_a_quick_look_sees_what_is_written(fresh_process):
    found, compiler = fresh_process(QUICK)
    assert not compiler
    # instance_norm is made of other ops, and its schema denies what it writes.
    written = [True, True, ["buffer:mean", "buffer:var", "input:x", "output"]]
    assert found["written True"] == found["written False"] == written
    assert found["autograd True"] == found["autograd False"] == ""


def _added_in_cpp(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1)


def _through_a_view(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(4).contiguous().view(2, 2).transpose(0, 1)[0].add_(1)


@pytest.mark.parametrize(
    "write",
    [
        # Torch's interpreter of TorchScript calls ops from C++.
        torch.jit.script(_added_in_cpp),
        _through_a_view,
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch.ops.aten.add_(x, 1),
        lambda x: x.to(torch.float32).mul_(2),
        lambda x: nn.functional.relu(x, inplace=True),
        lambda x: x.__setitem__(0, 2.0) or x,
        lambda x: torch.vmap(lambda row: row.mul_(2))(x),
    ],
)
def test_a_quick_look_puts_hidden_tensors_back(write):
    hidden, x = -torch.ones(2, 2), torch.ones(2, 2)

    class Hides(nn.Module):
        def forward(self, x):
            y = x + 1
            y += 1
            return write(hidden) + y

    both = Beside(Hides().eval(), (x,), {}, quick=True).run(lambda x: x)
    assert torch.equal(hidden, -torch.ones(2, 2))
    assert [item.name for item in both.items if "no argument" in item.name]
    # What the forward itself has made is not taken for a tensor from outside.
    assert len(both.items) == 2


def test_a_quick_look_hides_nothing_from_the_models_own_mode():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Doubles(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result * 2 if func is torch.ops.aten.add.Tensor else result

    class Model(nn.Module):
        def forward(self, x):
            with Doubles():
                return x + x

    both = Beside(Model().eval(), (torch.ones(2),), {}, quick=True).run(lambda x: 4 * x)
    assert not both.fails
    assert not any(map(disagreement, both.items))


def test_a_quick_look_leaves_attention_to_another():
    # It goes the fast way only where nobody sees the functions.
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    args = (torch.randn(2, 3, 8),)
    assert Beside(model, args, {}, quick=True).run(model).unchecked
    assert not Beside(model, args, {}).run(model).unchecked


def test_harmless_functions_return_what_is_noted_of_them():
    x = torch.rand(4, 4) + 0.5
    two = "linear matmul add sub mul div eq ne lt le gt ge type_as __eq__ view_as expand_as"
    given = {
        **dict.fromkeys(two.split(), (x,)),
        **dict.fromkeys(("layer_norm", "rms_norm"), ((4,),)),
        **{"softmax": (-1,), "pow": (1,), "clamp": (0, 9), "cumsum": (0,), "masked_fill": (x > 9, 0)},
        **{"gather": (0, torch.zeros(4, 4).long()), "transpose": (0, 1), "permute": (0, 1), "expand": (4, 4)},
        **{"view": (16,), "unsqueeze": (0,), "chunk": (1,), "narrow": (0, 0, 4), "select": (0, 0)},
        **{"reshape": (16,), "to": (torch.float32,), "__getitem__": (0,), "where": (x > 1, x)},
        **dict.fromkeys(("new_ones", "new_zeros"), ((2,),)),
    }
    alone = {
        **dict.fromkeys(("arange", "zeros", "ones", "empty"), (4,)),
        **dict.fromkeys(("cat", "stack"), ([x],)),
        **dict.fromkeys(("bmm", "conv1d"), (x[None], x[None])),
        **dict.fromkeys(("__and__", "__or__"), (x > 1, x > 1)),
        **{"full": ((4,), 1), "conv2d": (x[None, None], x[None, None])},
        **{"item": (x[0, 0],), "__bool__": (x[0, 0],), "embedding": (x, torch.zeros(3).long())},
        "__invert__": (x > 1,),
        "scaled_dot_product_attention": (x[None], x[None], x[None]),
    }
    for name, returns in _HARMLESS.items():
        places = (torch.Tensor, torch, torch._C._nn, nn.functional)
        function = next(getattr(place, name) for place in places if hasattr(place, name))
        args = alone.get(name) or (x, *given.get(name, ()))
        results = function(*args)
        memories = {memory_of(arg) for arg in args if isinstance(arg, torch.Tensor)}
        for result in results if isinstance(results, (list, tuple)) else [results]:
            if not isinstance(result, torch.Tensor):
                assert name in ("item", "__bool__")
                continue
            assert returns == _EITHER or (memory_of(result) in memories) == (returns == _VIEW), name


def test_values_too_far_apart_for_32_bits_are_measured():
    want = torch.full((100,), 3e38)
    got = want.clone()
    got[0] = -3e38
    found = measure("output", want, got)
    assert (found.difference, found.magnitude) == (pytest.approx(6e38), pytest.approx(3e38))
    assert found.spread == pytest.approx(0.2)
    assert str(measure("output", want, want).difference) == "0.0"


@pytest.mark.parametrize("norm", [1.0, 0.0])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_quick_look_sees_functions_that_write_or_draw_as_they_are_called(by_keyword, norm):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.full((3, 4), 9.0))

        def forward(self, ids, q):
            if by_keyword:
                rows = nn.functional.embedding(ids, self.table, max_norm=norm)
                return rows, nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
            rows = nn.functional.embedding(ids, self.table, None, norm)
            return rows, nn.functional.scaled_dot_product_attention(q, q, q, None, 0.5)

    model, args = Model().eval(), (torch.tensor([0, 2]), torch.rand(1, 2, 4, 4))
    both = Beside(model, args, {}, quick=True).run(model)
    assert both.drew
    assert "parameter:table" in [item.name for item in both.items]
    assert bool((model.table == 9.0).all())
    assert not any(map(disagreement, both.items))


def test_cond_runs_under_the_watch():
    class Cond(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    with torch.no_grad():
        both = run_both(Cond().eval(), lambda x: x + 1, (torch.ones(2),), {})
    assert not both.fails
    assert not any(map(disagreement, both.items))


def test_watch_imports_nothing_more(fresh_process):
    result = fresh_process("""
        import json, sys, torch
        from stitchcache.torchside.watch import Watch
        model, x = torch.nn.Linear(2, 2), torch.ones(2)
        with torch.no_grad():
            model(x)
            before = set(sys.modules)
            with Watch({}):
                model(x)
        print(json.dumps(sorted(set(sys.modules) - before)))
    """)
    assert result == []


def test_watch_in_one_thread_is_not_seen_elsewhere():
    from torch.utils import _python_dispatch

    with Watch({}):
        assert not _python_dispatch.is_in_torch_dispatch_mode()


def test_stopped_is_an_ordinary_error():
    with pytest.raises(StoppedError), Watch({}, draw=False):
        torch.rand(2)


@pytest.mark.parametrize(
    ("want", "got", "wrong"),
    [
        (torch.ones(3), torch.ones(3) + 1e-6, False),
        (torch.ones(3), torch.ones(3) + 1e-3, True),
        (torch.full((3,), 1000.0), torch.full((3,), 1000.01), False),
        (torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16) * 1.01, False),
        (torch.ones(3), torch.ones(3, dtype=torch.float64), True),
        (torch.ones(3), torch.ones(1, 3), True),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), False),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 0.0]), True),
        (torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("nan")]), True),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, float("-inf")]), True),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, float("inf")]), False),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), True),
        (torch.tensor([True]), torch.tensor([False]), True),
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), True),
        (torch.empty(0), torch.empty(0), False),
        (torch.zeros(3), torch.zeros(3), False),
        (None, None, False),
        (1, 1.0, True),
        (float("nan"), float("nan"), False),
        ("a", "b", True),
        (1, torch.ones(1), True),
    ],
)
def test_what_counts_as_the_same(want, got, wrong):
    assert bool(disagreement(measure("output", want, got))) is wrong


def test_the_measure_of_the_cold_compile_widens_the_bounds():
    item = measure("output", torch.ones(3), torch.ones(3) + 2e-3)
    assert disagreement(item)
    assert not disagreement(item, OutputBound(name="output", difference=1e-3, magnitude=1.0))
    # ... relative to what values are now, and not without end.
    large = measure("output", torch.full((3,), 50.0), torch.full((3,), 50.1))
    assert not disagreement(large, OutputBound(name="output", difference=1e-3, magnitude=1.0))
    assert disagreement(
        measure("output", torch.ones(3), -torch.ones(3)),
        OutputBound(name="output", difference=0.2, magnitude=1.0),
    )


def test_small_values_count_where_the_cold_compile_saw_them_exactly():
    def bound(difference, magnitude):
        return OutputBound(name="output", difference=difference, magnitude=magnitude)

    small = torch.full((3,), 2e-8)
    item = measure("output", small, small * 3)
    assert not disagreement(item), "it may be noise around zero"
    assert disagreement(item, bound(1e-15, 2e-8))
    assert not disagreement(item, bound(1e-8, 2e-8)), "it was noise"
    assert not disagreement(item, bound(0.0, 0.0)), "nothing is known"
    assert not disagreement(measure("output", small, small * (1 + 1e-6)), bound(1e-15, 2e-8))


def test_a_zero_has_a_sign():
    assert unlike(0.0, -0.0) == "is -0.0 instead of 0.0"
    assert unlike(float("nan"), float("nan")) == ""


def test_models_in_modules_without_a_forward_signature():
    module = types.ModuleType("looktest_module")
    sys.modules[module.__name__] = module

    class Any_(nn.Module):
        def forward(self, *args, **kwargs):
            args[0].add_(1)
            return args[0]

    x = torch.zeros(2)
    both = run_both(Any_().eval(), Any_().eval(), (x,), {})
    assert [item.name for item in both.items] == ["output", "input:args[0]"]
    del sys.modules[module.__name__]


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("there", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.plain = [torch.zeros(2)]
        self.calls = 0

    def forward(self, x):
        self.there.add_(x)
        self.replaced = self.replaced + x
        self.plain[0].add_(x)
        self.calls += 1
        self.new = x
        return x


@pytest.mark.parametrize("inference", [False, True])
def test_what_a_block_wrote_is_put_back(inference):
    with torch.inference_mode(inference):
        model = Keeps()
    before = [model.there, model.replaced, model.plain[0]]
    with unchanged(model), torch.inference_mode(inference):
        model(torch.ones(2))
    after = [model.there, model.replaced, model.plain[0]]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert not any(tensor.any() for tensor in after)
    assert model.calls == 0
    assert not hasattr(model, "new")


class Turns(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return getattr(x, self.how[0])(*self.how[1:]) * 2


@pytest.mark.parametrize("how", [("t_",), ("resize_", 1, 2), ("resize_", 4, 5), ("unsqueeze_", 0)])
@pytest.mark.parametrize("both", [True, False])
def test_sizes_and_strides_are_put_back(how, both):
    model, x = Turns(how).eval(), torch.arange(6.0).reshape(2, 3)
    # What resize_ adds has no defined values.
    found = run_both(model, model if both else lambda x: x * 2, (x,), {})
    assert not found.unchecked
    assert both is not any("shape" in item.fact for item in found.items)
    assert (x.shape, x.stride()) == ((2, 3), (3, 1))
    assert torch.equal(x, torch.arange(6.0).reshape(2, 3))


def test_other_memory_in_an_argument_is_no_look():
    x = torch.arange(6.0).reshape(2, 3)
    model = Turns(("set_", torch.ones(2))).eval()
    assert "set_" in run_both(model, model, (x,), {}).unchecked
    assert torch.equal(x, torch.arange(6.0).reshape(2, 3))


def test_sizes_of_views_that_the_forward_makes_are_its_own():
    class Views(nn.Module):
        def forward(self, x):
            return x[0].unsqueeze_(0)

    model = Views().eval()
    both = run_both(model, model, (torch.ones(2, 3),), {})
    assert [(item.name, disagreement(item)) for item in both.items] == [("output", ""), ("input:x", "")]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_what_only_the_other_side_moves_is_put_back(quick, raises):
    """Such as an op that counts its calls in Python, in an entry that is served wrongly."""

    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(2))
            self.calls = 0

        def forward(self, x):
            return 2 * x

    def other(x):
        model.calls += 1
        model.last = x
        if raises:
            raise ValueError("half way")
        return 2 * x

    model = Doubles().eval()
    last, beside = model.last, Beside(model, (torch.ones(2),), {}, quick=quick)
    for again in (False, True):
        both = beside.run(other, again=again)
        assert bool(both.fails) is raises
        assert not both.moved
        assert model.calls == 0
        assert model.last is last


@pytest.mark.parametrize("times", [1, 2])
def test_the_last_of_several_calls_is_compared(times):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    model = Counts().eval()
    both = run_both(model, lambda x: x, (torch.ones(2),), {}, times=times)
    assert bool(disagreement(both.items[0])) is (times == 2)
    assert both.moved
    assert model.calls == 0


def test_another_subject_is_judged_by_what_the_model_gave_before():
    calls = []

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(2))

        def forward(self, x):
            calls.append(1)
            self.total += x
            return self.total * 2

    def subject(x, more=0.0):
        model.total += x + more
        return model.total * 2

    model, x = Counter().eval(), torch.ones(2)
    beside = Beside(model, (x,), {})
    assert judged(beside.run(subject)).state == "agreed"
    for more, state in ((0.0, "agreed"), (1.0, "mismatch"), (0.0, "agreed")):
        both = beside.run(lambda x, more=more: subject(x, more), again=True)
        assert judged(both).state == state
        assert model.total.tolist() == [0, 0]
    assert len(calls) == 1


class Packs(nn.Module):
    """Saves for autograd through hooks of its own, which write a tensor that no module has."""

    def __init__(self, hidden):
        super().__init__()
        self.linear, self.hidden = nn.Linear(3, 3), hidden

    def forward(self, x):
        def pack(saved):
            self.hidden[0].fill_(float(saved.numel()))
            return saved

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            return self.linear(x).exp().detach()


def test_a_quick_look_sees_the_hooks_of_autograd():
    hidden = [torch.zeros(1)]
    model = Packs(hidden).eval()
    both = Beside(model, (torch.ones(2, 3),), {}, quick=True).run(model)
    assert judged(both).state == "agreed"
    assert hidden[0].item() == 0.0


def test_a_look_beside_the_callers_own_mode_is_no_quick_one():
    hidden = torch.zeros(1)

    class Notes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.exp:
                hidden.add_(1.0)
            return func(*args, **(kwargs or {}))

    class Exp(nn.Module):
        def forward(self, x):
            return torch.exp(x)

    with Notes():
        both = Beside(Exp(), (torch.ones(2),), {}, quick=True).run(Exp())
    assert judged(both).state == "agreed"
    assert hidden.item() == 0.0


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("size", [0, 7])
def test_memory_that_grows_is_no_longer_read(size, quick):
    """It is put back to its size, and what the model made of it lies beyond that."""
    scratch = torch.zeros(size)

    class Grows(nn.Module):
        def forward(self, x):
            scratch.resize_(x.numel())
            scratch.copy_(x.reshape(-1))
            return x + 1

    both = Beside(Grows(), (torch.ones(3000),), {}, quick=quick).run(lambda x: x + 1)
    assert both.unchecked == "the model resizes memory that is no argument and no buffer"
    assert scratch.shape == (size,)
    assert scratch.untyped_storage().nbytes() == 4 * size
