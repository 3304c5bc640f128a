"""Signatures on what is stored: whether one is good, whose is put on, blobs in directories that others write.

Imported where a signature is needed or a key is configured; other starts do without. What is checked without
the extra ``sign`` is all here, so that a start imports no more for a signature than this and its formats.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from stitchcache.artifact.entry import OUTSIDE, Kind, packed_digest, signature_in, signed_digest
from stitchcache.errors import EntryFormatError, OptionError, StoreWriteError, UntrustedEntryError
from stitchcache.store import Area, Files, words, write_error
from stitchcache.store.openssh import (
    Signature,
    Signer,
    Statement,
    fingerprint,
    matches,
    read_public,
    read_signers,
    read_statement,
)
from stitchcache.store.root import Root
from stitchcache.types import BlobRef, TargetRecord

if TYPE_CHECKING:
    from pathlib import Path

    from stitchcache.store.store import Store

# Clocks of machines differ; more than this is a wrong clock, or a wrong statement.
_SKEW = 600
# Keys of other kinds sign nothing here.
_NO_KEY = ("#", "ssh-rsa ", "ssh-dss ", "ecdsa-", "sk-")


def keys_directory() -> str:
    """Where keys and names of signers are: ``STITCHCACHE_KEYS``, or the user's configuration directory."""
    configured = os.environ.get("STITCHCACHE_KEYS")
    if configured:
        return os.path.abspath(os.path.expanduser(configured))
    import platformdirs

    return str(platformdirs.user_config_dir("stitchcache", appauthor=False))


def signature_namespace() -> str:
    """``STITCHCACHE_NAMESPACE``: what signatures are for. No other program's signatures count here."""
    name = os.environ.get("STITCHCACHE_NAMESPACE", "").strip() or "stitchcache"
    if name != "stitchcache" and not re.fullmatch(r"stitchcache(/[A-Za-z0-9._-]{1,64})?", name):
        said = f"STITCHCACHE_NAMESPACE={name!r}: use 'stitchcache', or 'stitchcache/' and a name of yours"
        raise OptionError(said, option="STITCHCACHE_NAMESPACE")
    return name


