"""What an export says when reading the trained model fails."""

import errno
from pathlib import Path

import pytest

from llamahome.errors import ConfigError
from llamahome.exported_model import raise_if_unreadable


def test_a_file_that_cannot_be_read_is_not_called_one_that_cannot_be_written(tmp_path: Path) -> None:
    goal, weights = tmp_path / "out", tmp_path / "run/final/model.safetensors"
    with pytest.raises(ConfigError) as refused:
        raise_if_unreadable(OSError(errno.EIO, "Input/output error", str(weights)), goal)
    (problem,) = refused.value.problems
    assert (problem.code, problem.where) == ("model.unreadable", str(weights))
    for written in (tmp_path / "out.tmp/model.safetensors", tmp_path / "out.tmp", tmp_path):
        raise_if_unreadable(OSError(errno.ENOSPC, "No space left on device", str(written)), goal)
    raise_if_unreadable(OSError(errno.ENOSPC, "No space left on device"), goal)
