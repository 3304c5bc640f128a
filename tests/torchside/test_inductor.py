"""What Inductor is given for a GPU's pieces; no GPU is needed to see it."""

from __future__ import annotations

import torch
from torch import nn

from stitchcache.torchside.inductor import keep_sums_apart


class Residual(nn.Module):
    """Sums of products and something else, some of which are results."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.biased = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x, y):
        first, second = x + self.plain(y), self.plain(x) + y
        return (
            first,
            second,
            x + self.biased(y),
            self.plain(x) + 1,
            torch.add(x, self.plain(y), alpha=2),
            ((y + torch.mm(x, y)) * 2),
        )


def test_of_sums_only_results_are_kept_apart_and_numbers_are_the_same_bits():
    torch.manual_seed(0)
    model = Residual().to(torch.bfloat16).eval()
    x, y = (torch.randn(8, 8, dtype=torch.bfloat16) for _ in range(2))
    x[0], y[1] = -0.0, torch.inf
    with torch.no_grad():
        gm = torch.export.export(model, (x, y), strict=False).module()
        wanted = gm(x, y)
        keep_sums_apart(gm.graph)
        gm.graph.lint()
        gm.recompile()
        got = gm(x, y)
    targets = [str(node.target) for node in gm.graph.nodes]
    assert (targets.count("aten.sub.Tensor"), targets.count("aten.add.Tensor")) == (2, 4)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


def test_whole_numbers_are_left_alone():
    class Whole(nn.Module):
        def forward(self, x, y):
            return x + torch.mm(x, y)

    x = torch.full((2, 2), -128, dtype=torch.int8)
    with torch.no_grad():
        gm = torch.export.export(Whole(), (x, x), strict=False).module()
    keep_sums_apart(gm.graph)
    assert "aten.sub.Tensor" not in [str(node.target) for node in gm.graph.nodes]


def test_a_size_is_no_summand_to_subtract_from():
    class Sized(nn.Module):
        def forward(self, x, y):
            return torch.mm(x, y) + x.shape[0], x + torch.mm(x, y)

    x, y = torch.randn(3, 4), torch.randn(4, 4)
    shapes = ({0: torch.export.Dim("rows", min=2, max=16)}, None)
    with torch.no_grad():
        gm = torch.export.export(Sized(), (x, y), dynamic_shapes=shapes, strict=False).module()
        keep_sums_apart(gm.graph)
        gm.recompile()
        for got, want in zip(gm(x[:2], y), Sized()(x[:2], y), strict=True):
            assert torch.equal(got, want)
    assert [str(node.target) for node in gm.graph.nodes].count("aten.sub.Tensor") == 1


def test_a_truth_value_is_no_summand_to_subtract_from():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return mask + torch.mm(x, x)

    x, mask = torch.randn(3, 3), torch.eye(3).bool()
    with torch.no_grad():
        gm = torch.export.export(Masked(), (x, mask), strict=False).module()
        expected = gm(x, mask)
        keep_sums_apart(gm.graph)
        gm.recompile()
        assert torch.equal(gm(x, mask), expected)
