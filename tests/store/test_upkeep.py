"""Eviction, verification, quarantine, statistics and the doctor's trials."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hostile import Intercepted
from stores import artifact, files_under, key, put, read_back, target

from stitchcache.cache import Cache
from stitchcache.errors import StoreWriteError
from stitchcache.store import Area
from stitchcache.store.probe import probe
from stitchcache.store.publish import MAX_FILES
from stitchcache.store.sources import keep_sources, kept_sources


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def entry_path(cache: Cache, graph_hash: str) -> Path:
    return cache.root / "entries" / graph_hash[:2] / f"{graph_hash}.stitch"


def used(cache: Cache, graph_hash: str, seconds_ago: float) -> None:
    when = time.time() - seconds_ago
    os.utime(entry_path(cache, graph_hash), (when, when))


# -- eviction --------------------------------------------------------------------------------------


def test_a_plan_says_what_will_go_and_nothing_goes_before(cache):
    made = [put(cache, index, [b"x" * 10_000 + bytes([index])]) for index in range(4)]
    for index, each in enumerate(made):
        cache.put_target(key(f"t{index}"), target(each.graph_hash))
        cache.put_piece(key(f"p{index}"), "aoti", each.pieces[0].blob)
        used(cache, each.graph_hash, 1000 - index)
    before = cache.stats()
    plan = cache.plan_prune(max_bytes=before.bytes // 2)
    assert [item.key for item, _ in plan.entries] == [each.graph_hash for each in made[:2]]
    assert "over the limit" in plan.entries[0][1]
    assert (len(plan.blobs), len(plan.targets), len(plan.pieces)) == (2, 2, 2)
    assert plan.total_bytes == before.bytes
    assert cache.stats().bytes == before.bytes
    result = plan.execute()
    assert (result.files, result.bytes) == (plan.files, plan.bytes)
    after = cache.stats()
    assert after.bytes == before.bytes - plan.bytes
    assert after.bytes <= before.bytes // 2
    assert [cache.get(each.graph_hash) is None for each in made] == [True, True, False, False]
    assert cache.get_target(key("t0")) == ()
    assert cache.get_target(key("t3"))
    assert cache.verify().findings == ()


def test_a_blob_that_another_entry_names_stays(cache):
    first, second = put(cache, "a", [b"shared", b"a"]), put(cache, "b", [b"shared", b"b"])
    used(cache, first.graph_hash, 100)
    plan = cache.plan_prune(max_age=50)
    assert [item.key for item in plan.blobs] == [first.pieces[1].blob.digest]
    plan.execute()
    assert read_back(cache, second.graph_hash) == [b"shared", b"b"]


def test_the_least_recently_used_goes_and_use_is_noted_hourly(cache):
    first, second = put(cache, "a", []), put(cache, "b", [])
    used(cache, first.graph_hash, 7300)
    used(cache, second.graph_hash, 7200)
    cache.get(first.graph_hash)
    noted = entry_path(cache, first.graph_hash).stat().st_mtime
    assert noted > time.time() - 60
    used(cache, first.graph_hash, 100)
    cache.get(first.graph_hash)
    assert entry_path(cache, first.graph_hash).stat().st_mtime < time.time() - 50
    assert [item.key for item, _ in cache.plan_prune(max_files=1).entries] == [second.graph_hash]


def test_limits_by_age_and_files(cache):
    made = [put(cache, index, []) for index in range(3)]
    used(cache, made[0].graph_hash, 100 * 86400)
    plan = cache.plan_prune(max_age=90 * 86400)
    assert [(item.key, reason) for item, reason in plan.entries] == [
        (made[0].graph_hash, "last used 100.0 days ago")
    ]
    assert len(cache.plan_prune(max_files=1).entries) == 2
    assert not cache.plan_prune().items


def test_an_entry_used_since_the_plan_stays(cache):
    made = put(cache, "a", [b"one"])
    used(cache, made.graph_hash, 100)
    plan = cache.plan_prune(max_bytes=0)
    used(cache, made.graph_hash, 0)
    result = plan.execute()
    assert result.in_use == [made.graph_hash]
    assert read_back(cache, made.graph_hash) == [b"one"]


def test_orphans_have_a_grace_period(cache):
    other = Cache(cache.root)
    ref = Cache(cache.root).put_blob(b"orphan")
    path = cache.root / "blobs" / ref.digest[:2] / ref.digest
    assert not other.plan_prune().blobs
    os.utime(path, (1e9, 1e9))
    plan = other.plan_prune()
    assert [item.key for item in plan.blobs] == [ref.digest]
    plan.execute()
    assert not path.exists()


def test_a_limit_is_kept_after_each_put(tmp_path):
    cache = Cache(tmp_path, max_bytes=50_000)
    for index in range(20):
        put(cache, index, [bytes([index]) * 9_000])
        assert cache.stats().bytes <= 50_000
    assert cache.get(key(19)) is not None
    assert cache.stats().counters["evicted"] >= 14
    files = Cache(tmp_path, max_files=4)
    put(files, "more", [b"x"])
    assert files.stats().files <= 4


def test_an_entry_that_is_too_large_for_the_limit_is_no_error(tmp_path):
    cache = Cache(tmp_path, max_bytes=10)
    made = put(cache, "a", [b"large" * 100])
    assert cache.get(made.graph_hash) is None


def test_one_prune_at_a_time(cache):
    put(cache, "a", [])
    plan = cache.plan_prune(max_bytes=0)
    import fcntl

    (cache.root / "locks").mkdir(exist_ok=True)
    path = cache.root / "locks" / "prune.lock"
    path.touch(mode=0o600)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert plan.execute().busy
    assert plan.execute().entries


def test_clear_leaves_nothing_but_the_tag_and_what_was_counted(cache):
    made = put(cache, "a", [b"one"])
    cache.put_target(key("t"), target(made.graph_hash))
    cache.put_piece(key("p"), "aoti", made.pieces[0].blob)
    (cache.root / "somebody's notes.txt").touch()
    cache.clear()
    left = [name for name in files_under(cache.root) if not name.startswith("stats")]
    assert left == ["CACHEDIR.TAG", "locks/blobs", "somebody's notes.txt"]


# -- verification ----------------------------------------------------------------------------------


def test_verify_names_each_problem_and_repair_puts_it_right(cache):
    good, bad_blob, no_blob, bad_entry = (put(cache, name, [name.encode()]) for name in "abcd")
    for each in (good, no_blob):
        cache.put_target(key(each.graph_hash), target(each.graph_hash))
    cache.put_piece(key("p"), "aoti", no_blob.pieces[0].blob)
    blob = {each.graph_hash: cache.blob_path(each.pieces[0].blob) for each in (bad_blob, no_blob)}
    blob[bad_blob.graph_hash].write_bytes(b"?")
    blob[no_blob.graph_hash].unlink()
    entry_path(cache, bad_entry.graph_hash).write_bytes(b"junk")
    report = cache.verify()
    assert not report.clean
    assert (report.entries, report.blobs, report.targets, report.pieces) == (4, 3, 2, 1)
    found = {(Path(f.path).name, f.problem) for f in report.findings}
    assert found == {
        (bad_blob.pieces[0].blob.digest, "damaged"),
        (f"{bad_blob.graph_hash}.stitch", "missing blob"),
        (f"{no_blob.graph_hash}.stitch", "missing blob"),
        (f"{bad_entry.graph_hash}.stitch", "damaged"),
        (key(no_blob.graph_hash), "stale"),
        (key("p"), "stale"),
    }
    assert Path(blob[bad_blob.graph_hash]).exists(), "verify alone changes nothing"
    assert cache.verify(repair=True).clean
    assert cache.verify().findings == ()
    assert read_back(cache, good.graph_hash) == [b"a"]
    assert cache.get_target(key(good.graph_hash))


def test_verify_names_what_is_not_trusted(cache):
    made = put(cache, "a", [b"one"])
    cache.blob_path(made.pieces[0].blob).chmod(0o666)
    report = cache.verify()
    assert [finding.problem for finding in report.findings] == ["untrusted"]
    assert not report.clean


def test_leftovers_of_the_dead_are_harmless_findings_and_go_with_a_prune(cache):
    put(cache, "a", [])
    pid = os.fork()
    if pid == 0:
        context = Cache(cache.root)._top.temporary()
        context.__enter__()
        os._exit(0)
    os.waitpid(pid, 0)
    (cache.root / "tmp" / f"elsewhere-0.1.{'0' * 16}.part").touch()
    with Cache(cache.root)._top.temporary() as (mine, _), cache.scratch() as scratch:
        report = cache.verify()
        assert [finding.problem for finding in report.findings] == ["leftover"]
        assert report.clean
        cache.plan_prune().execute()
        assert os.path.exists(mine)
        assert scratch.exists()
    assert [path.name for path in (cache.root / "tmp").iterdir()] == [f"elsewhere-0.1.{'0' * 16}.part"]


def test_the_quarantine_is_capped(cache):
    for index in range(MAX_FILES + 20):
        made = put(cache, index, [])
        entry_path(cache, made.graph_hash).write_bytes(b"junk")
        assert cache.get(made.graph_hash) is None
    kept = [path for path in (cache.root / "quarantine").iterdir() if path.suffix != ".reason"]
    assert len(kept) <= MAX_FILES
    assert cache.stats().counters["corrupt"] == MAX_FILES + 20


def test_a_good_entry_published_meanwhile_is_not_quarantined(cache):
    from stitchcache.store.publish import quarantine

    made = put(cache, "a", [b"one"])
    path = str(entry_path(cache, made.graph_hash))
    assert quarantine(cache._top, path, os.stat(path).st_ino + 1, "it was damaged, but that was another file")
    assert cache.get(made.graph_hash) == made


# -- a directory that somebody else can write as well -----------------------------------------------


@pytest.fixture
def home(tmp_path):
    """Somebody's files, long unused: some named as if a cache had left them."""
    home = tmp_path / "home"
    (home / "project").mkdir(parents=True)
    names = [
        "letter",
        "uv.lock",
        "project/main.py",
        f"{key('other')}.lock.bak",
        *(f"n{i}" for i in range(80)),
    ]
    for name in names:
        (home / name).write_text("mine")
        os.utime(home / name, (0, 0))
    return home


