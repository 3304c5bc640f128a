"""A registry as a remote: Debian's docker-registry, with and without a login."""

from __future__ import annotations

import base64
import email.message
import io
import json
import os
import time
from urllib.request import Request, urlopen

import pytest
from registry_server import Front, serving
from stores import key, put, read_back, target
from test_tier import fetched

from stitchcache.cache import Cache
from stitchcache.errors import OptionError, StoreError
from stitchcache.ext.export import pull, push
from stitchcache.remote import Remote, prune


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(autouse=True)
def _plain(monkeypatch, tmp_path):
    monkeypatch.setenv("OCI_ALLOW_HTTP", "true")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("STITCHCACHE_REMOTE_WAIT", "20")


@pytest.fixture
def oci(registry, request) -> str:
    return f"oci://{registry}/team/{abs(hash(request.node.name))}"


def filled(cache: Cache) -> Cache:
    put(cache, "a", [os.urandom(300_000), b"two"], label="ranker")
    cache.put_target(key("t"), target(key("a")))
    return cache


def test_nodes_share_over_it_with_as_many_requests_as_of_a_bucket(node, oci, keys):
    made = read_back(filled(node(oci)), key("a"))
    other = node(oci)
    assert fetched(other) == made
    assert other.tier.remote.requests == 2 + 2
    assert other.verify().clean


def test_pieces_travel_and_nobody_waits_for_a_lease(node, oci, keys):
    one, other = node(oci), node(oci)
    ref = one.put_blob(b"compiled")
    one.put_piece(key("p"), "aoti", ref)
    other.tier.pieces(other, [key("p"), key("q")])
    assert other.get_piece(key("p")).blob == ref
    with (
        one.tier.share(one, [key("q")], bool, lambda: None),
        other.tier.share(other, [key("q")], bool, lambda: None) as batches,
    ):
        assert list(batches) == [[key("q")]]


def test_a_tag_names_all_that_it_needs_so_the_registry_keeps_it(node, oci, registry, keys):
    filled(node(oci))
    where = (
        f"http://{registry}/v2/{oci.partition('/team')[2].join(['team', ''])}/manifests/entries-{key('a')}"
    )
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = json.load(urlopen(Request(where, headers={"Accept": kind})))
    assert len(manifest["layers"]) == 3
    assert base64.b64decode(manifest["layers"][0]["data"]).startswith(b"STITCH")


def test_push_and_pull_go_over_it(node, oci, keys, tmp_path):
    made = read_back(filled(node("", "builder")), key("a"))
    builder = node(oci, "builder")
    assert push(builder) == {key("a"): True}
    assert push(builder) == {key("a"): False}
    other = node(oci)
    assert pull(other, label="rank*") == {key("a"): True}
    assert read_back(other, key("a")) == made
    assert other.get_target(key("t"))


def test_what_a_stranger_signed_or_changed_is_refused_and_replaced(
    node, oci, keys, monkeypatch, tmp_path, caplog
):
    filled(node(oci))
    stranger = Remote(oci, lambda *_: None)
    for content in (b"", b"junk" * 100, os.urandom(2 << 20)):
        stranger.now(stranger.write, f"targets/{key('t')[:2]}/{key('t')}", content, replace=True)
        caplog.clear()
        cache = node(oci)
        assert fetched(cache) is None
        assert sum(f"targets/{key('t')[:2]}" in r.getMessage() for r in caplog.records) == 1
    cache.put_target(key("t"), target(key("a")))
    assert fetched(node(oci)) is not None


@pytest.mark.parametrize(
    "junk", [b"[]", b"{}", b'{"layers": []}', b'{"layers": [1]}', b"[" * 200_000, b"\xff"]
)
def test_a_manifest_of_anybody_is_a_failure_and_no_more(node, junk, keys, monkeypatch):
    from stitchcache.remote import oci as module

    monkeypatch.setattr(module.Registry, "_ask", lambda self, *_, **__: io.BytesIO(junk))
    cache = node("oci://registry.example.com/x")
    assert cache.tier.entry(cache, key("a")) is None
    assert cache.counted()["remote.failed"] == 1


