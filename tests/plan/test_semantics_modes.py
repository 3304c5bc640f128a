"""Modes that a forward switches, and control flow.

Every model runs beside its compiled form; see agreement.py.
"""

import split_ops  # noqa: F401 - registers them
import torch
from agreement import model_of
from torch import nn
from torch.export import Dim
from torch.nn import functional

import stitchcache

r = torch.randn
BATCH, SEQ = Dim("BATCH", min=1, max=64), Dim("SEQ", min=1, max=64)


def test_nograd(check):
    def f(s, x):
        with torch.no_grad():
            y = x * 2
        with torch.enable_grad():
            z = y + s.w
        return z * 3

    check(model_of(f, w=nn.Parameter(r(3))), [(r(3),)])


def test_nograd_split(check):
    def f(s, x):
        with torch.enable_grad():
            y = torch.ops.split_test.twist(x * s.w)
        return y * 3

    check(model_of(f, w=nn.Parameter(r(3))), [(r(3, 3),)], splitting_ops=["split_test::twist"])


def test_autocast(check):
    def f(s, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ s.w
        return y.float() + 1, y

    check(model_of(f, w=nn.Parameter(r(3, 3))), [(r(3, 3),)])


def test_autocast_split(check):
    def f(s, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ s.w
            z = torch.ops.split_test.twist(y)
            q = z @ s.w
        return q + 1, y

    check(model_of(f, w=nn.Parameter(r(3, 3))), [(r(3, 3),)], splitting_ops=["split_test::twist"])


def test_autocast_mha(check):
    class T(nn.Module):
        def __init__(s):
            super().__init__()
            s.l = nn.Linear(8, 24)
            s.n = nn.LayerNorm(8)

        def forward(s, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                q, k, v = s.l(s.n(x)).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
                y = functional.scaled_dot_product_attention(q, k, v)
                with torch.autocast("cpu", enabled=False):
                    z = y.float() @ y.float().transpose(-1, -2)
                w = torch.einsum("bhij,bhjd->bhid", z, y.float())
                e = torch.exp(w)
                c = torch.cat([e, y])
            return c.sum(0), w

    check(T(), [(r(2, 5, 8),)], splitting_ops=["aten::scaled_dot_product_attention"])


def test_autocast_mlp_dyn(check):
    class T(nn.Module):
        def __init__(s):
            super().__init__()
            s.l = nn.Linear(8, 24)
            s.n = nn.LayerNorm(24)
            s.c = nn.Conv1d(24, 3, 1)

        def forward(s, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with torch.no_grad():
                    h = functional.gelu(s.l(x))
                h = s.n(h)
                return s.c(h.transpose(1, 2)).softmax(-1), torch.addmm(h[0], h[0], h[0].t() @ h[0])

    check(T(), [(r(2, 5, 8),), (r(3, 4, 8),)], dynamic_shapes=[{0: BATCH, 1: SEQ}])


def test_autocast_cond(check):
    def f(s, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.cond(x.sum() > 0, lambda a: a @ s.w, lambda a: (a * 2) @ s.w, (x,))

    check(model_of(f, w=nn.Parameter(r(3, 3))), [(torch.ones(3, 3),), (-torch.ones(3, 3),)])


def test_inference(check):
    def f(s, x):
        with torch.inference_mode():
            y = x @ s.w
        return y + 1

    check(model_of(f, w=nn.Parameter(r(3, 3))), [(r(3, 3),)])


def test_ambient_autocast(tmp_path):
    m = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.LayerNorm(4), nn.Linear(4, 4)).eval()
    x = r(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        c = stitchcache.compile(
            m, (x,), backend="eager", cache=stitchcache.Cache(tmp_path), splitting_ops=["aten::softmax"]
        )
        w = m(x)
        g = c(x)
    assert w.dtype == g.dtype, (w.dtype, g.dtype)
    assert torch.equal(w, g)


def test_cond(check):
    def f(s, x):
        return torch.cond(x.sum() > 0, lambda a: a + s.w, lambda a: a * s.w, (x,))

    check(model_of(f, w=nn.Parameter(r(3))), [(torch.ones(3),), (-torch.ones(3),)])


def test_cond_split(check):
    def f(s, x):
        y = torch.ops.split_test.twist(x + 1)
        z = torch.cond(y.sum() > 0, lambda a: a + 1, lambda a: a * 2, (y,))
        return torch.ops.split_test.twist(z)

    check(model_of(f), [(torch.ones(3, 3),), (-9 * torch.ones(3, 3),)], splitting_ops=["split_test::twist"])


def test_map_hop(check):
    from torch._higher_order_ops.map import map as tmap

    check(model_of(lambda s, x: tmap(lambda a: a.sin() + 1, x)), [(r(3, 4),)])


def test_while_hop(check):
    def f(s, x):
        return torch.while_loop(lambda i, a: i < 3, lambda i, a: (i + 1, a * 2), (torch.tensor(0), x))

    check(model_of(f), [(r(3, 4),)])