@pytest.mark.parametrize("area", ["tmp", "locks", "quarantine", "entries", "blobs", "targets", "pieces"])
def test_nothing_is_removed_or_put_where_a_link_in_a_cache_leads(tmp_path, home, area):
    """Whoever could write the cache would choose what its next prune removes, as whoever runs that."""
    put(Cache(home / "cache"), "theirs", [b"theirs"])
    for shard in (home / "cache").rglob("*"):
        os.utime(shard, (0, 0))
    before = files_under(home)
    cache = Cache(tmp_path / "shared", trust="any")
    put(cache, "a", [b"one"])
    there = home / "cache" / area if area in ("entries", "blobs") else home
    if (cache.root / area).exists():
        (cache.root / area).rename(tmp_path / "aside")
    (cache.root / area).symlink_to(there)
    again = Cache(cache.root, trust="any", max_bytes=0)
    again.plan_prune(max_bytes=0, max_files=0, grace_seconds=0.0).execute()
    again.clear()
    if area in ("entries", "blobs"):
        with pytest.raises(StoreWriteError):
            put(again, "b", [b"two"])
    elif area != "tmp":
        put(again, "b", [b"two"])
        entry_path(again, key("b")).parent.mkdir(parents=True, exist_ok=True)
        entry_path(again, key("b")).write_bytes(b"junk")
        assert again.get(key("b")) is None
    assert files_under(home) == before


