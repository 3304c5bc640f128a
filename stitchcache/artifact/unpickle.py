"""Reads pickles from outside: an interpreter of few opcodes, and an exact list of what they may name.

No opcode does more than build plain values; what finds, calls or changes anything else is for a subclass to
allow. What is listed computes on values: none of it opens a file, starts a process, imports a module or
reaches an attribute by a computed name; and reading calls none of it.
"""

from __future__ import annotations

import collections
import copy
import pickletools
import sys
import types
from contextlib import suppress
from typing import Any, TypeVar

from stitchcache.errors import OptionError
from stitchcache.types import follow

T = TypeVar("T", bound=type)

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
READS_FILES = frozenset({"from_file", "load_tensor", "save"})

CONST_TYPES: dict[tuple[str, str], type] = {}
"""Types that users registered, by module and qualified name. The process has one such list: a type is
registered where it is defined, when its module is imported, and tables are read deep inside loading."""

_MOST_BYTES = 256 << 20
# Each opcode adds at most one value to the stack and one to the memo, so this bounds both.
_MOST_OPCODES = 1 << 20
_MOST_NESTED = 256
_MOST_IN_A_KEY = 1000
# Tuples in tuples. Python hashes them without looking at how deep they are, until the stack is full.
_MOST_IN_TUPLES = 10_000


class Refused(Exception):
    """What a pickle from outside may not have; ``names`` are a forbidden global's module and name."""

    def __init__(self, reason: str, *names: object) -> None:
        super().__init__(f"global {names[0]}.{names[1]} {reason}" if names else reason)
        self.names = [str(name) for name in names]


