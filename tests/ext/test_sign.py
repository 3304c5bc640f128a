"""Signatures: what they are over, who may make them, and what an attacker does with good ones."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
sys.path.insert(0, str(Path(__file__).parent.parent / "store"))

from signing import entry_path, new_keys, open_to_others, public, write_signed
from stores import artifact, key, put, read_back, target

from stitchcache.artifact.entry import (
    OUTSIDE,
    Kind,
    decode_signed,
    encode_target,
    signature_in,
    with_signature,
)
from stitchcache.cache import Cache
from stitchcache.errors import EntryFormatError, OptionError, StoreWriteError, UntrustedEntryError
from stitchcache.ext.sign import Keys
from stitchcache.store.openssh import Signature, read_signature, read_signers

ENTRY = ("entry", "ab" * 32, "cd" * 32)
SSH_KEYGEN = shutil.which("ssh-keygen")
needs_ssh = pytest.mark.skipif(SSH_KEYGEN is None, reason="needs ssh-keygen")


@pytest.fixture(autouse=True)
def _umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def keys(tmp_path, monkeypatch):
    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "keys"))
    return new_keys(tmp_path / "keys")


@pytest.fixture
def cache(keys, tmp_path):
    """A cache whose files anybody in the group can write: only signatures count."""
    made = put(Cache(tmp_path / "c"), "a", [b"one", b"two"])
    Cache(tmp_path / "c").put_target(key("t"), target(made.graph_hash))
    open_to_others(tmp_path / "c")
    return Cache(tmp_path / "c", trust="signed")


def refused(cache, name="a"):
    with pytest.raises(UntrustedEntryError) as caught:
        cache.get(key(name))
    assert caught.value.path
    return caught.value.message


def said(**changes):
    now = int(time.time())
    return {
        "version": 1, "kind": "entry", "key": "ab" * 32, "digest": "cd" * 32, "signer": "ci@example.com",
        "created": now, "expires": now + 1000, **changes,
    }  # fmt: skip


# -- what users do ---------------------------------------------------------------------------------


def test_what_is_stored_is_signed_where_a_key_is_configured_and_served_whoever_owns_it(cache):
    assert read_back(cache, key("a")) == [b"one", b"two"]
    assert cache.get_target(key("t")) == (target(key("a")),)
    with pytest.raises(UntrustedEntryError, match="others can write"):
        Cache(cache.root, trust="owner").get(key("a"))


def test_blobs_that_others_can_write_are_copied_before_they_are_loaded(cache):
    found = cache.get(key("a"))
    path = cache.blob_path(found.blobs[0])
    assert cache.root not in path.parents
    assert path.read_bytes() == b"one"
    (cache.root / "blobs" / found.blobs[1].digest[:2] / found.blobs[1].digest).write_bytes(b"owt")
    assert cache.blob_path(found.blobs[1]) is None


def test_pieces_are_not_copied_to_where_others_could_exchange_them(cache, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with pytest.raises(UntrustedEntryError, match="TMPDIR"):
        cache.blob_path(cache.get(key("a")).blobs[0])


def test_without_a_key_a_signed_cache_says_what_it_will_refuse(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "none"))
    put(Cache(tmp_path / "c", trust="signed"), "a", [b"one"])
    assert "keys generate" in caplog.text
    assert "signature is missing" in refused(Cache(tmp_path / "c", trust="signed"))
    assert Cache(tmp_path / "c", trust="any").get(key("a")) is not None
    assert Cache(tmp_path / "c").get(key("a")) is not None


def test_trust_can_be_of_each_root_and_comes_from_the_environment(cache, tmp_path, monkeypatch):
    roots = [tmp_path / "upper", cache.root]
    assert Cache(roots, trust=["owner", "signed"]).get(key("a")) is not None
    monkeypatch.setenv("STITCHCACHE_TRUST", "owner:signed")
    assert Cache(roots).get(key("a")) is not None
    for bad in ("own", "owner:signed:any", ""):
        with pytest.raises(OptionError, match="trust="):
            Cache(roots, trust=bad)


def test_a_record_of_a_signed_layer_stays_from_outside_when_it_is_copied_up(cache, keys, tmp_path):
    both = Cache([tmp_path / "upper", cache.root], trust=["owner", "signed"])
    other = target(key("a"))
    both.put_target(key("t"), type(other)(graph_hash=key("a"), sources=(), label="other"))
    data = (tmp_path / "upper" / "targets" / key("t")[:2] / key("t")).read_bytes()
    marks = [signature.startswith(OUTSIDE) for _, signature in decode_signed(data, key("t"))]
    assert marks == [False, True]
    keys.revoke(public(keys))
    assert [record.label for record in Cache(tmp_path / "upper").get_target(key("t"))] == ["other"]


def test_under_owner_nothing_of_signatures_is_imported(keys, tmp_path, fresh_process):
    put(Cache(tmp_path / "c"), "a", [b"one"])
    found = fresh_process(
        f"""
        import json, sys
        from stitchcache.cache import Cache
        cache = Cache({str(tmp_path / "c")!r})
        assert cache.get({key("a")!r}) is not None
        print(json.dumps([name for name in sys.modules if "ext." in name or "cryptography" in name]))
        """
    )
    assert found == []


def test_the_second_start_of_a_user_needs_no_cryptography(cache, fresh_process):
    source = f"""
        import json, sys
        from stitchcache.cache import Cache
        assert Cache({str(cache.root)!r}, trust="signed").get({key("a")!r}) is not None
        print(json.dumps(["cryptography" in sys.modules]))
        """
    assert [fresh_process(source) for _ in range(2)] == [[True], [False]]


# -- with OpenSSH ----------------------------------------------------------------------------------


def ssh_verify(tmp_path, keys, data, *more, namespace="stitchcache", name="ci@example.com"):
    text, _, block = data.decode().partition("-----BEGIN")
    (tmp_path / "s.sig").write_text("-----BEGIN" + block)
    command = ["-Y", "verify", "-f", keys.path("allowed_signers"), "-I", name, "-n", namespace]
    return subprocess.run(
        [SSH_KEYGEN, *command, "-s", tmp_path / "s.sig", *more], input=text.encode(), capture_output=True
    )


@needs_ssh
def test_ssh_keygen_verifies_what_we_sign_and_refuses_what_we_refuse(cache, keys, tmp_path):
    data = signature_in(entry_path(cache, key("a")).read_bytes())
    good = ssh_verify(tmp_path, keys, data)
    assert good.returncode == 0, good.stderr
    assert b'Good "stitchcache" signature for ci@example.com' in good.stdout
    assert ssh_verify(tmp_path, keys, data, namespace="file").returncode != 0
    assert ssh_verify(tmp_path, keys, data.replace(b'"version":1', b'"version":2')).returncode != 0
    keys.revoke(public(keys))
    assert ssh_verify(tmp_path, keys, data, "-r", keys.path("revoked_keys")).returncode != 0


@needs_ssh
def test_keys_of_ssh_keygen_sign_here_and_its_signatures_are_taken(tmp_path):
    directory = tmp_path / "keys"
    directory.mkdir(mode=0o700)
    make = ["-q", "-t", "ed25519", "-N", "", "-C", "release@example.com", "-f", directory / "id"]
    subprocess.run([SSH_KEYGEN, *make], check=True)
    keys = Keys(str(directory))
    line = (directory / "id.pub").read_text().split()
    (directory / "allowed_signers").write_text(f'*@example.com namespaces="stitch*" {line[0]} {line[1]}\n')
    found = keys.verify(keys.sign(*ENTRY), *ENTRY, path="p")
    assert found.signer == "release@example.com"
    (tmp_path / "text").write_bytes(read_signature(keys.sign(*ENTRY)).text.encode())
    sign = ["-Y", "sign", "-f", directory / "id", "-n", "stitchcache", tmp_path / "text"]
    subprocess.run([SSH_KEYGEN, *sign], check=True, capture_output=True)
    theirs = (tmp_path / "text").read_bytes() + (tmp_path / "text.sig").read_bytes()
    assert keys.verify(theirs, *ENTRY, path="p") is not None


@needs_ssh
@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_keys_of_other_kinds_cannot_sign(tmp_path, kind):
    directory = tmp_path / "keys"
    directory.mkdir(mode=0o700)
    subprocess.run([SSH_KEYGEN, "-q", "-t", kind, "-N", "", "-f", directory / "id"], check=True)
    with pytest.raises(OptionError, match="ed25519"):
        Keys(str(directory)).sign(*ENTRY)
    with pytest.raises(EntryFormatError, match="Ed25519"):
        public(Keys(str(directory)))


# -- who may sign ----------------------------------------------------------------------------------


def test_lines_limit_names_namespaces_and_times(keys):
    (own,) = keys.signers()
    data = keys.sign(*ENTRY)
    encoded = Path(keys.path("id.pub")).read_text().split()[1]
    lines = {
        "ci@example.com": True, "*": True, "ci@*,!ci@example.com": False, "dev@example.com": False,
        "c?@example.com": True, '"ci@example.com"': True, "[c]i@example.com": False,
        'ci@example.com namespaces="stitchcache"': True, 'ci@example.com namespaces="git,file"': False,
        'ci@example.com namespaces="stitchcache/*"': False,
        'ci@example.com valid-after="20200101Z"': True, 'ci@example.com valid-after="20990101"': False,
        'ci@example.com valid-before="20990101Z"': True, 'ci@example.com valid-before="202001010000"': False,
    }  # fmt: skip
    for line, good in lines.items():
        with open(keys.path("allowed_signers"), "w") as file:
            file.write(f"# signers\n\n{line} ssh-ed25519 {encoded} a comment\n")
        try:
            keys.verify(data, *ENTRY, path="p")
            verdict = True
        except UntrustedEntryError as error:
            verdict, text = False, error.message
            assert "ci@example.com" in text
        assert verdict == good, line
    assert own.names == ("ci@example.com",)


@pytest.mark.parametrize(
    "line",
    ["name", "name cert-authority ssh-ed25519 AAAA", "name ssh-ed25519 AAAA", "name ssh-ed25519 !!!!",
     'name namespaces="" ssh-ed25519 KEY', 'name valid-after="soon" ssh-ed25519 KEY',
     'name valid-after="20200101",valid-after="20200101" ssh-ed25519 KEY', "name ssh-ed25519"],
)  # fmt: skip
def test_a_line_that_is_not_understood_lets_nobody_sign(keys, line):
    encoded = Path(keys.path("id.pub")).read_text().split()[1]
    with open(keys.path("allowed_signers"), "a") as file:
        file.write(line.replace("KEY", encoded) + "\n")
    with pytest.raises(UntrustedEntryError, match=r"allowed_signers:2: "):
        keys.verify(keys.sign(*ENTRY), *ENTRY, path="p")


def test_other_kinds_of_keys_in_the_file_are_passed_over():
    lines = "a ssh-rsa AAAAB3 c\nb ecdsa-sha2-nistp256 AAAA\nc sk-ssh-ed25519@openssh.com AAAA\n"
    assert read_signers(lines, "p") == []


def test_a_limit_cannot_smuggle_another_line_or_option(keys):
    for name in ("a b", "a\nb", '"a', "", "a,b", "*"):
        with pytest.raises(OptionError):
            keys.trust(public(keys), name, {})
    for value in ('x",valid-before="20990101', "x\ny * ssh-ed25519 AAAA"):
        with pytest.raises(OptionError):
            keys.trust(public(keys), "a", {"namespaces": value})


def test_a_comment_cannot_smuggle_another_signer(keys, tmp_path):
    """What only Python takes for a line break: OpenSSH sees one line, with a comment."""
    evil = new_keys(tmp_path / "evil", "evil@example.com")
    theirs = Path(evil.path("id.pub")).read_text().split()
    own = Path(keys.path("id.pub")).read_text().split()
    for mark in ("\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r"):
        line = f"ci@example.com {own[0]} {own[1]} build{mark}* {theirs[0]} {theirs[1]}\n"
        with open(keys.path("allowed_signers"), "w", encoding="utf-8", newline="") as file:
            file.write(line)
        for signer in (keys, evil):
            with pytest.raises(UntrustedEntryError, match=r"allowed_signers:1: .*cannot be seen"):
                keys.verify(signer.sign(*ENTRY), *ENTRY, path="p")
    with open(keys.path("allowed_signers"), "w", newline="") as file:
        file.write(f"ci@example.com\t{own[0]} {own[1]} build\r\n")
    assert keys.verify(keys.sign(*ENTRY), *ENTRY, path="p")


def test_revoked_keys_that_are_not_understood_let_nobody_sign_and_cost_no_entry(cache, keys):
    path = Path(keys.path("revoked_keys"))
    path.write_text("# revoked\nssh-rsa AAAAB3 old\n  \necdsa-sha2-nistp256 AAAA x\n")
    assert cache.get(key("a")) is not None
    for text in ("ssh-ed25519 AAAA\n", "SSHKRL\n\0", "a word\n"):
        path.write_text(text)
        assert "revoked_keys" in refused(Cache(cache.root, trust="signed"))
        assert Cache(cache.root, trust="signed").get_target(key("t")) == ()
    path.unlink()
    assert Cache(cache.root, trust="signed").get(key("a")) is not None
    assert Cache(cache.root, trust="signed").get_target(key("t"))


def test_no_key_is_put_where_others_can_exchange_it(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(StoreWriteError, match="mode 0777"):
        Keys(str(tmp_path / "open")).generate("ci@example.com")
    assert os.listdir(tmp_path / "open") == []


def test_a_fifo_in_place_of_a_list_is_not_waited_for(keys):
    data = keys.sign(*ENTRY)
    for name in ("allowed_signers", "revoked_keys"):
        os.rename(keys.path(name), keys.path("aside")) if os.path.exists(keys.path(name)) else None
        os.mkfifo(keys.path(name), 0o600)
    with pytest.raises(UntrustedEntryError):
        keys.verify(data, *ENTRY, path="p")


def test_a_time_that_is_none_is_an_error_of_ours(keys, tmp_path, monkeypatch, caplog):
    for text in ("soon", "-1", "9" * 5000, "1.5"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
        with pytest.raises(OptionError, match="SOURCE_DATE_EPOCH"):
            keys.sign(*ENTRY)
    put(Cache(tmp_path / "c"), "a", [b"one"])
    assert "stored unsigned" in caplog.text


# -- attacks ---------------------------------------------------------------------------------------


def test_a_good_signature_under_another_key_or_on_another_file_is_refused(cache, tmp_path):
    made = put(Cache(tmp_path / "c2"), "b", [b"three"])
    b, a = entry_path(cache, key("b")), entry_path(cache, key("a"))
    b.parent.mkdir(exist_ok=True)
    theirs = entry_path(Cache(tmp_path / "c2"), made.graph_hash).read_bytes()
    # An entry under another's name.
    b.write_bytes(a.read_bytes())
    assert "something else" in refused(cache, "b")
    # Two signatures exchanged.
    b.write_bytes(with_signature(theirs, Kind.ENTRY, signature_in(a.read_bytes())))
    a.write_bytes(with_signature(a.read_bytes(), Kind.ENTRY, signature_in(theirs)))
    assert "something else" in refused(cache, "a")
    assert "something else" in refused(cache, "b")
    # The signature taken away.
    b.write_bytes(with_signature(theirs, Kind.ENTRY, b""))
    assert "missing" in refused(cache, "b")
    b.write_bytes(theirs)
    assert cache.get(key("b")) is not None


def test_an_older_entry_is_refused_once_a_newer_one_was_used(cache, monkeypatch):
    path = entry_path(cache, key("a"))
    old = path.read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(int(time.time()) + 60))
    cache.put(artifact("a", list(cache.get(key("a")).blobs), created=2.5))
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert Cache(cache.root, trust="signed").get(key("a")).created == 2.5
    path.write_bytes(old)
    assert "put back" in refused(Cache(cache.root, trust="signed"))
    # Elsewhere it is the newest that was seen.
    shutil.copytree(cache.root, cache.root.parent / "copy")
    assert Cache(cache.root.parent / "copy", trust="signed").get(key("a")).created == 1.5


def test_revoked_expired_and_future_signatures_are_refused(keys, monkeypatch):
    data = keys.sign(*ENTRY)
    assert keys.verify(data, *ENTRY, path="p", about="seen before") is not None
    with pytest.raises(UntrustedEntryError, match="expired on"):
        keys.verify(write_signed(keys, said(created=1, expires=2)), *ENTRY, path="p")
    with pytest.raises(UntrustedEntryError, match="in the future"):
        keys.verify(write_signed(keys, said(created=4_000_000_000, expires=5_000_000_000)), *ENTRY, path="p")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 366 * 86400)
    with pytest.raises(UntrustedEntryError, match="expired on"):
        keys.verify(data, *ENTRY, path="p", about="seen before")
    monkeypatch.setattr(time, "time", lambda: now)
    keys.revoke(public(keys))
    with pytest.raises(UntrustedEntryError, match="revoked"):
        keys.verify(data, *ENTRY, path="p", about="seen before")


def test_a_signer_is_a_name_with_its_key(keys, tmp_path):
    """Another trusted key that calls itself ci, a stranger's key, and a signature under a swapped key."""
    other = new_keys(tmp_path / "other", "dev@example.com")
    keys.trust(public(other), "dev@example.com", {})
    assert keys.verify(other.sign(*ENTRY), *ENTRY, path="p").signer == "dev@example.com"
    with pytest.raises(UntrustedEntryError, match="lets ci@"):
        keys.verify(write_signed(other, said()), *ENTRY, path="p")
    stranger = new_keys(tmp_path / "stranger")
    with pytest.raises(UntrustedEntryError, match="lets ci@"):
        keys.verify(stranger.sign(*ENTRY), *ENTRY, path="p")
    found = read_signature(stranger.sign(*ENTRY))
    swapped = Signature(
        text=found.text, public=public(keys), namespace=found.namespace, signature=found.signature
    )
    with pytest.raises(UntrustedEntryError, match="not of this key"):
        keys.verify(swapped.armored(), *ENTRY, path="p")


