"""One thread that generates answers one after another, behind a queue of bounded length.

A job is cancelled by its event: a waiting one then ends at once, a running one after its next token. So nothing is generated for a client
that has left, and the server ends within a token.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from llamahome.conversation import Answer, ChatModel
from llamahome.model.sampling import Sampling

Piece = str | Answer | BaseException
"""Text of an answer; then the whole answer, or the error that ended it."""


class Busy(Exception):
    """As many requests wait as may."""


@dataclass(eq=False)
class Job:
    """One answer that is waited for."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)


class Worker:
    """The model and its thread."""

    def __init__(self, model: ChatModel, *, waiting: int) -> None:
        self._model, self._most = model, waiting + 1
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self._jobs: set[Job] = set()
        self._stopped = False

    def start(self, prompt: Sequence[int], sampling: Sampling, stops: Sequence[str]) -> Job:
        """Begin or queue an answer, whose pieces come in `Job.pieces`. Raises Busy."""
        if len(self._jobs) >= self._most or self._stopped:
            raise Busy
        loop, job = asyncio.get_running_loop(), Job()

        def write(text: str) -> None:
            if text:
                loop.call_soon_threadsafe(job.pieces.put_nowait, text)

        def work() -> Answer:
            if job.cancelled.is_set():
                return Answer("", "cancelled", len(prompt), 0, 0)
            return self._model.answer(prompt, sampling, write=write, stops=stops, cancelled=job.cancelled.is_set)

        def done(future: "asyncio.Future[Answer]") -> None:
            self._jobs.discard(job)
            job.pieces.put_nowait(asyncio.CancelledError() if future.cancelled() else future.exception() or future.result())

        self._jobs.add(job)
        loop.run_in_executor(self._thread, work).add_done_callback(done)
        return job

    async def encode(self, encode: Callable[[], list[int]]) -> list[int]:
        """Run a function that makes a prompt of a request, beside the loop of the server."""
        return await asyncio.get_running_loop().run_in_executor(None, encode)

    def stop(self) -> None:
        """Cancel what runs and waits, and take nothing more."""
        self._stopped = True
        for job in list(self._jobs):
            job.cancelled.set()
