"""Signatures on what a cache holds (``pip install 'stitchcache[sign]'``): Ed25519, in OpenSSH's formats.

A signature is a statement, one line of JSON that says what is signed, by whom and until when, with an SSHSIG
block under it. ``ssh-keygen -Y verify`` checks the same two. Who may sign stands in ``allowed_signers``.

Everything is checked at each use but the arithmetic: a file in ``seen`` says that this user verified these
bytes before. That saves a warm start the import of cryptography, which takes longer than all the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

from stitchcache.artifact import read_value, record
from stitchcache.artifact.entry import OUTSIDE
from stitchcache.errors import EntryFormatError, OptionError, StoreWriteError, UntrustedEntryError
from stitchcache.ext.openssh import (
    Signature,
    Signer,
    fingerprint,
    matches,
    public_line,
    read_public,
    read_signature,
    read_signers,
    require_cryptography,
    signer_line,
)
from stitchcache.records import Count, Digest, Name, dataclass
from stitchcache.store import Files, words, write_error
from stitchcache.store.root import Root
from stitchcache.store.signed import keys_directory, signature_namespace

YEAR = 365 * 86400.0
# Clocks of machines differ; more than this is a wrong clock, or a wrong statement.
_SKEW = 600
# The format has room for 4096, the mark of what was imported among them.
_MOST_BYTES = 4096 - len(OUTSIDE)
# Keys of other kinds sign nothing here.
_NO_KEY = ("#", "ssh-rsa ", "ssh-dss ", "ecdsa-", "sk-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a signature says.

    Args:
        version: Of this grammar.
        kind: What is signed. ``key`` is the graph hash, target key or piece key that it stands under.
        digest: Of what is signed, as docs/format.md tells.
        signer: A name from ``allowed_signers``.
        created: Unix seconds, as ``expires``.
    """

    version: Count
    kind: Literal["entry", "target", "piece", "bundle"]
    key: Digest
    digest: Digest
    signer: Name
    created: Count
    expires: Count

    def _flaw(self) -> tuple[str, str] | None:
        if self.version != 1:
            return "version", f"{self.version} where 1 is expected"
        return None if self.created < self.expires else ("expires", "not after created")


