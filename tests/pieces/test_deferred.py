"""A compiler's commands, written down and run later."""

from __future__ import annotations

import ctypes
import subprocess

import pytest

from stitchcache.pieces import find_compiler
from stitchcache.pieces.deferred import Deferred

APART = 'extern "C" int thrice(int x) { return THREE * x; }'
SOURCE = f"""
#define THREE 3
// more
{APART}
extern "C" int thrice(int x);
extern "C" int both(int x) {{ return thrice(x) + LATER; }}
"""


class Noting(Deferred):
    """Notes what is compiled."""

    def _call(self, arguments):
        self.compiled = [*getattr(self, "compiled", []), *(w for w in arguments if w.endswith(".cpp"))]
        super()._call(arguments)


@pytest.fixture
def deferred(tmp_path):
    """Write a source's commands down, as Inductor gives them to the stand-in."""
    source, made, library = (tmp_path / name for name in ("source.cpp", "source.o", "library.so"))

    def deferred(apart, text=SOURCE):
        source.write_text(text)
        found = Noting(find_compiler(), tmp_path / "work", apart)
        for words in (
            [source, "-DLATER=1", "-fPIC", "-c", "-o", made],
            [made, "-shared", "-fPIC", "-o", library],
        ):
            subprocess.run([found.stand_in, *map(str, words)], check=True)
        # Nothing is compiled yet.
        assert (made.stat().st_size, library.stat().st_size) == (0, 0)
        return found

    deferred.library = library
    return deferred


@pytest.mark.parametrize(
    ("apart", "sources"),
    [("", ["source.cpp"]), ("int other;", ["source.cpp"]), (APART, ["apart.cpp", "rest.cpp"])],
)
def test_in_one_or_in_two_halves_it_is_the_same_library(deferred, apart, sources, tmp_path):
    found = deferred(apart)
    found.run()
    loaded = ctypes.CDLL(str(deferred.library))
    assert (loaded.thrice(2), loaded.both(2)) == (6, 7)
    assert sorted(word.rpartition("/")[2] for word in found.compiled) == sources
    assert not (tmp_path / "work").exists()
    assert (tmp_path / "source.cpp").read_text() == SOURCE


@pytest.mark.parametrize("wrong", ["THREE * x", "thrice(x) + LATER"])
def test_an_error_in_either_half_is_told(deferred, wrong):
    found = deferred(APART.replace(wrong, "nothing"), SOURCE.replace(wrong, "nothing"))
    with pytest.raises(RuntimeError, match="nothing"):
        found.run()
