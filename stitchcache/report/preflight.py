"""Will it hit there? What a machine's keys are made of, beside what a cache's entries were made for.

Only :func:`machine_record` and :func:`check_target` import torch. Comparing reads headers and factors of
entries, whoever may write them; nothing is loaded, stored or counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from stitchcache import __version__
from stitchcache.artifact.entry import decode_factors
from stitchcache.cache import Cache
from stitchcache.errors import OptionError
from stitchcache.explanation import explain_differences
from stitchcache.report.entry import Record, difference_records, entry_bytes, near_records
from stitchcache.store import Area, key_of
from stitchcache.types import ENGINE, Factor

if TYPE_CHECKING:
    from stitchcache.api.prewarm import Target

KIND = "stitchcache machine"
_MOST_BYTES = 1 << 20
# What the machine is, and what a program sets for itself: who wrote the machine down had torch's defaults.
_OF_MACHINE = ("env.", "torch.", "code.")

Machine = Mapping[str, Factor]


def machine_record() -> Record:
    """All that keys know of this machine and its installation, as ``stitchcache machine`` prints it."""
    import torch

    from stitchcache.keys.environment import environment_factors, torch_state_factors

    devices = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    factors = [*environment_factors(ENGINE, devices), *torch_state_factors()]
    return {"kind": KIND, "stitchcache": __version__, "factors": [asdict(factor) for factor in factors]}


def read_machine(path: str | os.PathLike[str]) -> Machine:
    """Factors of a machine by name, from the file that ``stitchcache machine`` wrote there.

    Raises:
        OptionError: The file cannot be read, or is something else.
    """
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(_MOST_BYTES))
        if found["kind"] != KIND:
            raise ValueError(f"it is of kind {found['kind']!r}")
        told = [[str(each[name]) for name in ("name", "value", "digest")] for each in found["factors"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        said = f"{os.fspath(path)} is not what 'stitchcache machine' prints ({type(error).__name__}: {error})"
        said += ". Run 'stitchcache machine > FILE' on that machine."
        raise OptionError(said, option="--machine") from error
    return {name: Factor(name=name, value=value, digest=digest) for name, value, digest in told}


def preflight(source: str | os.PathLike[str] | Cache, machine: Machine) -> list[Record]:
    """Say for each entry of a source whether it will hit on a machine, and what stands in the way.

    Args:
        source: A cache, its directory, or the file of a bundle.
        machine: From :func:`read_machine`.

    Returns:
        A record an entry, by label and graph hash, as ``check --json`` prints it: ``hit`` is whether nothing
        about the machine stands in the way, ``differences`` are the factors that do, and ``settings`` those
        that the program makes, of which the machine cannot tell.

    Raises:
        OptionError: ``source`` is neither.
        EntryFormatError: An entry of a bundle is damaged.
    """
    found = [_verdict(*told, machine) for told in _entries(source)]
    return sorted(found, key=lambda verdict: (verdict["label"], verdict["graph_hash"]))


def _entries(source: str | os.PathLike[str] | Cache) -> Iterator[tuple[str, str, Sequence[Factor]]]:
    """Graph hash and label of each entry, with the factors that a machine can tell."""
    if isinstance(source, Cache) or os.path.isdir(source):
        cache = source if isinstance(source, Cache) else Cache(source, read_only=True)
        for header in cache.entries():
            if (data := entry_bytes(header.path)) is not None:
                yield header.graph_hash, *decode_factors(data, header.graph_hash, header.path, _OF_MACHINE)
        return
    # Not at the top: a bundle is seldom asked about.
    import tarfile

    try:
        with tarfile.open(source, "r:") as bundle:
            for member in bundle:
                area, _, name = member.name.partition("/")
                graph_hash = key_of(Area.ENTRIES, os.path.basename(name))
                if area != Area.ENTRIES or graph_hash is None or member.size > _MOST_BYTES << 6:
                    continue
                if (file := bundle.extractfile(member)) is not None:
                    where = f"{os.fspath(source)}:{member.name}"
                    yield graph_hash, *decode_factors(file.read(), graph_hash, where, _OF_MACHINE)
    except (OSError, tarfile.TarError) as error:
        said = f"{os.fspath(source)} is neither a cache's directory nor a bundle ({error})."
        raise OptionError(said, option="SOURCE") from error


def _verdict(graph_hash: str, label: str, factors: Sequence[Factor], machine: Machine) -> Record:
    def differences(named: tuple[str, ...], *, known: bool) -> list[Record]:
        there = {f.name: f for f in factors if f.name.startswith(named)}
        both = [machine[name] for name in there if name in machine]
        wanted = [f for name, f in there.items() if name in machine or not known]
        return difference_records(explain_differences(wanted, both))

    stand = differences(_OF_MACHINE[:1], known=False)
    # An entry that says nothing of its machine is of a format before factors, and hits nowhere directly.
    told = any(factor.name.startswith("env.") for factor in factors)
    settings = differences(_OF_MACHINE[1:], known=True)
    facts = {"graph_hash": graph_hash, "label": label, "hit": told and not stand}
    return {**facts, "differences": stand, "settings": settings}


def check_target(target: Target, cache: Cache, machine: Machine) -> Record:
    """Whether a target will hit directly on a machine; its model is built here.

    Its key is computed with the machine's factors in place of this one's. Sources are compared with those
    here: the machine is taken to have the same code.
    """
    from stitchcache.api.prewarm import request_for
    from stitchcache.explanation import nearest_entries
    from stitchcache.keys import key_of as key_of_factors
    from stitchcache.keys.check import check_sources
    from stitchcache.pipeline.find import check_model, want

    model, args, kwargs = target.made()
    check_model(model, args, kwargs)
    wanted = want(model, args, kwargs, request_for(target), cache)
    found: Record = {"name": target.name, "hit": False, "reason": "", "graph_hash": None, "nearest": []}
    if wanted.target.key is None:
        return {**found, "reason": f"direct lookup is off: {wanted.target.reason}"}
    factors = [machine.get(f.name, f) if f.name.startswith("env.") else f for f in wanted.target.factors]
    records = cache.get_target(key_of_factors(factors))
    reason, graph_hash = "no entry for this target there", None
    for record in records:
        graph_hash = graph_hash or record.graph_hash
        why = record.refused or check_sources(record, wanted.walk, looked=True)
        if why is None and cache.get(record.graph_hash) is None:
            why = f"entry {record.graph_hash[:12]} is gone or damaged"
        if why is None:
            return {**found, "hit": True, "graph_hash": record.graph_hash}
        reason = why
    near = nearest_entries(cache.paths, factors, label=target.name, most=3) if not records else []
    return {**found, "reason": reason, "graph_hash": graph_hash, "nearest": near_records(near)}
