"""Which stored targets and entries come nearest to some factors."""

from __future__ import annotations

import dataclasses
import hashlib
import os

import pytest

from stitchcache import explanation
from stitchcache.artifact.entry import pack_factors
from stitchcache.cache import Cache
from stitchcache.explanation import apart, nearest_entries, stored_targets
from stitchcache.types import Artifact, Factor, TargetRecord, Variant


def digest(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def factors(**values: object) -> tuple[Factor, ...]:
    return tuple(Factor(name=n, value=str(v), digest=digest(v)) for n, v in values.items())


def add(cache, name, *, label="Net", created=1.0, graph="", refused=None, **values):
    record = TargetRecord(
        graph_hash=digest(graph or f"graph of {name}"),
        sources=(),
        label=label,
        created=created,
        refused=refused,
        factors=pack_factors(factors(**values)),
    )
    cache.put_target(digest(name), record)
    return record.graph_hash


def entry(name, label="Net", created=1.0, **values) -> Artifact:
    variant = Variant(size_range=None, code="x", submod_names=(), consts=None, pieces=())
    return Artifact(
        graph_hash=digest(name), variants=(variant,), label=label, created=created, factors=factors(**values)
    )


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path, durability="fast")


def test_an_empty_or_missing_cache_has_nothing_near(tmp_path):
    assert nearest_entries([tmp_path / "nowhere"], factors(a=1)) == []
    (tmp_path / "targets").write_text("a file where a directory should be")
    assert nearest_entries([tmp_path], factors(a=1)) == []


def test_fewest_differences_come_first_then_the_label_then_the_newest(cache):
    far = add(cache, "far", a=2, b=2, c=1, created=9.0)
    other = add(cache, "other", a=1, b=2, c=1, label="Other", created=9.0)
    old = add(cache, "old", a=1, b=2, c=1, created=1.0)
    new = add(cache, "new", a=1, b=1, c=2, created=5.0)
    found = nearest_entries(cache.roots, factors(a=1, b=1, c=1), label="Net", most=9)
    assert [item.graph_hash for item in found] == [new, old, other, far]
    assert found[0].differences == {"c": ("2", "1")}
    assert list(found[3].differences) == ["a", "b"]
    (one,) = nearest_entries(cache.roots, factors(a=1, b=1, c=1), label="Other", most=1)
    assert one.graph_hash == other


def test_absent_factors_count_on_both_sides(cache):
    add(cache, "t", a=1, gone=1)
    (found,) = nearest_entries(cache.roots, factors(a=1, fresh=2))
    assert found.differences == {"fresh": ("(absent)", "2"), "gone": ("1", "(absent)")}
    (found,) = nearest_entries(cache.roots, factors(a=1), partial=True)
    assert found.differences == {}


def test_what_is_left_out_is_left_out(cache):
    here = add(cache, "here", a=1)
    there = add(cache, "there", a=2)
    assert [n.graph_hash for n in nearest_entries(cache.roots, factors(a=1), without={here})] == [there]
    by_key = nearest_entries(cache.roots, factors(a=1), without={digest("here")})
    assert [n.graph_hash for n in by_key] == [there]


def test_entries_without_targets_are_found_too(cache):
    cache.put(entry("lonely", a=1, b=1, **{"graph.structure": "s", "request.backend": "eager"}))
    cache.put(entry("led to", a=1, b=2))
    add(cache, "t", graph="led to", a=3, b=3)
    found = nearest_entries(cache.roots, factors(a=1, b=2), most=9)
    assert [(n.graph_hash, n.target_key) for n in found] == [
        (digest("lonely"), None),
        (digest("led to"), digest("t")),
    ]
    assert found[0].differences == {"b": ("1", "2")}, "what only a trace knows is no difference of keys"


def test_the_entry_of_a_target_without_factors_is_found_itself(cache):
    graph = add(cache, "old")
    cache.put(dataclasses.replace(entry("x", a=1), graph_hash=graph))
    (found,) = nearest_entries(cache.roots, factors(a=2))
    assert (found.graph_hash, found.target_key, found.record) == (graph, None, None)


