"""Keys that can be computed without tracing, and why two of them differ."""

from stitchcache.keys.digest import Digest, make_factor
from stitchcache.keys.environment import SCHEMA_VERSION, environment_factors
from stitchcache.keys.inputs import input_factors
from stitchcache.keys.module_tree import ModelKey, model_factors
from stitchcache.keys.sources import SourceRecorder, check_sources
from stitchcache.keys.target import TargetKey, explain_differences, target_key
from stitchcache.keys.torch_state import torch_state_factors
from stitchcache.keys.values import UnkeyableError

__all__ = [
    "Digest",
    "ModelKey",
    "SCHEMA_VERSION",
    "SourceRecorder",
    "TargetKey",
    "UnkeyableError",
    "check_sources",
    "environment_factors",
    "explain_differences",
    "input_factors",
    "make_factor",
    "model_factors",
    "target_key",
    "torch_state_factors",
]