def test_what_a_cache_did_not_name_is_left_alone(cache):
    put(cache, "a", [b"one"])
    for name in ("tmp/notes.txt", "tmp/work/deep/file", "locks/uv.lock", "quarantine/letter"):
        (cache.root / name).parent.mkdir(parents=True, exist_ok=True)
        (cache.root / name).write_text("mine")
        os.utime(cache.root / name, (0, 0))
    os.utime(cache.root / "tmp" / "work", (0, 0))
    old = cache.root / "tmp" / f"elsewhere.{'0' * 16}.scratch"
    (old / "deep").mkdir(parents=True)
    (old / "deep" / "link").symlink_to(cache.root / "entries")
    os.utime(old, (0, 0))
    assert cache.clear().failed == []
    assert not old.exists()
    assert {name for name in files_under(cache.root) if "/" in name and "stats" not in name} == {
        "tmp/notes.txt", "tmp/work/deep/file", "locks/uv.lock", "locks/blobs", "quarantine/letter"
    }  # fmt: skip


def test_a_lock_directory_that_others_can_write_is_as_good_as_none(tmp_path):
    """Else one of them could hold a lock for ever, and everybody would wait to compile."""
    cache = Cache(tmp_path / "c", trust="signed")
    put(cache, "a", [b"one"])
    with cache.lock(key("x")) as held:
        assert held
        (cache.root / "locks").chmod(0o777)
        with Cache(cache.root, trust="signed").lock(key("x")) as second:
            assert not second


