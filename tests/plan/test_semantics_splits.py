"""Splitting ops in every position, and what crosses between pieces.

Every model runs beside its compiled form; see agreement.py.
"""

import split_ops  # noqa: F401 - registers them
import torch
from agreement import model_of
from torch import nn
from torch.export import Dim
from torch.nn import functional

r = torch.randn
BATCH, SEQ = Dim("BATCH", min=1, max=64), Dim("SEQ", min=1, max=64)


def test_split_perm(check):
    check(
        model_of(
            lambda s, x: (
                torch.ops.split_test.twist(x).view(-1)
                if False
                else (torch.ops.split_test.twist(x * 2) * r(1).new_ones(1)).sum(0)
            )
        ),
        [(r(4, 3),)],
        splitting_ops=["split_test::twist"],
    )


def test_split_lying(check):
    check(
        model_of(lambda s, x: torch.ops.split_test.badtwist(x * 2).reshape(-1) * 2),
        [(r(4, 3),)],
        splitting_ops=["split_test::badtwist"],
    )


def test_split_two(check):
    def f(s, x):
        a, b = torch.ops.split_test.two(x + 1)
        return a * b, b

    check(model_of(f), [(r(4, 3),)], splitting_ops=["split_test::two"])


def test_split_two_unused(check):
    def f(s, x):
        _, b = torch.ops.split_test.two(x + 1)
        return b * 2

    check(model_of(f), [(r(4, 3),)], splitting_ops=["split_test::two"])


def test_split_list(check):
    def f(s, x):
        a = torch.ops.split_test.lst(x + 1, 3)
        return a[2] * a[0]

    check(model_of(f), [(r(4, 3),)], splitting_ops=["split_test::lst"])


def test_split_adj(check):
    def f(s, x):
        return torch.ops.split_test.twist(torch.ops.split_test.twist(x))

    check(model_of(f), [(r(4, 3),)], splitting_ops=["split_test::twist"])


def test_split_adj2(check):
    def f(s, x):
        a, b = torch.ops.split_test.two(x)
        return torch.ops.split_test.twist(a) + torch.ops.split_test.twist(b)

    check(model_of(f), [(r(4, 3),)], splitting_ops=["split_test::twist", "split_test::two"])


def test_split_all(check):
    def f(s, x):
        return torch.ops.split_test.twist(x)

    check(model_of(f), [(r(4, 3),)], splitting_ops=["split_test::twist"])


def test_split_attn(check):
    class T(nn.Module):
        def __init__(s):
            super().__init__()
            s.ls = nn.ModuleList([nn.Linear(4, 12) for _ in range(3)])

        def forward(s, x):
            for layer in s.ls:
                q, k, v = layer(x).chunk(3, -1)
                out = torch.empty_like(q)
                torch.ops.split_test.attn(q, k, v, out)
                x = x + out
            return x

    check(
        T(),
        [(r(2, 5, 4),), (r(3, 2, 4),)],
        dynamic_shapes=[{0: BATCH, 1: SEQ}],
        splitting_ops=["split_test::attn"],
    )


def test_custom_unnamed(check):
    def f(s, x):
        return torch.ops.split_test.twist(x * 2) + 1

    check(model_of(f), [(r(4, 3),)])


def test_view_of_foreign(check):
    def f(s, x):
        t = torch.ops.split_test.twist(x)[:, :2]
        u = torch.ops.split_test.lst(t, 2)[1]
        w = t[1:]
        return torch.ops.split_test.twist(w.sin() + u[1:].cos())

    check(model_of(f), [(r(4, 4),)], splitting_ops=["split_test::twist", "split_test::lst"])


def test_split_slice(check):
    def f(s, x):
        y = torch.ops.split_test.twist(x * 2)
        z = y[1:, 1:]
        q = torch.ops.split_test.twist(z)
        return q + z.sin()

    check(model_of(f), [(r(4, 4),)], splitting_ops=["split_test::twist"])


def test_rand(check):
    check(model_of(lambda s, x: x + torch.rand_like(x) + torch.randn(3)), [(r(3),)], seed=3)


def test_rand_split(check):
    check(
        model_of(lambda s, x: torch.ops.split_test.twist(x + torch.rand_like(x)) + torch.rand_like(x)),
        [(r(3, 3),)],
        seed=3,
        splitting_ops=["split_test::twist"],
    )


def test_dropout_functional(check):
    check(model_of(lambda s, x: functional.dropout(x, 0.5, True)), [(r(30),)], seed=3)
