"""What files name, for modules that go over a whole root. The format itself stays outside this layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from stitchcache.errors import EntryFormatError, FutureFormatError
from stitchcache.store.files import Files, close_quietly, read_exactly
from stitchcache.store.layout import LEGACY_SUFFIXES, MAX_LEGACY, MAX_RECORD, Area, keyed_path
from stitchcache.store.root import Root

if TYPE_CHECKING:
    from stitchcache.store.scan import Item

# Most headers fit: one small read for each entry.
HEAD_READ = 4096

BlobName = tuple[str, int]


class Codec(Protocol):
    """The format, as this layer needs it. All raise ``EntryFormatError`` for bytes that they refuse."""

    def head_size(self, prefix: bytes, path: str) -> int:
        """Bytes that an entry's header ends at, from its first :data:`HEAD_READ` bytes."""

    def head(self, prefix: bytes, file_size: int, path: str) -> Sequence[BlobName]:
        """Digests and sizes of the blobs that an entry names, from its header alone."""

    def entry(self, data: bytes, key: str, path: str) -> Sequence[BlobName]:
        """The same from a whole entry, all of it checked."""

    def target(self, data: bytes, key: str, path: str) -> Sequence[str]:
        """The graph hashes that a target leads to."""

    def piece(self, data: bytes, key: str, path: str) -> BlobName:
        """The blob that a piece leads to."""


def read_head(files: Files, path: str, codec: Codec) -> tuple[bytes, int] | None:
    """An entry's first bytes, its whole header among them, and the file's size; all of a legacy entry.

    Raises:
        EntryFormatError: It has no header.
        OSError: It cannot be read.
    """
    try:
        fd = files.open_read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        size = files.fstat(fd).st_size
        if path.endswith(LEGACY_SUFFIXES):
            return read_exactly(files, fd, min(size, MAX_LEGACY + 1)), size
        prefix = read_exactly(files, fd, min(HEAD_READ, size))
        missing = codec.head_size(prefix, path) - len(prefix)
        if missing > 0:
            prefix += read_exactly(files, fd, missing)
    finally:
        close_quietly(files, fd)
    return prefix, size


class Reading:
    """Reads what one root's files name, and asks the layers beneath it.

    Args:
        root: Whose files are read.
        codec: The format.
        beneath: Other roots, whose entries and blobs the root's files may name.
    """

    def __init__(self, root: Root, codec: Codec, beneath: Sequence[Root] = ()) -> None:
        self.root = root
        self.codec = codec
        self._beneath = beneath

    def blobs(self, item: Item) -> Sequence[str] | None:
        """Digests of the blobs that an entry names.

        Returns:
            None of them for a damaged entry; ``None`` for one that may be good and cannot be read here.
        """
        try:
            head = read_head(self.root.files, item.path, self.codec)
            if head is None:
                return ()
            return tuple(dict.fromkeys(digest for digest, _ in self.codec.head(*head, item.path)))
        except FutureFormatError:
            return None
        except EntryFormatError:
            return ()
        except OSError:
            return None

    def target(self, item: Item) -> Sequence[str] | None:
        """Graph hashes that a target leads to; ``None`` for one that is left for ``verify``."""
        try:
            found = self.root.read(item.path, MAX_RECORD)
            return None if found is None else self.codec.target(found.data, item.key, item.path)
        except (EntryFormatError, OSError):
            return None

    def piece(self, item: Item) -> str | None:
        """Digest of the blob that a piece leads to; ``None`` for one that is left for ``verify``."""
        try:
            found = self.root.read(item.path, MAX_RECORD)
            return None if found is None else self.codec.piece(found.data, item.key, item.path)[0]
        except (EntryFormatError, OSError):
            return None

    def entry_beneath(self, key: str) -> bool:
        """Whether a layer beneath has an entry.

        Raises:
            OSError: That cannot be told.
        """
        return any(
            self._size(path) is not None
            for root in self._beneath
            for path in (
                keyed_path(root.path, Area.ENTRIES, key),
                *(f"{root.path}/{key}{suffix}" for suffix in LEGACY_SUFFIXES),
            )
        )

    def blob_beneath(self, digest: str, size: int) -> bool:
        """Whether a layer beneath has a blob.

        Raises:
            OSError: That cannot be told.
        """
        return any(self._size(keyed_path(root.path, Area.BLOBS, digest)) == size for root in self._beneath)

    def _size(self, path: str) -> int | None:
        try:
            return self.root.files.lstat(path).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
