"""How signatures are written: Ed25519 in OpenSSH's formats, public keys, SSHSIG, ``allowed_signers``.

A signature is a statement, one line of JSON that says what is signed, by whom and until when, with an SSHSIG
block under it. ``ssh-keygen -Y verify`` checks the same two (see ``ssh-keygen(1)``). Nothing is decided here.
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Literal

from stitchcache.artifact import read_value, record, unique
from stitchcache.artifact.entry import OUTSIDE
from stitchcache.errors import EntryFormatError, UntrustedEntryError
from stitchcache.records import Count, Digest, Name, dataclass

# The format has room for 4096, the mark of what was imported among them.
_MOST_BYTES = 4096 - len(OUTSIDE)
_TYPE, _HASH, _MAGIC, _VERSION = b"ssh-ed25519", b"sha512", b"SSHSIG", b"\0\0\0\1"
_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----\n", "-----END SSH SIGNATURE-----\n"


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _strings(data: bytes, count: int) -> list[bytes]:
    """So many length-prefixed strings, and nothing after them."""
    found, begin = [], 0
    for _ in range(count):
        end = begin + 4 + int.from_bytes(data[begin : begin + 4], "big")
        if end > len(data):
            raise ValueError("it ends too early")
        found.append(data[begin + 4 : end])
        begin = end
    if begin != len(data):
        raise ValueError(f"{len(data) - begin} bytes too many")
    return found


# -- public keys: the 32 bytes of one stand for it -------------------------------------------------


def _blob(public: bytes) -> bytes:
    return _string(_TYPE) + _string(public)


def _public(blob: bytes) -> bytes:
    kind, public = _strings(blob, 2)
    if kind != _TYPE or len(public) != 32:
        raise ValueError("it is no Ed25519 key")
    return public


def fingerprint(public: bytes) -> str:
    """As ``ssh-keygen -l`` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(_blob(public)).digest()).decode().rstrip("=")


def read_public(line: str, where: str) -> tuple[bytes, str]:
    """Key and comment in a line such as ``id.pub`` has; an ``EntryFormatError`` for another kind of key."""
    kind, _, rest = line.strip().partition(" ")
    encoded, _, comment = rest.strip().partition(" ")
    try:
        if kind.encode() != _TYPE:
            raise ValueError("it does not begin with ssh-ed25519")
        return _public(base64.b64decode(encoded, validate=True)), comment.strip()
    except ValueError as error:
        raise EntryFormatError.at(where, "key", f"no public key of Ed25519: {error}") from None


