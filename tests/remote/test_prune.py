"""Pruning a remote: what goes, what stays, and that no upload beside it is left without its blobs."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest
from stores import key, put, target

from stitchcache import remote as remotes
from stitchcache.artifact.entry import decode_header
from stitchcache.cache import Cache
from stitchcache.errors import OptionError, StoreError
from stitchcache.remote import prune, tier

DAY = 86400.0
NONE = {"max_bytes": None, "max_files": None}


@pytest.fixture(autouse=True)
def _unsigned(monkeypatch):
    # Signatures are no matter here, and cost time.
    monkeypatch.setenv("STITCHCACHE_TRUST", "any")


def objects(url: str) -> list[str]:
    root = Path(url[7:])
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def aged(url: str, seconds: float, part: str = "") -> None:
    """Let time pass for the store's objects, or for some of them."""
    for path in Path(url[7:]).rglob("*"):
        if path.is_file() and part in str(path):
            times = path.stat().st_mtime - seconds
            os.utime(path, (times, times))


def pruned(cache: Cache, **limits):
    with prune.planned(cache.tier, dry_run=False, **{**NONE, **limits}) as plan:
        return plan.execute()


def lacking(url: str) -> list[str]:
    """Entries that name a blob that is not there."""
    root, found = Path(url[7:]), []
    for path in (root / "entries").rglob("*.stitch"):
        data = path.read_bytes()
        places = [root / "blobs" / b.digest[:2] / b.digest for b in decode_header(data, len(data)).blobs]
        found += [path.name for place in places if not place.exists()]
    return found


def test_what_no_entry_needs_goes_after_a_day_and_the_rest_stays(node, url):
    cache = node(url)
    made = put(cache, "a", [b"one" * 100, b"two"])
    cache.put_target(key("t"), target(key("a")))
    kept = cache.put_blob(b"of a piece of the entry")
    cache.put_piece(key("p"), "aoti", made.pieces[0].blob)
    cache.put_piece(key("q"), "aoti", kept)
    cache.put_target(key("nowhere"), target(key("gone")))
    before = objects(url)
    assert pruned(cache).files == 1, "the target that leads nowhere"
    aged(url, 2 * DAY)
    with prune.planned(cache.tier, dry_run=True, **NONE) as plan:
        assert [item.key for item in plan.pieces] == [key("q")]
    with pytest.raises(StoreError, match="this was a look"):
        plan.execute()
    assert len(objects(url)) == len(before) - 1, "a look removes nothing"
    assert pruned(cache).files == 2
    gone = {f"targets/{key('nowhere')[:2]}/{key('nowhere')}", f"pieces/{key('q')[:2]}/{key('q')}"}
    gone |= {f"blobs/{kept.digest[:2]}/{kept.digest}"}
    assert set(before) - set(objects(url)) == gone
    other = node(url)
    assert other.tier.records(other, key("t"))
    assert other.tier.entry(other, key("a"))


def test_a_quota_takes_the_oldest_and_what_only_they_need(node, url):
    cache = node(url)
    for number in range(4):
        put(cache, number, [bytes([number]) * 10_000, b"shared" * 1000])
        cache.put_target(key(f"t{number}"), target(key(number)))
        aged(url, DAY)
    aged(url, DAY)
    put(cache, "young", [b"y" * 50_000])
    with prune.planned(cache.tier, dry_run=True, **{**NONE, "max_bytes": 85_000}) as plan:
        assert [item.key for item, _ in plan.entries] == [key(0), key(1)]
        assert "over the limit" in plan.entries[0][1]
    result = pruned(cache, max_bytes=85_000)
    assert (result.entries, result.failed) == ([key(0), key(1)], [])
    assert sum(path.stat().st_size for path in Path(url[7:]).rglob("*") if path.is_file()) <= 85_000
    assert pruned(cache, max_bytes=0).entries == [key(2), key(3)], "what is younger than a day stays"
    assert lacking(url) == []


def test_entries_go_by_age(node, url):
    cache = node(url)
    put(cache, "old", [b"old"])
    aged(url, 30 * DAY)
    put(cache, "new", [b"new"])
    aged(url, 2 * DAY)
    with prune.planned(cache.tier, dry_run=True, **{**NONE, "max_age": 20 * DAY}) as plan:
        assert plan.entries[0][1] == "uploaded 32.0 days ago"
    assert pruned(cache, max_age=20 * DAY).entries == [key("old")]


