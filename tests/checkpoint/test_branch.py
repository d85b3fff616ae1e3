from pathlib import Path

import pytest
from tests.support.checkpoints import differences, save_step

from llamahome.checkpoint import branch as module
from llamahome.checkpoint.branch import branch
from llamahome.checkpoint.store import SaveFailed, choose, load
from llamahome.rundir import create_run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, new = create_run(None, "old"), create_run(Path("elsewhere"), "new")
    save_step(old, 5)
    return old, new


def _no_links(source, target):
    raise OSError(1, "no links on this disk")


@pytest.mark.parametrize("links", [True, False])
def test_the_new_run_begins_with_the_same_bytes_and_the_old_one_keeps_its_own(runs, monkeypatch, links):
    old, new = runs
    if not links:
        monkeypatch.setattr(module.os, "link", _no_links)
    folder = branch(old.checkpoint(5), 5, new)
    assert folder == choose(new, warn=lambda problem: pytest.fail(problem.message))
    assert differences(load(folder)) == []
    assert (old.checkpoint(5) / "MANIFEST.json").stat().st_nlink == 1 + links
    for path in sorted(old.checkpoint(5).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert differences(load(folder)) == []


def test_what_cannot_be_copied_leaves_nothing(runs, monkeypatch):
    old, new = runs
    monkeypatch.setattr(module.os, "link", _no_links)
    (old.checkpoint(5) / "model" / "vanished").symlink_to("nowhere")
    with pytest.raises(SaveFailed) as caught:
        branch(old.checkpoint(5), 5, new)
    assert "No such file" in caught.value.problems[0].message
    assert sorted(path.name for path in new.root.iterdir()) == ["run_id"]
