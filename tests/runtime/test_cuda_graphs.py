"""CUDA graphs without a GPU: a recorder that writes ops down, and repeats them on the same memory."""

from __future__ import annotations

import threading

import models
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import stitchcache
from stitchcache import CudaGraphs, Dim
from stitchcache.errors import OptionError
from stitchcache.runtime import build_call, link
from stitchcache.runtime.cuda_graphs import Graphs


class Tape(TorchDispatchMode):
    """Ops as a graph has them: what writes is not run while it is recorded."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            value = kwargs.get("out", args[0]) if func._schema.returns else None
        else:
            value = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, value))
        return value

    def replay(self):
        for func, args, kwargs, before in self.ops:
            now = func(*args, **kwargs)
            pairs = zip(before, now, strict=True) if isinstance(before, (list, tuple)) else [(before, now)]
            for kept, new in pairs:
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class Recorder:
    """Stands in for ``torchside.cuda.Recorder``."""

    fails = False
    step = 100

    def __init__(self, index):
        assert index == 0
        self.memory, self.tape = 0, None

    def begin(self):
        self.tape = Tape()
        self.tape.__enter__()

    def end(self):
        tape, self.tape = self.tape, None
        tape.__exit__(None, None, None)
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.memory += self.step
        return tape.replay

    def abandon(self):
        if self.tape is not None:
            self.tape.__exit__(None, None, None)
            self.tape = None

    def taken(self):
        return self.memory

    def stream(self):
        return 0

    def current(self):
        return None

    def recorded_by_others(self):
        return False

    def borrow(self, tensor):
        return tensor


@pytest.fixture
def graphed(tmp_path):
    """A model whose calls are recorded, and its graphs."""

    def make(model, *args, wanted=None, recorder=Recorder, **options):
        cache = stitchcache.Cache(tmp_path / "cache")
        options = {"backend": "eager", **options}
        compiled = stitchcache.compile(model.eval(), args, cache=cache, check="none", **options)
        artifact, tensors = compiled.artifact, compiled._tensors

        def linked(around):
            return link(artifact, compiled._pieces, tensors, compiled._objects, around)

        wanted = wanted or CudaGraphs()
        graphs = Graphs(wanted, artifact, tensors.values(), linked, {}, recorder, kind="cpu")
        call = build_call(graphs.call, artifact, tensors, model.forward, compiled._objects)
        return call, graphs

    return make


def rows(least=1, most=64):
    return {0: Dim("rows", least, most)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize(("mode", "count"), [("pieces", 3), ("whole", 1)])
def test_the_second_call_is_recorded_and_the_next_replayed(graphed, mode, count):
    model = models.decoder()
    options = models.decoder_options()
    call, graphs = graphed(model, models.ids(), wanted=CudaGraphs(mode=mode), **options)
    for number in range(4):
        for size in ((2, 8), (3, 5)):
            ids = models.ids(*size) + number % 2
            torch.testing.assert_close(call(ids), model(ids))
        assert [record.graphs for record in graphs.records] == ([count, count] if number else [])
    assert {record.sizes for record in graphs.records} == {((2, 8),), ((3, 5),)}
    assert not graphs.due


@pytest.mark.parametrize("name", ["inside", "outside"])
def test_a_custom_op_is_recorded_only_where_the_user_says_so(graphed, name):
    inside = ["stitchtest::attention.default"] if name == "inside" else []
    call, graphs = graphed(
        models.decoder(), models.ids(), wanted=CudaGraphs(inside=inside), **models.decoder_options()
    )
    for _ in range(2):
        call(models.ids())
    assert graphs.records[0].graphs == (1 if inside else 3)


def test_sizes_that_get_no_graph(graphed):
    model = Net()
    call, graphs = graphed(model, torch.randn(4, 4), wanted=CudaGraphs([2, 4]), dynamic_shapes=(rows(),))
    for _ in range(3):
        for size in (2, 3, 5):
            x = torch.randn(size, 4)
            torch.testing.assert_close(call(x), model(x))
    assert [record.sizes for record in graphs.records] == [((2, 4),)]


class Sums(nn.Module):
    """Rows do not mix, but what is behind them would show in a sum."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        y = x + 1
        self.seen.copy_(torch.nn.functional.pad(x[:, 0], (0, 8 - x.shape[0])))
        return y, x.sum()