def test_an_entry_that_cannot_be_understood_keeps_all_blobs(node, url):
    cache = node(url)
    put(cache, "a", [b"1"])
    put(cache, "newer", [b"2"])
    aged(url, 2 * DAY)
    (path,) = Path(url[7:]).rglob(f"{key('newer')}.stitch")
    data = bytearray(path.read_bytes())
    data[8:10] = (99).to_bytes(2, "little")
    path.write_bytes(data)
    aged(url, 2 * DAY)
    with prune.planned(cache.tier, dry_run=True, **{**NONE, "max_bytes": 0}) as plan:
        assert [Path(each).name for each in plan.unreadable] == [path.name]
        assert not plan.items


def test_a_remote_that_fails_loses_nothing_or_only_what_leads_to_nothing(node, url, monkeypatch):
    cache = node(url)
    put(cache, "a", [b"1"])
    cache.put_target(key("t"), target(key("a")))
    aged(url, 2 * DAY)
    ask = remotes.Remote.ask

    def failing(verb: str, area: str):
        def asked(self, asked_verb, *args, **how):
            if asked_verb == verb and str(args[0]).startswith(area):
                raise OSError(5, "faulty")
            return ask(self, asked_verb, *args, **how)

        monkeypatch.setattr(remotes.Remote, "ask", asked)

    for verb, area in (("list", "entries"), ("put", "prunes")):
        failing(verb, area)
        with pytest.raises(StoreError, match="faulty"):
            pruned(cache, max_bytes=0)
        assert len(objects(url)) == 3
    failing("get", "entries")
    assert pruned(cache, max_bytes=0).files == 0
    failing("get", "targets")
    assert pruned(cache, max_bytes=0).files <= 2
    assert lacking(url) == []
    put(cache, "b", [b"2"])
    aged(url, 2 * DAY)
    failing("delete", "entries")
    result = pruned(cache, max_bytes=0)
    assert "faulty" in result.failed[0][1]
    assert lacking(url) == []
    monkeypatch.setattr(remotes.Remote, "ask", ask)
    with pytest.raises(StoreError, match="another prune is under way, or ended early 0 minutes ago"):
        pruned(cache, max_bytes=0)
    aged(url, 2 * DAY)
    assert pruned(cache, max_bytes=0).entries == [key("b")]
    assert objects(url) == []


def test_a_cache_without_a_remote_is_told(tmp_path):
    with (
        pytest.raises(OptionError, match="STITCHCACHE_REMOTE"),
        prune.planned(Cache(tmp_path).tier, dry_run=True),
    ):
        pass


# -- beside uploads --------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["upload", "prune"])
def test_one_may_run_whole_between_any_two_requests_of_the_other(url, node, monkeypatch, first):
    """With a blob that only an old entry has, one that nothing has, and one that is not there."""
    point = 1
    while interrupted(f"{url}-{point}", node, monkeypatch, first, point):
        assert lacking(f"{url}-{point}") == [], point
        point += 1
    assert point > 10


