import pytest

from llamahome.checkpoint.store import SaveFailed
from llamahome.distributed.failures import PEER_LOST, read_failures, write_failure
from llamahome.errors import CheckpointError, DataError, LlamaHomeError, MachineError, Problem, Stopped


def _problem(code, **more):
    return Problem(code=code, message="what happened", **more)


def test_an_error_is_read_back_unchanged(tmp_path):
    problems = [_problem("data.bad-json", where="a:1", excerpt="{", hint="repair it"), _problem("data.empty")]
    write_failure(DataError(problems), rank=3, folder=tmp_path)
    (failure,) = read_failures(tmp_path)
    assert type(failure.error) is DataError
    assert failure.error.problems == tuple(problems) and failure.rank == 3


def test_a_class_that_errors_does_not_define_is_read_back_as_its_base_class(tmp_path):
    write_failure(SaveFailed(_problem("checkpoint.write-failed")), rank=0, folder=tmp_path)
    assert type(read_failures(tmp_path)[0].error) is CheckpointError


def test_a_defect_keeps_its_traceback(tmp_path):
    try:
        raise ZeroDivisionError("a defect of ours\nwith two lines")
    except ZeroDivisionError as error:
        write_failure(error, rank=1, folder=tmp_path)
    (failure,) = read_failures(tmp_path)
    (problem,) = failure.error.problems
    assert type(failure.error) is LlamaHomeError and problem.code == "distributed.process-failed"
    assert problem.message == "process 1 failed: ZeroDivisionError: a defect of ours"
    assert "test_failures.py" in problem.excerpt and problem.excerpt.endswith("with two lines")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_a_cause_sorts_before_a_stop_and_before_a_lost_peer(tmp_path, order):
    errors = {
        0: MachineError(_problem(PEER_LOST)),
        1: Stopped(_problem("run.stopped")),
        2: DataError(_problem("data.empty")),
        3: MachineError(_problem(PEER_LOST)),
    }
    for rank in order:
        write_failure(errors[rank], rank=rank, folder=tmp_path)
    assert [failure.rank for failure in read_failures(tmp_path)][:2] == [2, 1]


def test_a_truncated_file_is_ignored(tmp_path):
    (tmp_path / "rank-0.json").write_text('{"time": 1')
    assert read_failures(tmp_path) == []
