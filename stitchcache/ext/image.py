"""Images: entries as an OCI image, which a node mounts as a volume, or GKM's MCV extracts.

Made of tar, gzip and JSON; no container tool is needed. The one layer holds::

    io.stitchcache.cache/                       a root: entries/, targets/ and blobs/
    io.stitchcache.manifest/manifest.json       what the entries were compiled for

The same entries give the same bytes, wherever and whenever the image is made. Only the compression is zlib's,
so another zlib may give another layer of the same content.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

from stitchcache.cache import Cache
from stitchcache.errors import OptionError, StoreWriteError
from stitchcache.ext.bundle import BLOCK, header
from stitchcache.ext.export import put_member, replacing, select
from stitchcache.records import dataclass
from stitchcache.remote.oci import Registry
from stitchcache.types import Artifact, BlobRef

_OCI = "application/vnd.oci.image"
# For KServe: the whole cache is mounted, as it is a root.
_MOUNTED = {"cache-type": "stitchcache", "cache-mount-subpath": ".", "framework": "pytorch"}
_MOUNTED |= {"cache-root-env": "STITCHCACHE_DIR=/home/kserve/.cache/stitchcache"}
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}  # as Go names them
# Compute capability by what NVIDIA calls a card: entries know its name only.
_CARDS = {"V100": 70, "T4": 75, "A100": 80, "A30": 80, "A10": 86, "L4": 89, "L40": 89, "L40S": 89, "H20": 90}
_CARDS |= {"H100": 90, "H200": 90, "GH200": 90, "B200": 100, "GB200": 100, "B300": 103, "GB300": 103}


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image that was made: its manifest's digest, its labels, its entries, its layer's compressed size."""

    digest: str
    labels: Mapping[str, str]
    entries: tuple[str, ...]
    bytes: int


