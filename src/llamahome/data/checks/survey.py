"""One pass over every row of a source, in order, in several processes where that saves time.

A process takes the next stretch of rows whenever it is done with one; results come back in the order of the rows, and only a few wait.
A process that dies ends the survey with an error, and whatever ends the survey ends the processes.
"""

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from llamahome.data.checks.rowcheck import Looked, Looker, Scope
from llamahome.data.files.sources import Source
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.distributed.processors import usable_cpus
from llamahome.errors import MachineError, Problem

_STRETCH = 1024
"""Rows looked at together."""
_AHEAD = 3
"""Stretches a process that are asked for before their turn; bounds what waits."""
_TOKENS_RATE, _STRUCTURE_RATE = 3.5e6, 35e6
"""Bytes a second of one process, with and without tokens. Measured: benchmarks/check_speed.py; one process tokenizes on two processors."""
_START = 12.0
"""Seconds of work from which more processes pay: they take about 3 to start."""

_looker: Looker | None = None
"""Of this process, when it was started by `survey`."""


def survey(scope: Scope, source: Source, tokenizer: ChatTokenizer | None, *, processes: int) -> Iterator[Looked]:
    """Every row of the source, a stretch at a time. Raises DataError when a file changes, MachineError when a process dies."""
    stretches = [range(begin, min(begin + _STRETCH, len(source))) for begin in range(0, len(source), _STRETCH)]
    processes = min(processes, len(stretches))
    if processes < 2:
        looker = Looker(scope, source=source, tokenizer=tokenizer)
        gc.freeze()  # what was imported is not searched for garbage again and again; measured: 20 % faster without tokens
        try:
            yield from map(looker.look, stretches)
        finally:
            gc.unfreeze()
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_open, initargs=(scope,))
    try:
        yield from _in_order(pool, stretches, processes * _AHEAD)
    except BrokenProcessPool as error:
        message = "a process that read the data was ended by the system, most likely for want of memory"
        hint = "again with --processes 1, which needs less memory"
        raise MachineError(Problem(code="machine.process-lost", message=message, hint=hint)) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def processes_for(paths: Sequence[str], *, tokens: bool) -> int:
    """As many processes as pay for files of this size."""
    size = sum(Path(path).stat().st_size for path in paths)
    return usable_cpus() if size / (_TOKENS_RATE if tokens else _STRUCTURE_RATE) > _START else 1


def _in_order(pool: ProcessPoolExecutor, stretches: Sequence[range], ahead: int) -> Iterator[Looked]:
    waiting: deque[Future[Looked]] = deque()
    for stretch in stretches:
        waiting.append(pool.submit(_look, stretch))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _open(scope: Scope) -> None:
    global _looker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every processor has its process
    _looker = Looker(scope)
    gc.freeze()


def _look(stretch: range) -> Looked:
    assert _looker is not None
    return _looker.look(stretch)
