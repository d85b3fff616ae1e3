"""F8 before the first step: a signal during imports, while rows are tokenized in processes of their own, and while the model is loaded."""

import random
import signal
import time

import pytest
from tests.e2e.test_hangs import many_rows
from tests.support.disturbed import committed, forget
from tests.support.processes import left_of
from tests.support.projects import Project

PHASES = {"libraries are imported": "loading torch", "rows are tokenized": ", format messages", "the model is loaded": " back end, "}
"""A part of the line that a run prints when the phase begins."""
LONGEST_S = {"libraries are imported": 1.0, "rows are tokenized": 1.0, "the model is loaded": 0.2}
"""How long after that a signal comes at most; the phases may be shorter."""
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


def words_of(project: Project, processes: int) -> tuple[str, ...]:
    return (*many_rows(project), "--max-steps", "30", "--world-size", str(processes))


def disturbed(project: Project, words: tuple[str, ...], phase: str, *sent: str, after: float = 0.0) -> tuple[int, str]:
    """Exit status and stderr of a command that gets the signals some seconds after the line of `phase`."""
    lines = []
    with project.start(*words) as run:
        for line in run.stderr:
            lines.append(line)
            if PHASES[phase] in line and sent:
                time.sleep(after)
                for each in sent:
                    run.send_signal(signal.Signals[each])
                    time.sleep(0.2)
                sent = ()
        run.wait(timeout=120)
    return run.returncode, "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_before_the_first_step_costs_nothing(project: Project, processes: int, phase: str) -> None:
    words = words_of(project, processes)
    project.shell(*words).expect(0)
    straight = project.run.weights()
    for number, sent in enumerate(SIGNALS):
        forget(project, prepared=phase == "rows are tokenized")
        status, err = disturbed(project, words, phase, sent, after=random.Random(number).uniform(0, LONGEST_S[phase]))
        assert left_of(project, 10) == []
        assert "Traceback" not in err and status in ((75,) if phase != "libraries are imported" else (75, 130)), f"{sent}: {status}\n{err}"
        whole = committed(project)
        assert bool(whole) is (status == 75) and not list((project.folder / "output").glob("**/*.tmp")), f"{sent}: {status}\n{err}"
        print(f"F8, {phase}, {processes} processes, {sent}: {status}")
        project.shell(*(("train-resume", "latest") if whole else words)).expect(0)
        assert project.run.weights() == straight


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("sent", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGKILL",)])
def test_who_leaves_at_once_while_rows_are_tokenized_leaves_nobody_behind(project: Project, processes: int, sent: tuple[str, ...]) -> None:
    """The prepared parts stay, and the next run goes on with them."""
    words = words_of(project, processes)
    status, err = disturbed(project, words, "rows are tokenized", *sent, after=0.1)
    assert status == (-signal.SIGKILL if sent == ("SIGKILL",) else 130) and "Traceback" not in err, f"{status}\n{err}"
    assert left_of(project, 150) == []
    asked_to_save = sent == ("SIGKILL",) and processes == 2  # the launcher died, and its ranks save what there is before they end
    assert asked_to_save or not committed(project)
    project.shell(*words).expect(0)