class Signers:
    """Who may sign: ``allowed_signers`` and ``revoked_keys`` in a directory of keys.

    A signature is checked at each use, all of it but the arithmetic: a file in ``seen`` says that this user
    verified these bytes before. That saves a warm start the import of cryptography, which takes longer than
    all the rest.

    Args:
        directory: Default ``STITCHCACHE_KEYS``, or the user's configuration directory.
        namespace: What is signed for; default ``STITCHCACHE_NAMESPACE``, or ``stitchcache``.
    """

    def __init__(self, directory: str | None = None, namespace: str | None = None) -> None:
        self.directory = directory or keys_directory()
        self.namespace = namespace or signature_namespace()
        self._files = Files()
        self._root = Root(self.directory, files=self._files, durable=True, read_only=False)

    def path(self, name: str) -> str:
        """A file of the directory."""
        return os.path.join(self.directory, name)

    def signers(self) -> list[Signer]:
        """Who may sign what; an ``UntrustedEntryError`` where others can write that."""
        return read_signers(self._read("allowed_signers"), self.path("allowed_signers"))

    def revoked(self) -> set[bytes]:
        """Keys that are revoked: a public key a line, as ``ssh-keygen -Y verify -r`` takes them."""
        path = self.path("revoked_keys")
        lines = [line.strip() for line in self._read("revoked_keys").split("\n")]
        try:
            return {read_public(each, path)[0] for each in lines if each and not each.startswith(_NO_KEY)}
        except EntryFormatError as error:
            raise UntrustedEntryError(f"{error.message}: mend the line", path=path) from error

    def _read(self, name: str) -> str:
        path = self.path(name)
        try:
            # It names the keys that may run code here, so it is held to the rules for that code.
            self._root.require_trust(path)
            # A FIFO is not waited for, and only a line feed ends a line.
            with open(self._files.open_read(path), encoding="utf-8", newline="") as file:
                return file.read()
        except FileNotFoundError:
            return ""
        except UntrustedEntryError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            reason = words(error) if isinstance(error, OSError) else "not UTF-8"
            raise UntrustedEntryError(f"{path}: cannot be read ({reason})", path=path) from error

    def verify(
        self, data: bytes, kind: str, key: str, digest: str, *, path: str, about: str = ""
    ) -> Statement:
        """The statement of a signature that is good for a kind, key and digest, here and now.

        ``path`` is the file that holds it, for messages. ``about`` tells this place from others: once a
        statement was taken there, no older one is.

        Raises:
            UntrustedEntryError: It is not good.
        """
        try:
            found, said = read_statement(data)
        except EntryFormatError as error:
            why = f"damaged ({error.reason})" if data else "missing"
            message = f"{path}: its signature is {why}: 'stitchcache sign' signs it where it was made"
            raise UntrustedEntryError(message, path=path) from error
        problem = self._problem(found, said, (kind, key, digest)) or self._arithmetic(found, said, about)
        if problem is not None:
            raise UntrustedEntryError(f"{path}: {problem}", path=path)
        return said

    def _problem(self, found: Signature, said: Statement, wanted: tuple[str, str, str]) -> str | None:
        """What is wrong with a signature, its arithmetic apart."""
        if (said.kind, said.key, said.digest) != wanted:
            return "its signature is about something else: it was copied here, or the file was changed"
        if found.namespace != self.namespace:
            return (
                f"it is signed for namespace {found.namespace}, and this is {self.namespace}: sign it for "
                "this one, or set STITCHCACHE_NAMESPACE"
            )
        now = time.time()
        if said.created > now + _SKEW:
            return f"it was signed in the future ({day(said.created)}): one of the two clocks is wrong"
        if said.expires <= now:
            return f"its signature expired on {day(said.expires)}: sign it again"
        shown = fingerprint(found.public)
        if found.public in self.revoked():
            return f"the key {shown} of its signer is revoked in {self.path('revoked_keys')}"
        why = f"no line of {self.path('allowed_signers')} lets {said.signer} sign with the key {shown}"
        for signer in self.signers():
            # The name counts with the key: a name in a statement is only what its signer says.
            if signer.public != found.public or not matches(said.signer, signer.names):
                continue
            limits = [signer.problem(self.namespace, moment) for moment in (said.created, now)]
            if limits == [None, None]:
                return None
            why = f"{said.signer} may not sign this: {limits[0] or limits[1]}"
        return f"{why} ('stitchcache keys trust' adds a line)"

    def _arithmetic(self, found: Signature, said: Statement, about: str) -> str | None:
        whole = hashlib.sha256(found.public + found.signature + found.signed).hexdigest()
        name = hashlib.sha256(
            "\0".join((about, found.namespace, said.kind, said.key)).encode("utf-8", "surrogatepass")
        ).hexdigest()
        place = self.path(f"seen/{name if about else whole}")
        created, seen = self._seen(place)
        if created > said.created:
            return (
                f"it was signed on {day(said.created)}, and one of {day(created)} was used from here: an "
                f"older one was put back. If that was you, sign it again, or remove {place}"
            )
        if seen == whole:
            return None
        if not found.verified():
            return "its signature is not of this key: somebody else made it, or it was changed"
        # Without it the next start verifies again, and does not notice an older one.
        with suppress(StoreWriteError):
            self._write(f"seen/{os.path.basename(place)}", f"{said.created} {whole}\n", last=False)
        return None

    def _seen(self, place: str) -> tuple[int, str]:
        """When the newest statement of a place was signed, and its digest."""
        try:
            self._root.require_trust(place)
            with self._files.opened(self._files.open_read(place)) as fd:
                created, whole = self._files.read_exactly(fd, 200).decode("ascii").split()
            return int(created), whole
        except (OSError, ValueError):
            return 0, ""

    def _write(self, name: str, text: str, mode: int = 0o644, *, last: bool = True) -> None:
        """Put a file in place, whole or not at all; ``last`` is whether it must survive a power loss."""
        path = self.path(name)
        temporary = f"{path}.{os.urandom(6).hex()}"
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            self._root.require_trust(os.path.dirname(path))
            try:
                with self._files.opened(self._files.create(temporary, mode)) as fd:
                    self._files.write_all(fd, text.encode())
                    if last:
                        self._files.fsync(fd)
                self._files.rename(temporary, path)
            finally:
                self._root.discard(temporary)
        except OSError as error:
            raise write_error(error, path) from error


