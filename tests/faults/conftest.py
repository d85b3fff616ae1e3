"""The scratch projects and machines of the end-to-end tests, and pairs of processes."""

from collections.abc import Iterator

import pytest
from tests.e2e.conftest import lanes, make_project, project, prompt, tiny_model  # noqa: F401
from tests.e2e.test_two_hosts import hosts  # noqa: F401
from tests.support.pair_of_ranks import Pair, two_prompts
from tests.support.projects import Project, Prompt


@pytest.fixture(scope="module")
def prompts(prompt: Prompt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prompt, Prompt]]:  # noqa: F811
    with two_prompts(prompt, tmp_path_factory.mktemp("pipes")) as both:
        yield both


@pytest.fixture
def pair(project: Project, prompts: tuple[Prompt, Prompt]) -> Pair:  # noqa: F811
    return Pair(project, prompts)
