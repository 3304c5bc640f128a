"""Reads a corpus of hostile pickles under an audit hook: a script, because a hook cannot be removed."""

import bdb
import code
import codecs
import copyreg
import cProfile
import ctypes
import doctest
import functools
import importlib
import linecache
import marshal
import operator
import os
import pdb
import pickle
import pydoc
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import timeit
import zipimport

import numpy
import torch
import torch.hub
import torch.jit
import torch.serialization
import torch.storage
import torch.utils.collect_env

from stitchcache.artifact.consts import load_consts
from stitchcache.errors import EntryFormatError


class By:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def raw(text):
    return b"\x80\x04](" + text + b"e."


made = {
    "os.system": By(os.system, "touch /tmp/never"),
    "subprocess": By(subprocess.Popen, ["touch", "/tmp/never"]),
    "eval": By(eval, "1"),
    "exec": By(exec, "1"),
    "compile": By(compile, "1", "f", "eval"),
    "import": By(__import__, "this"),
    "importlib": By(importlib.import_module, "antigravity"),
    "getattr": By(getattr, "x", "upper"),
    "attrgetter": By(operator.attrgetter, "__globals__"),
    "methodcaller": By(operator.methodcaller, "system", "x"),
    "open": By(open, "/tmp/never", "w"),
    "pipepager": By(pydoc.pipepager, "x", "touch /tmp/never"),
    "runpy": By(runpy._run_code, "1", {}),
    "timeit": By(timeit.timeit, "1"),
    "cProfile": By(cProfile.run, "1"),
    "pdb": By(pdb.run, "1"),
    "bdb": By(bdb.Bdb),
    "doctest": By(doctest.debug_script, "1"),
    "interpreter": By(code.InteractiveInterpreter),
    "cdll": By(ctypes.CDLL, "libc.so.6"),
    "socket": By(socket.create_connection, ("localhost", 9)),
    "rmtree": By(shutil.rmtree, "/tmp/never"),
    "mkstemp": By(tempfile.mkstemp),
    "partial": By(functools.partial, print, "x"),
    "extension": By(copyreg.add_extension, "a", "b", 3),
    "codecs": By(codecs.open, "/tmp/never", "w"),
    "linecache": By(linecache.getlines, "/etc/passwd"),
    "zipimport": By(zipimport.zipimporter, "/tmp/never"),
    "marshal": By(marshal.loads, b"N"),
    "pickle": By(pickle.loads, b"N."),
    "numpy.load": By(numpy.load, "/tmp/never"),
    "numpy.fromfile": By(numpy.fromfile, "/tmp/never"),
    "collect_env": By(torch.utils.collect_env.run, "touch /tmp/never"),
    "torch.load": By(torch.load, "/tmp/never"),
    "torch.save": By(torch.save, 1, "/tmp/never"),
    "hub": By(torch.hub.load, "a/b", "c"),
    "from_file": By(torch.from_file, "/tmp/never"),
    "storage": By(torch.storage._load_from_bytes, b"x"),
    "type": By(type, "T", (), {}),
    "breakpoint": By(breakpoint),
    "input": By(input),
    "vars": By(vars),
    "globals": By(globals),
}
tables = {name: pickle.dumps([value], 4) for name, value in made.items()}
for protocol in (0, 1, 2, 3, 5):
    tables[f"protocol {protocol}"] = pickle.dumps([By(os.system, "touch /tmp/never")], protocol)
tables |= {
    "code object": raw(b"ctypes\nCodeType\n)R"),
    "function": raw(b"ctypes\nFunctionType\n)R"),
    "inst": raw(b"(S'touch /tmp/never'\nios\nsystem\n"),
    "obj": raw(b"(cos\nsystem\nS'touch /tmp/never'\no"),
    "dotted": raw(b"\x8c\x08builtins\x8c\x11str.__class__.mro.x\x93"),
    "no module": raw(b"\x8c\x09antigravi\x8c\x01x\x93"),
    "extension code": raw(b"\x82\x01"),
    "persistent": raw(b"Pos.system\n"),
    "memo of nothing": raw(b"h\x07"),
    "memo bomb": b"\x80\x04]" + b"".join(b"r" + struct.pack("<I", 1 << 31) for _ in range(9)) + b".",
    "doubling": raw(b")" + b"2\x86" * 200_000),
    "nested marks": raw(b"(" * 100_000),
    "nested tuples": raw(b"N" + b"\x85" * 1_000_000),
    "huge string": raw(b"\x8d" + struct.pack("<Q", 1 << 62)),
    "huge integer": raw(b"\x8b" + struct.pack("<i", 1 << 30)),
    "negative integer": raw(b"\x8b" + struct.pack("<i", -5)),
    "huge decimal": raw(b"I" + b"9" * 1_000_000 + b"\n"),
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "no stop": b"\x80\x04](K\x01e",
    "after the stop": b"\x80\x04].cos\nsystem\n.",
    "empty": b"",
    "two pickles": b"\x80\x04N.\x80\x04N.",
    "byte array": raw(b"\x96" + struct.pack("<Q", 1 << 60)),
    "buffers": raw(b"\x97\x98"),
    "broken unicode": raw(b"X\x02\x00\x00\x00\xff\xfe"),
}
seen = []
sys.addaudithook(lambda event, args: seen.append(event))
ran = []
for name, table in tables.items():
    del seen[:]
    began = time.monotonic()
    try:
        load_consts(table)
        ran.append(name)
    except EntryFormatError:
        pass
    bad = [
        event
        for event in seen
        if event.split(".")[0]
        in (
            "import",
            "open",
            "os",
            "subprocess",
            "exec",
            "compile",
            "socket",
            "ctypes",
            "shutil",
            "marshal",
            "pickle",
            "tempfile",
            "urllib",
            "code",
            "builtins",
        )
        or event in ("exec", "compile")
    ]
    assert not bad, (name, bad)
    assert time.monotonic() - began < 20, name
# The memo is a dict: a large number takes no room.
assert ran == ["memo bomb"], ran
print(len(tables))
