"""Random forwards with views and writes, cut anywhere: what is planned must mean what eager means.

Nothing is compiled: a piece that would be is run here by a stand-in that does what a compiler may do,
which is to return copies where eager returns views.
"""

import copy
import os

import split_ops  # noqa: F401 - registers them
import torch
from agreement import same
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from stitchcache.capture import capture
from stitchcache.pieces import get_backend
from stitchcache.pipeline.make import plan

FULL = os.environ.get("STITCHCACHE_FULL") == "1"
STEPS = {
    "add": lambda m, a, b: a + b,
    "relu": lambda m, a, b: torch.relu(a),
    "scaled": lambda m, a, b: a * 0.5,
    "turned": lambda m, a, b: a.t(),
    "viewed": lambda m, a, b: a.reshape(-1).view(4, 4),
    "rows": lambda m, a, b: a[1:].sum(0) + b,
    "add_": lambda m, a, b: a.add_(1),
    "row_": lambda m, a, b: a[0].mul_(2),
    "assign": lambda m, a, b: a[1:3].copy_(b[:2].clone()),
    "split": lambda m, a, b: torch.ops.split_test.twist(a),
    "split_": lambda m, a, b: torch.ops.split_test.scale_(a, 0.75),
    "split_view_": lambda m, a, b: torch.ops.split_test.scale_(b[2:], 1.25),
    "buffer_": lambda m, a, b: m.state.add_(a.clone()),
    "buffer": lambda m, a, b: m.state * b,
    "state_view": lambda m, a, b: m.state.t(),
}
step = st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9))


class Program(nn.Module):
    """Runs steps over a growing list of 4 x 4 values."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.register_buffer("state", torch.arange(16.0).view(4, 4))

    def forward(self, x):
        values = [x, x * 1.5]
        for name, first, second in self.steps:
            result = STEPS[name](self, values[first % len(values)], values[second % len(values)])
            if result is not None and result.shape == (4, 4):
                values.append(result)
        return tuple(values[-4:])


class Copying(torch.fx.Interpreter):
    """Runs a planned graph; pieces that would be compiled return copies."""

    def __init__(self, planned, tensors):
        super().__init__(planned.split_gm)
        self.compiled = {piece.name for piece in planned.pieces if piece.backend != "eager"}
        self.tensors = {path: tensors[name] for path, name in planned.attributes.items()}

    def get_attr(self, target, args, kwargs):
        return self.tensors[target]

    def call_module(self, target, args, kwargs):
        results = super().call_module(target, args, kwargs)
        if target not in self.compiled:
            return results
        return tuple(r.clone() if isinstance(r, torch.Tensor) else r for r in results)


@settings(
    max_examples=1000 if FULL else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.lists(step, min_size=1, max_size=9))
def test_copies_instead_of_views_change_nothing(steps):
    model = Program(steps).eval()
    reference = copy.deepcopy(model)
    x = torch.linspace(-1, 1, 16).view(4, 4)
    captured = capture(model, (x.clone(),), {})
    present = {str(node.target) for node in captured.gm.graph.nodes}
    ops = [f"split_test::{op}" for op in ("twist", "scale_") if f"split_test.{op}.default" in present]
    planned = plan(captured, ops, get_backend("aoti"), [])
    for _ in range(2):
        ours, theirs = x.clone(), x.clone()
        with torch.no_grad():
            want = reference(theirs)
            got = Copying(planned, {"state": model.state}).run(ours)
        mutations = captured.output_spec.mutations
        for mutation, value in zip(mutations, got, strict=False):
            target = ours if mutation.startswith("input") else model.state
            target.copy_(value)
        same(list(want), list(got[len(mutations) :]), "results")
        same(theirs, ours, "input")
        same(reference.state, model.state, "state")
