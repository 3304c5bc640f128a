"""A remote store's objects, and how long anybody waits for them (``pip install 'stitchcache[remote]'``).

Lookups run in threads that nobody has to wait for: a remote that is slow, gone or lying costs a start the
wait and one warning. After three failures the process does not ask it again.
"""

from __future__ import annotations

import importlib
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from stitchcache.errors import OptionError, StitchCacheError, StoreError, visible
from stitchcache.store.store import log

T = TypeVar("T")

AT_ONCE = 16
# Bytes a second that give waiting time back: whoever sends less is as good as gone.
_SLOWEST = 256 << 10
_CHUNK = 64 << 10
_MOST_FAILURES = 3
GRACE = 86400.0
"""Seconds for which a prune leaves alone what was put (see ``stitchcache.remote.prune``)."""
NOTICE_LASTS = 3600.0
LEASES, NOTICES = "leases", "prunes"
_PREFIX = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE", "oc": "OCI"}


def wait_seconds() -> float:
    """``STITCHCACHE_REMOTE_WAIT``: seconds that a start loses at most on a remote that does not answer."""
    text = os.environ.get("STITCHCACHE_REMOTE_WAIT", "").strip() or "1"
    if not text.replace(".", "", 1).isdecimal() or not 0 < float(text) <= 600:
        said = f"STITCHCACHE_REMOTE_WAIT={text!r}: use seconds, more than 0 and at most 600"
        raise OptionError(said, option="STITCHCACHE_REMOTE_WAIT")
    return float(text)


class Broken(Exception):
    """A transfer that ended early."""


class Flight:
    """Requests that one caller waits for."""

    def __init__(self) -> None:
        self.stopped = False  # nobody waits any more
        self.error: Exception | None = None
        self._received, self._running = 0, 0
        self._changed, self._slots = threading.Condition(), threading.Semaphore(AT_ONCE)

    def note(self, size: int) -> None:
        """Note bytes that came."""
        with self._changed:
            self._received += size
            self._changed.notify_all()
        if self.stopped:
            raise Broken("nobody waits for it any more")

    def run(self, job: Callable[[], None], errors: tuple[type[Exception], ...]) -> None:
        """Do a job in a thread of its own; an error stops all."""

        def work() -> None:
            try:
                with self._slots:
                    if not self.stopped and self.error is None:
                        job()
            except FileNotFoundError:
                pass
            except errors as error:
                self.error = self.error or error
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

        self._running += 1
        threading.Thread(target=work, name="stitchcache remote", daemon=True).start()

    def wait(self, left: float, most: float) -> float:
        """Wait for so many seconds; those that are left. What is received gives some back, up to the most."""
        with self._changed:
            while self._running and not self.error and left > 0:
                before, seen = time.monotonic(), self._received
                self._changed.wait(left)
                waited, received = time.monotonic() - before, self._received - seen
                left = min(most, left - waited + received / _SLOWEST)
            self.stopped = True
            if self._running and not self.error:
                self.error = Broken(f"no answer in {most:g} s, or fewer than {_SLOWEST >> 10} KiB a second")
        return left


