"""What the generated checks of a call let through, and what they say of the rest."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import pickle

import pytest
import torch

import stitchcache
from stitchcache import Dim, errors


class TwoSizes(torch.nn.Module):
    def forward(self, a, b):
        return a.sum(1) + b.sum(0)


class Halves(torch.nn.Module):
    def forward(self, x):
        return x.view(x.shape[0] // 2, 2, -1).sum(1)


class Repeat(torch.nn.Module):
    def forward(self, x, times: int):
        return x * times


class Keyed(torch.nn.Module):
    def forward(self, x, *others, scale=1.0, **named):
        for other in others:
            x = x + other
        return x * scale + sum(named.values())


@pytest.fixture
def build(tmp_path):
    def build(model, args, kwargs=None, **options):
        cache = stitchcache.Cache(tmp_path / "cache")
        return stitchcache.compile(model.eval(), args, kwargs, backend="eager", cache=cache, **options)

    return build


def test_a_size_that_two_arguments_share(build):
    shared = Dim("n", 2, 9)
    compiled = build(
        TwoSizes(), (torch.ones(4, 3), torch.ones(5, 4)), dynamic_shapes=({0: shared}, {1: shared})
    )
    torch.testing.assert_close(compiled(torch.ones(7, 3), torch.ones(5, 7)), torch.full((7,), 8.0))
    with pytest.raises(
        errors.InputMismatchError, match=r"b.shape\[1\]: expected 7 \(the same as a.shape\[0\]\), got 6"
    ):
        compiled(torch.ones(7, 3), torch.ones(5, 6))


def test_a_relation_that_the_capture_relied_on(build):
    even = 2 * torch.export.Dim("half", min=2, max=8)
    compiled = build(Halves(), (torch.ones(6, 3),), dynamic_shapes=({0: even},))
    assert compiled(torch.ones(16, 3)).shape == (8, 3)
    for rows in (7, 18, 2):
        with pytest.raises(errors.InputMismatchError):
            compiled(torch.ones(rows, 3))


def test_strides_of_the_example_are_promised(build):
    model = torch.nn.Linear(4, 4)
    transposed = torch.randn(4, 3).t()
    compiled = build(model, (transposed,))
    torch.testing.assert_close(compiled(torch.randn(4, 3).t()).shape, torch.Size((3, 4)))
    with pytest.raises(errors.InputMismatchError, match=r"strides \(1, 3\), got \(4, 1\)"):
        compiled(torch.randn(3, 4))


def test_a_dimension_of_one_has_no_stride(build):
    compiled = build(torch.nn.Linear(4, 4), (torch.randn(1, 4),))
    odd = torch.randn(1, 8)[:, ::2].as_strided((1, 4), (99, 1))
    assert compiled(odd).shape == (1, 4)


def test_numbers_that_vary(build):
    compiled = build(Repeat(), (torch.ones(2), 3), dynamic_shapes=(None, torch.export.Dim.DYNAMIC))
    assert compiled(torch.ones(2), 5).tolist() == [5, 5]
    with pytest.raises(errors.InputMismatchError, match="times"):
        compiled(torch.ones(2), 2.5)


def test_variadic_arguments(build):
    one = torch.ones(2)
    compiled = build(Keyed(), (one, one, one), {"scale": 2.0, "extra": one})
    torch.testing.assert_close(compiled(one, one, one, scale=2.0, extra=one), torch.full((2,), 7.0))
    torch.testing.assert_close(compiled(one, one, one, extra=one, scale=2.0), torch.full((2,), 7.0))
    with pytest.raises(errors.InputMismatchError):
        compiled(one, one, scale=2.0, extra=one)
    with pytest.raises(errors.InputMismatchError):
        compiled(one, one, one, scale=2.0, other=one)


def test_errors_survive_pickling(build):

    compiled = build(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(errors.InputMismatchError) as caught:
        compiled(torch.randn(3, 4))
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is errors.InputMismatchError
    assert (again.argument, again.expected, again.actual) == ("input.shape[0]", "2", "3")
    assert str(again) == str(caught.value)


def test_the_call_shows_in_tracebacks(build):
    import traceback

    compiled = build(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    # Another model of the same graph comes and goes.
    build(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    gc.collect()
    try:
        compiled(torch.randn(3, 4))
    except errors.InputMismatchError as error:
        lines = "".join(traceback.format_exception(error))
    assert "<stitchcache call" in lines
    assert "raise mismatch('input.shape[0]'" in lines


class Accumulate(torch.nn.Module):
    def forward(self, total, x):
        total.add_(x)
        return x * total


def test_an_argument_that_is_written_needs_memory_of_its_own(build):
    compiled = build(Accumulate(), (torch.ones(3), torch.ones(3)))
    total, x = torch.ones(3), torch.full((3,), 2.0)
    assert compiled(total, x).tolist() == [6, 6, 6]
    assert total.tolist() == [3, 3, 3]
    with pytest.raises(errors.InputMismatchError, match=r"total: expected memory of its own.*x shares"):
        compiled(x, x)
    assert x.tolist() == [2, 2, 2]


def test_arguments_that_are_only_read_may_be_one(build):
    compiled = build(TwoSizes(), (torch.ones(4, 4), torch.ones(4, 4)))
    same = torch.full((4, 4), 2.0)
    assert compiled(same, same).tolist() == [16] * 4


def test_a_lazy_negative_is_refused(build):
    compiled = build(torch.nn.Linear(4, 4), (torch.randn(3, 4),))
    lazy = torch.randn(3, 4, dtype=torch.complex64).conj().imag.contiguous()
    negative = torch._neg_view(lazy.resolve_neg())
    with pytest.raises(errors.InputMismatchError, match="input: expected a tensor in memory"):
        compiled(negative)
    assert compiled(negative.resolve_neg()).shape == (3, 4)


def test_calls_leave_the_callers_grad_mode_as_it_was(build):
    compiled = build(Halves(), (torch.ones(6, 3),))
    x = torch.ones(6, 3, requires_grad=True)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            before = torch.is_grad_enabled()
            assert not compiled(x.detach()).requires_grad
            assert torch.is_grad_enabled() is before
    assert not compiled(x).requires_grad
    assert torch.is_grad_enabled()


def test_a_piece_that_fails_leaves_grad_mode_as_it_was(build):
    class Fails(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.cholesky(x)

    compiled = build(Fails(), (torch.eye(3),))
    with pytest.raises(RuntimeError):
        compiled(-torch.eye(3))
    assert torch.is_grad_enabled()


def test_numbers_as_tensors_have_no_rank_to_spare(build):
    class Scale(torch.nn.Module):
        def forward(self, x, factor):
            return x * factor

    compiled = build(Scale(), (torch.ones(3), torch.tensor(2.0)))
    torch.testing.assert_close(compiled(torch.ones(3), torch.tensor(3.0)), torch.full((3,), 3.0))
    for x, factor in [(torch.ones(3), torch.ones(1)), (torch.ones(3, 1), torch.tensor(2.0))]:
        with pytest.raises(errors.InputMismatchError, match="rank"):
            compiled(x, factor)


def test_a_compiled_model_is_a_callable_like_others(build):
    compiled = build(Halves(), (torch.ones(6, 3),))
    assert callable(compiled)
    assert list(inspect.signature(compiled).parameters) == ["args", "kwargs"]
    first = compiled.__call__
    other = Halves().eval()
    assert compiled.rebind(other) is compiled
    assert compiled.model is other
    assert compiled.__call__ is not first
    assert compiled(torch.ones(6, 3)).shape == (3, 3)


def test_named_tuples_of_torch_come_back_as_they_are(build):
    class Best(torch.nn.Module):
        def forward(self, x):
            return {"best": torch.topk(x, 2), "all": [torch.max(x, 0)]}

    model, x = Best().eval(), torch.randn(6)
    for _ in range(2):
        compiled = build(model, (x,))
        got, want = compiled(x + 1), model(x + 1)
        assert type(got["best"]) is torch.return_types.topk
        assert type(got["all"][0]) is torch.return_types.max
        torch.testing.assert_close(tuple(got["best"]), tuple(want["best"]))
        assert torch.equal(got["all"][0].indices, want["all"][0].indices)
    assert compiled.cache_hit == "direct"


def test_an_entry_that_divides_by_zero(build):
    compiled = build(TwoSizes(), (torch.ones(4, 3), torch.ones(4, 4)), dynamic_shapes=({1: Dim("n")}, None))
    spec = compiled.artifact.input_spec
    spec = dataclasses.replace(spec, constraints=("s0 // (s0 - s0) == 0",))
    compiled.artifact = dataclasses.replace(compiled.artifact, input_spec=spec)
    compiled.rebind(compiled.model)
    with pytest.raises(errors.InputMismatchError, match="division by zero"):
        compiled(torch.ones(4, 3), torch.ones(4, 4))


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_compiled_model_says_what_to_send_instead(build, how):
    compiled = build(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(TypeError, match=rf"stitchcache\.load\('{compiled.graph_hash[:12]}', model\)"):
        how(compiled)
