"""State: buffers, parameters, constants, and what is written to them.

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


def test_buf_inplace(check):
    def f(s, x):
        s.b.add_(x.sum())
        return x * s.b

    check(model_of(f, b=torch.ones(3)), [(r(2, 3),)])


def test_buf_reassign(check):
    def f(s, x):
        s.b = s.b * 2 + x.mean(0)
        return x * s.b

    check(model_of(f, b=torch.ones(3)), [(r(2, 3),)])


def test_buf_read_before_after(check):
    def f(s, x):
        y = s.b + 0
        s.b.add_(1)
        return y + x, s.b * 2

    check(model_of(f, b=torch.ones(3)), [(r(2, 3),)])


def test_buf_returned(check):
    def f(s, x):
        s.b.add_(1)
        return s.b, x + s.b

    check(model_of(f, b=torch.ones(3)), [(r(2, 3),)])


def test_buf_view_mut_split(check):
    def f(s, x):
        v = s.b[1:]
        torch.ops.split_test.scale_(v, 2.0)
        return x + s.b

    check(model_of(f, b=torch.ones(3)), [(r(2, 3),)], splitting_ops=["split_test::scale_"])


def test_tied(check):
    class T(nn.Module):
        def __init__(s):
            super().__init__()
            s.e = nn.Embedding(10, 4)
            s.h = nn.Linear(4, 10, bias=False)
            s.h.weight = s.e.weight

        def forward(s, i):
            return s.h(s.e(i))

    check(T(), [(torch.randint(0, 10, (2, 3)),)])


def test_tied_buf(check):
    class T(nn.Module):
        def __init__(s):
            super().__init__()
            b = torch.ones(3)
            s.register_buffer("a", b)
            s.register_buffer("b", b)

        def forward(s, x):
            s.a.add_(1)
            return x * s.b

    check(T(), [(r(3),)])


def test_viewed_buf(check):
    class T(nn.Module):
        def __init__(s):
            super().__init__()
            b = torch.ones(4)
            s.register_buffer("a", b)
            s.register_buffer("b", b[:2])

        def forward(s, x):
            s.a.add_(1)
            y = x * s.b
            s.b.mul_(2)
            return y + s.a[:2]

    check(T(), [(r(2),)])


def test_plain_attr(check):
    class T(nn.Module):
        def __init__(s):
            super().__init__()
            s.k = torch.arange(3.0)

        def forward(s, x):
            return x * s.k + torch.tensor([1.0, 2.0, 3.0]) + torch.tensor(2.0)

    check(T(), [(r(3),)])


def test_const_mut(check):
    def f(s, x):
        k = torch.tensor([1.0, 2.0])
        k.add_(1)
        return x * k

    check(model_of(f), [(r(2),)])


def test_nonpersist(check):
    class T(nn.Module):
        def __init__(s):
            super().__init__()
            s.register_buffer("k", torch.arange(3.0), persistent=False)

        def forward(s, x):
            s.k.add_(1)
            return x * s.k

    check(T(), [(r(3),)])


def test_batchnorm(check):
    check(nn.BatchNorm1d(3), [(r(4, 3),)])


def test_bn_train_stats(check):
    bn = nn.BatchNorm1d(3)

    def f(s, x):
        return functional.batch_norm(
            x, s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias, True, 0.1
        )

    check(model_of(f, bn=bn), [(r(4, 3),)])


def test_bn_train_split(check):
    bn = nn.BatchNorm1d(3)

    def f(s, x):
        return torch.ops.split_test.twist(
            functional.batch_norm(x, s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias, True, 0.1)
            + s.bn.running_mean
        )

    check(model_of(f, bn=bn), [(r(4, 3),)], splitting_ops=["split_test::twist"])


def test_buf_mut_twice_split(check):
    def f(s, x):
        s.c.add_(1)
        a = torch.ops.split_test.twist(x * s.c)
        s.c.mul_(2)
        b = torch.ops.split_test.twist(x * s.c)
        return a - b

    check(model_of(f, c=torch.ones(())), [(r(3, 4),)], splitting_ops=["split_test::twist"])


def test_cache_update(check):
    def f(s, x, pos):
        s.k.index_copy_(0, pos, x)
        return torch.ops.split_test.twist(s.k) + s.k

    check(
        model_of(f, k=torch.zeros(8, 3)),
        [(r(2, 3), torch.tensor([0, 3])), (r(2, 3), torch.tensor([1, 5]))],
        splitting_ops=["split_test::twist"],
    )


def test_wnorm(check):
    check(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), [(r(2, 3),)])


def test_twice(check):
    layer = nn.Linear(3, 3)
    check(model_of(lambda s, x: s.l(torch.relu(s.l(x))), l=layer), [(r(2, 3),)])


def test_noncontig_param(check):
    check(model_of(lambda s, x: x @ s.w, w=nn.Parameter(r(4, 3).t())), [(r(2, 3),)])


def test_lstm(check):
    check(nn.LSTM(3, 4, batch_first=True), [(r(2, 5, 3),)])


def test_lstm_split(check):
    check(
        model_of(lambda s, x: s.l(x * 2)[0] + 1, l=nn.LSTM(3, 4, batch_first=True)),
        [(r(2, 5, 3),)],
        splitting_ops=["aten::lstm"],
    )


def test_mha(check):
    check(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [(r(2, 5, 8),)])


def test_input_mut(check):
    def f(s, x, y):
        x.add_(y)
        return x * 2

    check(model_of(f), [(r(2, 3), r(2, 3)), (r(5, 3), r(5, 3))], dynamic_shapes=[{0: BATCH}, {0: BATCH}])


def test_input_mut_return_same(check):
    def f(s, x):
        x.mul_(2)
        return x

    check(model_of(f), [(r(2, 3),)])


def test_input_view_mut(check):
    def f(s, x):
        v = x[0]
        torch.ops.split_test.scale_(v, 2.0)
        return x.sum()

    check(model_of(f), [(r(3, 3),)], splitting_ops=["split_test::scale_"])


def test_mut_input_view_out(check):
    def f(s, x):
        x.add_(1)
        return x[0], x

    check(model_of(f), [(r(3, 4),)], splitting_ops=["aten::add_"])


def test_view_cross_mut(check):
    def f(s, x):
        y = x * 2
        v = y.view(-1)
        torch.ops.split_test.scale_(v[:3], 3.0)
        return y + 1, v

    check(model_of(f), [(r(2, 3),)], splitting_ops=["split_test::scale_"])


def test_view_cross_mut2(check):
    def f(s, x):
        y = x * 2
        v = y.t()
        z = torch.relu(y) + v.t()
        torch.ops.split_test.scale_(y, 3.0)
        w = v + 1
        torch.ops.split_test.scale_(v, 0.5)
        return y + z.sum(), w, v

    check(model_of(f), [(r(3, 3),)], splitting_ops=["split_test::scale_"])


def test_maybe_alias_reshape(check):
    def f(s, x):
        y = (x * 2).contiguous()
        z = y.reshape(-1).contiguous()
        w = y.to(torch.float32)
        torch.ops.split_test.scale_(z, 3.0)
        return y.sin() + 1, w.cos()

    check(model_of(f), [(r(3, 3),)], splitting_ops=["split_test::scale_"])


def test_chunk_views_mut(check):
    def f(s, x):
        a, b = (x * 2).chunk(2)
        torch.ops.split_test.scale_(a, 3.0)
        return a + b, b

    check(model_of(f), [(r(4, 3),)], splitting_ops=["split_test::scale_"])


def test_inplace_in_piece_crossing(check):
    def f(s, x):
        y = x + 1
        t = torch.ops.split_test.twist(y)
        y.add_(t.sum())
        u = torch.ops.split_test.twist(y)
        return y.mul_(2) + u

    check(model_of(f), [(r(3, 3),)], splitting_ops=["split_test::twist"])


def test_slice_assign_cross(check):
    def f(s, x):
        y = torch.zeros(4, 3)
        y[:2] = x
        t = torch.ops.split_test.twist(y)
        y[2:] = t[:2]
        return torch.ops.split_test.twist(y) + y

    check(model_of(f), [(r(2, 3),)], splitting_ops=["split_test::twist"])


def test_inplace_unsq(check):
    def f(s, x):
        y = x + 1
        y.unsqueeze_(0)
        y.t_()
        return torch.ops.split_test.twist(y)

    check(model_of(f), [(r(3),)], splitting_ops=["split_test::twist"])