def test_a_list_of_entries_reads_no_more_of_an_old_one_than_may_be_in_it(cache):
    put(cache, "a", [b"one"])
    with open(cache.root / f"{key('b')}.pkl", "wb") as file:
        file.write(b"\x80")
        file.truncate(2 << 30)

    class Watching(Intercepted):
        def before(self, name, args):
            assert name != "read" or args[1] <= (256 << 20) + 1

    assert [each.graph_hash for each in Cache(cache.root, _files=Watching()).entries()] == [key("a")]


# -- statistics ------------------------------------------------------------------------------------


def test_counts_add_up_over_processes(cache):
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            mine = Cache(cache.root)
            for _ in range(25):
                mine.count("hit.direct")
                mine.count("microseconds.saved", 10)
                mine._counters.flush()
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    stats = cache.stats()
    assert stats.counters["hit.direct"] == 100
    assert stats.counters["microseconds.saved"] == 1000
    assert 0 < time.time() - stats.since < 60


def test_counting_costs_nothing_until_the_process_ends(cache):
    put(cache, "a", [])
    file = cache.root / "stats" / "counters"
    before = file.read_bytes()
    other = Cache(cache.root)
    other.count("hit.graph")
    assert file.read_bytes() == before
    assert other.stats().counters["hit.graph"] == 1
    del other
    assert Cache(cache.root).stats().counters["hit.graph"] == 1


def test_torn_counts_are_left_out_and_odd_files_are_none(cache):
    cache.count("hit.direct", 3)
    cache._counters.flush()
    path = cache.root / "stats" / "counters"
    with path.open("ab") as file:
        file.write(
            b"12345678 put=5\n\xff\xff=\n00000000\nlooks=-1\nputs=\n"
            + b"many="
            + b"9" * 5000
            + b"\ntorn hit.dir"
        )
    assert Cache(cache.root).stats().counters == {"hit.direct": 3}
    path.unlink()
    os.mkfifo(path)
    assert Cache(cache.root).stats().counters == {}


def test_starts_are_counted_by_entry(cache):
    made = put(cache, "a", [b"one"])
    for way, seconds in (("compiled", 9.0), ("hit.direct", 0.5), ("hit.direct", 0.25)):
        # One process each.
        mine = Cache(cache.root)
        mine.count(way)
        mine.started(made.graph_hash, way, 9.0 - seconds, {"key": seconds, "total": seconds})
        del mine
    with (cache.root / "stats" / "counters").open("ab") as file:
        file.write(
            b"start.short=hit.direct:1\nstart.abcdefabcdef=no number:1,x,hit.direct:" + b"9" * 5000 + b"\n"
        )
    found = Cache(cache.root).starts()
    facts = found[made.graph_hash[:12]]
    assert abs(facts.pop("last.at") - time.time()) < 60
    assert facts == {
        "compiled": 1,
        "hit.direct": 2,
        "saved": 17_250_000,
        "last.key": 250_000,
        "last.total": 250_000,
    }
    assert found["abcdefabcdef"] == {}
    assert Cache(cache.root).stats().counters["hit.direct"] == 2


