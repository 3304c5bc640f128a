"""The cache: artifacts, pieces and target keys over one or more root directories. Imports no torch.

Reading never writes but to note a use, and never raises for damage: that is a miss, one warning, and the file
goes to quarantine. Writing raises :class:`~stitchcache.errors.StoreWriteError` where the store cannot be
written, and the caller goes on without having stored anything.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from stitchcache.artifact.decode import (
    HEADER_READ,
    Header,
    decode,
    decode_header,
    decode_piece,
    decode_target,
    header_of,
)
from stitchcache.artifact.encode import encode, encode_piece, encode_target
from stitchcache.artifact.frame import HEADER_OFFSET, MAX_FILE, header_end
from stitchcache.artifact.legacy import MAX_SIZE as MAX_LEGACY
from stitchcache.artifact.legacy import SUFFIXES, decode_legacy
from stitchcache.artifact.record import Artifact, PieceRecord
from stitchcache.errors import (
    AmbiguousPrefixError,
    EntryFormatError,
    FutureFormatError,
    GraphHashError,
    OptionError,
    StoreError,
    StoreWriteError,
    UntrustedEntryError,
)
from stitchcache.store.files import Files, close_quietly, read_exactly
from stitchcache.store.layout import Area, check_key, is_key, key_of, keyed_path
from stitchcache.store.locks import exclusive
from stitchcache.store.names import temporary_name
from stitchcache.store.root import Found, Identity, Root
from stitchcache.types import BlobRef, TargetRecord

T = TypeVar("T")

log = logging.getLogger("stitchcache")

_USE_NOTED_EVERY = 3600.0
_MAX_RECORD = 64 << 20


class Cache:
    """Compiled models on disk, shared by processes.

    Constructing does no more than look whether the root is a directory; directories are made by the first
    write. One object may be used by several threads.

    Args:
        root: Directory, or several: the first is written, all are searched in order. ``None`` takes
            ``STITCHCACHE_DIR``, or else the user's cache directory.
        read_only: Write nothing; also set by ``STITCHCACHE_READONLY``.
        max_bytes: Evict down to this after a put; default ``STITCHCACHE_MAX_SIZE``, or no limit.
        max_files: Likewise for the number of files.
        durability: ``"full"`` makes an acknowledged put survive a power loss; ``"fast"`` leaves that to the
            system (what was torn is noticed by its digest, and is a miss).

    Raises:
        StoreError: A root is something other than a directory.
        OptionError: An environment variable makes no sense.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        *,
        read_only: bool = False,
        max_bytes: int | None = None,
        max_files: int | None = None,
        durability: Literal["full", "fast"] = "full",
        _files: Files | None = None,
    ) -> None:
        if durability not in ("full", "fast"):
            raise OptionError(f"durability={durability!r}: use 'full' or 'fast'", option="durability")
        self._files = _files or Files()
        paths = _root_paths(root)
        for path in paths:
            _check_directory(path)
        read_only = read_only or _flag("STITCHCACHE_READONLY")
        self._layers = [
            Root(path, files=self._files, durable=durability == "full", read_only=read_only or index > 0)
            for index, path in enumerate(paths)
        ]
        self.root = Path(paths[0])
        self.read_only = read_only
        self.max_bytes = size_from_environment() if max_bytes is None else max_bytes
        self.max_files = max_files
        self.durability = durability
        self._good: dict[str, Identity] = {}
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        layers = f", +{len(self._layers) - 1} layers" if len(self._layers) > 1 else ""
        return f"Cache({str(self.root)!r}{layers})"

    @property
    def roots(self) -> tuple[Path, ...]:
        """All root directories, in the order they are searched."""
        return tuple(Path(layer.path) for layer in self._layers)

    @property
    def _top(self) -> Root:
        return self._layers[0]

    # -- entries ---------------------------------------------------------------------------------

    def get(self, graph_hash: str) -> Artifact | None:
        """The artifact of a graph hash.

        Args:
            graph_hash: 64 hex digits.

        Returns:
            ``None`` is a miss: there is no entry, or only a damaged one or one of a newer format (of which a
            warning told).

        Raises:
            UntrustedEntryError: There is an entry, but others can write it.
        """
        check_key(graph_hash)
        untrusted: UntrustedEntryError | None = None
        for layer in self._layers:
            for path, cap, read in self._entry_files(layer, graph_hash):
                try:
                    artifact = self._load(layer, path, cap, read)
                except UntrustedEntryError as error:
                    untrusted = untrusted or error
                    continue
                if artifact is not None:
                    return artifact
        if untrusted is not None:
            raise untrusted
        return None

    def _entry_files(
        self, layer: Root, graph_hash: str
    ) -> Iterator[tuple[str, int, Callable[[bytes, str], Artifact]]]:
        yield keyed_path(layer.path, Area.ENTRIES, graph_hash), MAX_FILE, _reader(decode, graph_hash)
        for suffix in SUFFIXES:
            flat = os.path.join(layer.path, graph_hash + suffix)
            yield flat, MAX_LEGACY, _reader(decode_legacy, graph_hash)

    def put(self, artifact: Artifact) -> str:
        """Store an artifact whose blobs are stored.

        Returns:
            Its graph hash. When this returns, the entry survives a crash.

        Raises:
            StoreError: A blob that it names is in no layer.
            StoreWriteError: The store cannot be written, or a newer stitchcache's entry has the name.
            EntryFormatError: A value in it has no form in the format.
        """
        key = check_key(artifact.graph_hash)
        data = encode(artifact)
        # What is written can be read: a mistyped field is the writer's error, not the next process's.
        decode(data)
        top = self._top
        path = keyed_path(top.path, Area.ENTRIES, key)
        with top.writing(path):
            for blob in artifact.blobs:
                self._hold(blob)
            if not self._is_there(path, data):
                top.publish(Area.ENTRIES, key, data)
            # Eviction that looked before this entry existed sees by the new times that it must look again.
            for blob in artifact.blobs:
                top.touch(keyed_path(top.path, Area.BLOBS, blob.digest))
        top.release([blob.digest for blob in artifact.blobs])
        self._after_put()
        return key

    def _hold(self, blob: BlobRef) -> None:
        if self._top.hold_blob(blob.digest, blob.size):
            return
        for layer in self._layers[1:]:
            try:
                if self._files.lstat(keyed_path(layer.path, Area.BLOBS, blob.digest)).st_size == blob.size:
                    return
            except OSError:
                continue
        path = keyed_path(self._top.path, Area.BLOBS, blob.digest)
        raise StoreError(
            f"{path}: the artifact names this blob of {blob.size} bytes, and it is not stored: "
            "put_blob() comes before put()",
            path=path,
        )

    def _is_there(self, path: str, data: bytes) -> bool:
        try:
            found = self._top.read(path, MAX_FILE)
        except EntryFormatError:
            return False
        if found is None:
            return False
        if found.data == data:
            self._top.touch(path)
            with_fd = self._files.open_read(path)
            try:
                if self._top.durable:
                    self._files.fsync(with_fd)
                    self._files.fsync_dir(os.path.dirname(path))
            finally:
                close_quietly(self._files, with_fd)
            return True
        try:
            decode(found.data, path=path)
        except FutureFormatError as error:
            raise StoreWriteError(error.message, path=path, reason=error.reason) from error
        except EntryFormatError:
            pass
        return False

    def find(self, prefix: str) -> str:
        """The full graph hash that a prefix means.

        Raises:
            GraphHashError: It names no entry, or is no hex.
            AmbiguousPrefixError: It names more than one.
        """
        wanted = prefix.lower()
        if not wanted or len(wanted) > 64 or not set(wanted) <= set("0123456789abcdef"):
            raise GraphHashError(f"{prefix!r} is no graph hash: 1 to 64 hex digits", prefix=prefix)
        found = sorted({key for _, key, _ in self._entry_paths(wanted)})
        if not found:
            raise GraphHashError(f"no entry in {self.root} begins with {prefix}", prefix=prefix)
        if len(found) > 1:
            shown = ", ".join(key[: len(wanted) + 8] for key in found[:5])
            raise AmbiguousPrefixError(
                f"{prefix} means any of {len(found)} entries: {shown}", prefix=prefix, candidates=found
            )
        return found[0]

    def _entry_paths(self, prefix: str = "") -> Iterator[tuple[Root, str, str]]:
        for layer in self._layers:
            for shard in self._scan(layer, layer.area(Area.ENTRIES)):
                if len(shard.name) == 2 and shard.name[: len(prefix)] == prefix[:2]:
                    for item in self._scan(layer, shard.path):
                        key = key_of(Area.ENTRIES, item.name)
                        if key is not None and key.startswith(prefix):
                            yield layer, key, item.path
            for item in self._scan(layer, layer.path):
                stem, suffix = os.path.splitext(item.name)
                if suffix in SUFFIXES and is_key(stem) and stem.startswith(prefix):
                    yield layer, stem, item.path

    def _scan(self, layer: Root, path: str) -> list[os.DirEntry[str]]:
        try:
            return layer.scan(path)
        except OSError as error:
            self._warn(path, f"{path}: cannot be listed: {error.strerror}")
            return []

    def entries(self) -> list[Header]:
        """Headers of all entries that can be read, the current format's and older ones', by layer.

        A damaged one is left out, with one warning; :meth:`verify` reports them.
        """
        headers = []
        seen: set[str] = set()
        for _layer, key, path in self._entry_paths():
            try:
                header = self._header(path)
            except EntryFormatError as error:
                self._warn(path, error.message)
            except OSError as error:
                self._warn(path, f"{path}: cannot be read: {error.strerror}")
            else:
                if header is not None and key not in seen:
                    seen.add(key)
                    headers.append(header)
        return headers

    def _header(self, path: str) -> Header | None:
        legacy = path.endswith(SUFFIXES)
        try:
            fd = self._files.open_read(path)
        except FileNotFoundError:
            return None
        try:
            facts = self._files.fstat(fd)
            if legacy:
                data = read_exactly(self._files, fd, min(facts.st_size, MAX_LEGACY + 1))
                return header_of(decode_legacy(data, path=path), path=path, file_bytes=facts.st_size)
            prefix = read_exactly(self._files, fd, min(HEADER_READ, facts.st_size))
            if len(prefix) >= HEADER_OFFSET:
                missing = header_end(prefix, path=path) - len(prefix)
                prefix += read_exactly(self._files, fd, missing) if missing > 0 else b""
        finally:
            close_quietly(self._files, fd)
        return decode_header(prefix, facts.st_size, path=path)

    # -- blobs, pieces, targets --------------------------------------------------------------------

    def put_blob(self, source: bytes | str | os.PathLike[str]) -> BlobRef:
        """Store bytes under their digest; they are kept until the artifact that names them is put.

        Args:
            source: The bytes, or the file that has them.

        Raises:
            StoreWriteError: The store cannot be written.
        """
        digest, size = self._top.publish_blob(source if isinstance(source, bytes) else os.fspath(source))
        return BlobRef(digest=digest, size=size)

    def blob_path(self, ref: BlobRef) -> Path | None:
        """A blob's file, its size and digest checked.

        Returns:
            ``None`` where it is in no layer, or damaged (of which a warning told).

        Raises:
            UntrustedEntryError: It is there, but others can write it or a directory above it.
        """
        untrusted: UntrustedEntryError | None = None
        for layer in self._layers:
            path = keyed_path(layer.path, Area.BLOBS, ref.digest)
            try:
                if self._blob_is_good(layer, path, ref):
                    return Path(path)
            except UntrustedEntryError as error:
                untrusted = untrusted or error
            except OSError as error:
                self._warn(path, f"{path}: cannot be read ({error.strerror}): taken as missing")
        if untrusted is not None:
            raise untrusted
        return None

    def _blob_is_good(self, layer: Root, path: str, ref: BlobRef) -> bool:
        good = self._good.get(path)
        try:
            facts = self._files.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        # Asked every time: a chmod after the first look counts.
        reason = layer.distrust(path)
        if reason is not None:
            raise UntrustedEntryError(reason, path=path)
        if good is not None and good == _identity(facts):
            return True
        state = layer.blob_state(path, ref.digest, ref.size)
        if isinstance(state, str):
            self._reject(layer, path, _identity(facts), f"blob: {state}")
            return False
        if state is not None:
            self._good[path] = state
        return state is not None

    def get_target(self, key: str) -> TargetRecord | None:
        """What a target key leads to; ``None`` where nothing sound is known."""
        return self._get_record(Area.TARGETS, key, lambda data, path: decode_target(data, key, path=path))

    def put_target(self, key: str, record: TargetRecord) -> None:
        """Let a target key lead to an entry; the entry comes first.

        Raises:
            StoreWriteError: The store cannot be written.
        """
        data = encode_target(check_key(key), record)
        decode_target(data, key)
        self._top.publish(Area.TARGETS, key, data)

    def get_piece(self, key: str) -> PieceRecord | None:
        """The compiled piece of a piece key; ``None`` where there is none or its blob is gone.

        The blob is kept until the artifact that names it is put.
        """
        record = self._get_record(Area.PIECES, key, lambda data, path: decode_piece(data, key, path=path))
        if record is None:
            return None
        try:
            if not self._top.read_only and self._top.hold_blob(record.blob.digest, record.blob.size):
                return record
            for layer in self._layers:
                facts = self._files.lstat(keyed_path(layer.path, Area.BLOBS, record.blob.digest))
                if facts.st_size == record.blob.size:
                    return record
        except OSError:
            pass
        return None

    def put_piece(self, key: str, backend: str, blob: BlobRef) -> None:
        """Note that a piece key's compiled piece is this blob; the blob comes first.

        Raises:
            StoreWriteError: The store cannot be written.
        """
        data = encode_piece(PieceRecord(key=check_key(key), backend=backend, blob=blob))
        decode_piece(data, key)
        self._top.publish(Area.PIECES, key, data)

    def _get_record(self, area: Area, key: str, read: Callable[[bytes, str], T]) -> T | None:
        check_key(key)
        for layer in self._layers:
            try:
                record = self._load(layer, keyed_path(layer.path, area, key), _MAX_RECORD, read)
            except UntrustedEntryError as error:
                self._warn(error.path, f"{error.message} (taken as missing)")
                continue
            if record is not None:
                return record
        return None

    # -- reading, rejecting ------------------------------------------------------------------------

    def _load(self, layer: Root, path: str, cap: int, read: Callable[[bytes, str], T]) -> T | None:
        found: Found | None = None
        try:
            found = layer.read(path, cap)
            if found is None:
                return None
            reason = layer.distrust(path)
            if reason is not None:
                raise UntrustedEntryError(reason, path=path)
            value = read(found.data, path)
        except FutureFormatError as error:
            self._warn(path, error.message)
            return None
        except EntryFormatError as error:
            self._reject(layer, path, found.identity if found else None, f"{error.field}: {error.reason}")
            return None
        except UntrustedEntryError:
            raise
        except OSError as error:
            self._warn(path, f"{path}: cannot be read ({error.strerror}): taken as missing")
            return None
        if not layer.read_only and time.time() - found.modified / 1e9 > _USE_NOTED_EVERY:
            layer.touch(path)
        return value

    def _reject(self, layer: Root, path: str, identity: Identity | None, reason: str) -> None:
        self._good.pop(path, None)
        gone = layer.quarantine(path, identity, reason)
        what = "moved to quarantine" if gone else "left there, for it cannot be moved"
        self._warn(path, f"{path}: damaged: {reason}; {what}, and taken as missing", again=gone)

    def _warn(self, path: str, message: str, *, again: bool = False) -> None:
        # A file that stays would be warned of at each look.
        if again or path not in self._warned:
            self._warned.add(path)
            log.warning("%s", message)

    # -- working together --------------------------------------------------------------------------

    @contextmanager
    def lock(
        self,
        key: str,
        *,
        timeout: float | None = None,
        on_wait: Callable[[float, str], None] | None = None,
    ) -> Iterator[bool]:
        """Let one process at a time work on a key.

        Args:
            key: 64 hex digits.
            timeout: Seconds to wait for another process; ``None`` waits as long as it takes.
            on_wait: Called now and then while waiting, with the seconds waited and who holds the lock.

        Yields:
            True when held; False where locks do not work (a read-only root, some network file systems): then
            the work may be done twice, and that is all.

        Raises:
            LockTimeoutError: Another process held it for all that time.
        """
        path = os.path.join(self._top.area(Area.LOCKS), f"{check_key(key)}.lock")
        if self._top.read_only or not self._have_directory(Area.LOCKS):
            yield False
            return
        with exclusive(self._files, path, timeout=timeout, on_wait=on_wait) as held:
            yield held

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private temporary directory, on the store's file system where that can be written."""
        parent = None
        if not self._top.read_only and self._have_directory(Area.TMP):
            name = temporary_name(self._top.host, "scratch")
            path = os.path.join(self._top.area(Area.TMP), name)
            try:
                self._files.mkdir(path, 0o700)
            except OSError:
                path = tempfile.mkdtemp(prefix="stitchcache-")
        else:
            path = tempfile.mkdtemp(prefix="stitchcache-", dir=parent)
        try:
            yield Path(path)
        finally:
            import shutil

            shutil.rmtree(path, ignore_errors=True)

    def _have_directory(self, area: Area) -> bool:
        try:
            self._top.make_dir(self._top.path)
            self._top.make_dir(self._top.area(area))
        except OSError:
            return False
        return True

    def why_not_writable(self) -> str | None:
        """Why nothing can be stored; ``None`` when it can. Tries it."""
        top = self._top
        try:
            with top.writing(top.path):
                top.make_dir(top.path)
                top.make_dir(top.area(Area.TMP))
                probe = os.path.join(top.area(Area.TMP), temporary_name(top.host, "probe"))
                fd = self._files.create(probe)
                close_quietly(self._files, fd)
                top.discard(probe)
        except StoreWriteError as error:
            return error.message
        return None

    def writable(self) -> bool:
        """Whether something can be stored; :meth:`why_not_writable` says why not."""
        return self.why_not_writable() is None

    def _after_put(self) -> None:
        pass


