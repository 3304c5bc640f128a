"""A registry as a remote, over the distribution API: each entry, piece and target is a tag.

A tag's manifest lists its file and the blobs that the file names. So a registry keeps what a tag needs and
takes no tag whose blobs are gone, and its own rules for tags are all the pruning there is. A small file also
stands in the manifest itself: a start asks a registry for no more than a bucket. A registry cannot create a
tag only if there is none, so nodes have no leases.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import Request, urlopen

from stitchcache.artifact.entry import CURRENT_SUFFIX, decode_header, decode_piece
from stitchcache.store import KEYED, Area, keyed_path
from stitchcache.types import BlobRef

_SECONDS = 30.0
# Registries take manifests of 4 MiB.
_MOST_BYTES, _MOST_INLINE = 8 << 20, 1 << 20
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_ANY = "application/octet-stream"


class Registry:
    """A repository, such as ``oci://registry.example.com/team/cache``, with the verbs of obstore."""

    exceptions = SimpleNamespace(AlreadyExistsError=FileExistsError, BaseError=HTTPException)

    def __init__(self, url: str, plain: bool) -> None:
        self._host, _, repository = url.removeprefix("oci://").partition("/")
        if not re.fullmatch(r"[a-z0-9]+([._/-]+[a-z0-9]+)*", repository):
            raise ValueError(f"{url}: write oci://HOST/NAME; a name has small letters, digits and . _ - /")
        self._base, self._login = f"http{'' if plain else 's'}://{self._host}/v2/{repository}/", ""

    def get(self, name: str) -> Any:
        """An object, to be streamed."""
        path = _path(name)
        content: Any = self._ask("GET", path, Accept=_MANIFEST)
        if not path.startswith("blobs/"):
            try:
                layer = _read(content)["layers"][0]
                inline = BytesIO(base64.b64decode(layer["data"])) if "data" in layer else None
                content = inline or self._ask("GET", f"blobs/{layer['digest']}")
            except (LookupError, TypeError) as error:
                raise ValueError(f"{path}: no manifest of stitchcache's: {error!r}") from error
        return SimpleNamespace(stream=lambda min_chunk_size: iter(partial(content.read, min_chunk_size), b""))

    def head(self, name: str) -> dict[str, Any]:
        """An object's size, and that it was put now: no tag is taken whose blobs are gone."""
        with self._ask("HEAD", _path(name), Accept=_MANIFEST) as answer:
            return {"size": int(answer.headers["Content-Length"] or -1), "last_modified": datetime.now(UTC)}

    def put(self, name: str, source: bytes | Path, *, mode: str) -> None:
        """Store an object. Where two nodes create one at the same moment, the last one's stays."""
        kind, _, place = _path(name).partition("/")
        if kind == "blobs":
            self.upload(place, source)
            return
        if mode == "create" and self._has(f"manifests/{place}"):
            raise FileExistsError(name)
        data = source if isinstance(source, bytes) else source.read_bytes()
        blobs: tuple[BlobRef, ...] = ()
        if name.startswith(Area.ENTRIES):
            blobs = decode_header(data, len(data)).blobs
        elif name.startswith(Area.PIECES):
            blobs = (decode_piece(data, name.rpartition("/")[2]).blob,)
        own = _file(hashlib.sha256(data).hexdigest(), len(data))
        self.upload(own["digest"], data)
        inline = {"data": base64.b64encode(data).decode()} if len(data) <= _MOST_INLINE else {}
        layers = [{**own, **inline}, *(_file(blob.digest, blob.size) for blob in blobs)]
        said = {"schemaVersion": 2, "mediaType": _MANIFEST, "config": own, "layers": layers}
        self.put_manifest(place, json.dumps(said).encode())

    def list(self, prefix: str) -> Iterator[list[dict[str, Any]]]:
        """Names of objects, without the blobs; a registry tells no sizes."""
        path, asked = "tags/list?n=1000", set[str]()
        # A page that leads back to an earlier one is the last.
        while path and path not in asked:
            asked.add(path)
            answer = self._ask("GET", path)
            following = re.match(r'<([^>]*)>; *rel="?next', answer.headers["Link"] or "")
            # Whatever else stands there is passed over.
            found = re.findall(r"'([a-z]+)-([0-9a-f]{64})'", str(_read(answer).get("tags")))
            areas = [(Area(at), key) for at, key in found if at in KEYED and at.startswith(prefix)]
            yield [{"path": keyed_path("", area, key)[1:], "size": 0} for area, key in areas]
            path = following[1] if following else ""

    def upload(self, digest: str, source: bytes | Path) -> None:
        """Upload a blob, unless it is there."""
        if self._has(f"blobs/{digest}"):
            return
        with self._ask("POST", "blobs/uploads/", b"") as answer:
            place = urljoin(self._base, answer.headers["Location"] or "")
        place += f"{'&' if '?' in place else '?'}digest={digest}"
        with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            size = str(file.seek(0, os.SEEK_END))
            file.seek(0)
            self._ask("PUT", place, file, **{"Content-Type": _ANY, "Content-Length": size}).close()

    def put_manifest(self, tag: str, data: bytes) -> None:
        """Let a tag name a manifest whose blobs are there."""
        self._ask("PUT", f"manifests/{tag}", data, **{"Content-Type": _MANIFEST}).close()

    def _has(self, path: str) -> bool:
        try:
            self._ask("HEAD", path, Accept=_MANIFEST).close()
        except FileNotFoundError:
            return False
        return True

    def _ask(self, method: str, path: str, data: Any = None, **headers: str) -> Any:
        url, refused = urljoin(self._base, path), False
        while True:
            request = Request(url, data, headers, method=method)
            if self._login and urlsplit(url).netloc == self._host:
                # Not to a bucket that the answer may lead to.
                request.add_unredirected_header("Authorization", self._login)
            try:
                return self._open(request)
            except HTTPError as error:
                with error:
                    if error.code == 404:
                        raise FileNotFoundError(url) from error
                    if error.code != 401 or refused:
                        raise OSError(f"{error}: {error.read(300).decode('utf-8', 'replace')}") from error
                    self._log_in(error.headers["WWW-Authenticate"] or "")
                    refused = True

    def _open(self, request: Request) -> Any:
        # An answer may lead to a file of this machine, or away from TLS.
        if not request.full_url.startswith(("https://", self._base[:7])):
            raise ValueError(f"{self._host} leads to {request.full_url}, which is not asked")
        return urlopen(request, timeout=_SECONDS)

    def _log_in(self, challenge: str) -> None:
        """As the registry asks for it: with a token, or with what 'docker login' has left."""
        basic = _credentials(self._host)
        said = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        if "realm" in said and challenge.lower().startswith("bearer"):
            query = urlencode({name: said[name] for name in ("service", "scope") if name in said})
            request = Request(f"{said['realm']}?{query}", headers={"Authorization": basic} if basic else {})
            found = _read(self._open(request))
            self._login = f"Bearer {found.get('token') or found.get('access_token')}"
        else:
            self._login = basic


