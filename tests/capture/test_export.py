"""What a capture refuses, and what it says."""

from pathlib import Path

import away
import pytest
import torch
from torch import nn
from torch.export import Dim

import stitchcache
from stitchcache.capture import capture
from stitchcache.errors import CaptureError, SplittingOpNotFoundError

HERE = str(Path(__file__))


def line_of(marker):
    lines = Path(__file__).read_text().splitlines()
    return next(n for n, line in enumerate(lines, 1) if marker in line and "line_of" not in line)


class Model(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.function = forward

    def forward(self, *args):
        return self.function(*args)


def refused(model, *args, **options):
    with pytest.raises(CaptureError) as caught:
        capture(model.eval(), args, {}, **options)
    return caught.value


def test_a_line_of_this_file_is_named():
    def forward(x):
        if x.sum() > 0:  # the branch
            return x
        return -x

    error = refused(Model(forward), torch.ones(3))
    assert error.location == f"{HERE}:{line_of('# the branch')}"
    assert "data-dependent" in error.reason
    assert "torch.where or torch.cond" in str(error)


def test_a_line_of_another_file_is_named():
    error = refused(Model(lambda x: away.branch_on_data(x)), torch.ones(3))
    assert error.location == f"{away.__file__}:5"


def test_a_lambda_is_named():
    error = refused(Model(lambda x: x.tolist()[0] + x if x.max() > 3 else x), torch.ones(3))  # the lambda
    assert error.location == f"{HERE}:{line_of('# the lambda')}"


def test_an_op_inside_a_sequential_is_explained():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 2))
    error = refused(model, torch.ones(2, 3))
    assert "Sequential" in str(error)
    assert "[5, 2]" in error.reason


def test_what_the_model_itself_raises_is_told():
    def forward(x):
        raise KeyError("no such expert")  # the raise

    error = refused(Model(forward), torch.ones(3))
    assert "no such expert" in error.reason
    assert error.location == f"{HERE}:{line_of('# the raise')}"
    assert isinstance(error.__cause__, KeyError)


def test_a_size_that_cannot_vary():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(4, 2)

    error = refused(Fixed(), torch.ones(4, 2), dynamic_shapes=[{0: Dim("B", min=2, max=9)}])
    assert "B" in error.reason


def test_a_splitting_op_that_is_not_there(tmp_path):
    with pytest.raises(SplittingOpNotFoundError, match="aten::relu") as caught:
        stitchcache.compile(
            nn.ReLU().eval(),
            (torch.ones(2),),
            splitting_ops=["aten::sofmax"],
            backend="eager",
            cache=stitchcache.Cache(tmp_path),
        )
    assert caught.value.op == "aten::sofmax"
    assert caught.value.present == ["aten::relu.default"]


class Counting(nn.Module):
    """Writes into a tensor that only plain objects lead to."""

    def __init__(self):
        super().__init__()
        self.seen = {"a.b": [torch.zeros(2)]}

    def forward(self, x):
        self.seen["a.b"][0].add_(1)
        return x + self.seen["a.b"][0]


def test_a_tensor_in_a_plain_object_is_bound_by_its_path_and_not_written_while_traced():
    model = Counting().eval()
    (bound,) = capture(model, (torch.ones(2),), {}).bound
    assert (bound.kind, bound.name) == ("attribute", "seen['a%2e;b'][0]")
    assert bound.tensor is model.seen["a.b"][0]
    assert torch.equal(bound.tensor, torch.zeros(2))


def test_a_parameter_that_a_list_leads_to_is_that_parameter():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            self.all = [self.w]

        def forward(self, x):
            return x * self.all[0]

    model = Listed().eval()
    used = [item for item in capture(model, (torch.ones(2),), {}).bound if item.aliases]
    assert [(item.kind, item.name, item.aliases) for item in used] == [("parameter", "w", ("all[0]",))]
    assert used[0].tensor is model.w


class Steps(nn.Module):
    """Counts in a tensor that only a list leads to, and may ask for its value."""

    def __init__(self, ask, write):
        super().__init__()
        self.steps, self.ask, self.write = [torch.tensor(1)], ask, write

    def forward(self, x):
        x = x * self.ask(self.steps[0])
        if self.write:
            self.steps[0].add_(1)
        return x


@pytest.mark.parametrize("ask", [int, float, torch.Tensor.item, lambda t: range(9)[t]])
def test_state_whose_value_python_asks_for(ask):
    error = refused(Steps(ask, write=True), torch.ones(2))
    assert "steps[0]" in str(error)
    assert "read and written" in error.reason
    capture(Steps(ask, write=False).eval(), (torch.ones(2),), {})


@pytest.mark.parametrize("ask", [bool, lambda t: t.numpy()])
def test_state_whose_value_torch_itself_does_not_give(ask):
    refused(Steps(ask, write=True), torch.ones(2))


def test_state_that_ops_compute_with():
    capture(Steps(lambda t: t + 1, write=True).eval(), (torch.ones(2),), {})


GLOBAL = torch.zeros(2)


def test_writing_into_a_tensor_that_no_attribute_leads_to_is_refused():
    error = refused(Model(lambda x: x + GLOBAL.add_(1)), torch.ones(2))
    assert "no attribute of the model leads to" in str(error)
    assert "register_buffer" in str(error)


def test_a_sparse_argument_is_refused():
    error = refused(Model(lambda x: x.to_dense() * 2), torch.eye(3).to_sparse())
    assert "sparse" in str(error)


def test_arguments_that_share_memory_are_kept_apart():
    shared = torch.arange(6.0)
    got = capture(Model(lambda x, y, z: x + 2 * y + 3 * z).eval(), (shared, shared, shared.view(6)), {})
    placeholders = [node for node in got.gm.graph.nodes if node.op == "placeholder"]
    assert all(node.users for node in placeholders)
    assert shared is got.example[0]
    assert shared is not got.example[1]