@pytest.mark.parametrize(
    "junk", [b"[]", b"{}", b'{"tags": 5}', b'{"tags": [1, {}, "entries-x"]}', b"[" * 200_000]
)
def test_tags_of_anybody_name_nothing(junk, monkeypatch):
    from stitchcache.remote import oci as module

    class Answer(io.BytesIO):
        headers = email.message.Message()

    monkeypatch.setattr(module.Registry, "_ask", lambda self, *_, **__: Answer(junk))
    remote = Remote("oci://registry.example.com/x", lambda *_: None)
    try:
        assert remote.now(remote.listed, "entries") == []
    except StoreError:
        assert junk.startswith(b"[")


def test_pages_of_tags_that_lead_in_a_circle_end(monkeypatch):
    from stitchcache.remote import oci as module

    class Answer(io.BytesIO):
        headers = {"Link": '<tags/list?n=1000>; rel="next"'}

    page = json.dumps({"tags": [f"entries-{key('a')}"]}).encode()
    monkeypatch.setattr(module.Registry, "_ask", lambda self, *_, **__: Answer(page))
    remote = Remote("oci://registry.example.com/x", lambda *_: None)
    assert len(remote.now(remote.listed, "entries")) == 1


@pytest.mark.parametrize("where", ["file:///etc/hostname", "http://127.0.0.1:9/token", "ftp://x/y"])
def test_a_login_does_not_lead_to_files_nor_away_from_tls(where):
    from stitchcache.remote import oci as module

    registry = module.Registry("oci://registry.example.com/x", False)
    with pytest.raises(ValueError, match="which is not asked"):
        registry._log_in(f'Bearer realm="{where}",service="x"')


def test_a_repository_that_cannot_be_written_is_told(node, registry, keys, monkeypatch):
    from stitchcache.remote.oci import Registry

    ask = Registry._ask

    def no_uploads(self, method, path, *args, **how):
        if method == "POST":
            raise FileNotFoundError(path)
        return ask(self, method, path, *args, **how)

    monkeypatch.setattr(Registry, "_ask", no_uploads)
    cache = filled(node("", "builder"))
    cache.remote = f"oci://{registry}/team/none"
    assert "blobs/uploads" in push(cache)[key("a")]


@pytest.mark.parametrize("kind", ["Basic", "Bearer"])
def test_it_logs_in_as_docker_does_and_tells_no_bucket(node, registry, kind, keys, tmp_path):
    front = Front(registry, kind)
    url = f"oci://{front.address}/team/{kind.lower()}"
    nobody = node(url)
    assert fetched(nobody) is None
    assert "401" in nobody.tier.remote.reason
    config = {"auths": {front.address: {"auth": base64.b64encode(b"user:secret").decode()}}}
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text(json.dumps(config))
    made = read_back(filled(node(url)), key("a"))
    assert fetched(node(url)) == made
    assert front.sent_on
    assert set(front.sent_on) == {None}
    front.shutdown()


def test_a_helper_of_dockers_is_asked(node, registry, keys, tmp_path, monkeypatch):
    front = Front(registry, "Basic")
    tool = tmp_path / "bin" / "docker-credential-ours"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nread host\necho \'{"Username": "user", "Secret": "secret"}\'\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"credHelpers": {front.address: "ours"}}))
    filled(node(f"oci://{front.address}/team/helped"))
    assert fetched(node(f"oci://{front.address}/team/helped")) is not None
    front.shutdown()


def test_a_registry_that_is_gone_or_misnamed_costs_a_start_nothing(node, keys, monkeypatch):
    monkeypatch.setenv("STITCHCACHE_REMOTE_WAIT", "1")
    began = time.monotonic()
    cache = node("oci://127.0.0.1:9/team/x")
    assert fetched(cache) is None
    assert time.monotonic() - began < 2.5
    cache = node("oci://registry.example.com/Team")
    assert fetched(cache) is None
    assert "small letters" in cache.tier.remote.broken


def test_a_registry_is_not_pruned(node, oci):
    with pytest.raises(OptionError, match="its own rules"), prune.planned(node(oci).tier, dry_run=True):
        pass


def test_a_blob_that_the_registry_collected_stops_the_tag(node, oci, keys, monkeypatch):
    """Where a blob is gone between the look for it and the tag, there is no tag that lacks it."""
    from stitchcache.remote.oci import Registry

    monkeypatch.setattr(Registry, "_has", lambda self, path: "blobs" in path)
    cache = node("", "builder")
    filled(cache)
    cache.remote = oci
    assert "MANIFEST" in push(cache)[key("a")]
    monkeypatch.undo()
