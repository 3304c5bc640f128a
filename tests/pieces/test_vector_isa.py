"""Inductor's probes of the CPU are skipped where they decide nothing, and done again afterwards."""

from __future__ import annotations

import pytest

from stitchcache.pieces import get_backend

cpu_vec_isa = pytest.importorskip("torch._inductor.cpu_vec_isa")
BEST = "avx512 avx512_vnni amx_tile"


def forget():
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    cpu_vec_isa.VecISA._VecISA__bool__impl.cache_clear()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        getattr(type(isa).__bool__, "cache_clear", lambda: None)()


@pytest.fixture
def probes(monkeypatch):
    """A CPU with all of x86's sets, on which every probe works; returns the probes that were made."""
    made = []

    def check_build(self, code):
        made.append(str(self))
        return True

    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2", *BEST.split()])
    monkeypatch.setattr(cpu_vec_isa.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", check_build)
    for name in ("_is_vnni_supported", "_init_amx"):
        monkeypatch.setattr(f"torch.cpu.{name}", lambda: True)
    forget()
    yield made
    forget()


@pytest.mark.parametrize("backend", ["aoti", "inductor"])
def test_a_gpus_pieces_are_compiled_without_probes(probes, backend):
    with get_backend(backend).around_compiling(["cuda"], {}):
        assert not cpu_vec_isa.pick_vec_isa()
        assert not probes
    # What follows in the same process gets what the CPU has.
    assert str(cpu_vec_isa.pick_vec_isa()) == BEST
    assert len(cpu_vec_isa.valid_vec_isa_list()) == 4


@pytest.mark.parametrize("devices", [["cpu"], ["cuda", "cpu"]])
def test_a_cpus_pieces_get_the_best_and_the_rest_are_not_probed(probes, devices):
    with get_backend("aoti").around_compiling(devices, {}):
        assert str(cpu_vec_isa.pick_vec_isa()) == BEST
        assert set(probes) == {BEST}
    assert len(cpu_vec_isa.valid_vec_isa_list()) == 4


def test_what_is_known_stays_known(probes):
    known = cpu_vec_isa.valid_vec_isa_list()
    made = len(probes)
    with get_backend("aoti").around_compiling(["cuda"], {}):
        assert cpu_vec_isa.valid_vec_isa_list() is known
    assert cpu_vec_isa.valid_vec_isa_list() is known
    assert len(probes) == made


@pytest.mark.parametrize("options", [{"cpp.simdlen": 256}, {"cpp.vec_isa_ok": True}])
def test_who_chooses_a_set_is_obeyed(probes, options):
    with get_backend("aoti").around_compiling(["cuda"], options):
        assert len(cpu_vec_isa.valid_vec_isa_list()) == 4


def test_an_error_leaves_nothing_behind(probes):
    with pytest.raises(KeyError), get_backend("aoti").around_compiling(["cuda"], {}):
        raise KeyError
    assert len(cpu_vec_isa.valid_vec_isa_list()) == 4
