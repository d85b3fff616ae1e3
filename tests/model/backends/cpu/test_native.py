"""Kernels are compiled once and cached; a machine that cannot compile them gets the reason instead."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.model.backends.cpu import native
from llamahome.model.backends.cpu.native import (
    Kernels,
    cache_folder,
    compile_pays_off,
    expects_bf16_pairs,
    load_kernels,
    make_kernels,
    must_compile,
    requested_level,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LLAMAHOME_CPU_LEVEL", raising=False)


def load_fresh() -> Kernels | str:
    return make_kernels(requested_level())


@pytest.mark.medium
@pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler here")
def test_the_library_is_compiled_once_and_stored_in_the_users_cache() -> None:
    assert isinstance(load_fresh(), Kernels)
    (library,) = cache_folder().iterdir()
    made = library.stat().st_mtime_ns
    assert isinstance(load_fresh(), Kernels) and [path.stat().st_mtime_ns for path in cache_folder().iterdir()] == [made]
    assert cache_folder().stat().st_mode & 0o077 == 0


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert load_fresh() == "there is no C++ compiler (g++ or c++)"


def test_a_compiler_that_fails_is_a_reason_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no room' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert load_fresh() == f"{broken} could not compile them: no room"


@given(tokens=st.integers(0, 10**9), more=st.integers(0, 10**9), weights=st.integers(1, 10**11), processes=st.integers(1, 64))
@settings(deadline=None, max_examples=50)
def test_what_compile_pays_off_its_compiling_does_so_with_more_tokens(tokens: int, more: int, weights: int, processes: int) -> None:
    assert not compile_pays_off(0, weights=weights, processes=processes)
    if compile_pays_off(tokens, weights=weights, processes=processes):
        assert compile_pays_off(tokens + more, weights=weights, processes=processes)


@pytest.mark.medium
@pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler here")
def test_what_is_in_the_cache_need_not_be_compiled() -> None:
    assert must_compile()
    assert isinstance(load_fresh(), Kernels)
    assert not must_compile()


def test_without_a_compiler_there_is_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert not must_compile()


def test_an_unknown_level_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMAHOME_CPU_LEVEL", "sse2")
    assert load_kernels() == load_fresh() == "LLAMAHOME_CPU_LEVEL is 'sse2'; it may be native, avx2, avx512, none"
    monkeypatch.setenv("LLAMAHOME_CPU_LEVEL", "none")
    assert load_kernels() == "LLAMAHOME_CPU_LEVEL is none" and not must_compile()
    assert not must_compile() and not expects_bf16_pairs()


def test_a_level_that_the_processor_lacks_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMAHOME_CPU_LEVEL", "avx512")
    monkeypatch.setattr(native, "_processor_flags", lambda: "flags : avx2 bmi1 bmi2 f16c fma movbe avx512f avx512bw avx512cd avx512dq")
    assert load_fresh() == "LLAMAHOME_CPU_LEVEL is avx512, but this processor has no avx512vl; it has native, avx2"
    assert not must_compile() and not expects_bf16_pairs()


@pytest.mark.medium
@pytest.mark.skipif(native._compiler() is None or native.unsupported_reason("avx2") is not None, reason="no C++ compiler or no AVX2 here")
def test_each_level_has_a_library_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    native_kernels = load_fresh()
    monkeypatch.setenv("LLAMAHOME_CPU_LEVEL", "avx2")
    assert must_compile() and not expects_bf16_pairs()
    avx2_kernels = load_fresh()
    assert isinstance(native_kernels, Kernels) and isinstance(avx2_kernels, Kernels) and native_kernels.name != avx2_kernels.name
    assert avx2_kernels.has("product", torch.float32) and not avx2_kernels.has("product", torch.bfloat16)
    assert {path.stem for path in cache_folder().iterdir()} == {native_kernels.name, avx2_kernels.name}
