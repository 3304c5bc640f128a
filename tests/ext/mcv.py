"""How GKM's MCV extracts a cache image, step by step: what it looks at, what it skips, what it checks.

After docs/spec-compat.md and pkg/cache of redhat-et/GKM. ``known`` is what a release of it knows: another
type in the labels is an error.
"""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from pathlib import Path

COMPAT = ("application/vnd.docker.image.rootfs.diff.tar.gzip", "application/vnd.oci.image.layer.v1.tar+gzip")
RELEASED = ("triton", "vllm")


def blob(image: Path, digest: str) -> Path:
    """Of an OCI layout, or of what ``skopeo copy docker://... dir:`` leaves."""
    name = digest.removeprefix("sha256:")
    return image / name if (image / "manifest.json").exists() else image / "blobs" / "sha256" / name


def manifest_of(image: Path) -> dict:
    if (image / "manifest.json").exists():
        return json.loads((image / "manifest.json").read_text())
    (described,) = json.loads((image / "index.json").read_text())["manifests"]
    return json.loads(blob(image, described["digest"]).read_bytes())


def extract(image: Path, cache: Path, manifests: Path, known=(*RELEASED, "stitchcache")) -> str:
    """Extract a pulled image; its cache type."""
    manifest = manifest_of(image)
    config = json.loads(blob(image, manifest["config"]["digest"]).read_bytes())
    labels = config["config"]["Labels"]
    kind = next((each for each in known if f"cache.{each}.image/summary" in labels), None)
    if kind is None:
        raise ValueError("unknown cache type from labels")
    layers = [layer for layer in manifest["layers"] if layer["mediaType"] in COMPAT]
    if not layers:
        raise ValueError("no compat layers found")
    size = sum(_layer(blob(image, layer["digest"]), kind, cache, manifests) for layer in layers)
    if size != int(labels[f"cache.{kind}.image/cache-size-bytes"]):
        raise ValueError(f"cache size mismatch: extracted {size} bytes")
    return kind


def _layer(layer: Path, kind: str, cache: Path, manifests: Path) -> int:
    size, in_cache, in_manifest = 0, f"io.{kind}.cache", f"io.{kind}.manifest/"
    with gzip.open(layer) as plain, tarfile.open(fileobj=plain) as tar:
        for member in tar:
            # Its reader leaves the slash on the names of directories.
            name = member.name + "/" * member.isdir()
            if name.startswith(in_cache):
                path = cache / name.removeprefix(in_cache).lstrip("/")
            elif name.startswith(f"{in_manifest}manifest.json"):
                path = manifests / name.removeprefix(in_manifest)
            else:
                continue
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            if member.isdir():
                path.mkdir(mode=member.mode, exist_ok=True)
            elif member.isreg():
                path.write_bytes(tar.extractfile(member).read())
                os.chmod(path, member.mode)
                size += member.size if name.startswith(in_cache) else 0
    return size
