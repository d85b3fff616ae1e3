"""Examples made while the model trains: rows are tokenized when their step comes near, and never written anywhere.

The loader asks ahead of the loop from threads of its own; each waits for one worker process. Memory: the rows asked for and the workers.
"""

import os
import shlex

import numpy as np
from numpy.typing import NDArray

from llamahome.data.store.counts import SHOWN, Counts
from llamahome.data.store.reading import Reading
from llamahome.data.store.table import ExampleTable
from llamahome.data.store.workers import Workers
from llamahome.distributed.processors import usable_cpus
from llamahome.errors import DataError, Problem

_MOST_PROCESSES = 4
_PROCESSORS_EACH = 4
"""Processors of a training process for each one that tokenizes for it; one makes 500,000 tokens a second, more than most trainings take."""

_NICENESS = 10
"""The training comes first; what is left is enough to stay ahead of it."""


class Streamed:
    """Reads rows for the loader. `threads` calls of examples_of run at once. Close it."""

    def __init__(self, reading: Reading, *, processes: int | None = None) -> None:
        if processes is None:
            trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's word for the processes of this machine
            processes = min(_MOST_PROCESSES, max(1, usable_cpus() // trainers // _PROCESSORS_EACH))
        self.reading = reading
        self._workers = Workers(reading, processes=processes, niceness=_NICENESS, here=False)
        self.threads = max(1, processes)
        self._problems: dict[str, Problem] = {}

    def examples_of(self, rows: NDArray[np.int64]) -> ExampleTable:
        """The examples of these rows; raises DataError at once for a row that cannot be used, unless such rows are skipped."""
        return self.read(rows)[0]

    def read(self, rows: NDArray[np.int64]) -> tuple[ExampleTable, Counts]:
        """The same, and the counts."""
        table, counts = self._workers.read(rows.tolist())
        if counts.bad and (self.reading.data.on_bad_row == "error" or counts.overlong):
            raise DataError([*counts.problems, _stopped(self.reading, counts)])
        for problem in counts.problems:
            if len(self._problems) < SHOWN:
                self._problems[str(problem.where)] = problem
        return table, counts

    def problems(self) -> list[Problem]:
        """The first bad rows that were skipped."""
        return list(self._problems.values())

    def pids(self) -> list[int]:
        """Ids of the processes."""
        return self._workers.pids()

    def close(self) -> None:
        """End the processes; may be called twice."""
        self._workers.close()


def _stopped(reading: Reading, counts: Counts) -> Problem:
    """Why a stream ends here, and how to see what else would end it."""
    rest = "" if counts.overlong else "; --set data.on_bad_row=skip leaves such rows out"
    return Problem(
        code="data.bad-rows",
        message=f"{counts.bad:,} of the {counts.rows:,} rows that were just tokenized cannot be used",
        where=reading.opened[0],
        hint=f"llamahome data check {' '.join(map(shlex.quote, reading.opened))} lists all of them" + rest,
    )
