import math
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.checkpoints import save_step

from llamahome.checkpoint.retention import apply, oldest_of_ages, set_aside, which_to_delete
from llamahome.rundir import RunPaths

CHECKPOINTS = st.dictionaries(st.integers(0, 40), st.none() | st.floats(0, 9) | st.just(math.nan), max_size=9).map(
    lambda each: list(each.items())
)


@settings(deadline=None, max_examples=200)
@given(CHECKPOINTS, st.integers(1, 4), st.integers(0, 3), st.data())
def test_the_last_the_best_and_the_verified_checkpoint_are_kept(checkpoints, keep_last, keep_best, data):
    steps = sorted(step for step, _ in checkpoints)
    verified = data.draw(st.sampled_from(steps)) if steps else None
    deleted = which_to_delete(checkpoints, keep_last=keep_last, keep_best=keep_best, newest_verified=verified)
    candidates = [step for step in steps if verified is not None and step <= verified]
    assert verified not in deleted
    assert not set(deleted) & set(candidates[-keep_last:])
    assert set(deleted) <= set(candidates)
    left = {step: loss for step, loss in checkpoints if step in candidates and step not in deleted}
    finite = sorted(loss for step, loss in checkpoints if step in candidates and loss is not None and math.isfinite(loss))
    assert sorted(loss for loss in left.values() if loss is not None and math.isfinite(loss))[:keep_best] == finite[:keep_best]
    assert len(left) <= keep_last + keep_best


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(1, 400), min_size=1, max_size=60), st.lists(st.floats(1, 5000), min_size=1, max_size=4, unique=True))
def test_a_ladder_of_ages_stays_small_and_reaches_back_to_the_first(pauses, ages):
    kept, now = {}, 0.0
    for step, pause in enumerate(pauses):
        now += pause
        kept[step] = now
        ladder = oldest_of_ages(kept, ages)
        kept = {step: seconds for step, seconds in kept.items() if step in ladder}
        assert len(kept) <= len(ages) + 1 and 0 in kept
        for age in ages:  # the gap around an age is at most the age and two pauses
            older = [seconds for seconds in kept.values() if now - seconds >= age]
            assert older or now - pauses[0] < age


def test_without_ages_nothing_is_kept_for_its_age():
    assert oldest_of_ages({1: 5.0, 2: 9.0}, []) == set()


def test_nothing_is_deleted_while_nothing_is_verified():
    assert which_to_delete([(1, 1.0), (2, 0.5), (3, None)], keep_last=1, keep_best=0, newest_verified=None) == []


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunPaths(tmp_path / "run", "20260101-000000-brisk-otter")


def _steps(run):
    return [step for step, _ in run.checkpoints()]


def _never(problem):
    raise AssertionError(problem.render())


def test_only_the_last_and_the_best_are_left(run):
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5), (4, None), (5, 1.7), (6, None)):
        save_step(run, step, eval_loss=loss)
    assert apply(run, keep_last=2, keep_best=1, warn=_never) == [1, 3, 4]
    assert _steps(run) == [2, 5, 6]
    assert sorted(path.name for path in run.root.iterdir()) == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]


def test_a_ladder_of_ages_keeps_old_ones_besides(run):
    for step in range(1, 10):
        save_step(run, step, elapsed_s=60.0 * step)
        apply(run, keep_last=1, keep_best=0, keep_ages=[150.0, 300.0], warn=_never)
    assert 9 in _steps(run) and 1 in _steps(run) and len(_steps(run)) == 4


def test_best_loss_counts_if_the_loss_of_the_step_was_not_written(run):
    save_step(run, 1, best_loss=1.0, best_step=1)
    save_step(run, 2, best_loss=1.0, best_step=1)
    save_step(run, 3, best_loss=1.0, best_step=1)
    assert apply(run, keep_last=1, keep_best=1, warn=_never) == [2]


def test_a_damaged_newest_checkpoint_deletes_nothing_that_is_needed(run):
    for step in (1, 2, 3):
        save_step(run, step)
    (run.checkpoint(3) / "config.yaml").write_text("torn")
    problems = []
    assert apply(run, keep_last=1, keep_best=0, warn=problems.append) == [1]
    assert _steps(run) == [2, 3]
    assert [problem.code for problem in problems] == ["checkpoint.damaged"]


def test_folders_of_other_runs_and_of_other_programs_are_never_touched(run, tmp_path):
    for step in (1, 2):
        save_step(replace(run, run_id="another"), step)
    (run.root / "checkpoint-3").mkdir()
    save_step(RunPaths(tmp_path, run.run_id), 4)
    (run.root / "checkpoint-4").symlink_to(tmp_path / "checkpoint-4")
    shutil.copytree(run.checkpoint(1), run.root / "mine")
    save_step(run, 5)
    save_step(run, 6)
    assert apply(run, keep_last=1, keep_best=0, warn=_never) == [5]
    assert _steps(run) == [1, 2, 3, 4, 6]
    assert (tmp_path / "checkpoint-4").is_dir() and (run.root / "mine").is_dir()


def test_leftovers_of_a_killed_deletion_are_removed(run):
    save_step(run, 1)
    (run.root / ".trash-checkpoint-9" / "model").mkdir(parents=True)
    assert apply(run, keep_last=1, keep_best=0, warn=_never) == []
    assert sorted(path.name for path in run.root.iterdir()) == ["checkpoint-1"]


def test_resuming_an_older_checkpoint_renames_later_ones_and_deletes_nothing(run):
    for step in (1, 2, 3):
        save_step(run, step)
    moved = set_aside(run, after=1)
    assert [path.name for path in moved] == ["superseded-checkpoint-2", "superseded-checkpoint-3"]
    assert all((path / "MANIFEST.json").is_file() for path in moved)
    assert [step for step, _ in run.checkpoints()] == [1]
    assert set_aside(run, after=1) == []


def test_of_equal_evaluations_the_earlier_checkpoint_is_kept():
    assert which_to_delete([(1, 2.0), (2, 1.0), (3, 1.0), (4, 3.0)], keep_last=1, keep_best=1, newest_verified=4) == [1, 3]