def test_smaller_sizes_are_padded_with_zeros(graphed):
    model = Net()
    wanted = CudaGraphs([4, 8], pad=True)
    call, graphs = graphed(model, torch.randn(4, 4), wanted=wanted, dynamic_shapes=(rows(),))
    for _ in range(3):
        for size in (8, 3, 7, 1, 4, 9):
            x = torch.randn(size, 4)
            got = call(x)
            assert got.shape == (size, 4)
            torch.testing.assert_close(got, model(x))
    assert {record.sizes for record in graphs.records} == {((8, 4),), ((4, 4),)}


def test_nothing_of_a_longer_call_is_left_behind_a_shorter_one(graphed):
    class Sum(nn.Module):
        def forward(self, x):
            return x * 2, x.sum()

    call, graphs = graphed(
        Sum(), torch.ones(4, 2), wanted=CudaGraphs([8], pad=True), dynamic_shapes=(rows(2),)
    )
    for size in (8, 8, 3, 3, 3, 5, 5, 2, 2, 8, 3):
        assert call(torch.ones(size, 2))[1] == 2 * size
    assert len(graphs.records) == 1


def test_weights_are_read_where_they_are(graphed):
    model = Net()
    call, graphs = graphed(model, torch.randn(3, 4))
    x = torch.randn(3, 4)
    for step in range(6):
        torch.testing.assert_close(call(x), model(x))
        with torch.no_grad():
            model.first.weight.add_(0.5)
            if step == 3:
                model.second.weight.data = model.second.weight.data.clone() + 1
    assert len(graphs.records) == 1


def test_state_is_written_once_a_call(graphed):
    model, twin = models.Counter(), models.Counter()
    call, graphs = graphed(model, torch.randn(2, 3))
    for _ in range(5):
        x = torch.randn(2, 3)
        torch.testing.assert_close(call(x), twin(x))
        torch.testing.assert_close(model.calls, twin.calls)
        torch.testing.assert_close(model.mean, twin.mean)
    assert len(graphs.records) == 1


def test_arguments_that_are_written_and_results_that_are_arguments_or_state(graphed):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("held", torch.ones(3))

        def forward(self, x, cache):
            cache.add_(x)
            return x, self.held, cache * 2, 7, None

    model = Both()
    call, _ = graphed(model, torch.ones(3), torch.zeros(3))
    cache = torch.zeros(3)
    for number in range(1, 5):
        x = torch.ones(3)
        same, held, doubled, seven, none = call(x, cache)
        assert same is x
        assert held.data_ptr() == model.held.data_ptr()
        assert cache.tolist() == [number] * 3
        assert doubled.tolist() == [2 * number] * 3
        assert (seven, none) == (7, None)


def test_what_an_outside_op_returns_reaches_the_next_graph(graphed):
    class Scaled(nn.Module):
        def forward(self, x):
            return torch.ops.stitchtest.scale(x + 1, 3.0) - 1

    call, graphs = graphed(Scaled(), torch.ones(2), splitting_ops=["stitchtest::scale"])
    for number in range(5):
        assert call(torch.full((2,), float(number))).tolist() == [3 * (number + 1) - 1] * 2
    assert graphs.records[0].graphs == 2


def test_results_are_copied_unless_they_are_to_be_kept(graphed):
    for outputs in ("copied", "kept"):
        call, _ = graphed(Net(), torch.randn(3, 4), wanted=CudaGraphs(outputs=outputs))
        x = torch.randn(3, 4)
        results = [call(x) for _ in range(4)]
        assert (results[2].data_ptr() == results[3].data_ptr()) == (outputs == "kept")


