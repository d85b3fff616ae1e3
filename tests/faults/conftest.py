"""The scratch projects of the end-to-end tests."""

from tests.e2e.conftest import make_project, project, prompt, tiny_model  # noqa: F401
