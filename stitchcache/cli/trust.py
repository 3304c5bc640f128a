"""``stitchcache keys``, ``sign``, ``export``, ``import``, ``push``, ``pull``, ``image``: vouching, moving."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli import Failure, Misuse, output as out
from stitchcache.cli.upkeep import age
from stitchcache.errors import EntryFormatError

if TYPE_CHECKING:
    from stitchcache.ext.sign import Keys


def _keys() -> Keys:
    from stitchcache.ext.sign import Keys

    return Keys()


@click.group()
def keys() -> None:
    """Make a key that signs, and say which keys are trusted.

    The files are in the directory STITCHCACHE_KEYS, or in the user's configuration directory, in OpenSSH's
    formats.
    """


@keys.command()
@click.argument("name")
@out.json_option
def generate(name: str) -> None:
    """Make a key pair, and trust it; NAME is what the signer is called, such as ci@example.com."""
    found = _keys()
    record = {"directory": found.directory, "name": name, "fingerprint": found.generate(name)}
    out.show(record, lambda _: click.echo(f"{found.path('id')}: {name} {record['fingerprint']}"))


@keys.command("list")
@out.json_option
def list_keys() -> None:
    """List who may sign."""
    from stitchcache.store.openssh import fingerprint

    found = _keys()
    revoked = found.revoked()
    signers = [
        {
            "names": list(signer.names),
            "fingerprint": fingerprint(signer.public),
            "namespaces": list(signer.namespaces),
            "valid_after": signer.after,
            "valid_before": signer.before,
            "revoked": signer.public in revoked,
        }
        for signer in found.signers()
    ]
    record = {
        "directory": found.directory,
        "namespace": found.namespace,
        "can_sign": found.can_sign(),
        "signers": signers,
    }
    out.show(record, _print_signers)


def _print_signers(record: out.Record) -> None:
    if not record["signers"]:
        out.say(f"nobody is trusted in {record['directory']}")
        return
    columns: dict[str, Any] = {"SIGNER": "names", "KEY": "fingerprint", "NAMESPACES": "namespaces"}
    columns["FROM"] = lambda signer: _moment(signer["valid_after"])
    columns["UNTIL"] = lambda signer: _moment(signer["valid_before"])
    out.print_table({**columns, "REVOKED": "revoked"}, record["signers"], 64)


def _moment(seconds: float | None) -> str:
    return "" if seconds is None else out.moment_text(seconds)


@keys.command()
@click.argument("public_key", type=click.Path())
@click.option("--name", help="What the signer is called.  [default: the key's comment]")
@click.option("--namespaces", help="What the key may sign for, such as 'stitchcache/prod'.")
@click.option("--valid-after", metavar="TIME", help="YYYYMMDD or YYYYMMDDHHMM, with a Z for UTC.")
@click.option("--valid-before", metavar="TIME", help="The same.")
@out.json_option
def trust(public_key: str, name: str | None, **limits: str | None) -> None:
    """Trust a key: PUBLIC_KEY is a file such as id.pub."""
    from stitchcache.store.openssh import fingerprint

    public, comment = _read_key(public_key)
    named = name or comment
    if not named:
        raise Misuse(f"{public_key}: the key has no comment: say who it is with --name")
    found = _keys()
    if public in found.revoked():
        raise Misuse(f"{found.path('revoked_keys')}: {named}'s key is revoked; remove its line there first")
    found.trust(public, named, {option.replace("_", "-"): value for option, value in limits.items()})
    record = {"directory": found.directory, "name": named, "fingerprint": fingerprint(public)}
    out.show(record, lambda _: click.echo(f"trusted: {named} {record['fingerprint']}"))


@keys.command()
@click.argument("signer")
@out.json_option
def revoke(signer: str) -> None:
    """Revoke a key; SIGNER is a name in allowed_signers, a fingerprint, or a file such as id.pub.

    What it signed is not loaded any more.
    """
    from stitchcache.store.openssh import fingerprint

    found = _keys()
    known = {each.public for each in found.signers() if signer in (*each.names, fingerprint(each.public))}
    if not known:
        if not os.path.isfile(signer):
            raise Failure(f"{signer!r} is no signer in {found.path('allowed_signers')}, and no file")
        known = {_read_key(signer)[0]}
    for public in known:
        found.revoke(public)
    record = {"directory": found.directory, "revoked": sorted(map(fingerprint, known))}
    out.show(record, lambda _: click.echo("\n".join(f"revoked: {each}" for each in record["revoked"])))


def _read_key(path: str) -> tuple[bytes, str]:
    from stitchcache.store.openssh import read_public

    try:
        with open(path, encoding="utf-8") as file:
            return read_public(file.readline(1 << 14), path)
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path}: cannot be read ({error})") from error
    except EntryFormatError as error:
        raise Failure(error.message) from error


@click.command()
@click.argument("prefixes", metavar="[PREFIX]...", nargs=-1)
@click.option("--days", type=click.FloatRange(min=0, min_open=True), default=365, help="How long it is good.")
@out.shared_options
def sign(prefixes: tuple[str, ...], days: float) -> None:
    """Sign entries, with what leads to them; without a PREFIX all entries of the cache.

    Only what nobody but you could have written is signed, and what was imported with a good signature.
    """
    from stitchcache.ext.export import sign as sign_entries

    cache = out.open_cache(trust="owner")
    signed = sign_entries(cache, [cache.find(prefix) for prefix in prefixes], seconds=days * 86400)
    said = f"signed {out.count_text(len(signed), 'entry')} in {cache.root}"
    out.show({"root": cache.paths[0], "signed": signed}, lambda _: out.print_keys(signed, said))


def _choosing(function: out.F) -> out.F:
    """Add what chooses entries that are to leave a cache."""
    recent = "Only entries compiled at most so long ago, such as 30d."
    for add in (
        click.option("--max-age", callback=age, metavar="AGE", help=recent),
        click.option("--target", metavar="KEY", help="Only entries that a target key beginning so leads to."),
        click.option("--label", help="Only entries with such a label; * and ? stand for others."),
        click.argument("prefixes", metavar="[PREFIX]...", nargs=-1),
    ):
        function = add(function)
    return function


@click.command()
@click.argument("file", type=click.Path())
@_choosing
@out.shared_options
def export(file: str, prefixes: tuple[str, ...], **only: Any) -> None:
    """Write entries to a signed bundle; without a PREFIX all entries of the cache."""
    from stitchcache.ext.export import export_bundle

    cache = out.open_cache()
    made = export_bundle(cache, file, [cache.find(prefix) for prefix in prefixes], **only)
    record = {"root": cache.paths[0], "file": file, **asdict(made)}
    out.show(record, lambda _: _print_bundle(record, "wrote"))


@click.command("import")
@click.argument("file", type=click.Path())
@out.shared_options
def import_(file: str) -> None:
    """Store the entries of a bundle that a trusted key has signed.

    The bundle is refused whole if any part of it is wrong. Entries that are there already stay.
    """
    from stitchcache.ext.bundle import import_bundle

    cache = out.open_cache()
    record = {"root": cache.paths[0], "file": file, **asdict(import_bundle(cache, file))}
    out.show(record, lambda _: _print_bundle(record, "read"))


def _print_bundle(record: out.Record, what: str) -> None:
    keys = [key + (" (there already)" if key in record["kept"] else "") for key in record["entries"]]
    entries = out.count_text(len(keys), "entry")
    targets, size = out.count_text(record["targets"], "target record"), out.size_text(record["bytes"])
    said = f"{what} {record['file']}: {entries}, {targets}, {size}, signed by {record['signer']}"
    out.print_keys(keys, said)


@click.group()
def image() -> None:
    """Make an OCI image of entries, and push it: nodes mount it as a read-only layer of their cache."""


@image.command()
@click.argument("directory", type=click.Path())
@_choosing
@click.option("--arch", help="The GPU's architecture, such as sm_90.  [default: by the GPU's name]")
@click.option(
    "--layout",
    default="stitchcache",
    help="'vllm' names directories and labels for extractors that know no other.",
)
@out.shared_options
def build(directory: str, prefixes: tuple[str, ...], **how: Any) -> None:
    """Write entries to DIRECTORY in OCI's image layout; without a PREFIX all entries of the cache.

    The same entries give the same bytes. With a key of yours, they are signed.
    """
    from stitchcache.ext.image import build_image

    cache = out.open_cache(exists=True)
    made = build_image(cache, directory, [cache.find(prefix) for prefix in prefixes], **how)
    record = {"root": cache.paths[0], "directory": directory, **asdict(made)}
    entries = out.count_text(len(made.entries), "entry")
    said = f"wrote {directory}: {entries}, {out.size_text(made.bytes)} compressed"
    out.show(record, lambda _: out.print_keys([made.digest], said))


@image.command("push")
@click.argument("directory", type=click.Path())
@click.argument("reference")
@click.option("--insecure", is_flag=True, help="Take a registry without TLS.")
@out.json_option
def push_image(directory: str, reference: str, insecure: bool) -> None:
    """Copy the image in DIRECTORY to a registry; REFERENCE is such as registry.example.com/team/cache:1.

    It logs in with what 'docker login' has left. What is printed names the image by its digest.
    """
    from stitchcache.ext.image import push_image as push_directory

    pushed = push_directory(directory, reference, insecure=insecure)
    record = {"directory": directory, "pushed": pushed}
    out.show(record, lambda _: click.echo(pushed))


def _moving(function: out.F) -> out.F:
    said = "URL, such as s3://bucket/prefix.  [default: STITCHCACHE_REMOTE]"
    return _choosing(click.option("--remote", metavar="URL", help=said)(out.shared_options(function)))


@click.command()
@_moving
def push(**how: Any) -> None:
    """Upload entries to the remote; without a PREFIX all entries of the cache.

    What is there already is not sent again, so a push that was interrupted goes on where it was.
    """
    _move("push", "sent", **how)


@click.command()
@_moving
def pull(**how: Any) -> None:
    """Store entries of the remote; without a PREFIX all that it has.

    A start fetches what it needs by itself. This is for images, and for nodes without a network.
    """
    _move("pull", "fetched", **how)


def _move(verb: str, done: str, prefixes: tuple[str, ...], remote: str | None, **only: Any) -> None:
    from stitchcache.ext import export as moves

    cache = out.open_cache(remote=remote)
    keys = prefixes if verb == "pull" else [cache.find(prefix) for prefix in prefixes]
    found = getattr(moves, verb)(cache, keys, on_progress=lambda said: out.say(said), **only)
    words = {True: done, False: "there already"}
    entries = {key: how if isinstance(how, str) else words[how] for key, how in found.items()}
    record = {"root": cache.paths[0], "remote": cache.remote, "entries": entries}
    failed = any(isinstance(how, str) for how in found.values())
    out.show(record, lambda _: out.print_pairs(list(entries.items())), finding=failed)
