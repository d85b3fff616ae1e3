"""Settings files that are not there or cannot be read, each with a help line that works when it is typed."""

import shutil
import subprocess

import pytest

from llamahome.config.load import load_config
from llamahome.errors import ConfigError


def test_a_missing_file_is_reported_with_the_nearest_name(tmp_path):
    (tmp_path / "quick.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path / "quik.yaml"], environment={}, folder=tmp_path)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("config.no-such-file", str(tmp_path / "quik.yaml"))
    assert str(tmp_path / "quick.yaml") in problem.hint


def test_a_folder_and_a_file_that_is_not_text_are_reported(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("model:\n  name: Zürich\n".encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path, tmp_path / "latin.yaml"], environment={}, folder=tmp_path)
    folder, latin = caught.value.problems
    assert (folder.code, latin.code) == ("config.unreadable", "config.not-text")
    assert folder.hint == f"--config {tmp_path / 'latin.yaml'}"
    if shutil.which("iconv"):
        subprocess.run(["sh", "-c", latin.hint], check=True)
        assert load_config([tmp_path / "latin.yaml"], environment={}, folder=tmp_path).config.model.name == "Zürich"
