"""Calls that a capture does not cover are refused; what differs in nothing that was traced is not."""

import collections

import pytest
import torch
from torch import nn

import stitchcache
from stitchcache import errors

X = torch.arange(4.0)


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class Named(nn.Module):
    def forward(self, x, *, a, b):
        return x * a - b


class First(nn.Module):
    def forward(self, x, *, a=None, **others):
        return x * next(iter(others.values())) + (0 if a is None else a)


@pytest.fixture
def build(tmp_path):
    def build(model, *args, **kwargs):
        model = model if isinstance(model, nn.Module) else Calls(model)
        cache = stitchcache.Cache(tmp_path / "cache")
        return stitchcache.compile(model.eval(), args, kwargs, backend="eager", cache=cache)

    return build


def refused(compiled, argument, *args, **kwargs):
    with pytest.raises(errors.InputMismatchError) as caught:
        compiled(*args, **kwargs)
    assert argument in caught.value.argument
    return str(caught.value)


@pytest.mark.parametrize(
    ("baked", "given"),
    [(0.0, -0.0), (-0.0, 0.0), (1, True), (True, 1), (1, 1.0), (0, 0.0), (0.0, False), (0.0, float("nan"))],
)
def test_a_value_that_equals_the_baked_one_and_is_another(build, baked, given):
    compiled = build(lambda x, v: x * (2.0 if str(v)[0] == "-" else 3.0) + v, X, baked)
    assert torch.equal(compiled(X, baked), X * (2.0 if str(baked)[0] == "-" else 3.0) + baked)
    assert repr(baked) in refused(compiled, "args[1]", X, given)


def test_nan_is_nan(build):
    nan = float("nan")
    assert torch.equal(build(lambda x, v: x * (2.0 if v != v else 3.0), X, nan)(X, float("nan")), X * 2)


def test_a_dict_in_another_order(build):
    compiled = build(lambda d: next(iter(d.values())) * 1, {"a": X, "b": X * 2})
    assert torch.equal(compiled({"a": X + 1, "b": X}), X + 1)
    assert "keys in the order a, b" in refused(compiled, "args[0]", {"b": X, "a": X + 1})
    refused(compiled, "args[0]", {"a": X})
    refused(compiled, "args[0]", {"a": X, "c": X})


def test_keys_that_are_equal_and_of_another_type(build):
    compiled = build(lambda d: next(iter(d.values())) * len(str(next(iter(d)))), {1: X})
    assert torch.equal(compiled({1: X}), X)
    refused(compiled, "args[0]", {True: X})
    refused(compiled, "args[0]", {1.0: X})


def test_an_ordered_dict_in_another_order(build):
    ordered = collections.OrderedDict
    compiled = build(lambda d: next(iter(d.values())) * 1, ordered(a=X, b=X))
    assert torch.equal(compiled(ordered(a=X + 1, b=X)), X + 1)
    refused(compiled, "args[0]", ordered(b=X, a=X + 1))
    refused(compiled, "args[0]", {"a": X, "b": X})


def test_the_order_of_named_keywords_is_nobodys_business(build):
    compiled = build(Named(), X, a=X, b=X * 2)
    assert torch.equal(compiled(X, b=X * 2, a=X), X * X - X * 2)


def test_the_order_of_collected_keywords_is_the_models(build):
    compiled = build(First(), X, b=X, a=X, c=X * 2)
    assert torch.equal(compiled(X, a=X, b=X, c=X * 2), X * X + X)
    assert "in the order b, c, got c, b" in refused(compiled, "keywords", X, c=X * 2, a=X, b=X)


def twice(a, b):
    return a * 2.0 if a is b else a * 3.0 + b


def test_one_tensor_given_twice_to_code_that_compares_identity(build):
    compiled = build(twice, X, X + 1)
    assert torch.equal(compiled(X, X + 2), twice(X, X + 2))
    assert "another tensor than args[0]" in refused(compiled, "args[1]", X, X)


def test_an_example_that_gives_one_tensor_twice(build):
    compiled = build(lambda a, b: a + b if (a is b) in (True, False) else a, X, X)
    assert torch.equal(compiled(X, X), X * 2)
    assert torch.equal(compiled(X, X + 1), X * 2 + 1)


def five(*all):
    return sum(all) if all[0] is not all[4] else all[0] * 1


def test_many_tensors_of_which_one_is_given_twice(build):
    compiled = build(five, *(X + i for i in range(5)))
    assert torch.equal(compiled(*(X + i for i in range(5))), X * 5 + 10)
    refused(compiled, "args[4]", X, X + 1, X + 2, X + 3, X)


def test_one_tensor_given_twice_to_other_code(build):
    compiled = build(lambda a, b=None, c=None: a + b if c is None else a, X, X + 1)
    assert torch.equal(compiled(X, X), X * 2)
    assert torch.equal(compiled(X[:], X.view(4)), X * 2)


def asks_gradients(x):
    return x * (2.0 if x.requires_grad else 3.0)


def asks_kind(x):
    return x * (2.0 if isinstance(x, nn.Parameter) else 3.0)


@pytest.mark.parametrize("function", [asks_gradients, asks_kind])
@pytest.mark.parametrize("given", [X.clone().requires_grad_(), nn.Parameter(X.clone())])
def test_a_tensor_of_a_kind_that_the_code_asks_about(build, function, given):
    compiled = build(function, X)
    assert torch.equal(compiled(X + 1), (X + 1) * 3)
    assert "plain tensor" in refused(compiled, "args[0]", given)
    with pytest.raises(errors.CaptureError, match=r"x\.detach\(\)"):
        build(function, given.reshape(2, 2).detach().requires_grad_())


def test_a_parameter_is_a_tensor_to_other_code(build):
    compiled = build(lambda x: x * 2, X)
    assert torch.equal(compiled(nn.Parameter(X.clone())), X * 2)
    assert torch.equal(compiled(X.clone().requires_grad_()), X * 2)
    assert torch.equal(compiled(torch.cat([X, X])[4:]), X * 2)


class Own(torch.Tensor):
    pass


def test_a_subclass_of_tensor(build):
    compiled = build(lambda x: x * 2, X)
    assert "Own" in refused(compiled, "args[0]", X.as_subclass(Own))
    assert torch.equal(compiled(X.as_subclass(Own).as_subclass(torch.Tensor)), X * 2)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x):
        self.last.add_(1)
        return x * self.last


def test_an_argument_that_is_the_state_that_the_model_writes(build):
    model = Remembers()
    compiled = build(model, X)
    assert torch.equal(compiled(X), X)
    for given in (model.last, model.last.view(4), model.last[:]):
        assert "memory of a tensor of the model" in refused(compiled, "x", given)
    assert torch.equal(compiled(model.last.clone()), torch.full((4,), 2.0))


def test_arguments_that_forward_does_not_take(build):
    said = refused(build(First(), X, b=X), "arguments", X, X)
    assert said.startswith("arguments: expected those of the model's forward, got too many")
