"""Arguments and results: containers, scalars, dtypes, layouts.

Every model runs beside its compiled form; see agreement.py.
"""

import dataclasses
from collections import OrderedDict

import split_ops  # noqa: F401 - registers them
import torch
from agreement import model_of
from torch import nn
from torch.export import Dim

import stitchcache

r = torch.randn
BATCH, SEQ = Dim("BATCH", min=1, max=64), Dim("SEQ", min=1, max=64)


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


torch.export.register_dataclass(Pair, serialized_type_name="tests.semantics.Pair")


def test_out_input(check):
    check(model_of(lambda s, x: (x, x + 1, x)), [(r(3),)])


def test_out_param(check):
    check(model_of(lambda s, x: (s.w, x + 1), w=nn.Parameter(r(3))), [(r(3),)])


def test_out_const(check):
    check(model_of(lambda s, x: (x + 1, 3, None, 2.5, "a", True)), [(r(3),)])


def test_out_dup(check):
    def f(s, x):
        y = x + 1
        return y, y, [y]

    check(model_of(f), [(r(3),)])


def test_out_none(check):
    check(model_of(lambda s, x: None), [(r(3),)])


def test_out_onlyinput(check):
    check(model_of(lambda s, x: x), [(r(3),)])


def test_out_empty(check):
    check(model_of(lambda s, x: ()), [(r(3),)])


def test_zero_inputs(check):
    check(model_of(lambda s: s.w * 2, w=nn.Parameter(r(3))), [()])


def test_zero_inputs_const(check):
    check(model_of(lambda s: torch.ones(3) * 2), [()])


def test_unused(check):
    check(model_of(lambda s, x, y: x + 1), [(r(3), r(2)), (r(3), r(2))])


def test_kw(check):
    def f(s, x, *, y, z=None, k=2):
        return x * k + y if z is None else x + z

    check(model_of(f), [(r(3),)], kwargs=[{"y": r(3)}])


def test_kw_reordered(check):
    def f(s, x, y, z):
        return x - y * z

    check(model_of(f), [(r(3),), (r(3),)], kwargs=[{"z": r(3), "y": r(3)}, {"y": r(3), "z": r(3)}])


def test_varargs(check):
    def f(s, *xs, **kw):
        return sum(xs) * kw["a"] + kw["b"]

    check(model_of(f), [(r(3), r(3))], kwargs=[{"a": r(3), "b": r(3)}])


def test_nested(check):
    def f(s, d):
        return {"o": [d["a"][0] + d["b"]["c"], (d["a"][1],)], "p": d["a"][0]}

    check(model_of(f), [({"a": [r(3), r(3)], "b": {"c": r(3)}},)])


def test_dclass(check):
    check(model_of(lambda s, p: Pair(p.x + p.y, p.x * p.y)), [(Pair(r(3), r(3)),)])


def test_odict(check):
    check(model_of(lambda s, p: OrderedDict(b=p["a"] + 1, a=p["b"])), [(OrderedDict(b=r(3), a=r(3)),)])


def test_scalars(check):
    def f(s, x, i, fl, b, st, n):
        y = x * i + fl
        if b:
            y = y + 1
        if st == "q":
            y = y * 3
        return y

    check(model_of(f), [(r(3), 2, 0.5, True, "q", None)])


def test_dtypes(check):
    def f(s, c, b, i8, h, bf, z):
        return c * 2j, ~b, i8 + 1, h * 2, bf * 2, z + 1, c.real

    check(
        model_of(f),
        [
            (
                r(3, dtype=torch.complex64),
                torch.tensor([True, False]),
                torch.tensor([127, 1], dtype=torch.int8),
                r(3).half(),
                r(3).bfloat16(),
                torch.tensor(2.0),
            )
        ],
    )


def test_conj(check):
    def f(s, c):
        return c.conj(), c.conj() @ c, torch.view_as_real(c)

    check(model_of(f), [(r(3, dtype=torch.complex64),)])


def test_conj_split(check):
    def f(s, c):
        d = (c * 1).conj()
        return torch.ops.split_test.lst(d, 2)[1] * d, d.imag

    check(model_of(f), [(r(3, dtype=torch.complex64),)], splitting_ops=["split_test::lst"])


def test_zerosize(check):
    check(model_of(lambda s, x: (x + 1, x.sum(0), torch.cat([x, torch.zeros(2, 3)]))), [(r(0, 3),)])


def test_zerosize_split(check):
    check(
        model_of(lambda s, x: torch.ops.split_test.twist(x * 2) + 1),
        [(r(0, 3),)],
        splitting_ops=["split_test::twist"],
    )


def test_noncontig_input(check):
    check(model_of(lambda s, x: x @ x.t()), [(r(4, 3).t(),)])


def test_expand_input(check):
    check(model_of(lambda s, x: x * 2), [(r(1, 4).expand(3, 4),)])


def test_out_view_of_input(check):
    check(model_of(lambda s, x: (x[0], x.t())), [(r(4, 4),)])


def test_inf_args(check):
    check(
        model_of(
            lambda s, x: torch.clamp(x, -float("inf"), float("nan")) + x.masked_fill(x > 0, float("-inf"))
        ),
        [(r(4),)],
    )


def test_to_dtype(check):
    check(
        model_of(
            lambda s, x: (
                x.to(torch.float64).sum(dtype=torch.float32)
                + torch.zeros(2, dtype=torch.float16, device=x.device)
            )
        ),
        [(r(4),)],
    )


def test_int_tensor_index(check):
    check(model_of(lambda s, x, i: x[i] + x[:, i].sum()), [(r(4, 4), torch.tensor([0, 2]))])


def test_bool_mask(check):
    check(model_of(lambda s, x: x[x > 0] * 2), [(r(8),), (r(8),), (-torch.ones(8),)])


def test_same_tensor_twice(check):
    x = r(3)
    check(model_of(lambda s, x, y: x + y * 2), [(x, x)])


def test_same_twice(tmp_path):
    x = r(3)

    m = model_of(lambda s, x, y: x + y * 2).eval()
    c = stitchcache.compile(m, (x, x), backend="eager", cache=stitchcache.Cache(tmp_path))
    y = r(3)
    assert torch.equal(c(x, y), m(x, y))
