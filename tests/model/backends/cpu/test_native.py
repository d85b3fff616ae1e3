"""Kernels are compiled once and kept; a machine that cannot compile is told why and gets none."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.model.backends.cpu import native
from llamahome.model.backends.cpu.native import (
    Kernels,
    asked_level,
    cache_folder,
    expects_pairs,
    load_kernels,
    make_kernels,
    must_compile,
    wins_back,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LLAMAHOME_CPU_LEVEL", raising=False)


def fresh() -> Kernels | str:
    return make_kernels(asked_level())


@pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler here")
def test_the_library_is_compiled_once_and_kept_in_the_users_cache() -> None:
    assert isinstance(fresh(), Kernels)
    (library,) = cache_folder().iterdir()
    made = library.stat().st_mtime_ns
    assert isinstance(fresh(), Kernels) and [path.stat().st_mtime_ns for path in cache_folder().iterdir()] == [made]
    assert cache_folder().stat().st_mode & 0o077 == 0


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert fresh() == "there is no C++ compiler (g++ or c++)"


def test_a_compiler_that_fails_is_a_reason_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no room' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert fresh() == f"{broken} could not compile them: no room"


@given(tokens=st.integers(0, 10**9), more=st.integers(0, 10**9), weights=st.integers(1, 10**11), processes=st.integers(1, 64))
@settings(deadline=None, max_examples=50)
def test_what_wins_back_its_compiling_does_so_with_more_tokens(tokens: int, more: int, weights: int, processes: int) -> None:
    assert not wins_back(0, weights=weights, processes=processes)
    if wins_back(tokens, weights=weights, processes=processes):
        assert wins_back(tokens + more, weights=weights, processes=processes)


@pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler here")
def test_what_is_in_the_cache_need_not_be_compiled() -> None:
    assert must_compile()
    assert isinstance(fresh(), Kernels)
    assert not must_compile()


def test_without_a_compiler_there_is_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert not must_compile()


def test_an_unknown_level_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMAHOME_CPU_LEVEL", "sse2")
    assert load_kernels() == fresh() == "LLAMAHOME_CPU_LEVEL is 'sse2'; it may be native, avx2, avx512, none"
    monkeypatch.setenv("LLAMAHOME_CPU_LEVEL", "none")
    assert load_kernels() == "LLAMAHOME_CPU_LEVEL is none" and not must_compile()
    assert not must_compile() and not expects_pairs()


def test_a_level_that_the_processor_lacks_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMAHOME_CPU_LEVEL", "avx512")
    monkeypatch.setattr(native, "_abilities", lambda: "flags : avx2 bmi1 bmi2 f16c fma movbe avx512f avx512bw avx512cd avx512dq")
    assert fresh() == "LLAMAHOME_CPU_LEVEL is avx512, but this processor has no avx512vl; it has native, avx2"
    assert not must_compile() and not expects_pairs()


@pytest.mark.skipif(native._compiler() is None or native.lacking("avx2") is not None, reason="no C++ compiler or no AVX2 here")
def test_each_level_has_a_library_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fresh()
    monkeypatch.setenv("LLAMAHOME_CPU_LEVEL", "avx2")
    assert must_compile() and not expects_pairs()
    small = fresh()
    assert isinstance(whole, Kernels) and isinstance(small, Kernels) and whole.name != small.name
    assert small.has("product", torch.float32) and not small.has("product", torch.bfloat16)
    assert {path.stem for path in cache_folder().iterdir()} == {whole.name, small.name}
