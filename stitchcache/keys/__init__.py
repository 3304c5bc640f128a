"""Keys that can be computed without tracing, and why two of them differ."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stitchcache.encoding import Digest as Digest
    from stitchcache.encoding import UnkeyableError as UnkeyableError
    from stitchcache.encoding import make_factor as make_factor
    from stitchcache.keys.check import check_sources as check_sources
    from stitchcache.keys.environment import SCHEMA_VERSION as SCHEMA_VERSION
    from stitchcache.keys.environment import environment_factors as environment_factors
    from stitchcache.keys.environment import torch_state_factors as torch_state_factors
    from stitchcache.keys.inputs import input_factors as input_factors
    from stitchcache.keys.model import ModelKey as ModelKey
    from stitchcache.keys.model import model_factors as model_factors
    from stitchcache.keys.recorder import SourceRecorder as SourceRecorder
    from stitchcache.keys.target import TargetKey as TargetKey
    from stitchcache.keys.target import target_key as target_key
    from stitchcache.keys.walk import Walk as Walk

# A warm start needs a few of these, and importing the rest takes longer than its own work.
_HOMES = {
    "Digest": "stitchcache.encoding",
    "ModelKey": "stitchcache.keys.model",
    "SCHEMA_VERSION": "stitchcache.keys.environment",
    "SourceRecorder": "stitchcache.keys.recorder",
    "TargetKey": "stitchcache.keys.target",
    "UnkeyableError": "stitchcache.encoding",
    "Walk": "stitchcache.keys.walk",
    "check_sources": "stitchcache.keys.check",
    "environment_factors": "stitchcache.keys.environment",
    "input_factors": "stitchcache.keys.inputs",
    "make_factor": "stitchcache.encoding",
    "model_factors": "stitchcache.keys.model",
    "target_key": "stitchcache.keys.target",
    "torch_state_factors": "stitchcache.keys.environment",
}
__all__ = [
    "Digest",
    "ModelKey",
    "SCHEMA_VERSION",
    "SourceRecorder",
    "TargetKey",
    "UnkeyableError",
    "Walk",
    "check_sources",
    "environment_factors",
    "input_factors",
    "make_factor",
    "model_factors",
    "target_key",
    "torch_state_factors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
