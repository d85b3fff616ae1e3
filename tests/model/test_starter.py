"""The starter model where its folder cannot be written; that it is what it should be is shown by tests/e2e/test_starter.py."""

from pathlib import Path

import pytest

from llamahome.errors import MachineError
from llamahome.model import starter


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    said: list[str] = []
    with pytest.raises(MachineError) as caught:
        starter.fetch_starter(say=said.append, root=tmp_path / "data/models/base")
    (problem,) = caught.value.problems
    assert problem.code == "machine.model-not-writable" and "Not a directory" in problem.message and said == []
    assert problem.where == str(tmp_path / "data/models/base" / starter.STARTER)