class Unpickler:
    """Reads one pickle of plain values."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._left = 0
        self._in_tuples = 0

    def load(self, data: bytes) -> Any:
        """What a pickle holds, if it is one and has nothing that it may not have."""
        if len(data) > _MOST_BYTES:
            raise Refused(f"{len(data)} bytes are more than the {_MOST_BYTES} that are read")
        self._left, end = len(data), 0
        try:
            for number, (opcode, argument, position) in enumerate(pickletools.genops(data)):
                if number >= _MOST_OPCODES:
                    raise Refused(f"more than {_MOST_OPCODES} opcodes")
                self._run(opcode.name, argument)
                end = (position or 0) + 1
            (value,) = self._stack
        except Refused:
            raise
        # Constructors of registered types run in between, and may raise whatever they like.
        except Exception as error:
            raise Refused(f"not a pickle of plain values: {error or type(error).__name__}") from error
        if end != len(data):
            raise Refused(f"{len(data) - end} bytes after the end")
        return value

    def outside(self, opcode: str, *operands: Any) -> Any:
        """What an opcode makes that is about more than plain values: for a subclass to judge."""
        raise Refused(f"opcode {opcode}, which plain values do not need")

    def spend(self, values: tuple[Any, ...]) -> None:
        """Count values that are copied: all must have stood in the pickle, or few bytes would cost much."""
        self._left -= sum(len(each) for each in values if isinstance(each, (bytes, list, tuple)))
        if self._left < 0:
            raise Refused("calls that copy more than the pickle holds")

    def _run(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if opcode in _VALUES:
                stack.append(argument)
            case _ if opcode in _BEGUN:
                stack.append(copy.copy(_BEGUN[opcode]))
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                self._marks.append(len(stack))
                if len(self._marks) > _MOST_NESTED:
                    raise Refused(f"nested deeper than {_MOST_NESTED}")
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._parts(_NUMBER.get(opcode))))
            case "FROZENSET":
                stack.append(frozenset(map(_key, self._parts(None))))
            case "APPEND" | "APPENDS":
                items = self._take(_NUMBER.get(opcode))
                self._container(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._take(_NUMBER.get(opcode))
                pairs = zip(map(_key, items[::2]), items[1::2], strict=True)
                self._container(dict, collections.OrderedDict).update(pairs)
            case "ADDITEMS":
                items = self._take(None)
                self._container(set).update(map(_key, items))
            case "GLOBAL":
                stack.append(self.outside(opcode, *argument.split(" ", 1)))
            case "STACK_GLOBAL" | "REDUCE" | "NEWOBJ" | "BUILD" | "BINPERSID":
                stack.append(self.outside(opcode, *self._take(_NUMBER[opcode])))
            case _:
                raise Refused(f"opcode {opcode}, which plain values do not need")

    def _take(self, number: int | None) -> list[Any]:
        """The last values of the stack, all from the last mark on without a number."""
        begin = self._marks.pop() if number is None else len(self._stack) - number
        if begin < 0:
            raise Refused("an opcode without its operands")
        taken = self._stack[begin:]
        del self._stack[begin:]
        return taken

    def _parts(self, number: int | None) -> list[Any]:
        """What a tuple or frozenset is made of."""
        taken = self._take(number)
        self._in_tuples += any(type(each) in (tuple, frozenset) for each in taken)
        if self._in_tuples > _MOST_IN_TUPLES:
            raise Refused(f"more than {_MOST_IN_TUPLES} tuples that hold tuples")
        return taken

    def _container(self, *kinds: type) -> Any:
        # Items go only into what the pickle itself made, never into an object with methods of its own.
        target = self._stack[-1]
        if type(target) not in kinds:
            raise Refused(f"items added to a {type(target).__name__}")
        return target


_BEGUN: dict[str, Any] = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False,
    "EMPTY_LIST": [], "EMPTY_TUPLE": (), "EMPTY_DICT": {}, "EMPTY_SET": set(),
}  # fmt: skip
# How many values an opcode takes; those that are not here take all from the last mark on.
_NUMBER = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "BINPERSID": 1}
_NUMBER |= dict.fromkeys(("STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"), 2)
_VALUES = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
})  # fmt: skip


def is_small(value: object) -> bool:
    """Whether a value can be hashed in no time: one that nests a tuple in itself 60 times over cannot."""
    todo, seen = [value], 0
    while todo:
        each = todo.pop()
        seen += 1
        if seen > _MOST_IN_A_KEY:
            return False
        if isinstance(each, (tuple, frozenset)):
            todo += each
    return True


def _key(value: Any) -> Any:
    if not is_small(value):
        raise Refused("a key or item of a set that is too large")
    return value


def register_const_type(cls: T) -> T:
    """Let entries hold constants of a type of yours: an enum, a NamedTuple, a dataclass or another class.

    Call this where the class is defined, so that every process that loads an entry has called it too; it can
    be a decorator. Loading looks an enum member up, fills a NamedTuple, and makes any other class by its own
    ``__new__`` or ``__init__`` and ``__setstate__``, with values that the entry holds: register only classes
    for which that is harmless.

    Args:
        cls: The class; subclasses are not covered.

    Returns:
        The same class.

    Raises:
        OptionError: It is no class, or another process cannot find it by its name.
    """
    if not isinstance(cls, type):
        raise OptionError(f"register_const_type({cls!r}): give it a class", option="cls")
    module, qualname = cls.__module__, cls.__qualname__
    found = follow(sys.modules.get(module), qualname)
    # A class being decorated is not in its module yet.
    if module == "__main__" or "<locals>" in qualname or found not in (None, cls):
        raise OptionError(
            f"register_const_type({module}.{qualname}): another process cannot find it by this name; "
            "define it at the top level of a module that can be imported",
            option="cls",
        )
    CONST_TYPES[module, qualname] = cls
    return cls


def is_registered(kind: type) -> bool:
    """Whether just this class was registered."""
    return CONST_TYPES.get((kind.__module__, kind.__qualname__)) is kind


def resolve(module: Any, qualname: Any) -> Any:
    """What a global means here and now, if it is listed or registered and its module is imported."""
    if type(module) is not str or type(qualname) is not str:
        raise Refused("a global whose name is no text")
    if (module, qualname) in CONST_TYPES:
        return CONST_TYPES[module, qualname]
    place = _SAME_AS.get(module, module)
    home = sys.modules.get(place)
    found = vars(home).get(qualname) if home is not None else None
    listed = qualname in _LISTED.get(place, ())
    of_torch = place == "torch" and (torch_value(found) or _is_operator(found, qualname))
    if found is not None and (listed or of_torch):
        return found
    if not listed:
        reason = (
            "is not allowed; if it is a type of yours, import it before loading this entry, and register it "
            "with stitchcache.register_const_type"
        )
    elif home is None:
        reason = f"needs {module!r}: import it before loading this entry"
    else:
        reason = "does not exist here"
    raise Refused(reason, module, qualname)


def _is_operator(found: object, name: str) -> bool:
    """Whether a function of ``torch`` is one of the nine hundred that its build makes from its operators."""
    return (
        isinstance(found, types.BuiltinFunctionType)
        and found.__qualname__ == f"_VariableFunctionsClass.{name}"
        and not name.startswith("_")
        and name not in READS_FILES
    )


def torch_value(value: object) -> bool:
    """Whether a value is a dtype, layout, memory format or quantization scheme."""
    torch = sys.modules.get("torch")
    kinds = () if torch is None else (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
    return isinstance(value, kinds)


def name_of(value: Any) -> tuple[str, str] | None:
    """A name that :func:`resolve` leads back to this function or class."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    candidates: list[tuple[Any, Any]] = [(module, getattr(value, "__qualname__", None))]
    # Functions made in C often do not know where they are found.
    places = ("torch", "torch.nn.functional", "operator", "math", "builtins")
    for place, path in candidates + [(place, name) for place in places]:
        with suppress(Refused):
            if resolve(place, path) is value:
                return place, path
    return None
