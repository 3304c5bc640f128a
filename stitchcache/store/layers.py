"""Several roots, searched in order; the first may be written. Damage becomes a miss here."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from stitchcache.errors import EntryFormatError, FutureFormatError, UntrustedEntryError
from stitchcache.store.files import Files, words
from stitchcache.store.layout import LEGACY_SUFFIXES, Area, key_of, keyed_path
from stitchcache.store.root import Found, Identity, Root, identity_of
from stitchcache.types import is_digest

if TYPE_CHECKING:
    from stitchcache.store.publish import Holds

T = TypeVar("T")

log = logging.getLogger("stitchcache")

_USE_NOTED_EVERY = 3600.0


class Layers:
    """The roots of a cache.

    Args:
        roots: In the order they are searched.
        count: Called with a counter's name when something is worth counting.
    """

    def __init__(self, roots: list[Root], count: Callable[[str], None]) -> None:
        self.roots = roots
        self.top = roots[0]
        self.files: Files = self.top.files
        self._mutex = threading.Lock()
        self._holds: Holds | None = None
        self._count = count
        self._good: dict[str, Identity] = {}
        self._warned: set[str] = set()

    @property
    def holds(self) -> Holds:
        """Blobs that are kept until an entry names them; a warm start keeps none."""
        from stitchcache.store.publish import Holds

        with self._mutex:
            if self._holds is None:
                self._holds = Holds(self.files)
            return self._holds

    def first(
        self,
        candidates: Callable[[Root], Iterable[tuple[str, int]]],
        read: Callable[[bytes, str], T],
    ) -> T | None:
        """What the first readable one of some files holds.

        Args:
            candidates: Paths in a root, with the most bytes each can have.
            read: Decodes a file; raises ``EntryFormatError`` for bytes that it refuses.

        Returns:
            ``None`` where there is none; a file that is damaged or newer counts as none, and is warned of.

        Raises:
            UntrustedEntryError: There is one, but others can write it.
        """
        untrusted: UntrustedEntryError | None = None
        for root in self.roots:
            for path, cap in candidates(root):
                try:
                    value = self._load(root, path, cap, read)
                except UntrustedEntryError as error:
                    untrusted = untrusted or error
                    continue
                if value is not None:
                    return value
        if untrusted is not None:
            raise untrusted
        return None

    def _load(self, root: Root, path: str, cap: int, read: Callable[[bytes, str], T]) -> T | None:
        found: Found | None = None
        try:
            found = root.read(path, cap)
            if found is None:
                return None
            reason = root.distrust(path)
            if reason is not None:
                raise UntrustedEntryError(reason, path=path)
            value = read(found.data, path)
        except FutureFormatError as error:
            self.warn(path, error.message)
            return None
        except EntryFormatError as error:
            self._reject(root, path, found.identity if found else None, f"{error.field}: {error.reason}")
            return None
        except UntrustedEntryError:
            raise
        except OSError as error:
            self._warn_unreadable(path, error)
            return None
        if not root.read_only and time.time() - found.modified / 1e9 > _USE_NOTED_EVERY:
            root.touch(path)
        return value

    def blob_path(self, digest: str, size: int) -> str | None:
        """A blob's file, its size and digest checked.

        Raises:
            UntrustedEntryError: There is one, but others can write it.
        """
        untrusted: UntrustedEntryError | None = None
        for root in self.roots:
            path = keyed_path(root.path, Area.BLOBS, digest)
            try:
                if self._blob_is_good(root, path, digest, size):
                    return path
            except UntrustedEntryError as error:
                untrusted = untrusted or error
            except OSError as error:
                self._warn_unreadable(path, error)
        if untrusted is not None:
            raise untrusted
        return None

    def _blob_is_good(self, root: Root, path: str, digest: str, size: int) -> bool:
        try:
            identity = identity_of(self.files.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        # Asked every time: a chmod after the first look counts.
        reason = root.distrust(path)
        if reason is not None:
            raise UntrustedEntryError(reason, path=path)
        if self._good.get(path) == identity:
            return True
        state = root.blob_state(path, digest, size)
        if isinstance(state, str):
            self._reject(root, path, identity, f"blob: {state}")
        elif state is not None:
            self._good[path] = state
            return True
        return False

    def hold(self, digest: str, size: int) -> bool:
        """Whether a blob is in a layer; one in the top layer is kept until it is released.

        Raises:
            OSError: The top layer's cannot be looked at.
        """
        from stitchcache.store.publish import hold_blob

        if not self.top.read_only and hold_blob(self.top, self.holds, digest, size):
            return True
        for root in self.roots if self.top.read_only else self.roots[1:]:
            try:
                if self.files.lstat(keyed_path(root.path, Area.BLOBS, digest)).st_size == size:
                    return True
            except OSError:
                continue
        return False

    def entry_paths(self, prefix: str = "") -> Iterator[tuple[Root, str, str]]:
        """Root, graph hash and path of every entry whose hash begins so, older formats included."""
        for root in self.roots:
            for shard in self.scan(root, root.area(Area.ENTRIES)):
                if len(shard.name) == 2 and shard.name[: len(prefix)] == prefix[:2]:
                    for item in self.scan(root, shard.path):
                        key = key_of(Area.ENTRIES, item.name)
                        if key is not None and key.startswith(prefix):
                            yield root, key, item.path
            for item in self.scan(root, root.path):
                stem, suffix = os.path.splitext(item.name)
                if suffix in LEGACY_SUFFIXES and is_digest(stem) and stem.startswith(prefix):
                    yield root, stem, item.path

    def scan(self, root: Root, path: str) -> list[os.DirEntry[str]]:
        """A directory's entries; none, and a warning, where it cannot be listed."""
        try:
            return root.scan(path)
        except OSError as error:
            self.warn(path, f"{path}: cannot be listed ({words(error)})")
            return []

    def _reject(self, root: Root, path: str, identity: Identity | None, reason: str) -> None:
        # Imported when there is damage, for a warm start has none.
        from stitchcache.store.verify import quarantine

        self._good.pop(path, None)
        gone = quarantine(root, path, identity, reason)
        what = "moved to quarantine" if gone else "left there, for it cannot be moved"
        self._count("corrupt")
        self.warn(path, f"{path}: damaged: {reason}; {what}, and taken as missing", again=gone)

    def _warn_unreadable(self, path: str, error: OSError) -> None:
        self.warn(path, f"{path}: cannot be read ({words(error)}): taken as missing")

    def warn(self, path: str, message: str, *, again: bool = False) -> None:
        """Warn of a file, once; a file that stays would be warned of at each look."""
        if again or path not in self._warned:
            self._warned.add(path)
            log.warning("%s", message)
