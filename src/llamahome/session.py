"""What lives as long as a command: the other ranks, the terminal, the request to stop, the watchdog, and what is closed at the end."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from llamahome import signals
from llamahome.checkpoint.chosen import reading_time, require_same_start
from llamahome.checkpoint.store import Saved
from llamahome.config.check import config_warnings
from llamahome.config.load import LoadedConfig
from llamahome.distributed.agreement import require_agreement, settings_and_versions
from llamahome.distributed.standing import IDLE
from llamahome.distributed.watchdog import Watchdog, open_watchdog
from llamahome.distributed.world import World, open_world
from llamahome.monitoring.progress import Progress, open_progress
from llamahome.training.stop import StopRequest


@dataclass(frozen=True)
class Session:
    """The parts that live as long as the command."""

    world: World
    progress: Progress
    stop: StopRequest
    watchdog: Watchdog
    closing: ExitStack
    """Closes everything that is registered here when the command ends."""

    @contextmanager
    def phase(self, name: str, part: str) -> Iterator[None]:
        """Show `name` while the block runs, and end the process if it makes no progress; `part` is its name for the watchdog."""
        with self.progress.phase(name), self.watchdog.during(part):
            yield


@contextmanager
def open_session(loaded: LoadedConfig, *, phases: int = 3, saves: bool = True, resumes: Saved | None = None) -> Iterator[Session]:
    """Join the other ranks and open the terminal; handle signals if the command saves something. Everything is closed at the end.

    `resumes` is the checkpoint that this process has read before; the others may take longer to read theirs.
    """
    with ExitStack() as stack:
        notes: list[str] = []
        signals.leave_if_asked()
        stop = stack.enter_context(StopRequest().listening()) if saves else StopRequest()
        joining = open_world(
            loaded.config.distributed,
            say=notes.append,
            processor=loaded.config.model.backend == "cpu",
            reading_s=reading_time(resumes) if resumes is not None else 0.0,
        )
        world = stack.enter_context(joining)
        progress = open_progress(sys.stderr, world.is_main, phases=phases)
        stack.callback(progress.close)
        watchdog = stack.enter_context(open_watchdog(loaded.config.training.hang_timeout, world.rank_status).watching(IDLE))
        for note in notes:
            progress.say(note)
        if saves:
            require_same_start(world, resumes=resumes is not None)
        require_agreement(world, settings_and_versions(loaded.config))
        for warning in config_warnings(loaded.config, loaded.origins) if saves else ():
            progress.warn(warning.message, warning.hint or "it has no effect")
        yield Session(world, progress, stop, watchdog, stack)
