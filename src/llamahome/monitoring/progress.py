"""The progress of a run: a panel on a terminal and in a notebook, key=value lines elsewhere, nothing on ranks other than the main one.

Progress goes to stderr. The lines of `finish` are results and go to stdout.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llamahome.monitoring.display import RunSummary


class Progress:
    """Reports what a run is doing. This class shows nothing and is used on every rank but the main one; views override its methods."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show `name` while the block runs, and how long the block took."""
        yield

    def say(self, line: str) -> None:
        """Show one line."""

    def warn(self, message: str, consequence: str) -> None:
        """Show what is wrong and what follows from it."""
        self._emphasize(f"warning: {message}; {consequence}")

    def alert(self, step: int, text: str, help: str) -> None:
        """Show that something needs a look, and what to do."""
        self._emphasize(f"alert: step {step}: {text}; {help}")

    def _emphasize(self, line: str) -> None:
        """Show one line that people must not miss."""
        self.say(line)

    def start(self, summary: RunSummary) -> None:
        """Show the summary; training begins."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics that Recorder.write returned for `step`."""

    def evaluating(self, step: int) -> None:
        """Show that the evaluation after `step` begins."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the result of the evaluation after `step`; `metrics` is empty if there are no held-out rows."""

    def saved(self, step: int, path: Path) -> None:
        """Show that the checkpoint of `step` is complete."""

    def finish(self, lines: Sequence[str]) -> None:
        """Print the result on stdout; this is the last call but for `close`."""

    def close(self) -> None:
        """Restore the terminal, also after an error. May be called twice."""


def open_progress(stream: TextIO, is_main: bool, *, phases: int | None = None) -> Progress:
    """The panel for a terminal or a notebook, else plain lines; nothing on other ranks. `phases` is the number of phases."""
    if not is_main:
        return Progress()
    if "IPython" in sys.modules:
        from llamahome.monitoring.notebook import NotebookProgress, notebook

        if (publish := notebook()) is not None:
            return NotebookProgress(publish, phases=phases)
    if stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown"):
        from llamahome.monitoring.panel import PanelProgress  # rich, which only a terminal needs

        return PanelProgress(stream, phases=phases)
    from llamahome.monitoring.plain import PlainProgress

    return PlainProgress(stream, phases=phases)