def _credentials(host: str) -> str:
    """What docker's or podman's configuration has for a registry; empty where it has nothing."""
    directory = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    try:
        path = os.environ.get("REGISTRY_AUTH_FILE") or f"{directory}/config.json"
        config = json.loads(Path(path).read_bytes())
        if tool := config.get("credHelpers", {}).get(host) or config.get("credsStore"):
            command = [f"docker-credential-{tool}", "get"]
            done = subprocess.run(command, input=host.encode(), capture_output=True, check=True)
            found = json.loads(done.stdout)
            auth = base64.b64encode(f"{found['Username']}:{found['Secret']}".encode()).decode()
        else:
            auth = config["auths"][host]["auth"]
        return f"Basic {auth}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, subprocess.CalledProcessError):
        return ""


def _read(answer: Any) -> dict[str, Any]:
    with answer:
        try:
            found = json.loads(answer.read(_MOST_BYTES))
        except RecursionError as error:
            raise ValueError(str(error)) from error
    if not isinstance(found, dict):
        raise ValueError("an answer is JSON, and no object")
    return found


def _path(name: str) -> str:
    area, _, rest = name.partition("/")
    key = rest.rpartition("/")[2].removesuffix(CURRENT_SUFFIX)
    return f"blobs/sha256:{key}" if area == Area.BLOBS else f"manifests/{area}-{key}"


def _file(digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": "application/vnd.stitchcache.file", "digest": f"sha256:{digest}", "size": size}