class Remote:
    """The objects under a URL, such as ``s3://bucket/prefix``.

    Methods that read or write raise what obstore raises; :meth:`gather` and :meth:`now` run them. ``count``
    adds to a statistic.
    """

    def __init__(self, url: str, count: Callable[..., None], *, retries: int = 2) -> None:
        self.url, self._count, self._retries = url.rstrip("/"), count, retries
        self.registry = url.startswith("oci://")
        self.requests = 0
        self.wait = self.left = wait_seconds()  # what a start may lose, and what is left of it
        self.reason = ""  # of the last failure
        self.broken = ""  # why it is not asked any more
        self._failures, self._process = 0, 0
        self._mutex = threading.Lock()
        self._obstore: Any = None
        self._store: Any = None
        self._errors: tuple[type[Exception], ...] = (OSError, ValueError, Broken)

    def at(self, name: str) -> str:
        """An object, as messages name it."""
        return f"{self.url}/{name}"

    @property
    def usable(self) -> bool:
        """Whether it is asked. In a child of a process that asked it, obstore's threads do not exist."""
        return not self.broken and self._process in (0, os.getpid())

    # -- running requests --------------------------------------------------------------------------

    def begin(self, seconds: float = 0.0) -> None:
        """Begin a start, which may lose the whole wait again, or so many seconds."""
        self.left = seconds or self.wait

    def gather(self, jobs: Sequence[Callable[[Flight], T]], seconds: float = 0.0) -> list[T | None]:
        """Do requests side by side: what each gave; ``None`` for a missing object, or if it took too long.

        They take so many seconds at most, or what is left to the start. A job's own ``StitchCacheError`` is
        raised here.
        """
        answers: list[T | None] = [None] * len(jobs)
        left, began = seconds or self.left, time.monotonic()
        if not jobs or left <= 0 or not self._ready():
            return answers
        # To open it counts too.
        left -= time.monotonic() - began
        flight = Flight()

        def answer(index: int, job: Callable[[Flight], T]) -> None:
            answers[index] = job(flight)

        for index, job in enumerate(jobs):
            flight.run(partial(answer, index, job), (StitchCacheError, *self._errors))
        left = flight.wait(left, seconds or max(self.wait, left))
        if not seconds or left <= 0:
            self.left = left
        if isinstance(flight.error, StitchCacheError):
            raise flight.error
        if flight.error is not None:
            self._fail(flight.error)
        # A thread that nobody waits for may still answer.
        return list(answers)

    def now(self, work: Callable[..., T], *args: Any, **how: Any) -> T | None:
        """Do a request, however long it takes; ``None`` for a missing object, ``StoreError`` if it failed."""
        if self._ready():
            try:
                return work(*args, **how)
            except FileNotFoundError:
                return None
            except self._errors as error:
                self._fail(error)
        raise StoreError(f"{self.url}: {self.broken or self.reason or 'not usable here'}", path=self.url)

    def _fail(self, error: Exception) -> None:
        first, kind = not self.reason, type(error).__name__
        self.reason = f"{kind}: {visible(' '.join(str(error).split())[:200])}"
        if kind == "PermissionDeniedError":
            self.reason += " (S3 says so of missing objects, without s3:ListBucket)"
        with self._mutex:
            self._failures += 1
            if self._failures >= _MOST_FAILURES:
                self.broken = f"not asked after {_MOST_FAILURES} failures, the last: {self.reason}"
        self._count("remote.failed")
        said = "%s: %s: starts do without it; after %d failures it is not asked again"
        log("warning" if first else "info", said, self.url, self.reason, _MOST_FAILURES)

    def _ready(self) -> bool:
        """Open it, if it is usable."""
        if self._process or not self.usable:
            # Without the lock, which a forked child may have inherited.
            return self.usable
        with self._mutex:
            if not self._process:
                try:
                    self._open()
                    self._process = os.getpid()
                except ImportError:
                    self.broken = "obstore is not installed (pip install 'stitchcache[remote]')"
                except self._errors as error:
                    self.broken = f"cannot be opened: {error}"
                if self.broken:
                    log("warning", "%s: %s", self.url, visible(self.broken))
            return self.usable

    def _open(self) -> None:
        # Options that are given here hide the variable that obstore would read.
        plain = os.environ.get(f"{_PREFIX.get(self.url[:2])}_ALLOW_HTTP", "").lower() == "true"
        # By name: what a start from local files does without, and extras.
        if self.registry:
            self._obstore = importlib.import_module("stitchcache.remote.oci").Registry
            self._store = self._obstore(self.url, plain)
        else:
            self._obstore, store = map(importlib.import_module, ("obstore", "obstore.store"))
            client = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "15m", "allow_http": plain}
            retry = {"max_retries": self._retries}
            if self.url.startswith("file://"):
                self._store = store.LocalStore(self.url[7:], mkdir=True)
            else:
                self._store = store.from_url(self.url, client_options=client, retry_config=retry)
        self._errors = (*self._errors, self._obstore.exceptions.BaseError)

    # -- requests ----------------------------------------------------------------------------------

    def ask(self, verb: str, *args: Any, **how: Any) -> Any:
        """One of obstore's functions."""
        self.requests += 1
        return getattr(self._obstore, verb)(self._store, *args, **how)

    def chunks(self, name: str, most: int, flight: Flight) -> Iterator[bytes]:
        """An object's bytes in parts, not many more than there may be; it is asked for at once."""
        found = self.ask("get", name)

        def read() -> Iterator[bytes]:
            size = 0
            try:
                for part in found.stream(min_chunk_size=_CHUNK):
                    size += len(part)
                    if size > most:
                        # Its digest will tell.
                        return
                    flight.note(len(part))
                    yield bytes(part)
            except self._errors as error:
                # No OSError: whoever stores the parts would take it for one of the disk.
                raise Broken(str(error)) from error

        return read()

    def read(self, name: str, most: int, flight: Flight | None = None) -> bytes:
        """A whole object."""
        return b"".join(self.chunks(name, most, flight or Flight()))

    def write(self, name: str, source: Any, *, replace: bool = False) -> bool:
        """Write an object, from bytes or a file; ``False`` where one is there that is not to be replaced."""
        try:
            # What is to be replaced and is large is sent in parts.
            self.ask("put", name, source, mode="overwrite" if replace else "create")
        except self._obstore.exceptions.AlreadyExistsError:
            return False
        except FileNotFoundError as error:
            # There is no such bucket, or no such repository.
            raise Broken(str(error)) from error
        return True

    def listed(self, prefix: str) -> list[Any]:
        """Path, size and time of the last put of all objects in a directory."""
        return [each for some in self.ask("list", prefix) for each in some]

    def being_pruned(self) -> bool:
        """Whether a prune is under way; clocks may differ by minutes."""
        notices = [] if self.registry else self.listed(NOTICES)
        return any(time.time() - put_at(each) < NOTICE_LASTS for each in notices)


