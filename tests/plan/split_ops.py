"""Ops to split at, defined without ``torch.library.custom_op`` as a serving engine would."""

import torch

LIBRARY = torch.library.Library("split_test", "DEF")


def define(schema, implementation, fake):
    """Register one op with its fake implementation."""
    LIBRARY.define(schema)
    name = schema.split("(")[0]
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"split_test::{name}", fake, lib=LIBRARY)


def _scale(x, s):
    x.mul_(s)


def _attend(q, k, v, out):
    out.copy_(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


def _rows_of(x):
    rows = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((rows, x.dim()), dtype=torch.int64)


define("scale_(Tensor(a!) x, float s) -> ()", _scale, lambda x, s: None)
define(
    "twist(Tensor x) -> Tensor", lambda x: x.t().contiguous().t() + 1, lambda x: x.t().contiguous().t() + 1
)
# Its fake promises other strides than it returns, which happens.
define("badtwist(Tensor x) -> Tensor", lambda x: (x + 1).t().contiguous().t(), lambda x: x.contiguous() + 1)
define(
    "two(Tensor x) -> (Tensor, Tensor)",
    lambda x: (x + 1, x * 2),
    lambda x: (torch.empty_like(x), torch.empty_like(x)),
)
define(
    "lst(Tensor x, int n) -> Tensor[]",
    lambda x, n: [x + i for i in range(n)],
    lambda x, n: [torch.empty_like(x) for _ in range(n)],
)
define("attn(Tensor q, Tensor k, Tensor v, Tensor(a!) out) -> ()", _attend, lambda q, k, v, out: None)
define(
    "strided(Tensor x) -> Tensor",
    lambda x: torch.cat([x, x], -1)[..., ::2],
    lambda x: torch.cat([x, x], -1)[..., ::2],
)
define("nz(Tensor x) -> Tensor", lambda x: x.nonzero(), _rows_of)
