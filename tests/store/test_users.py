"""Two real users: what another one can do to a cache, its files and the directories above it. Needs root."""

from __future__ import annotations

# Imported before a child becomes a user who may not be able to read them.
import ast
import encodings.ascii  # noqa: F401
import grp
import os
import pwd
import secrets  # noqa: F401
import shutil
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import filelock  # noqa: F401
import pytest
from stores import key, put, read_back, target

import stitchcache.store.evict
import stitchcache.store.refusal
import stitchcache.store.upkeep  # noqa: F401
from stitchcache.cache import Cache
from stitchcache.errors import StoreWriteError, UntrustedEntryError
from stitchcache.store import distrusted_way

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be two users")

OWNER, STRANGER = 54321, 54322
HERE = Path(__file__).parent


@pytest.fixture
def place(tmp_path_factory):
    """A directory that both users can reach, with the owner's home in it."""
    place = Path("/var/tmp") / f"stitchcache-users-{os.getpid()}-{time.monotonic_ns()}"
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    home = place / "home"
    home.mkdir()
    home.chmod(0o755)
    os.chown(home, OWNER, OWNER)
    yield place
    shutil.rmtree(place)


def as_user(uid: int, work, *args):
    """Run in a child process as a user; what it raised, as text, or what it returned, as ``repr``."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            os.umask(0o022)
            said = repr(work(*args))
        except BaseException as error:  # noqa: BLE001  (reported, whatever it is)
            said = f"{type(error).__name__}: {error}"
        os.write(send, said.encode()[:60_000])
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


def fill(root) -> None:
    made = put(Cache(root), "a", [b"one", b"two"])
    Cache(root).put_target(key("t"), target(made.graph_hash))


def look(root):
    return read_back(Cache(root), key("a"))


def blob_and_entry(root: Path) -> tuple[Path, Path]:
    entry = next(root.glob("entries/*/*.stitch"))
    return next(root.glob("blobs/*/*")), entry


def test_what_an_owner_makes_nobody_else_can_read_unless_the_root_was_opened_to_them(place):
    private, shared = place / "home" / "private", place / "home" / "shared"
    as_user(OWNER, fill, private)
    as_user(OWNER, os.mkdir, shared, 0o755)
    as_user(OWNER, fill, shared)
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in private.rglob("*")}
    assert all(mode & 0o077 == 0 for mode in modes.values()), modes
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert "Permission denied" in as_user(STRANGER, os.listdir, private)
    for path in shared.rglob("*"):
        area = path.relative_to(shared).parts[0]
        wanted = 0o755 if path.is_dir() else 0o644
        if area in ("locks", "tmp") or path.suffix == ".lock":
            wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    # Reading what another user owns is refused by the reader; root's files are not.
    assert f"belongs to user {OWNER}" in as_user(STRANGER, look, shared)
    for path in [shared, *shared.rglob("*")]:
        os.chown(path, 0, 0)
    os.chown(place / "home", 0, 0)
    assert as_user(STRANGER, look, shared) == "[b'one', b'two']"


def chmod(bits):
    return lambda path: path.chmod(stat.S_IMODE(path.stat().st_mode) | bits)


def give(path):
    os.chown(path, STRANGER, STRANGER)


def linked_by(uid):
    def act(path):
        real = path.with_name(path.name + ".real")
        path.rename(real)
        path.symlink_to(real)
        os.chown(path, uid, uid, follow_symlinks=False)

    return act


def second_name(path):
    os.link(path, path.parents[3] / "second")


def listed(path):
    """An access list that lets the stranger write: version 2, then tag, rights and number of each line."""
    none = 0xFFFFFFFF
    lines = [(1, 7, none), (2, 7, STRANGER), (4, 5, none), (16, 7, none), (32, 5, none)]
    data = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *line) for line in lines)
    try:
        os.setxattr(path, "system.posix_acl_access", data)
    except OSError:
        pytest.skip("no access lists on this file system")


ATTACKS = {
    "entry is another's": (lambda root: blob_and_entry(root)[1], give, "belongs to user 54322.*chown"),
    "blob is another's": (lambda root: blob_and_entry(root)[0], give, "belongs to user 54322.*chown"),
    "entry is a link": (lambda root: blob_and_entry(root)[1], linked_by(OWNER), "symbolic link.*put what"),
    "blob is a link": (lambda root: blob_and_entry(root)[0], linked_by(OWNER), "symbolic link.*put what"),
    "shard is a link": (lambda root: blob_and_entry(root)[0].parent, linked_by(OWNER), "symbolic link"),
    "root is another's link": (lambda root: root, linked_by(STRANGER), "belongs to user 54322"),
    "parent is another's link": (lambda root: root.parent, linked_by(STRANGER), "belongs to user 54322"),
    "parent is another's": (lambda root: root.parent, give, "belongs to user 54322"),
    "parent is the group's": (lambda root: root.parent, chmod(0o020), "mode 0775.*chmod go-w"),
    "parent is everybody's": (lambda root: root.parent, chmod(0o002), "mode 0757.*chmod go-w"),
    "root is sticky": (lambda root: root, chmod(0o1002), "mode 1757.*chmod go-w"),
    "parent has an access list": (lambda root: root.parent, listed, "access list.*setfacl -b"),
    "entry has two names": (lambda root: blob_and_entry(root)[1], second_name, r"2 names.*copy"),
    "blob has two names": (lambda root: blob_and_entry(root)[0], second_name, r"2 names.*copy"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_another_user_could_exchange_is_refused_with_the_way_to_mend_it(place, name):
    import re

    root = place / "home" / "cache"
    as_user(OWNER, os.mkdir, root, 0o755)
    as_user(OWNER, fill, root)
    assert as_user(OWNER, look, root) == "[b'one', b'two']"
    where, attack, said = ATTACKS[name]
    attack(where(root))
    found = as_user(OWNER, look, root)
    assert found.startswith("UntrustedEntryError"), found
    assert re.search(said, found), found


def test_a_device_in_place_of_a_file_is_not_read(place):
    root = place / "home" / "cache"
    as_user(OWNER, fill, root)
    for path in blob_and_entry(root):
        path.unlink()
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("no devices can be made here")
        os.chown(path, OWNER, OWNER)
        assert as_user(OWNER, look, root) == "None"
        as_user(OWNER, fill, root)
        assert as_user(OWNER, look, root) == "[b'one', b'two']"


def test_a_directory_above_that_is_sticky_or_roots_is_fine(place):
    shared = place / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    as_user(OWNER, fill, shared / "cache")
    assert as_user(OWNER, look, shared / "cache") == "[b'one', b'two']"
    # A link of one's own leads there, one of another's does not.
    os.symlink(shared / "cache", shared / "mine")
    os.chown(shared / "mine", OWNER, OWNER, follow_symlinks=False)
    assert as_user(OWNER, look, shared / "mine") == "[b'one', b'two']"
    as_user(STRANGER, os.symlink, shared / "cache", shared / "theirs")
    assert "belongs to user 54322" in as_user(OWNER, look, shared / "theirs")
    as_user(STRANGER, os.mkdir, shared / "made")
    (shared / "made").chmod(0o777)
    assert "belongs to user 54322" in as_user(OWNER, fill, shared / "made" / "cache")


def test_nothing_is_stored_or_built_in_a_root_that_is_not_trusted(place):
    root = place / "home" / "cache"
    root.mkdir()
    root.chmod(0o777)

    def use(root):
        cache = Cache(root)
        with pytest.raises(StoreWriteError, match=r"mode 0777.*chmod go-w.*nothing is stored"):
            cache.put_blob(b"x")
        with cache.lock(key("a")) as held, cache.scratch() as scratch:
            assert not held
            assert root not in scratch.parents
            assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
        cache.count("hit.direct")
        del cache
        return sorted(os.listdir(root))

    assert as_user(OWNER, use, root) == "[]"
    # Where the system's directory is no better, nothing is compiled at all.
    bad = place / "tmp"
    bad.mkdir()
    bad.chmod(0o777)

    def nowhere(root):
        import tempfile

        tempfile.tempdir = str(bad)
        with pytest.raises(StoreWriteError, match="TMPDIR"), Cache(root).scratch():
            pass

    assert as_user(OWNER, nowhere, root) == "None"


def test_a_user_who_may_only_read_stops_nobody(place):
    root = place / "home" / "cache"
    as_user(OWNER, os.mkdir, root, 0o755)
    as_user(OWNER, fill, root)
    script = textwrap.dedent("""
        import fcntl, os, sys, time
        os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
        held = []
        for directory, _, names in os.walk(sys.argv[1]):
            for name in [".", *names]:
                try:
                    fd = os.open(os.path.join(directory, name), os.O_RDONLY)
                except PermissionError:
                    continue
                fcntl.flock(fd, fcntl.LOCK_EX)
                held.append(fd)
        print(len(held), flush=True)
        time.sleep(600)
    """)
    reader = subprocess.Popen(
        [sys.executable, "-c", script, str(root), str(STRANGER)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert int(reader.stdout.readline()) > 8

        def use(root):
            began = time.monotonic()
            cache = Cache(root)
            assert read_back(cache, key("a")) == [b"one", b"two"]
            put(cache, "b", [b"one", b"three"])
            assert read_back(cache, key("b")) == [b"one", b"three"]
            with cache.lock(key("a"), timeout=0) as held:
                assert held
            assert cache.plan_prune(max_bytes=0, grace_seconds=0).execute().entries
            assert cache.clear().failed == []
            cache.count("hit.direct")
            cache._counters.flush()
            assert cache.counted()["hit.direct"] == 1
            return time.monotonic() - began < 5, cache.stats().files

        assert as_user(OWNER, use, root) == "(True, 0)"
    finally:
        reader.kill()
        reader.wait()


def test_a_user_who_may_only_read_checks_what_root_has_built(place):
    root = place / "image"
    root.mkdir(0o755)
    fill(root)

    def verify(root):
        report = Cache(root).verify()
        return report.clean, report.entries, report.findings

    assert as_user(STRANGER, verify, root) == "(True, 1, ())"

    def remove(root):
        return [len(found) for found in (Cache(root).remove([key("a")]).failed, Cache(root).entries())]

    assert as_user(STRANGER, remove, root) == "[1, 1]"
    # What cannot be listed is named.
    (root / "entries").chmod(0o700)
    assert f"{root}/entries: cannot be listed" in as_user(STRANGER, verify, root)


def test_what_is_swapped_between_check_and_use_is_never_run(place, full):
    """Whoever owns a directory above the cache exchanges the cache for one of his own, without pause."""
    there = place / "there"
    there.mkdir()
    os.chown(there, STRANGER, STRANGER)
    good, evil = there / "cache", there / "evil"
    for root in (good, evil):
        root.mkdir(mode=0o755)
        os.chown(root, OWNER, OWNER)
        as_user(OWNER, fill, root)
    for path in (evil / "blobs").glob("*/*"):
        path.chmod(0o644)
        path.write_bytes(b"EVIL" if path.stat().st_size == 3 else b"?")
    pid = os.fork()
    if pid == 0:
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        while True:
            os.rename(good, there / "aside")
            os.rename(evil, good)
            os.rename(good, evil)
            os.rename(there / "aside", good)

    def use(root):
        found = {"refused": 0}
        for _ in range(10_000 if full else 300):
            try:
                found[str(read_back(Cache(root), key("a")))] = 1
            except UntrustedEntryError:
                found["refused"] += 1
        return found

    try:
        said = as_user(OWNER, use, good)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert "EVIL" not in said
    assert "one" not in said, "an owner of a directory above could exchange it at any time"
    assert "refused" in said


def test_what_is_swapped_in_a_directory_of_another_is_loaded_only_as_it_was_signed(place, full):
    """Trust "signed": who owns all the files exchanges entries and blobs, without pause."""
    pytest.importorskip("cryptography")
    from stitchcache.ext import sign
    from stitchcache.store import signed  # noqa: F401

    there, mine = place / "there", place / "home" / "keys"
    there.mkdir()
    # Imports all that is needed: the other users may not read the directory of this environment.
    sign.Keys(str(place / "none")).generate("none@example.com")
    os.environ["STITCHCACHE_KEYS"] = str(mine)

    def begin(root):
        sign.Keys().generate("ci@example.com")
        fill(root)
        put(Cache(root), "b", [b"six", b"ten"])

    as_user(OWNER, os.mkdir, place / "home" / "cache", 0o755)
    assert as_user(OWNER, begin, place / "home" / "cache") == "None"
    root = there / "cache"
    (place / "home" / "cache").rename(root)
    for path in [there, root, *root.rglob("*")]:
        os.chown(path, STRANGER, STRANGER)
    swapped = [*root.glob("blobs/*/*"), *root.glob("entries/*/*")]
    other = {
        path: next(each for each in swapped if each.parts[-3] == path.parts[-3] and each != path)
        for path in swapped
    }
    files = {path: [path.read_bytes(), other[path].read_bytes(), b"EVI"] for path in swapped}
    pid = os.fork()
    if pid == 0:
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        while True:
            for index in range(3):
                for path, contents in files.items():
                    (there / "new").write_bytes(contents[index])
                    os.rename(there / "new", path)

    def use(root):
        found = {}
        for _ in range(10_000 if full else 200):
            for name in ("a", "b"):
                try:
                    said = f"{name} {read_back(Cache(root, trust='signed'), key(name))}"
                except UntrustedEntryError:
                    said = f"{name} refused"
                found[said] = found.get(said, 0) + 1
        return found

    try:
        said = as_user(OWNER, use, root)
    finally:
        del os.environ["STITCHCACHE_KEYS"]
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    good = {"a [b'one', b'two']", "a None", "a refused", "b [b'six', b'ten']", "b None", "b refused"}
    assert set(ast.literal_eval(said)) <= good, said
    print(said)


def test_a_private_group_may_write_where_torch_builds_and_nobody_else(place):
    """With a umask of 002, which many systems have, torch's directory is the group's too."""
    try:
        user = pwd.getpwnam("daemon")
        assert grp.getgrgid(user.pw_gid).gr_name == "daemon"
    except (KeyError, AssertionError):
        pytest.skip("no user with a group of its own")
    built = place / "torchinductor"
    built.mkdir()
    os.chown(built, user.pw_uid, user.pw_gid)

    def asked(mode):
        built.chmod(mode)
        return as_user(user.pw_uid, lambda: distrusted_way(str(built), of_torch=True) or "fine")

    assert asked(0o700) == asked(0o755) == asked(0o775) == "'fine'"
    for mode in (0o777, 0o1777, 0o1775, 0o1757):
        assert "others can write it" in asked(mode), oct(mode)
    built.chmod(0o775)
    assert "others can write it" in as_user(user.pw_uid, distrusted_way, str(built))
    os.chown(built, user.pw_uid, OWNER)
    assert "others can write it" in asked(0o775)


def test_what_is_written_over_after_the_check_is_not_what_runs(tmp_path):
    """The blob's name is given to other files all the time; each read is of a file that was checked."""
    cache = Cache(tmp_path / "cache")
    made = put(cache, "a", [b"good" * 1000])
    path = cache.blob_path(made.blobs[0])
    stop = threading.Event()

    def swap():
        number = 0
        while not stop.is_set():
            number += 1
            for data in (b"evil" * 1000, b"good" * 1000):
                new = tmp_path / f"new{number}"
                new.write_bytes(data)
                new.chmod(0o600)
                new.replace(path)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        seen = set()
        for _ in range(300):
            with Cache(tmp_path / "cache").opened(made.blobs) as (checked,):
                seen.add(None if checked is None else checked.read_bytes()[:4])
    finally:
        stop.set()
        thread.join()
    assert seen <= {b"good", None}
    assert b"good" in seen
