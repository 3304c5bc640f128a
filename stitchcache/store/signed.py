"""What only signatures need: settings, checking and making them, blobs in directories that others write.

Imported where a signature is needed or a key is configured; other starts do without.
"""

from __future__ import annotations

import os
import re
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from stitchcache.artifact.entry import OUTSIDE, Kind, packed_digest, signature_in, signed_digest
from stitchcache.errors import OptionError, UntrustedEntryError
from stitchcache.store import Area
from stitchcache.store.root import Root
from stitchcache.types import BlobRef, TargetRecord

if TYPE_CHECKING:
    from stitchcache.store.store import Store


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
    store.keys.verify(its, kind.name.lower(), key, digest, path=path, about=place)


def require_signed_record(
    store: Store, place: str, path: str, key: str, record: TargetRecord, its: bytes
) -> None:
    """Raise ``UntrustedEntryError`` where the signature of a target record is not good; likewise."""
    # Configurations of one key have their own histories.
    what = [*(source.digest for source in record.sources), *(f"{n}={v}" for n, v in record.globals)]
    about = f"{place}\0{chr(0).join(what)}"
    its = its.removeprefix(OUTSIDE)
    store.keys.verify(its, "target", key, packed_digest(record), path=path, about=about)


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
    from shutil import rmtree

    copy = Path(tempfile.mkdtemp(prefix="stitchcache-")) / ref.digest
    weakref.finalize(store, rmtree, copy.parent, ignore_errors=True)
    if (reason := root.files.distrusted_way(str(copy.parent))) is not None:
        root.files.close_quietly(fd)
        said = f"{reason}; or set TMPDIR to a directory of your own: pieces that others can write are copied"
        raise UntrustedEntryError(said, path=path)
    with root.files.opened(fd):
        copy.write_bytes(root.files.read_exactly(fd, ref.size))
    with root.files.opened(root.files.open_read(str(copy))) as own:
        problem = root.blob_problem(own, ref)
    if problem is not None:
        store.warn(path, f"{path}: damaged: {problem}; taken as missing")
        return None
    return copy
