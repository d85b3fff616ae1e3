from pathlib import Path

import pytest
from tests.support.checkpoints import save_step

from llamahome.checkpoint.target import names_run, resolve
from llamahome.errors import CheckpointError, UsageError
from llamahome.rundir import create_run, first_command, point_newest_to


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = create_run(None, "otter")
    save_step(run, 5)
    point_newest_to(run.root)
    return run


def _problem(target):
    with pytest.raises(CheckpointError) as caught:
        resolve(target)
    assert caught.value.exit_status == 7
    return caught.value.problems[0]


def test_a_checkpoint_or_run_is_found_by_every_kind_of_name(run):
    for target in (str(run.checkpoint(5)), "output/training/checkpoint-5", str(run.checkpoint(5).resolve())):
        paths, folder = resolve(target)
        assert (paths.run_id, folder) == (run.run_id, run.checkpoint(5).resolve())
    for target in (str(run.root), "output/training", run.run_id, "latest"):
        paths, folder = resolve(target)
        assert (paths.run_id, paths.root, folder) == (run.run_id, run.root.resolve(), None)


@pytest.mark.parametrize("content", ['{"command": ["sweep", "a b.jsonl", "--set", "lora.rank=2,4"]}', "{}", "[1", '{"command": 3}'])
def test_the_folder_of_a_sweep_names_the_command_that_goes_on_with_it(run, content):
    Path("output/sw").mkdir()
    Path("output/sw/command.json").write_text(content)
    problem = _problem("output/sw")
    assert "the folder of a sweep" in problem.message
    assert problem.hint == "llamahome sweep 'a b.jsonl' --set lora.rank=2,4" or "sweep" not in content


def test_latest_is_the_newest_run_by_date_if_there_is_no_link(run):
    Path("output/training").unlink()
    newer = Path("output/runs/29990101-000000-late")
    newer.mkdir()
    (newer / "run_id").write_text(newer.name)
    assert resolve("latest")[0].run_id == newer.name


def test_a_part_of_an_id_is_enough_if_only_one_run_has_it(run):
    assert names_run("otter") and resolve("otter")[0].run_id == run.run_id
    assert resolve(run.run_id[:-1])[0].run_id == run.run_id
    assert not names_run("badger") and not names_run("")
    second = create_run(None, "otter")
    with pytest.raises(UsageError) as caught:
        resolve("otter")
    problem = caught.value.problems[0]
    assert problem.code == "run.ambiguous" and problem.excerpt.splitlines() == [second.run_id, run.run_id]
    assert problem.hint == f"llamahome train-resume {second.run_id}"
    assert resolve(second.run_id)[0].run_id == second.run_id
    Path("otter").mkdir()
    assert "empty" in _problem("otter").message, "an existing folder of that name takes precedence"


def test_a_run_in_another_folder_keeps_its_id(run):
    other = create_run(Path("elsewhere/x"), "y")
    save_step(other, 1)
    assert resolve("elsewhere/x/checkpoint-1")[0].run_id == other.run_id


def test_the_error_describes_the_target_and_suggests_a_similar_run(run):
    Path("notes.txt").write_text("x")
    Path("bare").mkdir()
    Path("photos").mkdir()
    Path("photos/a.jpg").write_text("x")
    Path("checkpoint-500").mkdir()
    (run.root / "final").mkdir()
    (run.root / "final" / "adapter_config.json").write_text("{}")
    run.root.joinpath("checkpoint-6.tmp").mkdir()
    near_run = f"llamahome train-resume output/runs/{run.run_id}"
    expected = {
        "nowhere": ("no such", f"llamahome train-resume {run.run_id}"),
        "notes.txt": ("a file", f"llamahome train-resume {run.run_id}"),
        "bare": ("empty", f"llamahome train-resume {run.run_id}"),
        "photos": ("neither", f"llamahome train-resume {run.run_id}"),
        "checkpoint-500": ("no MANIFEST.json", f"llamahome train-resume {run.run_id}"),
        f"{run.root}/final": ("trained model", near_run),
        f"{run.root}/checkpoint-6.tmp": ("never finished", near_run),
        f"{run.root}/checkpoint-99": ("no such", near_run),
        "output/runs/otter": ("no such", f"llamahome train-resume {run.run_id}"),
        "oter": ("no such", f"llamahome train-resume {run.run_id}"),
    }
    for target, (what, hint) in expected.items():
        problem = _problem(target)
        assert problem.code == "checkpoint.not-a-checkpoint"
        assert what in problem.message, target
        assert problem.hint == hint, target


def test_without_any_run_the_hint_is_to_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _problem("latest").code == "checkpoint.none"
    assert _problem("x").hint == first_command()
