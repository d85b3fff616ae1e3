"""Kernels are compiled once and kept; a machine that cannot compile is told why and gets none."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.model.backends.cpu import native
from llamahome.model.backends.cpu.native import Kernels, cache_folder, load_kernels, must_compile, wins_back


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def fresh() -> Kernels | str:
    return load_kernels.__wrapped__()


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