def read_statement(data: bytes) -> tuple[Signature, Statement]:
    """A signature and what it says, none of it verified; an ``EntryFormatError`` where it is none."""
    if len(data) > _MOST_BYTES:
        raise EntryFormatError.at("", "signature", f"{len(data)} bytes, and {_MOST_BYTES} are allowed")
    found = read_signature(data)
    try:
        value = json.loads(found.text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise EntryFormatError.at("", "signature", f"its statement is no JSON: {error}") from None
    return found, read_value(record(Statement), value, "", "signature")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


class Keys:
    """A directory of keys: ``id`` signs, and ``allowed_signers`` and ``revoked_keys`` say who may.

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

    # -- who may sign ------------------------------------------------------------------------------

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

    # -- verifying ---------------------------------------------------------------------------------

    def verify(
        self, data: bytes, kind: str, key: str, digest: str, *, path: str, about: str = ""
    ) -> Statement:
        """The statement of a signature that is good for a key and a digest, here and now.

        Args:
            data: The signature.
            kind: What it must be about.
            key: The same.
            digest: The same.
            path: The file that holds it, for messages.
            about: Tells this place from others: once a statement was taken there, no older one is.

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

    # -- signing -----------------------------------------------------------------------------------

    def can_sign(self) -> bool:
        """Whether there is a key to sign with."""
        return os.path.lexists(self.path("id"))

    def sign(
        self, kind: str, key: str, digest: str, *, seconds: float = YEAR, created: int | None = None
    ) -> bytes:
        """Sign a digest with the key in ``id``.

        Args:
            kind: What is signed.
            key: Under which it stands.
            digest: Of it.
            seconds: How long the signature is good.
            created: Unix seconds of now, unless something else tells the time.

        Raises:
            UntrustedEntryError: There is no key, or others can read it.
            OptionError: The key or its name cannot be used.
        """
        private, public = self._private()
        # As reproducible builds set the time.
        epoch = os.environ.get("SOURCE_DATE_EPOCH") or str(int(time.time()))
        if not re.fullmatch(r"[0-9]{1,12}", epoch):
            raise OptionError(f"SOURCE_DATE_EPOCH={epoch!r}: use Unix seconds", option="SOURCE_DATE_EPOCH")
        now = int(epoch) if created is None else created
        said = {"version": 1, "kind": kind, "key": key, "digest": digest, "signer": self.name_of(public)}
        said |= {"created": now, "expires": now + int(seconds)}
        text = json.dumps(said, separators=(",", ":")) + "\n"
        made = Signature(text=text, public=public, namespace=self.namespace, signature=b"")
        data = replace(made, signature=private.sign(made.signed)).armored()
        try:
            read_statement(data)
        except EntryFormatError as error:
            raise OptionError(f"{self.path('id')}: {error.message}", option="id.pub") from error
        return data

    def public(self) -> bytes:
        """The public half of the key in ``id``."""
        return self._private()[1]

    def name_of(self, public: bytes) -> str:
        """What a key of ours calls itself: the comment in ``id.pub``, else its fingerprint."""
        with suppress(OSError, EntryFormatError, UnicodeDecodeError):
            with open(self.path("id.pub"), encoding="ascii") as file:
                named, comment = read_public(file.readline(), self.path("id.pub"))
            if named == public and comment:
                return comment
        return fingerprint(public)

    def _private(self) -> tuple[Any, bytes]:
        path = self.path("id")
        try:
            with self._files.opened(self._files.open_read(path, follow=True)) as fd:
                facts, data = self._files.fstat(fd), self._files.read_exactly(fd, 1 << 16)
        except OSError as error:
            advice = "'stitchcache keys generate NAME' makes a key"
            message = f"{path}: there is no key to sign with ({words(error)}): {advice}"
            raise UntrustedEntryError(message, path=path) from error
        mode = stat.S_IMODE(facts.st_mode)
        if facts.st_uid not in (os.geteuid(), 0) or mode & 0o077:
            message = (
                f"{path} belongs to user {facts.st_uid} and has mode {mode:04o}, so others may have the key: "
                f"chmod 600 {path!r}, or better make a new one"
            )
            raise UntrustedEntryError(message, path=path)
        require_cryptography()
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key

        try:
            key = load_ssh_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            reason = f"it is no OpenSSH private key without a passphrase ({error})"
            raise OptionError(f"{path}: {reason}", option="id") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise OptionError(f"{path}: make an Ed25519 key (ssh-keygen -t ed25519)", option="id")
        return key, key.public_key().public_bytes_raw()

    # -- changing what is there --------------------------------------------------------------------

    def generate(self, name: str) -> str:
        """Make a key pair that is called so, and trust it; its fingerprint.

        Raises:
            OptionError: There is a key already, or the name cannot be used.
            StoreWriteError: The directory cannot be written.
        """
        require_cryptography()
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        if self.can_sign():
            raise OptionError(f"{self.path('id')}: there is a key already; move it away first", option="id")
        key = Ed25519PrivateKey.generate()
        public = key.public_key().public_bytes_raw()
        line = signer_line(name, public, {})
        private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        self._write("id", private.decode(), 0o600)
        self._write("id.pub", public_line(public, name))
        self._append("allowed_signers", line)
        return fingerprint(public)

    def trust(self, public: bytes, name: str, limits: dict[str, str | None]) -> None:
        """Let a key sign under a name, within the limits that ``allowed_signers`` knows."""
        self._append("allowed_signers", signer_line(name, public, limits))

    def revoke(self, public: bytes) -> None:
        """Trust nothing any more that a key signed or will sign."""
        if public not in self.revoked():
            self._append("revoked_keys", public_line(public))

    def _append(self, name: str, line: str) -> None:
        before = self._read(name)
        joint = "\n" if before and not before.endswith("\n") else ""
        self._write(name, before + joint + line)

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
