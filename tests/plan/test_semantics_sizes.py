"""Sizes that vary, cross pieces, or come from data.

Every model runs beside its compiled form; see agreement.py.
"""

import split_ops  # noqa: F401 - registers them
import torch
from agreement import model_of
from torch import nn
from torch.export import Dim

r = torch.randn
BATCH, SEQ = Dim("BATCH", min=1, max=64), Dim("SEQ", min=1, max=64)


def test_mlp_dyn(check):
    check(
        nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)),
        [(r(3, 4),), (r(1, 4),), (r(7, 4),)],
        dynamic_shapes=[{0: BATCH}],
    )


def test_unused_dyn(check):
    check(
        model_of(lambda s, x, y: x + 1), [(r(3), r(2)), (r(4), r(5))], dynamic_shapes=[{0: BATCH}, {0: SEQ}]
    )


def test_dyn_int(check):
    def f(s, x, n):
        return x * n + torch.arange(n).sum()

    check(model_of(f), [(r(3), 5), (r(3), 7)], dynamic_shapes=[None, Dim.DYNAMIC])


def test_dyn_int_slice(check):
    def f(s, x, n):
        return x[:, :n] * 2

    check(
        model_of(f),
        [(r(3, 8), 5), (r(4, 9), 7)],
        dynamic_shapes=[{0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, Dim.DYNAMIC],
    )


def test_two_dims(check):
    check(
        model_of(lambda s, x: torch.softmax(x @ s.w, -1), w=nn.Parameter(r(4, 4))),
        [(r(3, 5, 4),), (r(1, 1, 4),), (r(6, 2, 4),), (r(5, 5, 4),)],
        dynamic_shapes=[{0: BATCH, 1: SEQ}],
        splitting_ops=["aten::softmax"],
    )


def test_eq_dims(check):
    check(
        model_of(lambda s, x, y: x @ y),
        [(r(3, 3), r(3, 3)), (r(4, 4), r(4, 4))],
        dynamic_shapes=[{0: BATCH, 1: BATCH}, {0: BATCH, 1: BATCH}],
    )


def test_derived(check):
    def f(s, x, y):
        return x.reshape(-1, 2).sum(1) + y[1:]

    check(
        model_of(f),
        [(r(6), r(4)), (r(10), r(6)), (r(4), r(3))],
        dynamic_shapes=[{0: 2 * BATCH}, {0: BATCH + 1}],
    )


def test_auto(check):
    check(
        model_of(lambda s, x, y: x + y),
        [(r(3, 4), r(3, 4)), (r(5, 2), r(5, 2))],
        dynamic_shapes=[{0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO}],
    )


def test_sz_cross(check):
    def f(s, x):
        n = x.shape[0]
        y = x * 2
        t = torch.ops.split_test.twist(y)
        return t.reshape(-1)[:n] * n + torch.arange(n * 2)[n:].to(t.dtype)

    check(
        model_of(f),
        [(r(3, 4),), (r(6, 4),), (r(2, 4),)],
        dynamic_shapes=[{0: BATCH}],
        splitting_ops=["split_test::twist"],
    )


def test_sz_out(check):
    def f(s, x):
        n = x.shape[0]
        return x * 2, n, n * 2 + 1

    check(model_of(f), [(r(3, 4),), (r(6, 4),)], dynamic_shapes=[{0: BATCH}])


def test_sz_cross2(check):
    def f(s, x):
        n = x.shape[0] * x.shape[1]
        t = torch.ops.split_test.twist(x)
        k = t.shape[1] // 2
        return (t[:, :k] * n).sum() + (n + k) * 1.5

    check(
        model_of(f),
        [(r(3, 4),), (r(6, 8),)],
        dynamic_shapes=[{0: BATCH, 1: Dim.AUTO}],
        splitting_ops=["split_test::twist"],
    )


def test_unbacked(check):
    def f(s, x):
        n = x.nonzero()
        y = n * 2
        return torch.ops.split_test.lst(y, 2)[1] + n.shape[0]

    check(
        model_of(f),
        [(torch.tensor([0, 1, 2, 0]),), (torch.tensor([1, 1, 2, 0]),), (torch.tensor([0, 0, 0, 0]),)],
        splitting_ops=["split_test::lst"],
    )


def test_unbacked_split(check):
    def f(s, x):
        n = torch.ops.split_test.nz(x)
        y = n * 2
        return y + n.shape[0], torch.ones(n.shape[0]) * 3

    check(
        model_of(f),
        [(torch.tensor([0, 1, 2, 0]),), (torch.tensor([1, 1, 2, 0]),), (torch.tensor([0, 0, 0, 0]),)],
        splitting_ops=["split_test::nz"],
    )


def test_item(check):
    def f(s, x, i):
        n = i.item()
        torch._check(n >= 0)
        torch._check(n < x.shape[0])
        t = torch.ops.split_test.twist(x)
        return t[: n + 1] * n + torch.zeros(n + 1, 1)

    check(
        model_of(f),
        [(r(4, 4), torch.tensor(2)), (r(4, 4), torch.tensor(0)), (r(4, 4), torch.tensor(1))],
        splitting_ops=["split_test::twist"],
    )


def test_symfloat(check):
    def f(s, x):
        n = x.shape[0]
        t = torch.ops.split_test.twist(x * 2)
        return t * (n / 3.0) + t / (n**0.5)

    check(
        model_of(f),
        [(r(3, 4),), (r(6, 4),)],
        dynamic_shapes=[{0: BATCH}],
        splitting_ops=["split_test::twist"],
    )


def test_symbool_out(check):
    def f(s, x):
        return x * 2, x.shape[0] > 4

    check(model_of(f), [(r(3, 4),), (r(6, 4),)], dynamic_shapes=[{0: BATCH}])


def test_size1_squeeze(check):
    check(model_of(lambda s, x: x.squeeze(0)), [(r(3, 4),), (r(1, 4),)], dynamic_shapes=[{0: BATCH}])


def test_size1_bcast(check):
    check(
        model_of(lambda s, x, y: x + y),
        [(r(3, 4), r(3, 4)), (r(1, 4), r(1, 4))],
        dynamic_shapes=[{0: BATCH}, {0: BATCH}],
    )


def test_size1_bcast2(check):
    check(
        model_of(lambda s, x, y: x + y),
        [(r(3, 4), r(5, 1, 4)), (r(1, 4), r(1, 1, 4)), (r(1, 4), r(3, 1, 4))],
        dynamic_shapes=[{0: BATCH}, {0: SEQ}],
    )


def test_size1_sum(check):
    def f(s, x, y):
        return (x.unsqueeze(1) * y.unsqueeze(0)).sum(0).squeeze()

    check(model_of(f), [(r(3, 4), r(5, 4)), (r(2, 4), r(6, 4))], dynamic_shapes=[{0: BATCH}, {0: SEQ}])


def test_stride_dyn_input(check):
    check(
        model_of(lambda s, x: torch.ops.split_test.twist(x.transpose(1, 2).reshape(-1, 4) * 2)),
        [(r(2, 4, 3),), (r(5, 4, 6),)],
        dynamic_shapes=[{0: BATCH, 2: SEQ}],
        splitting_ops=["split_test::twist"],
    )


def test_assert_split(check):
    def f(s, x):
        n = x.nonzero().shape[0]
        torch._check(n > 0)
        return torch.ops.split_test.lst(x * n, 2)[1] * n

    check(
        model_of(f),
        [(torch.tensor([1, 2, 0]),), (torch.tensor([1, 2, 3]),)],
        splitting_ops=["split_test::lst"],
    )
