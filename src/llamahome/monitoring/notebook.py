"""The progress of a run in a notebook: one output below the cell, which is replaced as the run goes on.

The lines of the phases and the panel are one text in one display, so that a long run leaves one output and not thousands. It is replaced
at most twice a second. IPython is never imported: a notebook has loaded it, and its publisher takes the text as plain text and as HTML.
"""

import html
import io
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from llamahome.monitoring.display import PhaseLabels, RunSummary, printable
from llamahome.monitoring.panel import PanelState, PanelView

Publish = Callable[[dict[str, str], str, bool], None]
"""Takes the text by its MIME type, the name of the display, and whether that display is there already and is replaced."""
_SECONDS_BETWEEN_DRAWS = 0.5
_LINES_OF_A_DISPLAY = 200
"""A run that says more begins another display, so that replacing one stays cheap and no line is lost."""
_WIDTH = 110
_STYLE = "white-space:pre-wrap;line-height:normal;font-family:monospace"
_numbers = itertools.count(1)


def notebook() -> Publish | None:
    """What shows text below the cell that runs; None in a script, and in IPython on a terminal."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None else None
    if shell is None or type(shell).__module__.startswith("IPython."):  # a notebook's shell is of ipykernel, or of Colab
        return None

    def publish(data: dict[str, str], name: str, replace: bool) -> None:
        shell.display_pub.publish(data, transient={"display_id": name}, update=replace)

    return publish


class NotebookProgress(PanelView):
    """Shows phases, messages and the panel in one display."""

    def __init__(self, publish: Publish, *, phases: int | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._publish = publish
        self._now = now
        self._labels = PhaseLabels(phases)
        self._drawn: float | None = None
        self._is_behind = False
        self._begin()

    def _begin(self) -> None:
        self._lines: list[str] = []
        self._name = f"llamahome-{os.getpid()}-{next(_numbers)}"
        self._is_there = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show `[2/6] data ...` while the block runs, and its time at the end."""
        label, started, outcome = self._labels.next(name), self._now(), "failed after "
        self.say(label)
        lines, place = self._lines, len(self._lines) - 1
        try:
            yield
            outcome = ""
        finally:
            lines[place] = f"{label} {outcome}{self._now() - started:.1f} s"
            if lines is self._lines:
                self._redraw()
            else:  # another display has begun meanwhile, and the old one stays as it is
                self.say(lines[place])

    def say(self, line: str) -> None:
        """Show one line above the panel."""
        if len(self._lines) >= _LINES_OF_A_DISPLAY:
            self._begin()
        self._lines.append(printable(line))
        self._redraw()

    def start(self, summary: RunSummary) -> None:
        """Show the panel."""
        self._panel = PanelState(summary, now=self._now)
        self._redraw()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics, unless the last draw was less than half a second ago."""
        super().update(step, metrics)
        self._is_behind = self._panel is not None
        if self._is_behind and (self._drawn is None or self._now() - self._drawn >= _SECONDS_BETWEEN_DRAWS):
            self._redraw()

    def close(self) -> None:
        """Show the last step; the display stays."""
        if self._is_behind:
            self._redraw()

    def _redraw(self) -> None:
        text = "\n".join(self._lines)
        if self._panel is not None:
            drawn = io.StringIO()
            Console(file=drawn, width=_WIDTH, force_terminal=False, force_jupyter=False, color_system=None).print(self._panel.draw())
            text = f"{text}\n{drawn.getvalue()}".strip("\n")
        data = {"text/plain": text, "text/html": f'<pre style="{_STYLE}">{html.escape(text)}</pre>'}
        self._publish(data, self._name, self._is_there)
        self._is_there, self._is_behind, self._drawn = True, False, self._now()