def build_image(
    cache: Cache,
    path: str | os.PathLike[str],
    graph_hashes: Collection[str] = (),
    *,
    arch: str | None = None,
    layout: str = "stitchcache",
    **only: Any,
) -> Image:
    """Write entries to a directory in OCI's image layout; signed, where there is a key.

    Args:
        cache: Where they are. Only what it trusts is taken.
        path: A directory that does not exist yet.
        graph_hashes: Which entries; all where none is named.
        arch: The GPU's architecture for a label, such as ``sm_90``; default by the GPU's name.
        layout: What directories and labels are named after: ``"vllm"`` where an extractor knows no other.
        **only: ``label``, ``target`` and ``max_age``, as for a bundle.

    Raises:
        OptionError: ``path`` exists, an option makes no sense, or entries are for several platforms.
        UntrustedEntryError: An entry that was named is not trusted.
        StoreError: Nothing is there to take, or a blob is missing.
        StoreWriteError: The directory cannot be written.
    """
    path = os.path.abspath(path)
    if layout not in ("stitchcache", "vllm"):
        raise OptionError(f"layout={layout!r}: there is stitchcache, vllm.", option="layout")
    if os.path.lexists(path):
        raise OptionError(f"{path} exists: remove it, or name another directory.", option="path")
    found = select(cache, graph_hashes, **only)
    hashes = tuple(sorted(found.artifacts))
    entries = [found.artifacts[key] for key in hashes]
    machine = _machine(entries)
    size = sum(len(c) if isinstance(c, bytes) else c.size for c in found.members.values())
    hardware = {_dumped(_hardware(entry, machine, arch)) for entry in entries}
    # One for all: a label may be too short for a list.
    together = hashlib.sha256("".join(hashes).encode()).hexdigest()
    labels = {
        f"cache.{layout}.image/entry-count": str(len(entries)),
        f"cache.{layout}.image/summary": f'{{"targets":[{",".join(sorted(hardware))}]}}',
        f"cache.{layout}.image/cache-size-bytes": str(size),
        "io.kserve.km/cache-hash": together,
        **{f"io.kserve.km/{name}": value for name, value in _MOUNTED.items()},
    }
    # An extractor that knows only vLLM's caches would read a list of ours as one of vLLM's.
    listed = {layout: [_described(entry) for entry in entries] if layout == "stitchcache" else []}
    members = {f"io.{layout}.cache/{name}": content for name, content in found.members.items()}
    members[f"io.{layout}.manifest/manifest.json"] = _dumped(listed).encode()
    # A clock may have been wrong, and tar has room for eleven octal digits.
    newest = min(max(0, *(int(entry.created) for entry in entries)), 2**33 - 1)
    created = datetime.fromtimestamp(newest, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    config = {"architecture": machine, "os": "linux", "created": created, "config": {"Labels": labels}}
    with replacing(path) as place:
        digest, packed = _write(cache, place, members, newest, config)
    return Image(digest=digest, labels=labels, entries=hashes, bytes=packed)


def _write(
    cache: Cache, place: str, members: Mapping[str, bytes | BlobRef], modified: int, config: dict[str, Any]
) -> tuple[str, int]:
    """Write layer, config, manifest and index; the manifest's digest, and the layer's size."""
    blobs, content = os.path.join(place, "blobs", "sha256"), hashlib.sha256()
    os.makedirs(blobs)
    layer = os.path.join(blobs, "layer")
    with open(layer, "wb") as file, gzip.GzipFile("", "wb", 6, file, 0) as stream:

        def put(data: bytes) -> None:
            content.update(data)
            stream.write(data)

        # Directories too: runtimes would make those that are missing, with modes of their own.
        parts = [name.split("/") for name in members]
        above = {"/".join(each[:count]) + "/" for each in parts for count in range(1, len(each))}
        for name in sorted({*members, *above}):
            if name in above:
                put(header(name, 0, modified))
            else:
                put_member(put, cache, name, members[name], modified)
        put(bytes(2 * BLOCK))

    def placed(kind: str, path: str) -> dict[str, Any]:
        with open(path, "rb") as file:
            digest, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
        os.rename(path, os.path.join(blobs, digest))
        return {"mediaType": f"{_OCI}.{kind}", "digest": f"sha256:{digest}", "size": size}

    def written(name: str, said: Any) -> str:
        with open(os.path.join(place, name), "w", encoding="utf-8") as file:
            file.write(_dumped(said))
        return file.name

    layers = [placed("layer.v1.tar+gzip", layer)]
    config = {**config, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{content.hexdigest()}"]}}
    kind, described = "manifest.v1+json", placed("config.v1+json", written("config", config))
    manifest = {"schemaVersion": 2, "mediaType": f"{_OCI}.{kind}", "config": described, "layers": layers}
    named = placed(kind, written("manifest", manifest))
    written("oci-layout", {"imageLayoutVersion": "1.0.0"})
    written("index.json", {"schemaVersion": 2, "manifests": [named]})
    return named["digest"], layers[0]["size"]


def _dumped(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _factor(entry: Artifact, name: str) -> str:
    return next((factor.value for factor in entry.factors if factor.name == name), "")


def _machine(entries: Iterable[Artifact]) -> str:
    """The one platform that all entries are for, as images name it."""
    found = {_factor(entry, "env.platform") for entry in entries} - {""}
    if len(found) > 1:
        said = f"the entries are for {len(found)} platforms ({', '.join(sorted(found))}): choose those of one"
        raise OptionError(f"{said}, by graph hash, label or age.", option="graph_hashes")
    name = [*(found.pop() if found else "").split()[1:2], os.uname().machine][0]
    return _MACHINES.get(name, name)


def _hardware(entry: Artifact, machine: str, arch: str | None) -> dict[str, Any]:
    """What GKM compares of a GPU: backend, architecture and warp size, and no more."""
    gpu = _factor(entry, "env.gpu")
    if not gpu:
        return {"backend": "cpu", "arch": machine, "warp_size": 1}
    if gpu.startswith("gfx"):
        name = arch or gpu.split()[0].partition(":")[0]
        return {"backend": "hip", "arch": name, "warp_size": 64 if name.startswith("gfx9") else 32}
    known = [f"sm_{_CARDS[word]}" for word in re.split(r"[ _-]", gpu) if word in _CARDS]
    if not arch and not known:
        said = f"what architecture {gpu!r} has is not known here: say it, such as 'sm_90'."
        raise OptionError(f"arch: {said}", option="arch")
    return {"backend": "cuda", "arch": arch or known[0], "warp_size": 32}


def _described(entry: Artifact) -> dict[str, Any]:
    """What tells, without unpacking, where an entry will hit."""
    factors = {f.name: f.value for f in entry.factors if f.name.startswith("env.")}
    return {"graph_hash": entry.graph_hash, "label": entry.label, "factors": factors}


def push_image(path: str | os.PathLike[str], reference: str, *, insecure: bool = False) -> str:
    """Copy an image that :func:`build_image` made to a registry, logged in as docker is.

    Args:
        path: The directory.
        reference: Where to, such as ``registry.example.com/team/ranker-cache:1.4``.
        insecure: The registry has no TLS.

    Returns:
        The reference by digest, which manifests should name.

    Raises:
        StoreWriteError: The registry does not take it; its words are in the message.
    """
    # A tag stands behind the last slash; what stands before may name a port.
    parent, slash, name = reference.partition("@")[0].rpartition("/")
    repository, tag = parent + slash + name.partition(":")[0], name.partition(":")[2] or "latest"
    blobs = Path(path, "blobs", "sha256")
    try:
        registry = Registry(f"oci://{repository}", insecure)
        (named,) = json.loads(Path(path, "index.json").read_bytes())["manifests"]
        manifest = (blobs / named["digest"].removeprefix("sha256:")).read_bytes()
        said = json.loads(manifest)
        for part in (said["config"], *said["layers"]):
            registry.upload(part["digest"], blobs / part["digest"].removeprefix("sha256:"))
        registry.put_manifest(tag, manifest)
    except (OSError, ValueError, LookupError, TypeError, HTTPException) as error:
        message = f"{reference}: the image was not pushed: {error}. 'docker login' logs in."
        raise StoreWriteError(message, path=reference, reason=str(error)) from error
    return f"{repository}@{named['digest']}"
