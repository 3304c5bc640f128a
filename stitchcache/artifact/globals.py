"""Which globals a consts table may name: an exact list, and the types that users register. Imports nothing.

A table is read in a process that trusts it as little as the code that uses it. So a name is looked up only if
it stands here, and what stands here computes on values: none of it opens a file, starts a process, imports a
module or reaches an attribute by a computed name. Reading calls none of these functions.
"""

from __future__ import annotations

import sys
import types
from typing import Any, TypeVar

from stitchcache.errors import OptionError

T = TypeVar("T", bound=type)

FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType)
PLACEMENTS = "torch.distributed.tensor.placement_types"

_LISTED: dict[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "builtins": """
            Ellipsis NotImplemented abs bool bytearray bytes complex dict divmod float frozenset int len list
            max min object pow range round set slice str sum tuple""",
        "collections": "OrderedDict",
        "math": """
            acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh degrees erf erfc exp exp2 expm1
            fabs floor fmod gamma gcd hypot isclose isfinite isinf isnan isqrt lcm ldexp lgamma log log10
            log1p log2 nextafter pow radians remainder sin sinh sqrt tan tanh trunc ulp""",
        "operator": """
            abs add and_ concat contains eq floordiv ge getitem gt iadd iand ifloordiv ilshift imatmul imod
            imul index inv invert ior ipow irshift is_ is_not isub itruediv ixor le lshift lt matmul mod mul
            ne neg not_ or_ pos pow rshift setitem sub truediv truth xor""",
        # Operators right under torch are not listed by name: see _is_operator.
        "torch": "Size Tensor device",
        "torch.nn.parameter": "Parameter",
        "torch.nn.functional": """
            adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d alpha_dropout avg_pool1d avg_pool2d
            avg_pool3d batch_norm bilinear binary_cross_entropy binary_cross_entropy_with_logits celu
            channel_shuffle conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
            cosine_similarity cross_entropy dropout elu embedding embedding_bag fold gelu glu grid_sample
            group_norm hardshrink hardsigmoid hardswish hardtanh huber_loss instance_norm interpolate kl_div
            l1_loss layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid mish mse_loss
            nll_loss normalize one_hot pad pairwise_distance pixel_shuffle pixel_unshuffle prelu relu relu6
            relu_ rms_norm scaled_dot_product_attention selu sigmoid silu smooth_l1_loss softmax softmin
            softplus softshrink softsign tanh tanhshrink threshold unfold upsample""",
        PLACEMENTS: "Partial Replicate Shard _StridedShard",
    }.items()
}
# Under their module's own name, as functions made in C say it, and as Python 2 named builtins.
_SAME_AS = {"_operator": "operator", "__builtin__": "builtins"}
_READS_FILES = frozenset({"from_file", "load_tensor", "save"})


class Refused(Exception):
    """Something that a table may not have."""


class ForbiddenGlobal(Refused):
    """A global that a table may not name, or may not call.

    Args:
        module: Its module, as the table has it.
        name: Its qualified name.
        reason: What is wrong with it.
    """

    def __init__(self, module: str, name: str, reason: str) -> None:
        super().__init__(f"global {module}.{name} {reason}")
        self.module = module
        self.name = name


class ConstTypes:
    """Types that users let a consts table hold, by module and qualified name."""

    def __init__(self) -> None:
        self._types: dict[tuple[str, str], type] = {}

    def __contains__(self, cls: type) -> bool:
        return self._types.get((cls.__module__, cls.__qualname__)) is cls

    def add(self, cls: type) -> None:
        """Let tables hold instances of exactly this class, and the class itself.

        Raises:
            OptionError: It is no class, or another process cannot find it by its name.
        """
        if not isinstance(cls, type):
            raise OptionError(f"register_const_type({cls!r}): give it a class", option="cls")
        module, qualname = cls.__module__, cls.__qualname__
        found: Any = sys.modules.get(module)
        for part in qualname.split("."):
            found = getattr(found, part, None)
        # A class being decorated is not in its module yet.
        elsewhere = found is not None and found is not cls
        if module == "__main__" or "<locals>" in qualname or elsewhere:
            raise OptionError(
                f"register_const_type({module}.{qualname}): another process cannot find it by this name; "
                "define it at the top level of a module that can be imported",
                option="cls",
            )
        self._types[module, qualname] = cls

    def find(self, module: str, qualname: str) -> type | None:
        """The class that was registered under a name."""
        return self._types.get((module, qualname))


CONST_TYPES = ConstTypes()
"""What this process has registered: the one object here that lives as long as the process. It is not an
argument, because tables are read deep inside loading, by whoever holds an entry; and a type is registered
where it is defined, once, when its module is imported."""


def register_const_type(cls: T) -> T:
    """Let entries hold constants of a type of yours: an enum, a NamedTuple, a dataclass or another class.

    A graph may have such a value as an argument of a node. Call this where the class is defined, so that
    every process that loads an entry has called it too; it can be a decorator. When an entry is loaded, an
    enum member is looked up, a NamedTuple is filled, and any other class is made by its own ``__new__`` or
    ``__init__`` and ``__setstate__``, with values that the entry holds: register only classes for which that
    is harmless.

    Args:
        cls: The class; subclasses are not covered.

    Returns:
        The same class.

    Raises:
        OptionError: It is no class, or another process cannot find it by its name.
    """
    CONST_TYPES.add(cls)
    return cls


def resolve(module: str, qualname: str) -> Any:
    """What a global means here and now.

    Raises:
        ForbiddenGlobal: It is not on the list, not registered, or its module is not imported.
    """
    registered = CONST_TYPES.find(module, qualname)
    if registered is not None:
        return registered
    place = _SAME_AS.get(module, module)
    home = sys.modules.get(place)
    found = vars(home).get(qualname) if home is not None else None
    listed = qualname in _LISTED.get(place, ())
    if found is not None and (
        listed or (place == "torch" and (torch_value(found) or _is_operator(found, qualname)))
    ):
        return found
    if listed and home is not None:
        raise ForbiddenGlobal(module, qualname, "does not exist here")
    if listed:
        raise ForbiddenGlobal(module, qualname, f"needs {module!r}: import it before loading this entry")
    raise ForbiddenGlobal(
        module,
        qualname,
        "is not allowed; if it is a type of yours, import it before loading this entry, and register it with "
        "stitchcache.register_const_type",
    )


def _is_operator(found: object, name: str) -> bool:
    """Whether a function of ``torch`` is one of the nine hundred that its build makes from its operators."""
    return (
        isinstance(found, types.BuiltinFunctionType)
        and found.__qualname__ == f"_VariableFunctionsClass.{name}"
        and not name.startswith("_")
        and name not in _READS_FILES
    )


def reads_files(op: str) -> bool:
    """Whether an operator of torch's own opens files; ``aten::save`` is TorchScript's."""
    return op.rpartition("::")[2] in _READS_FILES


def torch_value(value: object) -> bool:
    """Whether a value is a dtype, layout, memory format or quantization scheme."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return isinstance(value, (torch.dtype, torch.layout, torch.memory_format, torch.qscheme))


def name_of(value: Any) -> tuple[str, str] | None:
    """A name that :func:`resolve` leads back to this function or class."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    candidates = [(module, getattr(value, "__qualname__", None))]
    # Functions made in C often do not know where they are found.
    places = ("torch", "torch.nn.functional", "operator", "math", "builtins")
    candidates += [(place, name) for place in places]
    for place, path in candidates:
        if isinstance(place, str) and isinstance(path, str):
            try:
                if resolve(place, path) is value:
                    return place, path
            except ForbiddenGlobal:
                continue
    return None
