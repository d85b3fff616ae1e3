"""The scratch projects and machines of the end-to-end tests."""

from tests.e2e.conftest import lanes, make_project, project, prompt, tiny_model  # noqa: F401
from tests.e2e.test_two_hosts import hosts  # noqa: F401