def test_caps(graphed):
    model = Net()
    for wanted, reasons in (
        (CudaGraphs(max_graphs=2), ["", ""]),
        (CudaGraphs(max_bytes=250), ["", "", "beyond max_bytes"]),
    ):
        call, graphs = graphed(model, torch.randn(4, 4), wanted=wanted, dynamic_shapes=(rows(),))
        for size in (2, 3, 4, 5, 6):
            for _ in range(3):
                x = torch.randn(size, 4)
                torch.testing.assert_close(call(x), model(x))
        assert [record.reason for record in graphs.records] == reasons
        assert not graphs.due


def test_what_cannot_be_recorded_runs_without(graphed, caplog):
    class Fails(Recorder):
        fails = True

    model = Net()
    call, graphs = graphed(model, torch.randn(3, 4), recorder=Fails)
    for _ in range(4):
        x = torch.randn(3, 4)
        torch.testing.assert_close(call(x), model(x))
    assert "not permitted" in graphs.records[0].reason
    assert caplog.text.count("gets no CUDA graph") == 1


def test_an_error_of_an_op_ends_the_recording(graphed):
    class Fails(Recorder):
        def begin(self):
            super().begin()
            raise KeyError("an op of the user's")

    model = Net()
    call, _graphs = graphed(model, torch.randn(3, 4), recorder=Fails)
    x = torch.randn(3, 4)
    call(x)
    with pytest.raises(KeyError):
        call(x)
    # Nothing is recorded any more: a mode would see this.
    assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []
    torch.testing.assert_close(call(x), model(x))


def test_inference_mode_of_one_call_is_not_that_of_the_next(graphed):
    model = Net()
    call, graphs = graphed(model, torch.randn(3, 4))
    for mode in (True, True, False, True, False):
        with torch.inference_mode(mode), torch.no_grad():
            x = torch.randn(3, 4)
            torch.testing.assert_close(call(x), model(x))
    assert len(graphs.records) == 1


def test_while_the_caller_records_nothing_else_is(graphed):
    class Busy(Recorder):
        def recorded_by_others(self):
            return True

    call, graphs = graphed(Net(), torch.randn(3, 4), recorder=Busy)
    for _ in range(4):
        call(torch.randn(3, 4))
    assert graphs.records == ()
    assert graphs.due


def test_threads(graphed):
    model = Net()
    call, _ = graphed(
        model, torch.randn(4, 4), wanted=CudaGraphs([2, 4, 8], pad=True), dynamic_shapes=(rows(),)
    )
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            x = torch.randn(int(torch.randint(1, 10, (), generator=generator)), 4, generator=generator)
            with torch.no_grad():
                if not torch.allclose(call(x), model(x), atol=1e-5):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": "8"}, "needs a list"),
        ({"sizes": [0]}, "whole numbers"),
        ({"sizes": [2.5]}, "whole numbers"),
        ({"mode": "all"}, "mode='all'"),
        ({"pad": True}, "sizes to pad to"),
        ({"outputs": "x"}, "outputs='x'"),
        ({"inside": "a::b"}, "inside='a::b'"),
        ({"max_graphs": 0}, "positive"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(OptionError, match=words):
        CudaGraphs(**options)


def test_sizes_are_held_against_the_contract(graphed):
    with pytest.raises(OptionError, match=r"sizes of 1\.\.64, and not for 65"):
        graphed(Net(), torch.randn(4, 4), wanted=CudaGraphs([2, 65]), dynamic_shapes=(rows(),))
    shapes = models.decoder_options()
    with pytest.raises(OptionError, match="does not name one dimension; the model has ids"):
        graphed(models.decoder(), models.ids(), wanted=CudaGraphs([2]), **shapes)
    _, graphs = graphed(models.decoder(), models.ids(), wanted=CudaGraphs([2], dim="ids.shape[0]"), **shapes)
    assert graphs.records == ()


def test_on_the_cpu_there_are_none(tmp_path):
    model, x = Net().eval(), torch.randn(3, 4)
    with pytest.raises(OptionError, match="is on cpu"):
        stitchcache.compile(model, (x,), cuda_graphs=CudaGraphs(), cache=stitchcache.Cache(tmp_path))
    with pytest.raises(OptionError, match="cuda_graphs is a dict"):
        stitchcache.compile(model, (x,), cuda_graphs={}, cache=stitchcache.Cache(tmp_path))