def interrupted(url: str, node, monkeypatch, first: str, point: int) -> bool:
    """Do one thing, and before one of its requests the other; False if it has not so many."""
    ask, count = remotes.Remote.ask, 0
    old, new = node(url), node("")
    put(old, "gone", [b"of nothing"])
    put(old, "old", [b"only of an old entry"])
    for path in Path(url[7:]).rglob(f"{key('gone')}.stitch"):
        path.unlink()
    aged(url, 3 * DAY)
    put(new, "new", [b"only of an old entry", b"of nothing", b"not there"])
    new.remote = url

    def act(name: str) -> None:
        try:
            upload(new, "new") if name == "upload" else pruned(old, max_bytes=0)
        except StoreError as error:
            said = str(error)
        else:
            said = "is being pruned"
        assert "is being pruned" in said

    def asked(self, verb, *args, **how):
        nonlocal count
        count += 1
        if count == point:
            act("prune" if first == "upload" else "upload")
        return ask(self, verb, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(remotes.Remote, "ask", asked)
        act(first)
    return count >= point


class Stopped(BaseException):
    """As a process that is killed."""


class Turns:
    """Lets actors make their requests one at a time, in an order that a seed decides; some are killed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._changed = rng, threading.Condition()
        self._waiting: list[str] = []
        self._live: set[str] = set()
        self._next = ""
        self._killed: set[str] = set()

    def take(self, actor: str) -> None:
        with self._changed:
            if actor in self._killed:
                raise Stopped
            # It may have several threads.
            self._waiting.append(actor)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._next == actor)
            self._next = ""
            self._waiting.remove(actor)
            self._changed.notify_all()
            if actor in self._killed:
                raise Stopped

    def run(self, jobs: dict[str, object], kill: float) -> None:
        def work(actor: str, job) -> None:
            try:
                job()
            except (Stopped, StoreError, OSError):
                pass
            finally:
                with self._changed:
                    self._live.discard(actor)
                    self._changed.notify_all()

        self._live = set(jobs)
        threads = [threading.Thread(target=work, args=each, daemon=True) for each in jobs.items()]
        for each in threads:
            each.start()
        favourite, bursts = "", self._rng.random() < 0.5
        with self._changed:
            while True:
                assert self._changed.wait_for(lambda: {*self._waiting} >= self._live, 30)
                if not self._live:
                    break
                actor = self._rng.choice(sorted(self._live))
                if bursts and favourite in self._live and self._rng.random() < 0.9:
                    # Bursts: what is held up between two requests meets all that another does.
                    actor = favourite
                elif self._rng.random() < 0.3:
                    favourite = actor
                if self._rng.random() < kill:
                    self._killed.add(actor)
                self._next = actor
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: not self._next, 30)
        for each in threads:
            each.join()


@pytest.mark.parametrize("part", range(3))
def test_no_entry_is_ever_without_its_blobs(tmp_path, url, monkeypatch, full, part):
    """Uploads and prunes, their requests interleaved at random, killed at random, over months of days."""
    monkeypatch.setattr(prune, "AT_ONCE", 1)
    monkeypatch.setattr(prune, "_BATCH", 2)
    turns: Turns | None = None
    ask = remotes.Remote.ask

    def asked(self, verb, *args, **how):
        if turns is not None:
            turns.take(self.actor)
        return ask(self, verb, *args, **how)

    made = remotes.Remote.__init__

    def begun(self, *args, **how):
        made(self, *args, **how)
        self.actor = threading.current_thread().name

    monkeypatch.setattr(remotes.Remote, "ask", asked)
    monkeypatch.setattr(remotes.Remote, "__init__", begun)
    elapsed = [0.0]
    monkeypatch.setattr(tier, "elapsed", lambda: time.monotonic() + elapsed[0])
    # A node's clock is wrong by minutes.
    monkeypatch.setattr(tier, "put_at", lambda there: remotes.put_at(there) - 300.0)
    rng = random.Random(f"prune {part}")
    entries = 0
    for round_ in range(2500 if full else 25):
        if round_ % 25 == 0:
            own = f"{url}-{part}-{round_}"
            nodes = [Cache(tmp_path / f"{part}-{round_}-{n}", remote="") for n in range(2)]
            for each in nodes:
                for number in range(4):
                    put(each, number, [bytes([b]) * 50 for b in rng.sample(range(6), 3)])
                each.remote = own
        turns = Turns(rng)
        jobs = {}
        for number, each in enumerate(nodes):
            each.tier.remote.actor = f"node {number}"
            chosen = rng.choices(range(4), k=rng.randrange(3))
            jobs[f"node {number}"] = lambda each=each, chosen=chosen: [upload(each, n) for n in chosen]
        for number in range(rng.choice([0, 1, 1, 2])):
            limits = rng.choice([{}, {"max_bytes": rng.randrange(4000)}, {"max_age": DAY * rng.randrange(9)}])
            jobs[f"prune {number}"] = named(f"prune {number}", nodes[0], limits)
        turns.run(jobs, kill=rng.choice([0.0, 0.0, 0.1]))
        turns = None
        assert lacking(own) == [], (part, round_)
        entries += sum("entries/" in name for name in objects(own))
        # No upload takes hours, and no prune: time passes between them.
        step = rng.choice([60.0, 3 * 3600.0, 7 * 3600.0, DAY, 3 * DAY])
        elapsed[0] += step
        aged(own, step)
    assert entries > 15


def named(name: str, cache: Cache, limits: dict):
    def job() -> None:
        threading.current_thread().name = name
        pruned(cache, **limits)

    return job


def upload(cache: Cache, number: int | str) -> None:
    """As ``Cache.put`` gives to its tier."""
    found = cache.get(key(number))
    path = cache.root / "entries" / key(number)[:2] / f"{key(number)}.stitch"
    cache.tier.send(cache, tier.Area.ENTRIES, key(number), path.read_bytes(), found.blobs)