def public_line(public: bytes, comment: str = "") -> str:
    """The line of a key."""
    return f"{_TYPE.decode()} {base64.b64encode(_blob(public)).decode()} {comment}".rstrip() + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A text with the key and the signature under it; nothing is verified yet."""

    text: str
    public: bytes
    namespace: str
    signature: bytes

    @property
    def signed(self) -> bytes:
        """The bytes that the signature is over."""
        parts = (self.namespace.encode(), b"", _HASH, hashlib.sha512(self.text.encode()).digest())
        return _MAGIC + b"".join(map(_string, parts))

    def armored(self) -> bytes:
        """The text, and the signature as ``ssh-keygen -Y sign`` writes it."""
        signature = _string(_TYPE) + _string(self.signature)
        parts = (_blob(self.public), self.namespace.encode(), b"", _HASH, signature)
        encoded = base64.b64encode(_MAGIC + _VERSION + b"".join(map(_string, parts))).decode()
        lines = [encoded[at : at + 70] + "\n" for at in range(0, len(encoded), 70)]
        return "".join((self.text, _BEGIN, *lines, _END)).encode()

    def verified(self) -> bool:
        """Whether the key made the signature, over just this text and namespace."""
        require_cryptography()
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(self.signature, self.signed)
        except (InvalidSignature, ValueError):
            return False
        return True


def read_signature(data: bytes) -> Signature:
    """A text and the SSHSIG block under it; an ``EntryFormatError`` where it is anything else."""
    try:
        text, begin, block = data.decode("ascii").partition(_BEGIN)
        body, end, rest = block.partition(_END)
        if not begin or not end or rest:
            raise ValueError("no text with one SSHSIG block under it")
        blob = base64.b64decode(body.replace("\n", ""), validate=True)
        start = len(_MAGIC + _VERSION)
        if blob[:start] != _MAGIC + _VERSION:
            raise ValueError("no SSHSIG of version 1")
        public, namespace, reserved, hashed, signed = _strings(blob[start:], 5)
        kind, signature = _strings(signed, 2)
        # The key alone decides the algorithm.
        if kind != _TYPE or len(signature) != 64 or reserved or hashed != _HASH:
            raise ValueError("it is not Ed25519 over SHA-512")
        return Signature(
            text=text, public=_public(public), namespace=namespace.decode("ascii"), signature=signature
        )
    except ValueError as error:
        raise EntryFormatError.at("", "signature", str(error)) from None


def require_cryptography() -> None:
    """Raise an ``UntrustedEntryError`` that says what to install."""
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        message = "signatures need the package cryptography: pip install 'stitchcache[sign]'"
        raise UntrustedEntryError(message, path="") from error


# As text: a warm start compiles none of them where no line has an option.
_OPTION = r'(?P<name>[a-z-]+)(="(?P<value>[^"]*)")?(,|$)'
_LIMITS = {"namespaces", "valid-after", "valid-before"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """A line of the file: who may sign with a key, for what, and when."""

    names: tuple[str, ...]  # patterns of the names that the key may sign under
    public: bytes
    namespaces: tuple[str, ...] = ()  # patterns of what it may sign for; empty is everything
    after: float | None = None  # Unix seconds from which on it is valid
    before: float | None = None  # when it ends

    def problem(self, namespace: str, moment: float) -> str | None:
        """Why it may not sign for a namespace at a moment; ``None`` where it may."""
        if self.namespaces and not matches(namespace, self.namespaces):
            return f"its key is for namespaces {','.join(self.namespaces)}, and this is {namespace}"
        if self.after is not None and moment < self.after:
            return "its key was not valid yet"
        if self.before is not None and moment >= self.before:
            return "its key is no longer valid"
        return None


def matches(text: str, patterns: tuple[str, ...]) -> bool:
    """As OpenSSH matches: ``*`` and ``?``, and a pattern after ``!`` that matches refuses."""
    found = [each[0] for each in patterns if _match(text, each.removeprefix("!"))]
    return bool(found) and "!" not in found


def _match(text: str, pattern: str) -> bool:
    # Most lines have whole names. A pattern is compiled to a regular expression, once a process.
    whole = "*" not in pattern and "?" not in pattern
    return text == pattern if whole else fnmatchcase(text, pattern.replace("[", "[[]"))


def read_signers(text: str, path: str) -> list[Signer]:
    """The Ed25519 keys of the file; lines about other kinds of keys are passed over.

    Raises:
        UntrustedEntryError: A line cannot be understood. Then nobody may sign, for it may be a limit.
    """
    found = []
    # A line ends where OpenSSH ends it: what Python takes for a line break too may stand in a comment.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            if not line.replace("\t", " ").removesuffix("\r").isprintable():
                raise ValueError("it has characters that cannot be seen")
            found += signers_in(line.strip())
        except (ValueError, OverflowError, EntryFormatError) as error:
            raise UntrustedEntryError(f"{path}:{number}: {error}: mend the line", path=path) from None
    return found


def signers_in(line: str) -> list[Signer]:
    """The key of one line, none where it is of another kind; a ``ValueError`` where it is no such line."""
    line = " ".join(line.split())
    names, _, rest = line[1:].partition('"') if line.startswith('"') else line.partition(" ")
    text, kind, key = f" {rest.strip()}".partition(f" {_TYPE.decode()} ")
    if not kind:
        others = [word for word in rest.split()[:2] if word.startswith(("ssh-", "ecdsa-", "sk-"))]
        if others and _TYPE.decode() not in others:
            return []
        raise ValueError("no line such as 'NAME ssh-ed25519 AAAA...'")
    limits: dict[str, str] = {}
    text = text.strip()
    while text:
        option = re.match(_OPTION, text)
        if option is None or option["name"] not in _LIMITS - limits.keys() or not option["value"]:
            raise ValueError(f"the option {text[:60]!r} is not supported here, or is there twice")
        limits[option["name"]] = option["value"]
        text = text[option.end() :]
    return [
        Signer(
            names=tuple(filter(None, names.split(","))),
            public=read_public(kind.strip() + " " + key, "")[0],
            namespaces=tuple(filter(None, limits.get("namespaces", "").split(","))),
            after=_moment(limits.get("valid-after")),
            before=_moment(limits.get("valid-before")),
        )
    ]


def _moment(text: str | None) -> float | None:
    """``YYYYMMDD[HHMM[SS]][Z]`` in Unix seconds; local time without the Z, as OpenSSH reads it."""
    if text is None:
        return None
    digits = text.removesuffix("Z")
    form = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}.get(len(digits))
    if form is None or not digits.isdigit():
        raise ValueError(f"{text!r} is no time: write YYYYMMDD or YYYYMMDDHHMM, with a Z for UTC")
    read = datetime.strptime(digits, form)
    return (read.replace(tzinfo=UTC) if text.endswith("Z") else read).timestamp()


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a signature says."""

    version: Count  # of this grammar
    kind: Literal["entry", "target", "piece", "bundle"]  # what is signed
    key: Digest  # the graph hash, target key or piece key that it stands under
    digest: Digest  # of what is signed, as docs/format.md tells
    signer: Name  # from ``allowed_signers``
    created: Count  # Unix seconds
    expires: Count

    def _flaw(self) -> tuple[str, str] | None:
        if self.version != 1:
            return "version", f"{self.version} where 1 is expected"
        return None if self.created < self.expires else ("expires", "not after created")


def read_statement(data: bytes) -> tuple[Signature, Statement]:
    """A signature and what it says, none of it verified; an ``EntryFormatError`` where it is none."""
    if len(data) > _MOST_BYTES:
        raise EntryFormatError.at("", "signature", f"{len(data)} bytes, and {_MOST_BYTES} are allowed")
    # Not at the top: who may sign is told without.
    import json

    found = read_signature(data)
    try:
        value = json.loads(found.text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise EntryFormatError.at("", "signature", f"its statement is no JSON: {error}") from None
    return found, read_value(record(Statement), value, "", "signature")
