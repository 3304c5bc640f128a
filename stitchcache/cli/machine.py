"""``stitchcache config`` and ``doctor``: settings, and what a directory and this machine can do."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

import click

from stitchcache import store
from stitchcache.cli import output as out
from stitchcache.errors import OptionError, StoreError, printable
from stitchcache.store.probe import Level, Trial, probe, probe_lower
from stitchcache.store.signed import keys_directory, signature_namespace

_SETTINGS: dict[str, Callable[[], object]] = {
    "max_size": store.max_size,
    "require": lambda: {"nothing": False, "hit": True}.get(store.required(), store.required()),
    "check": lambda: store.choice("STITCHCACHE_CHECK", store.CHECKS),
    "read_only": lambda: store.flag("STITCHCACHE_READONLY"),
    "audit": lambda: store.flag("STITCHCACHE_AUDIT"),
    "trust": lambda: ":".join(store.trust_of(None, 1 + os.environ.get("STITCHCACHE_TRUST", "").count(":"))),
    "keys": keys_directory,
    "namespace": signature_namespace,
    "debug": lambda: store.flag("STITCHCACHE_DEBUG"),
    "remote": lambda: out.open_cache(remote=None).remote,
    # By name: few have a remote.
    "remote_wait": lambda: importlib.import_module("stitchcache.remote").wait_seconds(),
}
"""Settings, each with what tells its value: an OptionError if its variable makes no sense."""
# Others' variables that change what is compiled, with what, or where.
_FOREIGN = ("CXX", "ATEN_CPU_CAPABILITY", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")


@click.command()
@out.shared_options
def config() -> None:
    """Show each setting, its value and where it came from."""
    place, *lower = out.open_cache().paths
    source = "option" if out.asked("cache") is not None else _source("STITCHCACHE_DIR")
    settings: out.Record = {
        name: {"value": value, "source": source, "variable": "STITCHCACHE_DIR"}
        for name, value in (("root", place), ("lower_layers", lower))
    }
    for name, value in _SETTINGS.items():
        variable = _variable(name)
        settings[name] = {"value": value(), "source": _source(variable), "variable": variable}
    columns: out.Fields = {
        "SETTING": "name",
        "VALUE": lambda found: (
            out.size_text(found["value"]) if type(found["value"]) is int else found["value"]
        ),
        "FROM": "source",
        "VARIABLE": "variable",
    }
    rows = [{"name": name, **found} for name, found in settings.items()]
    out.show({"settings": settings}, lambda _: out.print_table(columns, rows))


def _variable(name: str) -> str:
    return f"STITCHCACHE_{'READONLY' if name == 'read_only' else name.upper()}"


def _source(variable: str) -> str:
    return "environment" if os.environ.get(variable, "").strip() else "default"


@click.command()
@click.argument("path", required=False, type=click.Path())
@out.shared_options
def doctor(path: str | None) -> None:
    """Try what a cache needs of a directory and of this machine.

    PATH is a cache's directory, existing or not.  [default: the cache]

    Files are made in it for the trial, and removed again. Exit status 1 says that there is a problem; a note
    is something that stitchcache works around.
    """
    # Not through a Cache: one that cannot be opened is what this command is for.
    named = out.one_place("PATH", path)
    place, *lower = store.default_roots() if named is None else store.split_roots(named, option="--cache")
    python = Trial("python", "ok", sys.version.split()[0])
    try:
        trust = store.trust_of(None, 1 + len(lower))
    except OptionError:
        # Among the environment's findings.
        trust = ["owner"] * (1 + len(lower))
    layers = [*probe(place, trust=trust[0]), *map(probe_lower, lower, trust[1:])]
    trials = [*layers, *_remote(), _signing(trust), python, _torch(), _compiler(), *_environment()]
    record = {
        "root": place,
        "problems": sum(trial.level == "problem" for trial in trials),
        "findings": [asdict(trial) for trial in trials],
    }
    out.show(record, _print_trials, finding=record["problems"] != 0)


def _print_trials(record: out.Record) -> None:
    click.echo(f"cache  {printable(record['root'])}")
    margin = " " * 24
    for trial in record["findings"]:
        click.echo(f"  {trial['level']:<7}  {trial['name']:<11}  {printable(trial['found'])}")
        if trial["meaning"]:
            meaning = printable(trial["meaning"])
            click.echo(click.wrap_text(meaning, 100, initial_indent=margin, subsequent_indent=margin))
    notes = sum(trial["level"] == "note" for trial in record["findings"])
    verdict = out.count_text(record["problems"], "problem") if record["problems"] else "no problems"
    click.echo(f"{verdict}, {out.count_text(notes, 'note')}" if notes else verdict)


def _signing(trust: list[str]) -> Trial:
    from stitchcache.errors import StitchCacheError
    from stitchcache.ext.sign import Keys

    needed = "signed" in trust
    try:
        keys = Keys()
        signers = len(keys.signers())
        found = f"{out.count_text(signers, 'key')} trusted in {keys.directory}"
        if keys.can_sign():
            found += f"; what is stored is signed by {keys.name_of(keys.public())}"
    except StitchCacheError as error:
        meaning = "nothing is signed here, and what is signed or was imported is not loaded"
        return Trial("signatures", "problem", error.message, meaning)
    if needed and not signers:
        meaning = "STITCHCACHE_TRUST=signed, so nothing is loaded: 'stitchcache keys trust' adds a signer"
        return Trial("signatures", "problem", found, meaning)
    return Trial("signatures", "ok", found)


def _remote() -> Iterator[Trial]:
    url = os.environ.get("STITCHCACHE_REMOTE", "").strip()
    if url.startswith(store.REMOTES):
        from stitchcache.remote import Remote

        remote, name = Remote(url, lambda *_: None), f"probe/{os.urandom(8).hex()}"
        level: Level = "ok"
        meaning = ""
        try:
            if remote.registry:
                remote.now(remote.ask, "head", name)
                level, meaning = "note", "several nodes may compile one piece: a registry has no leases"
            elif [remote.now(remote.write, name, b"probe") for _ in range(2)] != [True, False]:
                level = "note"
                meaning = "several nodes may compile one piece: it creates what is there already"
            if not remote.registry:
                remote.now(remote.ask, "delete", name)
        except StoreError as error:
            level, meaning = "problem", f"{error.message}: starts go on without it"
        yield Trial("remote", level, url, meaning)


def _torch() -> Trial:
    # Its metadata alone: importing torch takes seconds.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return Trial("torch", "ok", version("torch"))
    except PackageNotFoundError:
        meaning = "models can be neither compiled nor loaded by this Python: 'pip install torch'"
        return Trial("torch", "problem", "not installed", meaning)


def _compiler() -> Trial:
    # As find_compiler() looks, which cannot be imported without torch; a test holds them together.
    wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(wanted)
    if found is not None:
        return Trial("compiler", "ok", found)
    meaning = (
        "what is cached can be loaded, and nothing new compiled but with backend='eager': install a C++ "
        "compiler (Debian, Ubuntu: 'apt install g++'; Fedora: 'dnf install gcc-c++'; conda: "
        "'cxx-compiler'), or point CXX at one"
    )
    return Trial("compiler", "note", f"no {wanted} on PATH", meaning)


def _environment() -> Iterator[Trial]:
    known = {_variable(name): name for name in ("dir", *_SETTINGS)}
    for variable in sorted(os.environ):
        if variable not in _FOREIGN and not variable.startswith("STITCHCACHE_"):
            continue
        level: Level = "ok"
        meaning = ""
        if variable not in known and variable not in _FOREIGN:
            level = "note"
            meaning = f"there is no such setting; 'stitchcache config' lists all of them. Unset {variable}"
        elif known.get(variable) in _SETTINGS:
            try:
                _SETTINGS[known[variable]]()
            except OptionError as error:
                level, meaning = "problem", error.message
        shown = f"{variable}={os.environ[variable]}"
        yield Trial("environment", level, shown, meaning)