def _reader(read: Callable[..., Artifact], graph_hash: str) -> Callable[[bytes, str], Artifact]:
    def checked(data: bytes, path: str) -> Artifact:
        artifact = read(data, path=path)
        if artifact.graph_hash != graph_hash:
            reason = f"{artifact.graph_hash} in a file that is named {graph_hash}"
            raise EntryFormatError(
                f"{path}: graph_hash: {reason}", path=path, field="graph_hash", reason=reason
            )
        return artifact

    return checked


def _identity(facts: os.stat_result) -> Identity:
    from stitchcache.store.root import identity_of

    return identity_of(facts)


def _root_paths(root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None) -> list[str]:
    if root is None:
        return [default_root()]
    roots = [root] if isinstance(root, (str, os.PathLike)) else list(root)
    if not roots or any(not os.fspath(path) for path in roots):
        raise OptionError("root: a cache needs a directory, and got an empty name", option="root")
    return [os.path.abspath(os.path.expanduser(os.fspath(path))) for path in roots]


def default_root() -> str:
    """The directory that is used where none is named."""
    configured = os.environ.get("STITCHCACHE_DIR")
    if configured:
        return os.path.abspath(os.path.expanduser(configured))
    import platformdirs

    return str(platformdirs.user_cache_dir("stitchcache", appauthor=False))


def _check_directory(path: str) -> None:
    try:
        facts = os.stat(path)
    except OSError:
        # Missing, or not to be seen: reads will miss, and writes will say why they cannot.
        return
    if not stat.S_ISDIR(facts.st_mode):
        raise StoreError(
            f"{path}: is not a directory, so it cannot be a cache: move that file away, or name another "
            "directory (root=..., or STITCHCACHE_DIR)",
            path=path,
        )


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise OptionError(f"{name}={value!r}: use 1 or 0", option=name)


def size_from_environment() -> int | None:
    """``STITCHCACHE_MAX_SIZE`` in bytes; ``None`` where it is not set."""
    text = os.environ.get("STITCHCACHE_MAX_SIZE", "").strip()
    return parse_size(text, option="STITCHCACHE_MAX_SIZE") if text else None


def parse_size(text: str, *, option: str = "size") -> int:
    """Bytes in a text such as ``10G``, ``500 MiB`` or ``1048576``; units are powers of 1024.

    Raises:
        OptionError: It is no such text.
    """
    import re

    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise OptionError(f"{option}={text!r}: use a number with K, M, G or T, such as 10G", option=option)
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))
