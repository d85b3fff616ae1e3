"""The progress of a run on a terminal: a ticking line per phase, then one panel that is drawn again twice a second.

The panel keeps its numbers between draws, so a slow step still shows a moving clock. Long lines fold rather than lose their end. A draw
takes a few milliseconds of one core, outside the training's thread. The cursor stays visible, so a killed run leaves a sane terminal.
"""

import atexit
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llamahome.monitoring.progress import Pace, PhaseLabels, RunSummary, describe, one_line, show_results
from llamahome.monitoring.sparkline import sparkline
from llamahome.units import show_bytes, show_count, show_seconds

_DRAWS_PER_SECOND = 2
_LOSSES_KEPT = 10_000
_BAR_WIDTH = 12


class PanelProgress:
    """Phases and the panel, drawn with rich on a terminal; honours NO_COLOR."""

    def __init__(
        self, stream: TextIO, *, phases: int | None = None, console: Console | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(file=stream, highlight=False)
        self._now = now
        self._labels = PhaseLabels(phases)
        self._live: Live | None = None
        self._board: Board | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A line with a running clock while the block runs; it stays when the block has ended."""
        self.close()
        label, started, ending = self._labels.next(name), self._now(), "failed after "

        def line() -> Text:
            return Text(f"{label} {self._now() - started:.1f} s")

        self._show(line, transient=True)
        try:
            yield
            ending = ""
        finally:
            self.close()
            self._print(f"{label} {ending}{self._now() - started:.1f} s")

    def say(self, line: str) -> None:
        """Show one line above the panel."""
        self._print(line)

    def warn(self, message: str, consequence: str) -> None:
        """`warning: message; consequence`, above the panel."""
        self._print(f"warning: {message}; {consequence}", style="yellow")

    def start(self, summary: RunSummary) -> None:
        """Draw the panel from now on."""
        self.close()
        board = Board(summary, now=self._now, unicode=self._console.encoding.startswith("utf"))
        self._board = board
        self._show(board.draw, transient=False)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """New numbers for the next draw."""
        if self._board is not None:
            self._board.update(step, metrics)

    def evaluating(self, step: int) -> None:
        """The next draws say so."""
        if self._board is not None:
            self._board.evaluating = True

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """A new evaluation for the next draw."""
        if self._board is not None:
            self._board.evaluating = False
            self._board.evaluation = (step, dict(metrics)) if metrics else self._board.evaluation

    def saved(self, step: int, path: Path) -> None:
        """A new checkpoint for the next draw."""
        if self._board is not None:
            self._board.checkpoint = path.name

    def finish(self, lines: Sequence[str]) -> None:
        """Leave the last panel on the screen and show the result on stdout."""
        self.close()
        show_results(lines)

    def close(self) -> None:
        """Stop drawing; the last panel stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)

    def _show(self, draw: Callable[[], RenderableType], *, transient: bool) -> None:
        self._live = Live(
            get_renderable=draw,
            console=self._console,
            refresh_per_second=_DRAWS_PER_SECOND,
            transient=transient,
            redirect_stdout=False,
        )
        self._live.start(refresh=True)
        self._console.show_cursor(True)
        atexit.register(self.close)

    def _print(self, line: str, *, style: str | None = None) -> None:
        self._console.print(Text(one_line(line), style=style or ""), soft_wrap=True)


class Board:
    """The numbers on the panel, and how they are laid out."""

    def __init__(self, summary: RunSummary, *, now: Callable[[], float], unicode: bool = True) -> None:
        self._summary = summary
        self._pace = Pace(summary, now)
        self._unicode = unicode
        self._step = summary.first_step
        self._metrics: Mapping[str, float] = {}
        self._losses: deque[float] = deque(maxlen=_LOSSES_KEPT)
        self.evaluating = False
        self.evaluation: tuple[int, dict[str, float]] | None = None
        self.checkpoint: str | None = None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take over the metrics of `step`."""
        self._pace.reached(step)
        self._step, self._metrics = step, dict(metrics)
        if "train/loss" in metrics:
            self._losses.append(metrics["train/loss"])

    def draw(self) -> Panel:
        """The panel as it is now."""
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        rows = [(name, Text(text)) for name, text in describe(self._summary)]
        rows += [
            ("progress", Text(self._progress())),
            ("loss", Text(self._loss())),
            ("update", Text(self._update())),
            ("speed", Text(self._speed())),
            ("memory", Text(self._memory())),
            ("files", Text(self._files())),
            ("watch", Text(f"llamahome runs show {self._summary.run_id}")),
            ("stop", Text("Ctrl-C saves a checkpoint and stops; a second one leaves at once")),
        ]
        for name, content in rows:
            table.add_row(name, content)
        return Panel(table, title=Text(self._summary.run_id), title_align="left", border_style="dim", padding=(0, 1))

    def _progress(self) -> str:
        done, horizon, epochs = self._step, self._summary.horizon, self._summary.epochs
        filled = _BAR_WIDTH * done // horizon
        full, empty = "━─" if self._unicode else "#-"
        words = f"{full * filled}{empty * (_BAR_WIDTH - filled)} step {done:,} of {horizon:,}, {show_seconds(self._pace.elapsed())} gone"
        left = self._pace.left()
        words += f", {show_seconds(left)} left" if left is not None else ""
        return words + f", epoch {epochs * done / horizon:.2f}/{epochs:g}" + (", evaluating ..." if self.evaluating else "")

    def _loss(self) -> str:
        if not self._losses:
            return "the first step is not done; it may take longer than the others" + self._last_evaluation()
        return f"{self._losses[-1]:.4f}  {sparkline(self._losses, width=24, unicode=self._unicode)}" + self._last_evaluation()

    def _last_evaluation(self) -> str:
        if self.evaluation is None:
            return ""
        step, metrics = self.evaluation
        loss = metrics.get("eval/loss")
        return f"  held-out {loss:.4f} at step {step}" if loss is not None else ""

    def _update(self) -> str:
        norm, rate = self._metrics.get("train/grad_norm"), self._metrics.get("train/learning_rate")
        return f"gradient norm {norm:.3f}, learning rate {rate:.2e}" if norm is not None and rate is not None else "-"

    def _speed(self) -> str:
        metrics = self._metrics
        if "speed/tokens_per_s" not in metrics:
            return "-"
        words = f"{show_count(metrics['speed/tokens_per_s'])} tokens/s"
        if "speed/mfu" in metrics:
            words += f", {metrics['speed/mfu']:.0%} of the peak"
        parts = {name.removeprefix("time/"): seconds for name, seconds in metrics.items() if name.startswith("time/")}
        total = sum(parts.values())
        shares = [f"{name} {seconds / total:.0%}" for name, seconds in parts.items() if total and seconds / total >= 0.005]
        return words + (": " + ", ".join(shares) if shares else "")

    def _memory(self) -> str:
        metrics = self._metrics
        if "memory/rss" not in metrics:
            return "-"
        words = f"{show_bytes(metrics['memory/rss'])} now, {show_bytes(metrics['memory/peak'])} at most"
        if "memory/gpu_allocated" in metrics:
            words += f"; GPU {show_bytes(metrics['memory/gpu_allocated'])} used, {show_bytes(metrics['memory/gpu_reserved'])} reserved"
        return words

    def _files(self) -> str:
        return f"{self._summary.folder}" + (f", newest {self.checkpoint}" if self.checkpoint else "")
