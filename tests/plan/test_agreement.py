"""The comparison that the semantics tests rely on: what it must tell apart."""

import pytest
import torch
from agreement import same

nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("want", "got"),
    [
        ([0.0, 1.0], [nan, 1.0]),
        ([nan, 1.0], [0.0, 1.0]),
        ([nan, 1.0], [1.0, nan]),
        ([inf], [torch.finfo(torch.float32).max]),
        ([inf], [-inf]),
        ([1.0], [1.001]),
        ([complex(1, nan)], [complex(1, 0)]),
        ([True], [False]),
        ([2**60], [2**60 + 1]),
    ],
)
@pytest.mark.parametrize("tolerance", [0.0, 2e-5])
def test_other_numbers_are_told_apart(want, got, tolerance):
    with pytest.raises(AssertionError, match="numbers differ"):
        same(torch.tensor(want), torch.tensor(got), "result", tolerance)


@pytest.mark.parametrize("values", [[nan, 1.0], [inf, -inf], [0.0], [complex(nan, 1)], [2**60], [True], []])
def test_equal_numbers_agree(values):
    same(torch.tensor(values), torch.tensor(values), "result")
    same(torch.tensor(values), torch.tensor(values), "result", 2e-5)


@pytest.mark.parametrize(
    ("want", "got"),
    [
        ([torch.ones(1)], (torch.ones(1),)),
        (torch.ones(1), torch.ones(1, dtype=torch.float64)),
        (torch.ones(1), torch.ones(1, 1)),
        (torch.ones(1), 1.0),
        (1, 1.0),
        (0.0, nan),
    ],
)
def test_other_structures_and_types_are_told_apart(want, got):
    with pytest.raises(AssertionError):
        same(want, got, "result")