# Goes on while a machine sleeps.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def elapsed() -> float:
    """Seconds by a clock of this machine that nobody sets."""
    return time.clock_gettime(_CLOCK)


def put_at(there: Any) -> float:
    """When an object was put, in Unix seconds of the store's clock."""
    return float(there["last_modified"].timestamp())


# -- leases ----------------------------------------------------------------------------------------
# Of all nodes, one compiles a piece, and the others wait for it. A lease is an object that its holder creates
# if it is absent, and writes again every few seconds. Whoever waits looks whether it changes, by a clock of
# its own, so nobody's time matters. A lease that did not change for its lifetime is removed, and is there for
# whoever creates it first. Where two nodes remove one at the same moment, both may compile the piece.

LIFETIME = 10.0
"""Seconds after which a lease that did not change is taken over."""
DEADLINE = 600.0
"""Seconds after which whoever waits compiles itself."""
Fetched = Callable[[Collection[str]], Sequence[str]]
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
_MOST_BYTES = 4096


class Leases:
    """What this process holds, renewed by a thread, and what others hold, as it was last seen."""

    def __init__(self, remote: Remote) -> None:
        self.lifetime, self.deadline, self._remote = LIFETIME, DEADLINE, remote
        self._held: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}  # what a lease says, and since when
        self._mutex, self._renewing = threading.Lock(), False

    def share(
        self, keys: Collection[str], fetched: Fetched, on_wait: Callable[[], None]
    ) -> Iterator[Collection[str]]:
        """Batches of keys that are this node's to work on; ``fetched`` says which ones others have done.

        The caller releases the leases, each when others can have what was made.
        """
        began, claimed = time.monotonic(), self._claim(keys)
        if undone := self._undone(claimed, fetched):
            yield undone
        rest = [key for key in keys if key not in claimed]
        while rest:
            key = rest.pop(0)
            if self._wait_for(key, began, fetched, on_wait):
                # Whoever had it and is gone had others too.
                more = self._claim(rest) if self._remote.usable else rest
                rest = [each for each in rest if each not in more]
                yield [key, *self._undone(more, fetched)]

    def _undone(self, keys: list[str], fetched: Fetched) -> list[str]:
        """Those that are to be worked on: some may have been done between the last lookup and the lease."""
        done = fetched(keys)
        self.release(done)
        return [key for key in keys if key not in done]

    def _wait_for(self, key: str, began: float, fetched: Fetched, on_wait: Callable[[], None]) -> bool:
        """Wait until another node has done a key's work; ``True`` if this one has to do it."""
        pause, told = _FIRST_PAUSE, ""
        while True:
            if key not in self._seen and fetched([key]):
                return False
            if self._claim([key]):
                return bool(self._undone([key], fetched))
            said = self._seen.get(key)
            if said and not told:
                told = visible(said[0].partition(b"\n")[0][:100].decode("utf-8", "replace")) or "a node"
                log("info", "piece %s: waiting for %s, which compiles it", key[:12], told)
            waited = time.monotonic() - began
            if not self._remote.usable or waited > self.deadline:
                log("info", "piece %s: waited %.0f s for %s; compiling it here", key[:12], waited, told)
                return True
            on_wait()
            # Nodes that began together do not ask together.
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 1.5, _LONGEST_PAUSE, self.lifetime / 4)

    def _claim(self, keys: Collection[str]) -> list[str]:
        """Take those leases that nobody has, or whose holders show no life."""
        self._remote.gather([partial(self._take, key) for key in keys], self._remote.wait)
        # One may have been had after nobody waited for the answer any more.
        return [key for key in keys if key in self._held]

    def _take(self, key: str, flight: Flight) -> None:
        seen, since = self._seen.get(key, (b"", 0.0))
        if not seen and self._create(key, flight):
            return
        try:
            said = self._remote.read(_name(key), _MOST_BYTES, flight) or b"?"
        except FileNotFoundError:
            # Given back: whoever looks next may have it.
            self._seen.pop(key, None)
            return
        if said != seen:
            self._seen[key] = (said, time.monotonic())
        elif time.monotonic() - since > self.lifetime:
            self._remote.ask("delete", _name(key))
            self._seen.pop(key)
            self._create(key, flight)

    def _create(self, key: str, flight: Flight) -> bool:
        if not self._remote.write(_name(key), _says()):
            return False
        if flight.stopped:
            self._remote.ask("delete", _name(key))
            return False
        with self._mutex:
            self._held.add(key)
            if not self._renewing:
                self._renewing = True
                threading.Thread(target=self._renew, name="stitchcache lease", daemon=True).start()
        return True

    def _renew(self) -> None:
        """Write all leases again until none is held."""
        while True:
            time.sleep(self.lifetime / 4)
            with self._mutex:
                held = list(self._held)
                self._renewing = bool(held) and self._remote.usable
            if not self._renewing:
                return
            self._remote.gather([partial(self._rewrite, key) for key in held], self.lifetime / 4)

    def _rewrite(self, key: str, _flight: Flight) -> None:
        self._remote.write(_name(key), _says(), replace=True)
        if key not in self._held:
            # Released meanwhile.
            self._remote.ask("delete", _name(key))

    def release(self, keys: Collection[str]) -> None:
        """Give leases back; one that cannot be removed is taken over when its lifetime is over."""
        with self._mutex:
            mine = self._held.intersection(keys)
            self._held -= mine
        jobs = [lambda _flight, key=key: self._remote.ask("delete", _name(key)) for key in mine]
        self._remote.gather(jobs, self._remote.wait)


def _name(key: str) -> str:
    return f"{LEASES}/{key[:2]}/{key}"


def _says() -> bytes:
    """Never twice the same."""
    return f"process {os.getpid()} on {os.uname().nodename}\n{os.urandom(8).hex()}".encode()
