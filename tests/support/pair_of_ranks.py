"""The two ranks of a run as two commands in one folder, without a launcher: each can be struck and killed by itself.

Both are forks of prompts with the imports done (tests/support/prompt.py), so a run of two processes takes about three seconds.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.support.projects import Answer, Project, Prompt, RunFiles, Strike
from tests.support.workers import free_port

Strikes = Sequence[Strike]
NOBODY: tuple[Strikes, Strikes] = ((), ())


class Pair:
    """Two processes that train together in the folder of a project."""

    def __init__(self, project: Project, prompts: tuple[Prompt, Prompt]) -> None:
        self.project, self._prompts = project, prompts
        self._typists = [Project(project.folder, prompt, _typed=10_000 * (rank + 1)) for rank, prompt in enumerate(prompts)]

    @property
    def run(self) -> RunFiles:
        """The newest run."""
        return self.project.run

    def type(
        self,
        *words: str,
        at: tuple[Strikes, Strikes] = NOBODY,
        meanwhile: Callable[[], None] = lambda: None,
        variables: tuple[dict[str, str], dict[str, str]] = ({}, {}),
        machines: int = 1,
    ) -> list[Answer]:
        """Run `llamahome <words>` as both ranks to their ends, and `meanwhile` in this thread; their answers by rank."""
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
        with ThreadPoolExecutor(2) as threads:
            running: list[Future[Answer]] = []
            for rank, typist in enumerate(self._typists):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank // machines), "LOCAL_WORLD_SIZE": str(2 // machines)}
                running.append(threads.submit(typist.type, *words, at=at[rank], **shared, **place, **variables[rank]))
            meanwhile()
            return [each.result() for each in running]

    def kill(self, ranks: Sequence[int], sent: str = "SIGKILL") -> None:
        """Send a signal to the processes of these ranks, if they still run."""
        for rank in ranks:
            if (pid := self._prompts[rank].pid) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.Signals[sent])

    def is_running(self) -> bool:
        """Whether one of the processes still runs."""
        return any(prompt.pid is not None for prompt in self._prompts)


@contextmanager
def two_prompts(prompt: Prompt, folder: Path) -> Iterator[tuple[Prompt, Prompt]]:
    """Two lanes of a prompt; `folder` gets their pipes."""
    folder.mkdir(exist_ok=True)
    lanes = (prompt.lane(folder / "0"), prompt.lane(folder / "1"))
    try:
        yield lanes
    finally:
        for lane in lanes:
            lane.close()
