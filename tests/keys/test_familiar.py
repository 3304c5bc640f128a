"""Calls of torch run unwatched once they were watched, and nothing of somebody else's code goes unseen."""

import collections
import gc
import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch

import stitchcache
from stitchcache.demo import decoder
from stitchcache.keys import events
from stitchcache.keys.events import FamiliarCalls
from stitchcache.keys.recorder import SourceRecorder


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of one's own from source."""

    def make(source, name="familiar_model"):
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location(name, path)
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, made)
        spec.loader.exec_module(made)
        return made

    return make


class Watch:
    """Counts calls of Python code by name, and notices what one asks it to."""

    def __init__(self, *noticing):
        self.calls = collections.Counter()
        self.noticing = noticing

    def __call__(self, frame, event, arg):
        if event == "call":
            self.calls[frame.f_code.co_name] += 1

    @property
    def noticed(self):
        return sum(self.calls[name] for name in self.noticing)

    def run(self, action):
        with FamiliarCalls(self, self):
            sys.setprofile(self)
            try:
                action()
                return sys.getprofile() is self
            finally:
                sys.setprofile(None)


def test_the_second_call_of_a_kind_is_unwatched():
    watch, x = Watch(), torch.ones(2, 3)

    def action():
        for _ in range(5):
            torch.nn.functional.softmax(x, dim=1)

    assert watch.run(action)
    # Watched, it is seen twice: when it is called, and when it runs in earnest.
    assert watch.calls["softmax"] == 5 + 1
    assert watch.calls["__torch_function__"] == 5


def test_other_kinds_of_arguments_are_watched_again():
    watch, x = Watch(), torch.ones(2, 3)

    def action():
        for _ in range(3):
            torch.nn.functional.softmax(x, dim=1)
            torch.nn.functional.softmax(x, 1)
            torch.nn.functional.softmax(torch.nn.Parameter(x), dim=1)
            torch.nn.functional.softmax(x.to("meta"), dim=1)

    assert watch.run(action)
    assert watch.calls["softmax"] == 12 + 4


def test_other_choices_are_watched_again():
    watch, x = Watch(), torch.ones(2, 3)

    def action():
        for _ in range(3):
            torch.nn.functional.dropout(x, training=False)
            torch.nn.functional.dropout(x, training=True)
            torch.nn.functional.dropout(x, inplace=True)

    assert watch.run(action)
    assert watch.calls["dropout"] == 9 + 3


def test_what_is_noticed_below_a_call_keeps_it_watched():
    watch, x = Watch("softmax"), torch.ones(2, 3)

    def action():
        for _ in range(5):
            torch.nn.functional.softmax(x, dim=1)

    assert watch.run(action)
    assert watch.calls["softmax"] == 10


def test_a_call_that_is_given_a_function_stays_watched():
    watch, x = Watch(), torch.ones(3)

    def plus(a, b):
        return a + b

    def action():
        for _ in range(3):
            x.map_(x, plus)

    assert watch.run(action)
    assert watch.calls["plus"] == 9


def test_a_class_of_tensors_of_the_users_stays_watched(module):
    mine = module(
        """
        import torch

        class Mine(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                return own(super().__torch_function__(func, types, args, kwargs or {}))

        def own(value):
            return value
        """
    )
    watch, x = Watch(), torch.ones(3).as_subclass(mine.Mine)

    def action():
        for _ in range(4):
            torch.add(x, x)

    assert watch.run(action)
    assert watch.calls["own"] == 4


def test_a_mode_of_the_users_keeps_its_calls_watched(module):
    mine = module(
        """
        from torch.utils._python_dispatch import TorchDispatchMode

        class Mine(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return own(func(*args, **(kwargs or {})))

        def own(value):
            return value
        """
    )
    watch, x = Watch("own"), torch.ones(2, 3)

    def action():
        for _ in range(3):
            torch.add(x, x)
        for _ in range(4):
            with mine.Mine():
                torch.add(x, x)

    assert watch.run(action)
    assert watch.calls["own"] == 4


def test_an_op_of_the_users_stays_watched():
    @torch.library.custom_op("familiar::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def shape_of_twice(x):
        return torch.empty_like(x)

    watch, x = Watch(), torch.ones(2, 3, device="meta")

    def action():
        for _ in range(3):
            torch.ops.familiar.twice(x)
            torch.ops.familiar.twice.default(x)

    assert watch.run(action)
    assert watch.calls["shape_of_twice"] == 6


def test_an_error_leaves_the_profile_function_where_it_was():
    watch, x = Watch(), torch.ones(2, 3)

    def action():
        torch.nn.functional.softmax(x, dim=1)
        for _ in range(2):
            with pytest.raises(IndexError):
                torch.nn.functional.softmax(x, dim=7)
        torch.nn.functional.softmax(x, dim=1)

    assert watch.run(action)


def test_another_profile_function_is_left_alone():
    watch, other, x = Watch(), Watch(), torch.ones(2, 3)

    def action():
        for _ in range(3):
            torch.nn.functional.softmax(x, dim=1)
        sys.setprofile(other)
        for _ in range(3):
            torch.nn.functional.softmax(x, dim=1)

    assert not watch.run(action)
    assert other.calls["softmax"] == 6


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_a_kernel_of_the_users_for_an_op_of_torch_is_recorded(module):
    mine = module(
        """
        import torch

        def kernel(x):
            return x + SHIFT

        SHIFT = 2.0

        def forward(x):
            for _ in range(4):
                x = torch.cos(torch.sin(x))
            return x
        """
    )
    library = torch.library.Library("aten", "IMPL")
    library.impl("cos", mine.kernel, "CPU")
    try:
        with SourceRecorder() as recorded:
            mine.forward(torch.ones(2))
    finally:
        library._destroy()
    assert "familiar_model" in {source.module for source in recorded.sources}
    assert "global:familiar_model:SHIFT" in dict(recorded.globals)


def test_a_capture_is_recorded_as_if_all_was_watched(monkeypatch):
    config = decoder.DecoderConfig(layers=3)
    model, args = decoder.build(config)
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)

    # What torch imports at its first export is no part of this.
    torch.export.export(model, args, dynamic_shapes=shapes, strict=False)

    def record():
        # What the collector finds meanwhile may run code of another test.
        gc.collect()
        with stitchcache.collection_paused(), torch.no_grad(), SourceRecorder() as recorded:
            program = torch.export.export(model, args, dynamic_shapes=shapes, strict=False)
        return recorded, program.graph_module.code

    familiar, code = record()
    with monkeypatch.context() as patch:
        patch.setattr(events, "active_modes", lambda: ["somebody's"])
        watched, plain = record()
    assert familiar.unsound is None
    assert (familiar.sources, familiar.globals, code) == (watched.sources, watched.globals, plain)


CONDITIONAL = """
import warnings
warnings.simplefilter("error")
import torch
from stitchcache.keys.recorder import SourceRecorder

class Net(torch.nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))

with torch.no_grad():
    plain = torch.export.export(Net(), (torch.ones(3),), strict=False)
    with SourceRecorder() as recorded:
        program = torch.export.export(Net(), (torch.ones(3),), strict=False)
assert recorded.unsound is None, recorded.unsound
assert program.graph_module.code == plain.graph_module.code
"""


def test_what_dynamo_traces_is_as_without(tmp_path):
    script = tmp_path / "conditional.py"
    script.write_text(CONDITIONAL)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
