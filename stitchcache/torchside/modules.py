"""What ``nn.Module`` keeps in an instance beside its parameters, buffers and children.

Uses the names of its hook tables, its other attributes, and the hooks that all modules run
(``torch.nn.modules.module._global_*``).
"""

from __future__ import annotations

from torch.nn.modules import module as nn_module

SEEN = ("2.11", "2.13")

HOOKS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_backward_hooks": (),
    "_backward_pre_hooks": (),
}
"""Dictionaries of hooks that a call looks at, each with those that say how its hooks are called.

Hooks around state dictionaries are no part of a call.
"""

TRANSIENT_BUFFERS = "_non_persistent_buffers_set"
"""Names of the buffers that ``state_dict`` leaves out."""

COMPILED_CALL = "_compiled_call_impl"
"""Set by ``Module.compile()``."""

TABLES = frozenset({"training", "_parameters", "_buffers", "_modules", TRANSIENT_BUFFERS})
"""What every module has: a key or a graph hash writes each in its own way."""

INTERNALS = TABLES | {
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    *HOOKS,
    *(flag for flags in HOOKS.values() for flag in flags),
}
"""What torch itself keeps in a module; each is either a factor of its own or no part of a call."""

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def has_global_hooks() -> bool:
    """Whether hooks are registered that every module runs."""
    return any(getattr(nn_module, name, None) for name in _GLOBAL_HOOKS)
