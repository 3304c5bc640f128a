"""Models for ``torch.compile(backend="stitchcache")``, and the program that runs them in a fresh process."""

from __future__ import annotations

import json
import logging
import sys

import models
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Breaks(nn.Module):
    """Two graphs, with a buffer that is counted up and a size that is returned."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.table = torch.arange(8.0)

    def forward(self, x):
        x = torch.relu(self.first(x)) + self.table
        torch._dynamo.graph_break()
        self.calls.add_(1)
        return self.second(x), x.shape[0] * 2, self.calls.clone(), torch.arange(x.shape[0])


class Counts(nn.Module):
    """The same in one graph, for a compiler that takes long."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return torch.relu(self.linear(x)), x.shape[0] * 2, self.calls.clone()


class Modes(nn.Module):
    """Blocks under other modes, a branch on data, and a constant that is made in the forward."""

    def __init__(self, autocast):
        super().__init__()
        self.linear, self.autocast = nn.Linear(8, 8), autocast

    def forward(self, x):
        with torch.no_grad():
            y = self.linear(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            z = self.linear(x)
        with torch.inference_mode():
            z = z + 1
        z = nn.functional.scaled_dot_product_attention(z[None], z[None], z[None])[0]
        w = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
        return {"y": y, "z": z.float(), "w": w, "k": y + torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]), "n": None}


class Wraps(nn.Module):
    """Blocks that Dynamo wraps: checkpoints, transforms of torch.func, ``.data``, modes inside branches."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def block(self, x):
        with torch.no_grad():
            return torch.relu(self.linear(x)) + torch.tensor([2.0] * 8)

    def forward(self, x, shift):
        y = checkpoint(self.block, x, use_reentrant=False)
        z = torch.vmap(lambda row: row * row.sum())(x)
        g = torch.func.grad(lambda t: (t * t).sin().sum())(x)
        w = torch.cond(x.sum() > 0, self.block, lambda t: t - torch.tensor([3.0] * 8), (x,))
        return y + shift, z, g, w, self.linear.weight.data * 2, x.roll(shift, 0)


class Layouts(nn.Module):
    """Returns views, of arguments and of each other, that are written to behind a graph break."""

    def forward(self, x):
        y, z = x.view(-1), torch.relu(x)
        t, c, same = z.t(), x.clone(), torch.relu(x)
        torch._dynamo.graph_break()
        y[0], t[1, 1], c[0], same[0, 0] = 100, 200, 9, 5
        return (
            x,
            y,
            z,
            t,
            c,
            same,
            x[1:],
            x.float(),
            (x * 2).expand(2, *x.shape),
            torch.ones(2),
            torch.ones(2),
        )


class Writes(nn.Module):
    """Writes into an argument, of which another may be a view."""

    def forward(self, cache, x):
        cache.mul_(2)
        return (x * 3).relu() + cache.sum()


def build(name):
    """Model, and calls to make of it."""
    torch.manual_seed(0)
    x = [torch.randn(n, 8) for n in (5, 9, 1, 2)]
    if name == "counts":
        return Counts().eval(), [(x[0],), (x[1],)]
    if name == "breaks":
        return Breaks().eval(), [(t,) for t in x]
    if name in {"modes", "autocast"}:
        return Modes(name == "autocast").eval(), [(t,) for t in x]
    if name == "writes":
        shared = torch.randn(6, 8)
        calls = [(torch.randn(6, 8), torch.randn(6, 8)), (shared, shared[:]), (shared, shared[2:4])]
        return Writes().eval(), calls
    if name == "wraps":
        return Wraps().eval(), [(t, n) for t, n in zip(x, (3, -4, 0, 2**40), strict=True)]
    if name == "layouts":
        return Layouts().eval(), [(x[0],), (x[1],), (torch.randn(12, 8)[3:9],)]
    return models.decoder(), [(models.ids(2, 7),), (models.ids(3, 5),), (models.ids(1, 9),)]


OPS = ["aten::scaled_dot_product_attention", models.ATTENTION]


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def largest_difference(got, want):
    a, b = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want)
    assert len(a) == len(b)
    worst = 0.0
    for one, two in zip(a, b, strict=True):
        if isinstance(two, torch.Tensor):
            assert one.shape == two.shape
            assert one.dtype == two.dtype
            assert one.stride() == two.stride()
            worst = max([worst, (one.float() - two.float()).abs().max().item()] if one.numel() else [worst])
        else:
            assert one == two
    return worst


def sharing(call, results):
    """Which tensors of a call share memory."""
    found = [t for t in torch.utils._pytree.tree_leaves((call, results)) if isinstance(t, torch.Tensor)]
    memory = [t.untyped_storage().data_ptr() for t in found]
    return [memory.index(address) for address in memory]


def run(name, root, backend, **more):
    """Compile and call a model; returns what was logged and how far from eager it was."""
    lines = Lines()
    logger = logging.getLogger("stitchcache")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    model, calls = build(name)
    reference, same_calls = build(name)
    options = {"cache": root, "backend": backend, "splitting_ops": OPS, **more}
    compiled = torch.compile(model, backend="stitchcache", dynamic=True, options=options)
    worst = 0.0
    with torch.no_grad():
        for ours, theirs in zip(calls, same_calls, strict=True):
            got, want = compiled(*ours), reference(*theirs)
            assert sharing(ours, got) == sharing(theirs, want)
            worst = max(worst, largest_difference(got, want))
            worst = max(worst, largest_difference(list(ours), list(theirs)))
    logger.removeHandler(lines)
    return {"lines": lines.lines, "difference": worst}


if __name__ == "__main__":
    print(json.dumps({name: run(name, sys.argv[1], sys.argv[2]) for name in sys.argv[3:]}))
