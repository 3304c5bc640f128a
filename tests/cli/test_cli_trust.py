"""``stitchcache keys``, ``sign``, and ``verify --require-signature``."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from cli_entries import entry_file, put, put_target

pytest.importorskip("cryptography")

A, B = "a1" * 32, "b2" * 32


@pytest.fixture
def home(tmp_path):
    """An environment with a directory of keys, and a cache with two unsigned entries."""
    root = tmp_path / "cache"
    for graph_hash in (A, B):
        put(root, graph_hash)
    put_target(root, "t", A, {"env.torch": "2.13"})
    return {"STITCHCACHE_KEYS": str(tmp_path / "keys"), "STITCHCACHE_DIR": str(root)}


def test_sign_verify_and_revoke(run_cli, home, tmp_path):
    made = run_cli("keys", "generate", "ci@example.com", "--json", env=home)
    assert made.status == 0, made.err
    assert run_cli("keys", "generate", "again", env=home).status == 2
    before = run_cli("verify", "--require-signature", "--json", env=home)
    assert before.status == 1
    assert {each["problem"] for each in before.json["findings"]} == {"untrusted"}
    assert len(before.json["findings"]) == 3
    signed = run_cli("sign", A[:6], "--json", env=home)
    assert signed.json["signed"] == [A], signed.err
    after = run_cli("verify", "--require-signature", "--json", env=home)
    assert [each["path"] for each in after.json["findings"]] == [str(entry_file(tmp_path / "cache", B))]
    assert run_cli("sign", env=home).out.split() == [A, B]
    whole = run_cli("verify", "--require-signature", env=home)
    assert whole.status == 0, whole.out
    (signer,) = run_cli("keys", "list", "--json", env=home).json["signers"]
    assert signer["names"] == ["ci@example.com"]
    assert signer["fingerprint"] == made.json["fingerprint"]
    revoked = run_cli("keys", "revoke", "ci@example.com", env=home)
    assert made.json["fingerprint"] in revoked.out
    again = run_cli("keys", "trust", tmp_path / "keys" / "id.pub", env=home)
    assert (again.status, "revoked_keys: ci@example.com's key is revoked" in again.err) == (2, True)
    late = run_cli("verify", "--require-signature", env={**home, "STITCHCACHE_TRUST": "signed"})
    assert late.status == 1
    assert "revoked" in late.out
    assert run_cli("verify", env=home).status == 0


def test_trust_takes_a_public_key_with_its_limits(run_cli, home, tmp_path):
    run_cli("keys", "generate", "ci@example.com", env=home)
    elsewhere = {**home, "STITCHCACHE_KEYS": str(tmp_path / "other")}
    key = tmp_path / "keys" / "id.pub"
    limits = ["--namespaces", "stitchcache/prod", "--valid-before", "20990101Z"]
    trusted = run_cli("keys", "trust", key, *limits, env=elsewhere)
    assert trusted.status == 0, trusted.err
    line = (tmp_path / "other" / "allowed_signers").read_text()
    assert line.startswith(
        'ci@example.com namespaces="stitchcache/prod",valid-before="20990101Z" ssh-ed25519 AAAA'
    )
    assert "stitchcache/prod" in run_cli("keys", "list", env=elsewhere).out
    for wrong in (
        ["trust", tmp_path / "none"],
        ["revoke", "nobody"],
        ["trust", entry_file(tmp_path / "cache", A)],
    ):
        assert run_cli("keys", *wrong, env=elsewhere).status == 1
    assert run_cli("keys", "trust", key, "--valid-before", "soon", env=elsewhere).status == 2
    assert "keys generate" in run_cli("sign", env=elsewhere).err


def test_config_shows_who_vouches_and_doctor_finds_a_wrong_word(run_cli, home):
    env = {**home, "STITCHCACHE_TRUST": "signed", "STITCHCACHE_NAMESPACE": "stitchcache/prod"}
    settings = run_cli("config", "--json", env=env).json["settings"]
    assert (settings["trust"]["value"], settings["trust"]["source"]) == ("signed", "environment")
    assert settings["namespace"]["value"] == "stitchcache/prod"
    assert settings["keys"]["value"] == home["STITCHCACHE_KEYS"]
    wrong = run_cli("config", env={**home, "STITCHCACHE_TRUST": "everyone"})
    assert wrong.status == 2
    assert "owner, signed, any" in wrong.err


def test_export_and_import_move_entries(run_cli, home, tmp_path):
    run_cli("keys", "generate", "ci@example.com", env=home)
    bundle = tmp_path / "x.bundle"
    wrote = run_cli("export", bundle, "--json", env=home)
    assert wrote.json["entries"] == [A, B], wrote.err
    assert wrote.json["targets"] == 1
    other = {"STITCHCACHE_KEYS": str(tmp_path / "other"), "STITCHCACHE_DIR": str(tmp_path / "served")}
    stranger = run_cli("import", bundle, env=other)
    assert stranger.status == 1
    assert "keys trust" in stranger.err
    run_cli("keys", "trust", tmp_path / "keys" / "id.pub", env=other)
    assert run_cli("import", bundle, env=other).out.split() == [A, B]
    again = run_cli("import", bundle, env=other)
    assert again.out.count("there already") == 2
    assert "signed by ci@example.com" in again.err
    assert run_cli("verify", "--require-signature", env=other).status == 0
    assert run_cli("export", bundle, A[:4], "--max-age", "1s", env=home).status == 1
    assert run_cli("export", tmp_path, env=home).status == 1


def test_inspect_shows_who_signed_and_prints_what_ssh_keygen_takes(run_cli, home, tmp_path):
    assert run_cli("inspect", A, "--json", env=home).json["signature"] is None
    assert run_cli("inspect", A, "--signature", env=home).status == 1
    run_cli("keys", "generate", "ci@example.com", env=home)
    run_cli("sign", A, env=home)
    record = run_cli("inspect", A, "--json", env=home).json["signature"]
    assert (record["good"], record["imported"], record["statement"]["signer"]) == (
        True,
        False,
        "ci@example.com",
    )
    assert "signed by ci@example.com, good until" in run_cli("inspect", A, env=home).out
    text = run_cli("inspect", A, "--signature", env=home).out
    statement, _, block = text.partition("-----BEGIN")
    (tmp_path / "s.sig").write_text("-----BEGIN" + block)
    if shutil.which("ssh-keygen"):
        command = [
            "ssh-keygen",
            "-Y",
            "verify",
            "-f",
            tmp_path / "keys" / "allowed_signers",
            "-I",
            "ci@example.com",
        ]
        command += ["-n", "stitchcache", "-s", tmp_path / "s.sig"]
        subprocess.run(command, input=statement.encode(), check=True, capture_output=True)
    run_cli("keys", "revoke", "ci@example.com", env=home)
    assert "is revoked" in run_cli("inspect", A, env=home).out


def test_doctor_says_whether_signatures_can_be_made_and_taken(run_cli, home, tmp_path):
    def signatures(**more):
        found = run_cli("doctor", "--json", env={**home, **more}).json["findings"]
        return {trial["name"]: trial for trial in found}

    assert signatures()["signatures"]["level"] == "ok"
    assert signatures(STITCHCACHE_TRUST="signed")["signatures"]["level"] == "problem"
    run_cli("keys", "generate", "ci@example.com", env=home)
    assert "signed by ci@example.com" in signatures(STITCHCACHE_TRUST="signed")["signatures"]["found"]
    (tmp_path / "cache").chmod(0o775)
    assert signatures()["trust"]["level"] == "problem"
    assert signatures(STITCHCACHE_TRUST="signed")["trust"]["level"] == "note"
    (tmp_path / "keys" / "id").chmod(0o644)
    assert "chmod 600" in signatures()["signatures"]["found"]
