import shutil
from pathlib import Path

import pytest
from tests.support.checkpoints import PRINTS, differences, save, save_step, state_at, tensors_at

from llamahome import durable
from llamahome.checkpoint import manifest
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.checkpoint.store import SaveFailed, branch, choose, compare_fingerprints, load, require_space, space_needed
from llamahome.errors import CheckpointError
from llamahome.monitoring.environment import write_environment
from llamahome.rundir import RunPaths, as_typed, create_run, free_beside


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunPaths(tmp_path / "run", "20260101-000000-brisk-otter")


def _names(run):
    return sorted(path.name for path in run.root.iterdir())


def test_a_saved_checkpoint_is_loaded_unchanged(run):
    folder = save_step(run, 3)
    saved = load(folder)
    assert differences(saved) == []
    assert _names(run) == ["checkpoint-3"]
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "MANIFEST.json",
        "config.yaml",
        "trainer_state.json",
        "model/adapter_config.json",
        "model/adapter_model.safetensors",
        "optimizer/optimizer.json",
        "optimizer/optimizer.safetensors",
    }


def test_the_same_state_is_not_written_twice(run):
    folder = save_step(run, 3)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    save_step(run, 3, elapsed_s=99.0)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(run):
    folder = save_step(run, 3)
    (folder / "config.yaml").write_text("torn")
    assert differences(load(save_step(run, 3))) == []
    assert _names(run) == ["checkpoint-3"]


def test_another_state_at_the_same_step_replaces_the_old_one(run):
    save_step(run, 3)
    assert load(save_step(run, 3, tokens=5)).state.tokens == 5
    assert _names(run) == ["checkpoint-3"]


def test_leftovers_of_killed_saves_are_removed(run):
    for step in (2, 3):
        (run.root / f"checkpoint-{step}.tmp" / "model").mkdir(parents=True)
    save_step(run, 3)
    assert _names(run) == ["checkpoint-3"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("I/O error (os error 28)")])
def test_after_a_full_disk_the_partial_checkpoint_is_removed(run, error):
    save_step(run, 1)

    def write_model(folder: Path) -> None:
        (folder / "half").write_bytes(b"x" * 1000)
        raise error

    with pytest.raises(SaveFailed) as caught:
        save(
            run,
            state=state_at(2),
            config_text="",
            fingerprints=PRINTS,
            write_model=write_model,
            optimizer_tensors={},
            optimizer_values={},
        )
    problem = caught.value.problems[0]
    assert problem.code == "checkpoint.write-failed" and "earlier ones are untouched" in problem.message
    assert caught.value.exit_status == 7
    assert _names(run) == ["checkpoint-1"]
    assert differences(load(run.checkpoint(1))) == []


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ZeroDivisionError])
def test_other_errors_pass_unchanged_and_leave_nothing(run, raised):
    def write_model(folder: Path) -> None:
        raise raised

    with pytest.raises(raised):
        save(
            run, state=state_at(2), config_text="", fingerprints=PRINTS, write_model=write_model, optimizer_tensors={}, optimizer_values={}
        )
    assert _names(run) == []


def test_too_little_space_is_an_error_with_numbers(run):
    with pytest.raises(SaveFailed) as caught:
        require_space(run.root, 2**60)
    assert "needs about 1048576.0 TiB and" in caught.value.problems[0].message


def test_the_space_needed_is_that_of_the_newest_checkpoint(run):
    assert space_needed(run, tensors_at(1, size=2**20)) == 12 * 2**20 + 6 + 8 * 2**20
    folder = save_step(run, 1)
    assert space_needed(run, {}) == manifest.read(folder).total_bytes + 2**20


def test_the_newest_intact_checkpoint_is_chosen_and_damaged_ones_are_named(run):
    for step in (9, 10, 11):
        save_step(run, step)
    (run.checkpoint(11) / "trainer_state.json").unlink()
    (run.checkpoint(10) / "MANIFEST.json").write_text("{")
    problems = []
    assert choose(run, warn=problems.append) == run.checkpoint(9)
    assert [problem.where for problem in problems] == [
        str(run.checkpoint(11) / "trainer_state.json"),
        str(run.checkpoint(10) / "MANIFEST.json"),
    ]