def test_a_refused_target_says_so(cache):
    add(cache, "t", a=1, refused="it reads a clock")
    assert nearest_entries(cache.roots, factors(a=1))[0].refused == "it reads a clock"


def test_damage_is_passed_over_and_left(cache, tmp_path, caplog):
    good = add(cache, "good", a=1)
    add(cache, "bad", a=2)
    bad = tmp_path / "targets" / digest("bad")[:2] / digest("bad")
    bad.chmod(0o600)
    bad.write_bytes(b"STITCH\r\njunk")
    (bad.parent / "foreign").write_text("x")
    assert [n.graph_hash for n in nearest_entries(cache.roots, factors(a=2), most=9)] == [good]
    assert bad.read_bytes() == b"STITCH\r\njunk"
    assert not caplog.records


def test_several_roots(tmp_path):
    below, top = Cache(tmp_path / "below"), Cache(tmp_path / "top")
    add(below, "same", a=1, created=1.0)
    fresh = add(top, "same", a=1, created=2.0, graph="fresh")
    both = Cache([tmp_path / "top", tmp_path / "below"])
    assert [record.graph_hash for _, _, record in stored_targets(both.roots)] == [fresh]


def test_a_huge_store_costs_no_more_than_a_large_one(cache, monkeypatch, tmp_path):
    for number in range(40):
        add(cache, number, a=number, created=float(number))
        path = tmp_path / "targets" / digest(number)[:2] / digest(number)
        os.utime(path, (number, number))
    read = []
    real = explanation._read
    monkeypatch.setattr(explanation, "_read", lambda *words: read.append(words) or real(*words))
    monkeypatch.setattr(explanation, "MOST_TARGETS", 10)
    found = nearest_entries(cache.roots, factors(a=0), most=99)
    assert len(read) == len(found) == 10
    assert {n.created for n in found} == {float(number) for number in range(30, 40)}, "the newest are read"
    monkeypatch.setattr(explanation, "MOST_BYTES", 1500)
    assert 0 < len(nearest_entries(cache.roots, factors(a=0), most=99)) < 10


def test_stored_targets_by_prefix_and_by_entry(cache):
    graph = add(cache, "one", a=1, created=1.0)
    add(cache, "two", a=2, created=2.0, graph="graph of one")
    add(cache, "three", a=3)
    assert [key for key, _, _ in stored_targets(cache.roots, graph_hash=graph)] == [
        digest("two"),
        digest("one"),
    ]
    ((key, path, _),) = stored_targets(cache.roots, prefix=digest("three")[:10])
    assert key == digest("three")
    assert path.endswith(digest("three"))


def test_records_are_frozen(cache):
    add(cache, "t", a=1)
    (found,) = nearest_entries(cache.roots, factors(a=1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.label = "other"


def test_a_pipe_where_a_file_should_be_is_passed_over(cache, tmp_path):
    add(cache, "near", a=1)
    for area in ("targets", "entries"):
        key = digest(f"pipe in {area}")
        (tmp_path / area / key[:2]).mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / area / key[:2] / (key if area == "targets" else f"{key}.stitch"))
    assert len(nearest_entries([tmp_path], factors(a=2))) == 1
    assert len(stored_targets([tmp_path])) == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{'a': 1, 'b': 2}", "{'a': 1, 'b': 3}", ("'b': 2", "'b': 3")),
        ("{'rope': {'theta': 1}}", "{'rope': {'theta': 2}}", ("rope: 'theta': 1", "rope: 'theta': 2")),
        ("[1, [2, 3]]", "[1, [2, 4]]", ("1: 3", "1: 4")),
        ("[1, 2]", "[1, 2, 3]", ("item 2: (absent)", "item 2: 3")),
        ("{'a': 1}", "{}", ("'a': 1", "(absent)")),
        (
            "[{0: Dim(batch, min=1, max=64)}, null]",
            "[{0: Dim(batch, min=2, max=64)}, null]",
            ("0: 0: Dim: min=1", "0: 0: Dim: min=2"),
        ),
        ("float32", "float16", ("float32", "float16")),
    ],
)
def test_which_item_of_a_container_differs(old, new, said):
    assert apart(old, new) == said
