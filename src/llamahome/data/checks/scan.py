"""One pass over every row of a source, in order, in several processes where that saves time.

Each process takes the next block of rows when it has finished one. Results come back in the order of the rows, and few of them wait.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from llamahome.data.checks.rowcheck import CheckedRows, CheckScope, RowChecker
from llamahome.data.files.sources import Source
from llamahome.data.store.workers import WorkerFailed, WorkerPool
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.distributed.processors import usable_cpus
from llamahome.errors import MachineError, Problem

BLOCK_ROWS = 1024
"""Rows that are checked together."""
_AHEAD = 3
"""Blocks per process that are requested before their turn; limits how many results wait."""
_COLLECT_AFTER = 20_000
"""Objects after which the collector looks for cycles, of which rows have none; measured: 4 % faster than after Python's 700."""
_TOKENS_RATE, _STRUCTURE_RATE = 3.5e6, 35e6
"""Bytes per second of one process, with and without tokens. Measured with benchmarks/check_speed.py; tokenizing uses two processors."""
_WORTH_S = 12.0
"""Seconds of work for which more processes save time: they take about 3 to start."""


def scan(
    scope: CheckScope, source: Source, tokenizer: ChatTokenizer | None, *, processes: int, block_rows: int = BLOCK_ROWS
) -> Iterator[CheckedRows]:
    """Check every row of the source, one block after the other. Raises DataError if a file changes, MachineError if a process fails."""
    blocks = [range(begin, min(begin + block_rows, len(source))) for begin in range(0, len(source), block_rows)]
    processes = min(processes, len(blocks))
    if processes < 2:
        checker = RowChecker(scope, source=source, tokenizer=tokenizer)
        gc.freeze()  # so that the collector skips the imported libraries; measured: 20 % faster without tokens
        thresholds = gc.get_threshold()
        gc.set_threshold(_COLLECT_AFTER, *thresholds[1:])
        try:
            yield from map(checker.check, blocks)
        finally:
            gc.set_threshold(*thresholds)
            gc.unfreeze()
        return
    pool = WorkerPool(_open_checker, scope, processes=processes)
    threads = ThreadPoolExecutor(processes)
    try:
        results: deque[Future[CheckedRows]] = deque()
        for block in blocks:
            results.append(threads.submit(pool, block))
            if len(results) > processes * _AHEAD:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    except WorkerFailed as failure:
        message = f"a process that read the data {failure.reason}"
        hint = "again with --processes 1, which needs less memory"
        raise MachineError(Problem(code="machine.process-lost", message=message, hint=hint)) from failure
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        pool.close()
        threads.shutdown()


def processes_for(paths: Sequence[str], *, tokens: bool) -> int:
    """How many processes save time for files of this size."""
    size = sum(Path(path).stat().st_size for path in paths)
    return usable_cpus() if size / (_TOKENS_RATE if tokens else _STRUCTURE_RATE) > _WORTH_S else 1


def _open_checker(scope: CheckScope) -> Callable[[range], CheckedRows]:
    return RowChecker(scope).check