def test_another_namespace_or_another_use_of_the_key_is_refused(keys, monkeypatch):
    for namespace in ("file", "git", "stitchcache/prod", ""):
        with pytest.raises(UntrustedEntryError, match="signed for namespace"):
            keys.verify(write_signed(keys, said(), namespace), *ENTRY, path="p")
    monkeypatch.setenv("STITCHCACHE_NAMESPACE", "stitchcache/prod")
    with pytest.raises(UntrustedEntryError, match="signed for namespace"):
        Keys(keys.directory).verify(write_signed(keys, said()), *ENTRY, path="p")
    monkeypatch.setenv("STITCHCACHE_NAMESPACE", "git")
    with pytest.raises(OptionError):
        Keys(keys.directory)


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"version": True}, {"extra": 1}, {"created": 1.5}, {"expires": "never"}, {"expires": 0},
     {"key": "AB" * 32}, {"kind": "file"}, {"signer": None}],
)  # fmt: skip
def test_statements_are_read_strictly(keys, change):
    with pytest.raises(UntrustedEntryError, match="damaged"):
        keys.verify(write_signed(keys, said(**change)), *ENTRY, path="p")


def test_algorithms_and_framing_cannot_be_confused(keys):
    import base64

    data = keys.sign(*ENTRY)
    text, _, block = data.decode().partition("-----BEGIN SSH SIGNATURE-----\n")
    blob = base64.b64decode(block.replace("-----END SSH SIGNATURE-----\n", ""))

    def framed(changed: bytes) -> bytes:
        body = base64.b64encode(changed).decode()
        return f"{text}-----BEGIN SSH SIGNATURE-----\n{body}\n-----END SSH SIGNATURE-----\n".encode()

    assert keys.verify(framed(blob), *ENTRY, path="p")
    for wrong in (
        blob.replace(b"sha512", b"sha256"), blob.replace(b"SSHSIG\0\0\0\1", b"SSHSIG\0\0\0\2"),
        blob.replace(b"ssh-ed25519", b"ssh-ed25518"), blob + b"\0", blob[:-1], blob[:20], b"",
        blob[:-83] + blob[-83:].replace(b"ssh-ed25519", b"ssh-ed25518"),
    ):  # fmt: skip
        with pytest.raises(UntrustedEntryError, match="damaged"):
            keys.verify(framed(wrong), *ENTRY, path="p")
    twice = text.replace('"kind"', '"kind":"piece","kind"')
    for wrong in (
        data + b"x",
        data + data,
        b"x" + data,
        data[:-2],
        text.encode(),
        b"[" * 3000,
        twice.encode(),
    ):
        with pytest.raises(UntrustedEntryError):
            keys.verify(wrong, *ENTRY, path="p")


