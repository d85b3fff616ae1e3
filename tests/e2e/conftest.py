"""A scratch project for each test, the prompt that all of them share, and lanes for tests of hundreds of runs."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.models import save_tiny
from tests.support.projects import SETTINGS, Project, Prompt, chats, write_rows

from llamahome.model.backends.cpu.native import load_kernels

LANES = 4


@pytest.fixture(scope="session")
def prompt() -> Iterator[Prompt]:
    process = Prompt()
    yield process
    process.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def make_project(prompt: Prompt, tiny_model: Path) -> Callable[[Path], Project]:
    """Fills a folder: the model `tiny`, chats.jsonl with 24 rows, and settings for quick float32 runs of 5 steps."""
    load_kernels()  # before the first run: short ones do not compile, and a library that comes in between would change the bits

    def make(folder: Path) -> Project:
        (folder / "data/models/base").mkdir(parents=True)
        shutil.copytree(tiny_model, folder / "data/models/base/tiny")
        write_rows(folder / "chats.jsonl", chats(24))
        (folder / ".config").mkdir()
        (folder / ".config/training_config.yaml").write_text(SETTINGS, encoding="utf-8")
        return Project(folder, prompt)

    return make


@pytest.fixture
def lanes(make_project: Callable[[Path], Project], prompt: Prompt, tmp_path: Path) -> Iterator[list[Project]]:
    """Projects whose commands run at the same time, when each has a thread of the test."""
    made = [make_project(tmp_path / f"lane-{number}/project") for number in range(LANES)]
    for each in made:
        each.prompt = prompt.lane(each.folder.parent / "pipes")
    yield made
    for each in made:
        each.prompt.close()


@pytest.fixture
def project(make_project: Callable[[Path], Project], tmp_path: Path) -> Project:
    return make_project(tmp_path / "project")
