"""Kernels are compiled once and kept; a machine that cannot compile is told why and gets none."""

from pathlib import Path

import pytest

from llamahome.model import native
from llamahome.model.native import Kernels, cache_folder, load_kernels


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
