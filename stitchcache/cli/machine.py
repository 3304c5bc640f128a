"""``stitchcache config`` and ``doctor``: settings, and what a directory and this machine can do."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict

import click

from stitchcache.cli.output import (
    Column,
    cache_option,
    count_text,
    finding,
    json_option,
    open_cache,
    print_json,
    print_table,
    printable,
    size_text,
)
from stitchcache.errors import OptionError
from stitchcache.store.layout import CHECKS, choice, default_root, flag, max_size, required
from stitchcache.store.probe import Trial, probe

_FLAGS = ("STITCHCACHE_READONLY", "STITCHCACHE_REQUIRE", "STITCHCACHE_AUDIT", "STITCHCACHE_DEBUG")
_KNOWN = {"STITCHCACHE_DIR", "STITCHCACHE_MAX_SIZE", "STITCHCACHE_CHECK", *_FLAGS}
# Others' variables that change what is compiled, with what, or where.
_FOREIGN = ("CXX", "ATEN_CPU_CAPABILITY", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


_Setting = tuple[str, str | int | bool | None, str, str, str]
"""Name, value, the value in words, where it came from, and the variable that sets it."""


@click.command()
@click.argument("path", required=False, type=click.Path())
@json_option
@cache_option
def doctor(path: str | None, as_json: bool, root: str | None) -> None:
    """Try what a cache needs of a directory and of this machine.

    PATH is a cache's directory, existing or not.  [default: the cache]

    Files are made in it for the trial, and removed again. Exit status 1 says that there is a problem; a note
    is something that stitchcache works around.
    """
    if path is not None and root is not None:
        raise click.UsageError("PATH and --cache name the same thing; give one of them")
    # Not through a Cache: one that cannot be opened is what this command is for.
    place = os.path.abspath(os.path.expanduser(path or root or default_root()))
    trials = [*probe(place), *_machine(), *_environment()]
    problems = sum(trial.level == "problem" for trial in trials)
    notes = sum(trial.level == "note" for trial in trials)
    if as_json:
        record = {"root": place, "problems": problems, "findings": [asdict(trial) for trial in trials]}
        print_json(record)
    else:
        click.echo(f"cache  {printable(place)}")
        for trial in trials:
            _print(trial)
        verdict = count_text(problems, "problem") if problems else "no problems"
        click.echo(f"{verdict}, {count_text(notes, 'note')}" if notes else verdict)
    if problems:
        finding()


def _print(trial: Trial) -> None:
    click.echo(f"  {trial.level:<7}  {trial.name:<11}  {printable(trial.found)}")
    if trial.meaning:
        click.echo(
            click.wrap_text(
                printable(trial.meaning), 100, initial_indent=" " * 24, subsequent_indent=" " * 24
            )
        )


def _machine() -> Iterator[Trial]:
    yield Trial(name="python", level="ok", found=sys.version.split()[0], meaning="")
    yield _torch()
    yield _compiler()
    yield _processor()


def _torch() -> Trial:
    # Its metadata alone: importing torch takes seconds.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return Trial(name="torch", level="ok", found=version("torch"), meaning="")
    except PackageNotFoundError:
        meaning = "models can be neither compiled nor loaded by this Python: 'pip install torch'"
        return Trial(name="torch", level="problem", found="not installed", meaning=meaning)


def _compiler() -> Trial:
    # As backends.toolchain looks, which cannot be imported without torch; a test holds them together.
    wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(wanted)
    if found is not None:
        return Trial(name="compiler", level="ok", found=found, meaning="")
    meaning = (
        "what is cached can be loaded, and nothing new compiled but with backend='eager': install a C++ "
        "compiler (Debian, Ubuntu: 'apt install g++'; Fedora: 'dnf install gcc-c++'; conda: "
        "'cxx-compiler'), or point CXX at one"
    )
    return Trial(name="compiler", level="note", found=f"no {wanted} on PATH", meaning=meaning)


def _processor() -> Trial:
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    flags = set(value.split())
                    break
    except OSError:
        # Not Linux.
        pass
    if flags >= _AVX512:
        level = "AVX-512"
    elif flags >= {"avx2", "fma"}:
        level = "AVX2"
    elif flags & {"asimd", "neon"}:
        level = "SVE" if "sve" in flags else "NEON"
    else:
        meaning = (
            "code is compiled for the least of its kind, or the flags cannot be read; entries that were "
            "compiled on a machine with more are not used here, so prewarm on one of this kind"
        )
        return Trial(name="processor", level="note", found="no vector extensions seen", meaning=meaning)
    meaning = "an entry serves only machines whose processor has the same flags: prewarm on one of their kind"
    return Trial(name="processor", level="ok", found=level, meaning=meaning)


def _environment() -> Iterator[Trial]:
    for name in sorted(os.environ):
        if name in _FOREIGN:
            yield Trial(name="environment", level="ok", found=f"{name}={os.environ[name]}", meaning="")
        elif name.startswith("STITCHCACHE_"):
            yield _setting(name)


def _setting(name: str) -> Trial:
    shown = f"{name}={os.environ[name]}"
    if name not in _KNOWN:
        meaning = f"there is no such setting; 'stitchcache config' lists all of them. Unset {name}"
        return Trial(name="environment", level="note", found=shown, meaning=meaning)
    meaning = ""
    try:
        if name == "STITCHCACHE_MAX_SIZE" and (limit := max_size()) is not None:
            meaning = f"a put evicts what is over {size_text(limit)}"
        elif name == "STITCHCACHE_READONLY" and flag(name):
            meaning = "nothing is stored: what misses is compiled in every process again"
        elif name == "STITCHCACHE_REQUIRE" and (need := required()) != "nothing":
            what = "a miss" if need == "hit" else "whatever is no direct hit"
            meaning = f"{what} is an error: prewarm what is to run here"
        elif name == "STITCHCACHE_CHECK" and choice(name, CHECKS) == "none":
            meaning = "no hit is compared with the model: a wrong one is served without a word"
        elif name == "STITCHCACHE_AUDIT" and flag(name):
            meaning = "every direct hit is traced too, which takes seconds"
        elif name in _FLAGS:
            flag(name)
    except OptionError as error:
        return Trial(name="environment", level="problem", found=shown, meaning=error.message)
    return Trial(name="environment", level="ok", found=shown, meaning=meaning)


@click.command()
@json_option
@cache_option
def config(as_json: bool, root: str | None) -> None:
    """Show each setting, its value and where it came from."""
    settings = _settings(root)
    if as_json:
        records = {
            name: {"value": value, "source": source, "variable": variable}
            for name, value, _, source, variable in settings
        }
        print_json({"settings": records})
        return
    columns = (Column("SETTING"), Column("VALUE"), Column("FROM"), Column("VARIABLE"))
    print_table(columns, [[name, *words] for name, _, *words in settings])


def _settings(root: str | None) -> list[_Setting]:
    cache = open_cache(root)
    limit = cache.max_bytes
    shown = "no limit" if limit is None else size_text(limit)
    flags = {"read_only": "READONLY", "audit": "AUDIT", "debug": "DEBUG"}
    needed, check = required(), choice("STITCHCACHE_CHECK", CHECKS)
    value, words = {"nothing": (False, "no"), "hit": (True, "yes")}.get(needed, (needed, needed))
    return [
        ("root", str(cache.root), str(cache.root), _source("STITCHCACHE_DIR", root), "STITCHCACHE_DIR"),
        ("max_size", limit, shown, _source("STITCHCACHE_MAX_SIZE"), "STITCHCACHE_MAX_SIZE"),
        ("require", value, words, _source("STITCHCACHE_REQUIRE"), "STITCHCACHE_REQUIRE"),
        ("check", check, check, _source("STITCHCACHE_CHECK"), "STITCHCACHE_CHECK"),
        *(
            (name, flag(variable), "yes" if flag(variable) else "no", _source(variable), variable)
            for name, variable in ((name, f"STITCHCACHE_{word}") for name, word in flags.items())
        ),
    ]


def _source(variable: str, option: str | None = None) -> str:
    if option is not None:
        return "option"
    return "environment" if os.environ.get(variable, "").strip() else "default"
