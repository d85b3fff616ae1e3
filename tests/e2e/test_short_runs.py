"""`training.compile: auto` compiles only where the run is long enough to win the time back."""

from pathlib import Path

import pytest
from tests.support.models import backend_named, save_tiny
from tests.support.projects import Project
from tests.support.runs import ALONE

from llamahome.config.load import load_config, with_values
from llamahome.model.backends.cpu.native import cache_folder, has_compiler, make_kernels
from llamahome.resolve import too_short_to_compile, with_resolved

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")


@pytest.mark.medium
def test_a_short_run_on_a_fresh_machine_trains_plainly_says_why_and_stays_so(project: Project, tmp_path: Path) -> None:
    fresh = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = project.shell("train", "chats.jsonl", "--max-steps", "1", **fresh).expect(0)
    assert "too few to win back the time of compiling; it trains without" in done.err
    assert not list(tmp_path.glob("cache/llamahome/kernels/*.so"))
    assert "compile: false" in project.run.paths.config.read_text()
    again = project.shell("train-resume", "latest", "--set", "training.max_steps=2").expect(0)
    assert "compil" not in again.err and "compile: false" in project.run.paths.config.read_text()


@pytest.mark.medium
def test_a_long_run_a_kept_library_and_a_clear_wish_are_left_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base, said, loaded = save_tiny(tmp_path / "tiny"), [], load_config()
    wished = with_values(loaded, {"training.compile": True}, origin="test")

    def left(asked, tokens: float) -> bool | str:
        short = too_short_to_compile(asked.config.training, base, backend_named("cpu"), ALONE, tokens=tokens, say=said.append)
        return with_resolved(asked, short).config.training.compile

    assert left(loaded, 100) is False and len(said) == 1
    assert left(loaded, 1e12) == "auto" and left(wished, 100) is True and len(said) == 1
    assert not cache_folder().exists()
    make_kernels("native")
    assert left(loaded, 100) == "auto" and len(said) == 1