def test_only_so_many_entries_have_their_starts_counted(cache):
    for number in range(600):
        cache.started(f"{number:064x}"[::-1], "hit.graph", 0.0, {"total": 0.1})
    cache.count("hit.graph", 600)
    cache._counters.flush()
    found = Cache(cache.root).starts()
    assert len(found) == 512
    assert f"{599:064x}"[::-1][:12] in found
    assert (cache.root / "stats" / "counters").stat().st_size < 100_000


def test_source_is_kept_beside_an_entry_and_goes_with_it(cache):
    first, second = put(cache, "a", [b"one"]), put(cache, "b", [b"two"])
    assert kept_sources(cache, first.graph_hash) == {}
    keep_sources(cache, first.graph_hash, {key("p"): {"piece.cpp": "int main() {}\n" * 1000}})
    keep_sources(cache, first.graph_hash, {key("q"): {"other.cpp": "// \x1b[31m"}})
    keep_sources(cache, second.graph_hash, {key("p"): {"piece.cpp": "void"}})
    assert kept_sources(Cache(cache.root), first.graph_hash).keys() == {key("p"), key("q")}
    assert cache.get(first.graph_hash) == first
    assert cache.verify().clean
    # Nothing of it goes before the entry does, however old it is.
    for path in cache.root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    # What was replaced goes.
    assert len(cache.plan_prune().items) == 1
    cache.plan_prune().execute()
    assert kept_sources(Cache(cache.root), first.graph_hash).keys() == {key("p"), key("q")}
    cache.remove([first.graph_hash])
    assert kept_sources(Cache(cache.root), first.graph_hash) == {}
    assert kept_sources(Cache(cache.root), second.graph_hash) == {key("p"): {"piece.cpp": "void"}}
    assert {item.key for item in cache._top.items(Area.PIECES)} == {second.graph_hash}


def test_prometheus(cache):
    put(cache, "a", [b"one"])
    text = cache.stats().prometheus()
    assert 'stitchcache_events_total{event="put"} 1\n' in text
    assert "stitchcache_entries 1\n" in text


# -- the doctor ------------------------------------------------------------------------------------


def test_a_good_directory_has_no_problem_and_nothing_is_left(tmp_path):
    trials = probe(str(tmp_path))
    assert [trial.name for trial in trials] == ["directory", "trust", "space", "write", "lock", "exec"]
    assert {trial.level for trial in trials if trial.name != "space"} == {"ok"}
    assert not list(tmp_path.iterdir())
    assert probe(str(tmp_path / "not" / "yet"))[0].found.startswith("missing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "trial", "level"),
    [
        ("create", "write", "problem"),
        ("rename", "write", "problem"),
        ("flock", "lock", "note"),
        ("fsync", "write", "problem"),
        ("open_read", "exec", "note"),
    ],
)
def test_what_does_not_work_is_named_with_its_meaning(tmp_path, call, trial, level):
    import errno

    class Without(Intercepted):
        def before(self, name, args):
            if name == call:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    found = {each.name: each for each in probe(str(tmp_path), files=Without())}
    assert found[trial].level == level
    assert found[trial].meaning
    assert not list(tmp_path.iterdir())


def test_a_file_and_a_shared_directory_are_problems(tmp_path):
    (tmp_path / "file").touch()
    assert [trial.level for trial in probe(str(tmp_path / "file"))] == ["problem"]
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    found = {trial.name: trial.level for trial in probe(str(tmp_path / "shared"))}
    assert found["trust"] == "problem"


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
def test_another_file_system(tmp_path):
    import shutil
    import tempfile

    place = tempfile.mkdtemp(dir="/dev/shm")
    try:
        assert {trial.level for trial in probe(place)} <= {"ok", "note", "problem"}
        cache = Cache(place)
        made = put(cache, "a", [b"one"])
        assert read_back(cache, made.graph_hash) == [b"one"]
        assert artifact("a", [made.pieces[0].blob]) == made
    finally:
        shutil.rmtree(place)
