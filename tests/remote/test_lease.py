"""Leases: one of many holds one; one that shows no life is taken over, whatever clocks say."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from stores import key

from stitchcache.remote import Leases, Remote


@pytest.fixture
def leases(url):
    """Makes nodes that know one remote. A busy machine gets more room than leases need."""

    def make(lifetime: float = 1.5) -> Leases:
        made = Leases(Remote(url, lambda *_: None))
        made.lifetime, made._remote.wait = lifetime, 20.0
        return made

    return make


def work(node: Leases, done: list, compiled: list, name: str, seconds: float = 0.0) -> None:
    """Share two keys with others: ``done`` is what the remote has."""

    def fetched(keys):
        return [each for each in keys if each in done]

    for batch in node.share([key(1), key(2)], fetched, lambda: None):
        for each in batch:
            time.sleep(seconds)
            compiled.append((name, each))
            done.append(each)
            node.release([each])


def test_of_many_nodes_each_key_is_worked_on_by_one(leases):
    done, compiled = [], []
    nodes = [threading.Thread(target=work, args=(leases(), done, compiled, str(n), 0.05)) for n in range(8)]
    for each in nodes:
        each.start()
    for each in nodes:
        each.join()
    assert sorted(each for _, each in compiled) == sorted([key(1), key(2)])


def test_the_lease_of_a_dead_node_is_taken_over(leases, url):
    dead = leases()
    batches = dead.share([key(1), key(2)], lambda keys: [], lambda: None)
    assert sorted(next(batches)) == sorted([key(1), key(2)])
    with dead._mutex:
        dead._held.clear()
    done, compiled, began = [], [], time.monotonic()
    nodes = [threading.Thread(target=work, args=(leases(), done, compiled, str(n), 0.05)) for n in range(5)]
    for each in nodes:
        each.start()
    for each in nodes:
        each.join()
    assert {each for _, each in compiled} == {key(1), key(2)}
    assert time.monotonic() - began < 15
    assert not list((Path(url[7:]) / "leases").rglob("*.*")), "nothing of it is left"


def test_what_a_dead_node_held_is_taken_over_together(leases):
    """One piece after the other would be compiled on one core."""
    dead, other = leases(1.0), leases(1.0)
    keys = [key(n) for n in range(5)]
    next(dead.share(keys, lambda keys: [], lambda: None))
    dead._held.clear()
    assert [len(batch) for batch in other.share(keys, lambda keys: [], lambda: None)] == [5]


def test_a_holder_that_lives_is_waited_for(leases):
    done, compiled = [], []
    slow = threading.Thread(target=work, args=(leases(), done, compiled, "slow", 2.5))
    slow.start()
    time.sleep(0.5)
    work(leases(), done, compiled, "other")
    slow.join()
    assert {name for name, _ in compiled} == {"slow"}


def test_whoever_waits_says_for_whom_and_compiles_itself_after_the_deadline(leases, caplog):
    caplog.set_level("INFO", "stitchcache")
    holder, other = leases(), leases()
    next(holder.share([key(1)], lambda keys: [], lambda: None))
    other.deadline = 0.6
    waited = []
    assert list(other.share([key(1)], lambda keys: [], lambda: waited.append(1))) == [[key(1)]]
    assert waited
    assert sum("waiting for process" in r.getMessage() for r in caplog.records) == 1
    assert any("compiling it here" in r.getMessage() for r in caplog.records)
    holder.release([key(1)])


def test_what_was_done_between_lookup_and_lease_is_not_done_again(leases):
    assert list(leases().share([key(1)], lambda keys: list(keys), lambda: None)) == []


@pytest.mark.parametrize("said", [b"", b"\n\n\n", b"\xff" * 4000, b"x" * 100_000])
def test_a_lease_of_a_stranger_is_waited_for_and_taken_over(leases, said):
    node = leases(0.3)
    name = f"leases/{key(1)[:2]}/{key(1)}"
    node._remote.now(node._remote.write, name, said)
    began = time.monotonic()
    assert list(node.share([key(1)], lambda keys: [], lambda: None)) == [[key(1)]]
    assert time.monotonic() - began < 15