def test_key_files_that_others_can_write_or_read_are_not_used(keys):
    data = keys.sign(*ENTRY)
    for name, mode in (("allowed_signers", 0o664), (".", 0o777)):
        before = os.stat(keys.path(name)).st_mode & 0o777
        os.chmod(keys.path(name), mode)
        with pytest.raises(UntrustedEntryError, match="chmod go-w"):
            Keys(keys.directory).verify(data, *ENTRY, path="p")
        os.chmod(keys.path(name), before)
    os.chmod(keys.path("id"), 0o640)
    with pytest.raises(UntrustedEntryError, match="chmod 600"):
        keys.sign(*ENTRY)
    assert os.stat(keys.path("allowed_signers")).st_mode & 0o022 == 0


def test_trouble_with_the_key_costs_the_signature_and_not_the_entry(keys, tmp_path, caplog):
    os.chmod(keys.path("id"), 0o644)
    with caplog.at_level(logging.WARNING):
        put(Cache(tmp_path / "c"), "a", [b"one"])
    assert "stored unsigned" in caplog.text
    assert Cache(tmp_path / "c").get(key("a")) is not None


def test_a_target_record_is_refused_under_another_key_with_other_code_or_another_entry(cache):
    path = cache.root / "targets" / key("t")[:2] / key("t")
    ((record, signature),) = decode_signed(path.read_bytes(), key("t"))
    other = cache.root / "targets" / key("u")[:2] / key("u")
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(encode_target(key("u"), [record], [signature]))
    assert cache.get_target(key("u")) == ()
    fields = {name: getattr(record, name) for name in record.__dataclass_fields__}
    for change in (
        {"graph_hash": key("b")},
        {"code": (("12" * 32, b"code"),)},
        {"sources": ()},
        {"refused": "x"},
    ):
        path.write_bytes(encode_target(key("t"), [type(record)(**fields | change)], [signature]))
        assert Cache(cache.root, trust="signed").get_target(key("t")) == ()
    path.write_bytes(encode_target(key("t"), [record]))
    assert Cache(cache.root, trust="signed").get_target(key("t")) == ()
    path.write_bytes(encode_target(key("t"), [record], [signature]))
    assert Cache(cache.root, trust="signed").get_target(key("t")) == (record,)


def test_a_piece_record_needs_a_signature_too(cache):
    blob = cache.get(key("a")).blobs[0]
    cache.put_piece(key("p"), "aoti", blob)
    assert cache.get_piece(key("p")).blob == blob
    path = cache.root / "pieces" / key("p")[:2] / key("p")
    path.write_bytes(with_signature(path.read_bytes(), Kind.PIECE, b""))
    assert Cache(cache.root, trust="signed").get_piece(key("p")) is None


def test_pieces_that_are_pickles_need_someone_who_vouches(cache):
    blob = cache.get(key("a")).blobs[0]
    for trust in ("owner", "signed", "any"):
        opened = Cache(cache.root, trust=trust)
        opened.require_voucher("aoti")
        if trust == "any":
            with pytest.raises(UntrustedEntryError, match="pickles"):
                opened.require_voucher("inductor")
        else:
            opened.require_voucher("inductor")
    assert Cache(cache.root, trust="any").blob_path(blob) is not None
