"""Many processes at once: every read is what exactly one writer published, and one of many compiles."""

from __future__ import annotations

import hashlib
import os
import random
import time
import traceback
from pathlib import Path

import pytest
from stores import artifact, key, put, read_back

from stitchcache.cache import Cache
from stitchcache.errors import LockTimeoutError

KEYS = 64
BODY = 2000


def run_all(count: int, work) -> list[int]:
    children = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work(number)
                status = 0
            except (Exception, SystemExit):  # noqa: BLE001, a fork's failure is told by its exit status
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(pid)
    return [os.waitpid(pid, 0)[1] for pid in children]


def body(name: int, writer: int, turn: int) -> bytes:
    text = f"{name} {writer} {turn} ".encode()
    return text + hashlib.sha256(text).hexdigest().encode() * (BODY // 64)


def is_one_writers(name: int, found: list[bytes]) -> bool:
    first = found[0].split(b" ", 3)
    return (
        int(first[0]) == name
        and found == [body(name, int(first[1]), int(first[2])), b"shared", found[2]]
        and found[2] == b"tail of " + found[0]
    )


def test_every_read_equals_what_one_writer_published(tmp_path, full):
    root = tmp_path / "root"
    processes, operations = (16, 2000) if full else (6, 150)
    entry_bytes = 2 * BODY + 1200
    working_set = KEYS * entry_bytes
    limit = working_set // 2
    largest = tmp_path / "largest"
    largest.mkdir()

    def work(number: int) -> None:
        rng = random.Random(number)
        cache = Cache(root, durability="fast", max_bytes=limit)
        most = 0
        for turn in range(operations):
            # Key 0 is everybody's; each writes its own bytes.
            name = 0 if rng.random() < 0.1 else rng.randrange(KEYS)
            if rng.random() < 0.4:
                first = body(name, number, turn)
                put(cache, name, [first, b"shared", b"tail of " + first])
            else:
                found = read_back(cache, key(name))
                assert found is None or is_one_writers(name, found), found
            if turn % 50 == 0:
                most = max(most, cache.stats().bytes)
        (largest / str(number)).write_text(str(most))

    assert set(run_all(processes, work)) == {0}
    cache = Cache(root)
    assert not list((root / "quarantine").glob("*")) if (root / "quarantine").exists() else True
    seen = max(int(path.read_text()) for path in largest.iterdir())
    assert seen <= limit + processes * entry_bytes
    for name in range(KEYS):
        found = read_back(cache, key(name))
        assert found is None or is_one_writers(name, found)
    report = cache.verify()
    assert report.clean, report.findings
    cache.plan_prune(grace_seconds=0).execute()
    assert cache.stats().bytes <= limit
    assert cache.verify().findings == ()


def test_one_of_many_compiles(tmp_path, full):
    root, log = tmp_path / "root", tmp_path / "log"

    def work(number: int) -> None:
        cache = Cache(root)
        if cache.get(key("model")) is None:
            with cache.lock(key("model")) as held:
                assert held
                if cache.get(key("model")) is None:
                    with log.open("a") as file:
                        file.write(f"{number}\n")
                    time.sleep(0.3)
                    put(cache, "model", [b"compiled"])
        assert read_back(cache, key("model")) == [b"compiled"]

    assert set(run_all(16 if full else 8, work)) == {0}
    assert len(log.read_text().split()) == 1
    assert [path.name for path in (root / "locks").iterdir()] in ([], ["blobs"])


def test_the_lock_excludes_and_a_dead_holder_frees_it(tmp_path):
    cache = Cache(tmp_path)
    ready_read, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with Cache(tmp_path).lock(key("a")):
                os.write(ready, b"x")
                time.sleep(60)
        finally:
            os._exit(1)
    os.read(ready_read, 1)
    waits = []
    with (
        pytest.raises(LockTimeoutError) as caught,
        cache.lock(key("a"), timeout=0.1, on_wait=lambda seconds, holder: waits.append((seconds, holder))),
    ):
        pass
    assert caught.value.seconds >= 0.1
    assert str(pid) in str(caught.value)
    assert waits
    assert str(pid) in waits[-1][1]
    with cache.lock(key("b"), timeout=0) as held:
        assert held
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    with cache.lock(key("a"), timeout=5) as held:
        assert held


def test_threads_exclude_each_other_too(tmp_path):
    import threading

    cache = Cache(tmp_path)
    inside, most = [], []

    def work() -> None:
        for _ in range(20):
            with cache.lock(key("a")):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_where_locks_do_not_work_work_goes_on(tmp_path, code):
    import errno

    from hostile import Intercepted

    class NoLocks(Intercepted):
        def before(self, name, args):
            if name in ("flock", "lock", "lock_byte"):
                number = getattr(errno, code)
                raise OSError(number, os.strerror(number))

    cache = Cache(tmp_path, _files=NoLocks())
    with cache.lock(key("a"), timeout=0) as held:
        assert held is False
    made = put(cache, "a", [b"one"])
    cache.count("hit.direct")
    assert cache.get(made.graph_hash) == made
    # Without locks the grace period protects the blobs that a put under way may need.
    blob = cache.blob_path(made.pieces[0].blob)
    cache.plan_prune(max_bytes=0).execute()
    assert cache.get(made.graph_hash) is None
    assert blob.read_bytes() == b"one"
    cache.plan_prune(max_bytes=0, grace_seconds=0).execute()
    assert not blob.exists()


def test_blobs_of_a_put_under_way_are_not_evicted(tmp_path):
    root = Path(tmp_path)
    cache = Cache(root)
    refs = [cache.put_blob(b"one"), cache.put_blob(b"two")]
    result = Cache(root).plan_prune(max_bytes=0, grace_seconds=0).execute()
    assert result.files == 0
    cache.put(artifact("a", refs))
    assert read_back(Cache(root), key("a")) == [b"one", b"two"]


def test_an_adopted_piece_survives_the_eviction_of_its_entry(tmp_path):
    cache = Cache(tmp_path)
    made = put(cache, "a", [b"one"])
    cache.put_piece(key("p"), "aoti", made.pieces[0].blob)
    other = Cache(tmp_path)
    record = other.get_piece(key("p"))
    result = cache.plan_prune(max_bytes=0, grace_seconds=0).execute()
    assert result.entries == [made.graph_hash]
    other.put(artifact("b", [record.blob]))
    assert read_back(cache, key("b")) == [b"one"]


def test_a_put_between_plan_and_execution_keeps_its_blobs(tmp_path):
    cache = Cache(tmp_path)
    put(cache, "a", [b"shared"])
    plan = Cache(tmp_path).plan_prune(max_bytes=0, grace_seconds=0)
    made = put(cache, "b", [b"shared"])
    plan.execute()
    assert cache.get(key("a")) is None
    assert read_back(cache, made.graph_hash) == [b"shared"]


def test_what_is_opened_outlives_its_eviction(tmp_path):
    cache = Cache(tmp_path)
    made = put(cache, "a", [b"one", b"two"])
    with Cache(tmp_path).opened(made.blobs) as paths:
        assert cache.plan_prune(max_bytes=0, grace_seconds=0).execute().entries == [made.graph_hash]
        assert [path.read_bytes() for path in paths] == [b"one", b"two"]
    with cache.opened(made.blobs) as paths:
        assert paths == [None, None]


def test_a_forbidden_lock_is_no_lock_rather_than_a_wait_without_end(tmp_path):
    """A security module that forbids locking says EACCES, which filelock takes for another's lock."""
    import errno

    from hostile import Intercepted

    class Forbidden(Intercepted):
        def before(self, name, args):
            if name == "flock":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        def lock(self, fd):
            return False

    with Cache(tmp_path, _files=Forbidden()).lock(key("a")) as held:
        assert held is False


def test_a_lock_is_free_although_a_child_forked_meanwhile_lives_on(tmp_path):
    cache = Cache(tmp_path)
    with cache.lock(key("a")):
        path = tmp_path / "locks" / f"{key('a')}.lock"
        second_name = tmp_path / "second"
        os.link(path, second_name)
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
    try:
        os.rename(second_name, path)
        with cache.lock(key("a"), timeout=0) as held:
            assert held
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_exclusive_and_shared_locks_are_of_one_kind(tmp_path):
    """filelock's and our own: eviction must see what a put under way holds."""
    import fcntl

    from stitchcache.store import Files

    files = Files()
    (tmp_path / "file").touch()
    first, second = files.open_write(str(tmp_path / "file")), files.open_write(str(tmp_path / "file"))
    files.flock(first, fcntl.LOCK_SH)
    assert files.try_lock(second) is False
    files.close(first)
    assert files.lock(second)
    with pytest.raises(BlockingIOError):
        files.flock(files.open_write(str(tmp_path / "file")), fcntl.LOCK_SH | fcntl.LOCK_NB)
    files.close(second)