def day(moment: float) -> str:
    """A day, as messages name it."""
    return datetime.fromtimestamp(min(moment, 2e11), UTC).strftime("%Y-%m-%d")


def require_signed_file(store: Store, place: str, path: str, area: Area, key: str, data: bytes) -> None:
    """Raise ``UntrustedEntryError`` where the signature of an entry or piece is not good.

    ``place`` is the root or remote that it is in.
    """
    kind = Kind.ENTRY if area is Area.ENTRIES else Kind.PIECE
    try:
        digest = signed_digest(data, kind)
    except UntrustedEntryError as error:
        raise UntrustedEntryError(f"{path}: {error.message}", path=path) from error
    its = signature_in(data).removeprefix(OUTSIDE)
    store.signers.verify(its, kind.name.lower(), key, digest, path=path, about=place)


def require_signed_record(
    store: Store, place: str, path: str, key: str, record: TargetRecord, its: bytes
) -> None:
    """Raise ``UntrustedEntryError`` where the signature of a target record is not good; likewise."""
    # Configurations of one key have their own histories.
    what = [*(source.digest for source in record.sources), *(f"{n}={v}" for n, v in record.globals)]
    about = f"{place}\0{chr(0).join(what)}"
    its = its.removeprefix(OUTSIDE)
    store.signers.verify(its, "target", key, packed_digest(record), path=path, about=about)


def own_signature(store: Store, root: Root, kind: str, key: str, digest: str) -> bytes:
    """Our signature on what is stored in a root now; empty where there is no key that can be used."""
    try:
        if os.path.lexists(os.path.join(keys_directory(), "id")):
            signed: bytes = store.keys.sign(kind, key, digest)
            return signed
        if root.trust != "signed":
            return b""
        why = "there is no key ('stitchcache keys generate NAME' makes one)"
    except (UntrustedEntryError, OptionError) as error:
        why = error.message
    later = ", so the next start refuses it" if root.trust == "signed" else ""
    store.warn("signature", f"{root.path}: what is compiled is stored unsigned{later}: {why}")
    return b""


def own_copy(store: Store, root: Root, path: str, ref: BlobRef) -> Path | None:
    """A private copy of a blob that others can write, so that what was digested is what is loaded."""
    fd = root.open(path)
    if fd is None:
        return None
    # Few roots are open to others.
    import tempfile
    from pathlib import Path
    from shutil import rmtree

    copy = Path(tempfile.mkdtemp(prefix="stitchcache-")) / ref.digest
    weakref.finalize(store, rmtree, copy.parent, ignore_errors=True)
    with root.files.opened(fd):
        if (reason := root.files.distrusted_way(str(copy.parent))) is not None:
            said = f"{reason}; or set TMPDIR to a directory of your own: what others can write is copied"
            raise UntrustedEntryError(said, path=path)
        copy.write_bytes(root.files.read_exactly(fd, ref.size))
    with root.files.opened(root.files.open_read(str(copy))) as own:
        problem = root.blob_problem(own, ref)
    if problem is not None:
        store.warn(path, f"{path}: damaged: {problem}; taken as missing")
        return None
    return copy