def test_a_run_without_an_intact_checkpoint_is_an_error(run):
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            choose(run, warn=lambda problem: None)
        problem = caught.value.problems[0]
        assert problem.code == "checkpoint.none"
        assert problem.hint.startswith("llamahome ") and problem.hint.endswith(
            f" --config {as_typed(run.config)} --output {free_beside(run.root)}"
        )
        (save_step(run, 1) / "config.yaml").unlink()


def test_the_hint_to_start_again_names_the_data_of_the_run(run):
    (save_step(run, 1, extra={"data_path": ["my rows.jsonl", "b.jsonl"]}) / "config.yaml").unlink()
    with pytest.raises(CheckpointError) as caught:
        choose(run, warn=lambda problem: None)
    assert caught.value.problems[0].hint.startswith("llamahome train 'my rows.jsonl' b.jsonl --config ")


def test_a_run_that_ended_before_its_first_checkpoint_is_started_again_on_its_own_data(run):
    write_environment(run.environment, ["llamahome", "train", "my rows.jsonl"], ["my rows.jsonl", "b.jsonl"])
    with pytest.raises(CheckpointError) as caught:
        choose(run, warn=lambda problem: None)
    assert caught.value.problems[0].hint.startswith("llamahome train 'my rows.jsonl' b.jsonl --config ")


def test_a_damaged_checkpoint_names_its_files_and_an_older_intact_one(run):
    for step in (1, 2, 3, 4):
        save_step(run, step)
    shutil.rmtree(run.checkpoint(2) / "model")
    (run.checkpoint(3) / "config.yaml").unlink()
    (run.checkpoint(3) / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        load(run.checkpoint(3))
    assert [Path(problem.where).name for problem in caught.value.problems] == ["config.yaml", "trainer_state.json"]
    assert caught.value.problems[-1].hint == f"llamahome train-resume {run.checkpoint(1)}"


def test_changed_data_and_base_are_refused_unless_allowed_by_name():
    other = Fingerprints(data="x" * 64, base="y" * 64)
    compare_fingerprints(PRINTS, PRINTS, allowed=set())
    compare_fingerprints(PRINTS, other, allowed={"data", "base"})
    with pytest.raises(CheckpointError) as caught:
        compare_fingerprints(PRINTS, other, allowed=set())
    assert [(problem.code, problem.hint) for problem in caught.value.problems] == [
        ("checkpoint.data-changed", "--allow-changed data"),
        ("checkpoint.base-changed", "--allow-changed base"),
    ]
    with pytest.raises(CheckpointError) as caught:
        compare_fingerprints(PRINTS, other, allowed={"data"})
    assert [problem.code for problem in caught.value.problems] == ["checkpoint.base-changed"]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, new = create_run(None, "old"), create_run(Path("elsewhere"), "new")
    save_step(old, 5)
    return old, new


def _no_links(source, target):
    raise OSError(1, "no links on this disk")


@pytest.mark.parametrize("links", [True, False])
def test_a_branch_has_the_same_bytes_and_does_not_depend_on_the_old_run(runs, monkeypatch, links):
    old, new = runs
    if not links:
        monkeypatch.setattr(durable.os, "link", _no_links)
    folder = branch(old.checkpoint(5), 5, new)
    assert folder == choose(new, warn=lambda problem: pytest.fail(problem.message))
    assert differences(load(folder)) == []
    assert (old.checkpoint(5) / "MANIFEST.json").stat().st_nlink == 1 + links
    for path in sorted(old.checkpoint(5).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert differences(load(folder)) == []


def test_a_failed_branch_leaves_nothing(runs, monkeypatch):
    old, new = runs
    monkeypatch.setattr(durable.os, "link", _no_links)
    (old.checkpoint(5) / "model" / "vanished").symlink_to("nowhere")
    with pytest.raises(SaveFailed) as caught:
        branch(old.checkpoint(5), 5, new)
    assert "No such file" in caught.value.problems[0].message
    assert sorted(path.name for path in new.root.iterdir()) == ["run_id"]
