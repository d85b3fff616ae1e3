"""Examples that are made while the model trains: rows are tokenized shortly before their step and are not written to disk.

The loader calls this from its own threads, each of which waits for one worker process. Memory: the requested rows and the workers.
"""

import os
import shlex

import numpy as np
from numpy.typing import NDArray

from llamahome.data.store.counts import SHOWN, Counts
from llamahome.data.store.row_reader import ParallelReader, RowReader
from llamahome.data.store.table import ExampleTable
from llamahome.distributed.processors import usable_cpus
from llamahome.errors import DataError, Problem

_MAX_PROCESSES = 4
_PROCESSORS_PER_WORKER = 4
"""Processors of a training process per worker; one worker makes 500,000 tokens a second, more than most trainings consume."""
_NICENESS = 10
"""Training has priority; the processor time that is left is enough to stay ahead of it."""


class StreamedExamples:
    """Reads rows for the loader; `threads` calls of examples_of run at once. Close it."""

    def __init__(self, reading: RowReader, *, processes: int | None = None) -> None:
        if processes is None:
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
            processes = min(_MAX_PROCESSES, max(1, usable_cpus() // ranks_here // _PROCESSORS_PER_WORKER))
        self.reading = reading
        self._reader = ParallelReader(reading, processes=processes, niceness=_NICENESS, local=False)
        self.threads = max(1, processes)
        self._problems: dict[str, Problem] = {}

    def examples_of(self, rows: NDArray[np.int64]) -> ExampleTable:
        """The examples of these rows. Raises DataError for a row that cannot be used, unless the settings skip such rows."""
        return self.read(rows)[0]

    def read(self, rows: NDArray[np.int64]) -> tuple[ExampleTable, Counts]:
        """`examples_of`, and the counts."""
        table, counts = self._reader.read(rows.tolist())
        if counts.bad and (self.reading.data.on_bad_row == "error" or counts.overlong):
            raise DataError([*counts.problems, _bad_rows(self.reading, counts)])
        for problem in counts.problems:
            if len(self._problems) < SHOWN:
                self._problems[str(problem.where)] = problem
        return table, counts

    def problems(self) -> list[Problem]:
        """The first bad rows that were skipped."""
        return list(self._problems.values())

    def pids(self) -> list[int]:
        """Ids of the worker processes."""
        return self._reader.pids()

    def close(self) -> None:
        """End the worker processes; may be called twice."""
        self._reader.close()


def _bad_rows(reading: RowReader, counts: Counts) -> Problem:
    """Why the stream ends, and which commands list or skip the bad rows."""
    skip = "" if counts.overlong else "; --set data.on_bad_row=skip leaves such rows out"
    return Problem(
        code="data.bad-rows",
        message=f"{counts.bad:,} of the {counts.rows:,} rows that were just tokenized cannot be used",
        where=reading.opened[0],
        hint=f"llamahome data check {' '.join(map(shlex.quote, reading.opened))} lists all of them" + skip,
    )
