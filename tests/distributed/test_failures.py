import pytest

from llamahome.checkpoint.store import SaveFailed
from llamahome.distributed.failures import PEER_LOST, record, recorded
from llamahome.errors import CheckpointError, DataError, LlamaHomeError, MachineError, Problem, Stopped


def _problem(code, **more):
    return Problem(code=code, message="what happened", **more)


def test_an_error_comes_back_as_it_was(tmp_path):
    problems = [_problem("data.bad-json", where="a:1", excerpt="{", hint="mend it"), _problem("data.empty")]
    record(DataError(problems), rank=3, folder=tmp_path)
    (failure,) = recorded(tmp_path)
    assert type(failure.error) is DataError
    assert failure.error.problems == tuple(problems) and failure.rank == 3


def test_a_kind_that_the_launcher_does_not_know_comes_back_as_its_nearest_one(tmp_path):
    record(SaveFailed(_problem("checkpoint.write-failed")), rank=0, folder=tmp_path)
    assert type(recorded(tmp_path)[0].error) is CheckpointError


def test_a_defect_keeps_its_traceback(tmp_path):
    try:
        raise ZeroDivisionError("a defect of ours\nwith two lines")
    except ZeroDivisionError as error:
        record(error, rank=1, folder=tmp_path)
    (failure,) = recorded(tmp_path)
    (problem,) = failure.error.problems
    assert type(failure.error) is LlamaHomeError and problem.code == "distributed.process-failed"
    assert problem.message == "process 1 failed: ZeroDivisionError: a defect of ours"
    assert "test_failures.py" in problem.excerpt and problem.excerpt.endswith("with two lines")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_the_first_cause_is_told_before_a_stop_and_before_a_lost_peer(tmp_path, order):
    errors = {
        0: MachineError(_problem(PEER_LOST)),
        1: Stopped(_problem("run.stopped")),
        2: DataError(_problem("data.empty")),
        3: MachineError(_problem(PEER_LOST)),
    }
    for rank in order:
        record(errors[rank], rank=rank, folder=tmp_path)
    assert [failure.rank for failure in recorded(tmp_path)][:2] == [2, 1]


def test_a_record_that_was_cut_short_is_passed_over(tmp_path):
    (tmp_path / "rank-0.json").write_text('{"time": 1')
    assert recorded(tmp_path) == []
