import random

import pytest
from tests.support.checkpoints import differences, save_step

from llamahome.checkpoint.store import choose, load
from llamahome.errors import CheckpointError
from llamahome.rundir import RunPaths


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    run = RunPaths(tmp_path / "run", "20260101-000000-brisk-otter")
    for step in (1, 2):
        save_step(run, step)
    return run


def _files(run):
    return sorted(path for path in run.checkpoint(2).rglob("*") if path.is_file())


def _is_found_and_survived(run, path):
    with pytest.raises(CheckpointError) as caught:
        load(run.checkpoint(2))
    assert [problem.where for problem in caught.value.problems] == [str(path)]
    assert caught.value.problems[0].hint == f"llamahome train-resume {run.checkpoint(1)}"
    problems = []
    assert differences(load(choose(run, warn=problems.append))) == []
    assert [problem.where for problem in problems] == [str(path)]


def test_one_flipped_bit_in_any_file_is_found_and_named_and_the_older_one_is_used(run):
    rng = random.Random(7)
    for path in _files(run):
        whole = path.read_bytes()
        for position in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(4))}:
            flipped = bytearray(whole)
            flipped[position] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            _is_found_and_survived(run, path)
        path.write_bytes(whole)
    assert choose(run, warn=lambda problem: pytest.fail(problem.render())) == run.checkpoint(2)


def test_a_torn_or_emptied_file_is_found_and_named_and_the_older_one_is_used(run):
    for path in _files(run):
        whole = path.read_bytes()
        for left in (whole[:-1], b"", whole + b"\0"):
            path.write_bytes(left)
            _is_found_and_survived(run, path)
        path.write_bytes(whole)


def test_a_lost_file_is_found_and_named_and_the_older_one_is_used(run):
    for path in _files(run):
        whole = path.read_bytes()
        path.unlink()
        problems = []
        assert choose(run, warn=problems.append) == run.checkpoint(1)
        assert len(problems) == 1 and problems[0].where in (str(path), str(path.parent))
        path.write_bytes(whole)
