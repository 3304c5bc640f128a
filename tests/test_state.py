"""Paths to tensors that lie in plain objects, and putting back what a forward wrote."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from stitchcache import state

Pair = namedtuple("Pair", "first second")


class Slotted:
    __slots__ = ("tensor", "unset")

    def __init__(self):
        self.tensor = torch.zeros(1)


class Hostile:
    def __init__(self):
        self.tensor = torch.zeros(1)

    @property
    def trap(self):
        raise AssertionError("a property of the user's ran")

    def __getattr__(self, name):
        if name.startswith("__"):
            # pytest asks for these.
            raise AttributeError(name)
        raise AssertionError("the user's __getattr__ ran")


class Holds(nn.Module):
    def __init__(self, thing):
        super().__init__()
        self.inner = nn.Module()
        self.inner.thing = thing


LEAF = torch.zeros(1)


@pytest.mark.parametrize(
    ("thing", "path"),
    [
        (LEAF, "inner.thing"),
        ([0, [LEAF]], "inner.thing[1][0]"),
        ({"a": LEAF}, "inner.thing['a']"),
        ({7: LEAF}, "inner.thing[7]"),
        ({"7": LEAF}, "inner.thing['7']"),
        (OrderedDict({"a.b['\\\"]": LEAF}), "inner.thing['a%2e;b%5b;%27;%5c;%22;%5d;']"),
        (Pair(None, LEAF), "inner.thing[1]"),
        (Slotted(), "inner.thing.tensor"),
        (Hostile(), "inner.thing.tensor"),
        ([nn.Linear(1, 1, bias=False)], "inner.thing[0].weight"),
    ],
)
def test_a_path_leads_back(thing, path):
    model = Holds(thing)
    found = state.plain_tensors(model)
    assert list(found) == [path]
    assert state.tensor_at(model, path) is found[path]


@pytest.mark.parametrize(
    "path",
    [
        *("", ".", "inner", "inner.thing[1]", "inner.thing[0", "inner.thing.0", "inner.thing[-1]"),
        *("inner.thing['0']", "inner.thing.__class__", "inner..thing[0]", "inner.thing[0]]"),
        "inner.thing[99999999999999999999]",
    ],
)
def test_a_path_that_leads_nowhere(path):
    assert state.tensor_at(Holds([torch.zeros(1)]), path) is None


def test_no_code_of_the_users_runs():
    assert state.tensor_at(Holds(Hostile()), "inner.thing.trap") is None


def test_objects_that_hold_each_other():
    first, second = Hostile(), Hostile()
    first.other, second.other = second, first
    assert sorted(state.plain_tensors(Holds(first))) == ["inner.thing.other.tensor", "inner.thing.tensor"]


def test_a_parameter_is_found_under_its_path_too():
    model = nn.Linear(2, 2)
    model.kept = {"w": model.weight}
    assert state.plain_tensors(model)["kept['w']"] is model.weight
    assert state.state_of(model)["weight"] is model.weight


def test_memory_is_one_for_a_detached_tensor_and_not_for_a_view_of_a_part():
    whole = torch.zeros(4)
    assert state.elements_of(whole) == state.elements_of(whole.detach())
    assert state.elements_of(whole) != state.elements_of(whole[:2])
    assert state.elements_of(whole) != state.elements_of(whole.clone())
    assert state.elements_of(torch.eye(2).to_sparse()) is None
