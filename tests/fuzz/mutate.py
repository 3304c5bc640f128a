# ruff: noqa: E501
"""Changes that a hostile writer would make: to msgpack trees, to bytes, to pickles and to source text."""

from __future__ import annotations

import itertools
import pickletools
import random
import string
import struct
from typing import Any

import msgpack

NUMBERS = [
    0, 1, -1, 2, 7, 8, 63, 64, 127, 255, 256, 65535, 1 << 20, (1 << 20) + 1, 1 << 31, (1 << 32) - 1,
    (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63), 10**9, 0.0, -0.0, 1.5, 1e308, float("inf"), float("nan"), -1e-300,
]  # fmt: skip
SIZES = [
    "s0", "s1", "0", "1", "7", "(", ")", " + ", " - ", "*", "**", "**9", "**10", "//", " % ", "-", "not ", " and ", " or ",
    " <= ", " == ", " < ", ",", "max(", "min(", "max", "s0, s1)", "9" * 20, "9" * 21, "0" * 30, "#", "\n", "\\", ";", "'", "f''",
    "lambda: ", "[", "if", ":=", "s2", "s0.real", "__import__('os')", "1e9", "0x" + "f" * 40, "1_0", "\x0c", "\u0663", "j",
    "(s0 + 1)**9", "s0**3*s1**3", "(" * 99, "-" * 999, "s0*" * 300, "True", "None", "...", "~", "<<", "@", "is", "in", "!=",
]  # fmt: skip
TEXTS = [
    "", "s0", "s1", "s0 + 1", "9**9**9", "9**999999999", "s0**s0", "2**63", "1" * 21, "1" * 20, "(" * 200, "-" * 4000,
    "s0//0", "s0 % 0", "Mod(s0, 0)", "0**-1", "1/0", "s0 <= ", "__import__('os')", "s0 if s0 else s1", "lambda: 0",
    "\ud800", "\0", "\x1b[2J", "\u202e", "a" * 70000, "distinct", "plain", "apart", "tensor", "inout", "symbol", "constant",
    "parameter", "buffer", "attribute", "compared", "unchecked", "float32", "float99", "cpu", "cuda", "meta", "aoti",
    "inductor", "eager", "engine", "../../etc/passwd", "input:0", "input:-1", "input:99999", "buffer:x", "ab" * 32, "AB" * 32,
    "null", "[]", "{}", '[1, {"type": null, "context": null, "children_spec": []}]',
    '{"type": "builtins.list", "context": "null", "children_spec": []}', "[" * 3000, "1e999", "NaN",
]  # fmt: skip
NAMES = [
    "os", "system", "posix", "builtins", "eval", "exec", "getattr", "__import__", "torch", "load", "operator", "attrgetter",
    "methodcaller", "types", "CodeType", "numpy", "functools", "partial", "collections", "OrderedDict", "Size", "device",
    "slice", "range", "complex", "bytearray", "global", "enum", "op", "tensor", "same", "placement", "parameter", "float32",
    "aten::add", "aten::save", "subprocess", "Popen", "importlib", "import_module", "pydoc", "sympify", "__globals__", "math",
]  # fmt: skip
CODE = [
    "lambda: 0", "9**9**9", "'a' * 10**9", "(" * 300, "\0", "__globals__", "__import__('os')", "import os\n", "global x\n",
    "x := 1", "*x", "**x", "yield x", "await x", "[y for y in x]", "{x: x}", "f'{x}'", "b'x'", "1e999", "1j", "...", "not x",
    "x if x else x", "x.__class__", "x.storage()", "torch.load", "torch.ops.aten.add.Tensor", "torch.ops.aten.nothing.x",
    "@torch.jit.script\n", "while True: pass\n", "try: pass\nexcept: pass\n", "class A: pass\n", "del x", "assert x", "raise x",
    "\\N{DEAD}", "# coding: utf7\n", "\f", "\t", "\u2028", "x" * 3000, "-" * 3000 + "1", "0x" + "f" * 5000, "return", "def",
    "__submods__", "__consts__", "__vllm_submods__", "__vllm_consts__", "submod_0", "const_0", "None", "True", "[0]", "[-1]",
    ".T", ".shape", "=", ",", ":", "(", ")", "\n    ", "\n", "-> int", "x: int", "/", "*, y",
]  # fmt: skip


