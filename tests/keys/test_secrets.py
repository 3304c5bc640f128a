"""What a cache tells of its builder: no secrets, no user, host, home or paths."""

from __future__ import annotations

import getpass
import os
import socket
import tempfile
from pathlib import Path

import pytest
import torch

import stitchcache
from stitchcache.encoding import is_telling
from stitchcache.keys.model import readable

TOKEN = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm"


class Net(torch.nn.Module):
    def __init__(self, token=TOKEN):
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)
        self.api_token, self.note = token, token
        self.where = "/home/alice/models/llama"
        self.password = "hunter2"
        self.activation = "gelu"

    def forward(self, x):
        return self.inner(x).relu()


def start(cache, model, secret, backend="eager"):
    factors = {"tenant": stitchcache.Secret(secret), "release": "spring"}
    return stitchcache.compile(
        model, (torch.ones(2, 3),), backend=backend, cache=cache, key_factors=factors, check="none"
    )


def everything(root: Path) -> bytes:
    return b"".join(path.read_bytes() + str(path).encode() for path in root.rglob("*") if path.is_file())


def test_secrets_count_in_keys_and_stand_in_no_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCHINDUCTOR_STITCHCACHE_TEST", "/home/alice/settings")
    cache = stitchcache.Cache(tmp_path / "cache")
    first = start(cache, Net().eval(), "tenant-secret-1")
    assert start(cache, Net().eval(), "tenant-secret-1").cache_hit == "direct"
    assert start(cache, Net().eval(), "tenant-secret-2").cache_hit is None
    assert start(cache, Net("hf_" + "x" * 26).eval(), "tenant-secret-1").cache_hit != "direct"
    data = everything(tmp_path / "cache")
    for secret in (TOKEN, "tenant-secret", "hunter2", "alice", "/home/"):
        assert secret.encode() not in data, secret
        assert secret not in caplog.text
        assert secret not in repr(first.artifact) + str(first.explain())
    shown = {factor.name: factor.value for factor in first.explain().factors}
    assert shown["user.tenant"] == "Secret"
    assert shown["user.release"] == "'spring'"
    assert any(name.endswith(".activation") and value == "'gelu'" for name, value in shown.items())
    assert repr(stitchcache.Secret("x")) == "Secret()"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pad_token", "x"), ("AUTH", "x"), ("user_password", "x"), ("x", "/home/me"), ("x", "~/m"),
        ("x", "https://me:pw@host/"), ("x", "sk-abcdefghijklmnopqrstuvwx"), ("x", "-----BEGIN KEY-----"),
        ("x", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc"),
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_or_a_path_is_not_shown(name, text):
    assert not is_telling(name, text)
    assert readable(text, name) == f"str of {len(text)} (not shown)"


@pytest.mark.parametrize(
    "text", ["gelu", "sentence-transformers/all-MiniLM-L6-v2", "layers.0", "sdpa", "float32", ""]
)
def test_what_explains_a_miss_is_shown(text):
    assert readable(text, "hidden_act") == repr(text)


@pytest.mark.compile
def test_a_library_does_not_say_where_and_by_whom_it_was_built(tmp_path):
    home = tmp_path / "home-of-somebody"
    home.mkdir(mode=0o700)
    cache = stitchcache.Cache(home / "cache")
    start(cache, Net().eval(), "s", backend="aoti")
    blobs = b"".join(path.read_bytes() for path in (home / "cache" / "blobs").rglob("*") if path.is_file())
    assert len(blobs) > 10_000
    telling = [str(home), os.environ.get("TORCHINDUCTOR_CACHE_DIR"), str(Path(torch.__file__).parent)]
    telling += [
        f"{socket.gethostname()}.",
        f"torchinductor_{getpass.getuser()}",
        ".scratch",
        f"{tempfile.gettempdir()}/",
    ]
    for text in telling:
        assert text is None or text.encode() not in blobs, text
