"""Quickly made dataclasses behave as the standard ones do."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from stitchcache.records import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    x: int
    y: int = 2
    tags: tuple = ()


@dataclass(slots=True)
class Bag:
    name: str
    items: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard:
    x: int
    y: int = 2
    tags: tuple = ()


def test_what_the_library_does_with_dataclasses():
    point = Point(x=1)
    assert dataclasses.is_dataclass(point)
    assert dataclasses.asdict(point) == dataclasses.asdict(Standard(x=1))
    assert repr(point) == repr(Standard(x=1)).replace("Standard", "Point")
    assert dataclasses.replace(point, y=5) == Point(x=1, y=5) != point
    assert hash(Point(x=1)) == hash(point)
    assert {point: 1}[Point(x=1, y=2)] == 1
    assert pickle.loads(pickle.dumps(point)) == point == copy.deepcopy(point)
    assert point != Standard(x=1)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Point(x=1).x = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del Point(x=1).x


def test_not_frozen():
    first, second = Bag("a"), Bag("b", [1])
    first.items.append(3)
    assert (first.items, second.items, Bag("c").items) == ([3], [1], [])
    with pytest.raises(TypeError):
        hash(first)


@pytest.mark.parametrize(
    "make",
    [lambda: Point(1), lambda: Point(), lambda: Point(x=1, z=2), lambda: Bag(), lambda: Bag("a", name="b")],
)
def test_wrong_arguments(make):
    with pytest.raises(TypeError):
        make()


@dataclass(frozen=True)
class Span:
    low: int
    high: int
    name: str = dataclasses.field(default="", compare=False)


@dataclass(frozen=True)
class Named(Span):
    label: str = "none"


def test_what_is_not_compared():
    assert Span(1, 2, "a") == Span(1, 2, "b")
    assert hash(Span(1, 2, "a")) == hash(Span(1, 2, "b"))


def test_fields_of_classes_above_come_first():
    assert [field.name for field in dataclasses.fields(Named)] == ["low", "high", "name", "label"]
    assert Named(1, 2, label="x") == dataclasses.replace(Named(1, 2), label="x")
    assert repr(Named(1, 2)) == "Named(low=1, high=2, name='', label='none')"


def test_fields_are_made_once_whoever_asks_first():
    @dataclass(kw_only=True)
    class Late:
        x: int
        items: list = dataclasses.field(default_factory=list)

    early = Late(x=1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: dataclasses.fields(Late), range(32)))
    assert all(fields is not None and [f.name for f in fields] == ["x", "items"] for fields in found)
    assert {tuple(map(id, fields)) for fields in found} == {tuple(map(id, dataclasses.fields(Late)))}
    assert dataclasses.asdict(early) == dataclasses.asdict(Late(x=1)) == {"x": 1, "items": []}
    assert dataclasses.fields(Late)[1].default_factory is list
