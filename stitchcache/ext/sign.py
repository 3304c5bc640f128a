"""Signatures on what a cache holds (``pip install 'stitchcache[sign]'``), and the keys that make them.

What is signed, and how a signature is checked, stands in ``stitchcache.store.signed``.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from stitchcache.errors import EntryFormatError, OptionError, UntrustedEntryError
from stitchcache.store import openssh, words
from stitchcache.store.signed import Signers

YEAR = 365 * 86400.0
_NAME = r"[A-Za-z0-9._@:/+=-]{1,256}"


class Keys(Signers):
    """A directory of keys: ``id`` signs, and ``allowed_signers`` and ``revoked_keys`` say who may.

    Args:
        directory: Default ``STITCHCACHE_KEYS``, or the user's configuration directory.
        namespace: What is signed for; default ``STITCHCACHE_NAMESPACE``, or ``stitchcache``.
    """

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
        made = openssh.Signature(text=text, public=public, namespace=self.namespace, signature=b"")
        data = replace(made, signature=private.sign(made.signed)).armored()
        try:
            openssh.read_statement(data)
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
                named, comment = openssh.read_public(file.readline(), self.path("id.pub"))
            if named == public and comment:
                return comment
        return openssh.fingerprint(public)

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
        openssh.require_cryptography()
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

    def generate(self, name: str) -> str:
        """Make a key pair that is called so, and trust it; its fingerprint.

        Raises:
            OptionError: There is a key already, or the name cannot be used.
            StoreWriteError: The directory cannot be written.
        """
        openssh.require_cryptography()
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        if self.can_sign():
            raise OptionError(f"{self.path('id')}: there is a key already; move it away first", option="id")
        key = Ed25519PrivateKey.generate()
        public = key.public_key().public_bytes_raw()
        line = signer_line(name, public, {})
        private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        self._write("id", private.decode(), 0o600)
        self._write("id.pub", openssh.public_line(public, name))
        self._append("allowed_signers", line)
        return openssh.fingerprint(public)

    def trust(self, public: bytes, name: str, limits: dict[str, str | None]) -> None:
        """Let a key sign under a name, within the limits that ``allowed_signers`` knows."""
        self._append("allowed_signers", signer_line(name, public, limits))

    def revoke(self, public: bytes) -> None:
        """Trust nothing any more that a key signed or will sign."""
        if public not in self.revoked():
            self._append("revoked_keys", openssh.public_line(public))

    def _append(self, name: str, line: str) -> None:
        before = self._read(name)
        joint = "\n" if before and not before.endswith("\n") else ""
        self._write(name, before + joint + line)


def signer_line(name: str, public: bytes, limits: dict[str, str | None]) -> str:
    """A line of the file; an ``OptionError`` where it would be read as something else."""
    options = ",".join(f'{option}="{value}"' for option, value in limits.items() if value is not None)
    line = " ".join(filter(None, (name, options, openssh.public_line(public))))
    try:
        if not re.fullmatch(_NAME, name):
            raise ValueError("a signer's name has 1 to 256 letters, digits and . _ @ : / + = -")
        if any('"' in value or not value.isprintable() for value in limits.values() if value is not None):
            raise ValueError("a limit cannot have quotes or line breaks")
        openssh.signers_in(line.strip())
    except (ValueError, OverflowError) as error:
        raise OptionError(f"{name!r}: {error}", option="name") from None
    return line