class Mutator:
    """One mutation after the other, all of them decided by a seed."""

    def __init__(self, seed: object) -> None:
        self.random = random.Random(str(seed))

    def pick(self, among: Any) -> Any:
        return among[self.random.randrange(len(among))]

    # -- trees ------------------------------------------------------------------------------------

    def tree(self, value: Any) -> Any:
        """A copy of a tree of maps, arrays and plain values, with one to three places changed."""
        root = [_copied(value)]
        for _ in range(self.pick((1, 1, 1, 2, 3))):
            places = list(_places(root))
            container, key = self.pick(places)
            self._change(container, key, places)
            if _weight(root) > MOST:
                # Parts doubled within doubled parts would measure the mutator's own memory.
                return None
        return root[0]

    def _change(self, container: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
        old = container[key]
        match self.random.randrange(8):
            case 0:
                # Another part of the same tree, of any kind.
                other, at = self.pick(places)
                container[key] = _copied(other[at])
            case 1 if isinstance(container, dict):
                del container[key]
            case 1 if len(container) > 1:
                container.pop(key)
            case 2 if isinstance(container, dict):
                container[self.pick(TEXTS)[:60]] = self._value()
            case 2:
                container[key:key] = [_copied(old) for _ in range(self.pick((1, 1, 2, 9, 65, 300)))]
            case 3:
                container[key] = self._value()
            case 4 if isinstance(old, dict) and old:
                old[self.pick(sorted(old, key=str))] = self._value()
            case _:
                container[key] = self._altered(old)

    def _value(self) -> Any:
        return self.pick((
            lambda: self.pick(NUMBERS), lambda: self.pick(TEXTS), lambda: self.bytes(b"some bytes"), lambda: None,
            lambda: True, list, dict, lambda: {"int": self.pick(TEXTS)}, lambda: [[[[[]]]]], lambda: [0] * 70,
        ))()  # fmt: skip

    def _altered(self, old: Any) -> Any:
        if isinstance(old, bool) or old is None:
            return self._value()
        if isinstance(old, (int, float)):
            return old + self.pick((1, -1)) if self.random.random() < 0.5 else self.pick(NUMBERS)
        if isinstance(old, str):
            return self.text(old, TEXTS)
        if isinstance(old, bytes):
            return self.bytes(old)
        return self._value()

    def packed(self, tree: Any) -> bytes:
        """The msgpack of a tree, and rarely something that no tree is packed to."""
        try:
            data = msgpack.packb(tree, use_bin_type=True, unicode_errors="surrogatepass")
        except (ValueError, OverflowError):
            data = msgpack.packb(None)
        return self.bytes(data) if self.random.random() < 0.08 else data

    # -- bytes and text ----------------------------------------------------------------------------

    def bytes(self, data: bytes) -> bytes:
        """Flipped, cut, doubled, or with a length or a deep nest put in."""
        at = self.random.randrange(len(data) + 1)
        match self.random.randrange(7):
            case 0 | 1 if data:
                at = min(at, len(data) - 1)
                return data[:at] + bytes([data[at] ^ (1 << self.random.randrange(8))]) + data[at + 1 :]
            case 2:
                return data[:at]
            case 3:
                return data[:at] + data[at // 2 :]
            case 4:
                more = self.pick(
                    (b"\xff" * 4, b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xc1", b"\0" * 9)
                )
                return data[:at] + more + data[at:]
            case 5:
                return data[:at] + self.pick((b"\x91", b"\x81\xa1a", b"\xdc\0\1")) * self.pick((3, 600, 5000))
            case _:
                return data[:at] + self.random.randbytes(self.pick((1, 4, 40))) + data[at:]

    def text(self, old: str, words: list[str]) -> str:
        """A text with a word put in, a part taken out or doubled, or another character."""
        at = self.random.randrange(len(old) + 1)
        end = min(len(old), at + self.pick((1, 3, 20)))
        match self.random.randrange(6):
            case 0:
                return self.pick(words)
            case 1:
                return old[:at] + old[end:]
            case 2:
                return old[:end] + old[at:]
            case 3:
                return old[:at] + self.pick(string.printable) + old[end:]
            case _:
                return old[:at] + self.pick(words) + old[self.pick((at, end)) :]

    def source(self, code: str) -> str:
        """Source text with lines moved and words put in."""
        for _ in range(self.pick((1, 1, 2, 4))):
            lines = code.split("\n")
            at = self.random.randrange(len(lines))
            match self.random.randrange(5):
                case 0:
                    lines[at:at] = [self.pick(lines)]
                case 1:
                    del lines[at]
                case 2:
                    lines[at] = lines[at].replace(self.pick(lines).strip() or "x", self.pick(CODE))
                case _:
                    lines[at] = self.text(lines[at], CODE)
            code = "\n".join(lines)
        return code

    # -- pickles -----------------------------------------------------------------------------------

    def pickle(self, data: bytes) -> bytes:
        """A pickle with opcodes taken out, doubled, exchanged and put in."""
        starts = [position for _, _, position in pickletools.genops(data)] + [len(data)]
        steps = [data[begin:end] for begin, end in itertools.pairwise(starts)]
        for _ in range(self.pick((1, 1, 2, 3, 5))):
            at = self.random.randrange(len(steps) + 1)
            match self.random.randrange(6):
                case 0 if at < len(steps):
                    del steps[at]
                case 1 if at < len(steps):
                    steps[at:at] = [steps[at]] * self.pick((1, 2, 50))
                case 2 if at < len(steps):
                    steps[at] = self.bytes(steps[at])
                case 3:
                    steps[at:at] = [self.pick(steps or [b"N"])]
                case _:
                    steps[at:at] = [self._opcode()]
        return b"".join(steps) + self.pick((b"", b"", b"", b".", b"x"))

    def _opcode(self) -> bytes:
        name = self.pick(NAMES).encode()
        number = self.pick((0, 1, 2, 255, 1 << 20, (1 << 31) - 1, (1 << 32) - 1))
        return self.pick((
            b"c" + name + b"\n" + self.pick(NAMES).encode() + b"\n", b"\x8c" + bytes([len(name)]) + name, b"\x93", b"R",
            b"\x81", b"b", b"Q", b"(", b"t", b"l", b"]", b"}", b")", b"\x8f", b"\x90", b"\x91", b"a", b"e", b"s", b"u",
            b"0", b"1", b"2", b"\x94", b"h" + bytes([number & 255]), b"j" + struct.pack("<I", number & 0xFFFFFFFF),
            b"\x85", b"\x86", b"\x87", b"N", b"\x88", b"J" + struct.pack("<i", number & 0x7FFFFFFF),
            b"\x8a\xff" + b"\xff" * 255, b"\x8b" + struct.pack("<i", number & 0x7FFFFFFF), b"G" + b"\x7f\xf0" + bytes(6),
            b"\x8e" + struct.pack("<Q", number), b"B" + struct.pack("<I", number & 0xFFFFFFFF),
            b"X" + struct.pack("<I", number & 0xFFFFFFFF), b"\x95" + struct.pack("<Q", number), b"\x82\1", b"\x92",
            b"\x96" + struct.pack("<Q", number), b"\x97", b"\x98", b"o", b"i" + name + b"\n" + name + b"\n", b"P0\n", b".",
            b"(" * 300, b"]\x94" * 40, (b"h\0" * 2 + b"\x86") * 30,
        ))  # fmt: skip


MOST = 1 << 20


def _weight(value: Any) -> int:
    """About the bytes of memory that a tree takes, or more than the limit."""
    found, todo = 0, [value]
    while todo and found <= MOST:
        each = todo.pop()
        found += 64 + (len(each) if isinstance(each, (str, bytes)) else 0)
        todo += [*each, *each.values()] if isinstance(each, dict) else each if isinstance(each, list) else ()
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _places(container: Any) -> Any:
    for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
        yield container, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
