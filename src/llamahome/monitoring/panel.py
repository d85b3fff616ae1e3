"""The progress of a run on a terminal: one line with a clock per phase, then a panel that is drawn twice a second.

The clock moves during a slow step too, because a thread draws the panel from the last metrics. Long lines wrap. A draw takes a few
milliseconds of one core, outside the training's thread. The cursor stays visible, so that a killed run leaves a usable terminal.
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

from llamahome.monitoring.display import PhaseLabels, RunSummary, StepTimer, print_results, printable, sparkline, summary_rows
from llamahome.monitoring.progress import Progress
from llamahome.units import show_bytes, show_count, show_seconds

_DRAWS_PER_SECOND = 2
_LOSSES_KEPT = 10_000
_BAR_WIDTH = 12


class PanelView(Progress):
    """Passes what happens on to a panel, which is there from the first step on."""

    _panel: "PanelState | None" = None

    def alert(self, step: int, text: str, help: str) -> None:
        """Show `alert: step 12: text; help` above the panel, and its first part in the panel."""
        super().alert(step, text, help)
        if self._panel is not None:
            self._panel.alert(step, text)
            self._redraw()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics at the next draw."""
        if self._panel is not None:
            self._panel.update(step, metrics)

    def evaluating(self, step: int) -> None:
        """Show that an evaluation is running."""
        if self._panel is not None:
            self._panel.evaluating = True
            self._redraw()

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the new evaluation."""
        if self._panel is not None:
            self._panel.evaluating = False
            self._panel.evaluation = (step, dict(metrics)) if metrics else self._panel.evaluation
            self._redraw()

    def saved(self, step: int, path: Path) -> None:
        """Show the new checkpoint."""
        if self._panel is not None:
            self._panel.checkpoint = path.name
            self._redraw()

    def finish(self, lines: Sequence[str]) -> None:
        """Leave the last panel where it is, and print the result on stdout."""
        self.close()
        print_results(lines)

    def _redraw(self) -> None:
        """Draw the panel, where no thread does."""


class PanelProgress(PanelView):
    """Draws phases and the panel with rich; honours NO_COLOR."""

    def __init__(
        self,
        stream: TextIO,
        *,
        phases: int | None = None,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
        hints: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        """`hints` are the last lines of the panel: name and text; None for how to watch and stop the run of this process."""
        self._hints = hints
        self._console = console or Console(file=stream, highlight=False)
        self._now = now
        self._labels = PhaseLabels(phases)
        self._live: Live | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a line with a running clock while the block runs, and leave the line when the block has ended."""
        self.close()
        label, started, outcome = self._labels.next(name), self._now(), "failed after "

        def line() -> Text:
            return Text(f"{label} {self._now() - started:.1f} s")

        self._show(line, transient=True)
        try:
            yield
            outcome = ""
        finally:
            self.close()
            self._print(f"{label} {outcome}{self._now() - started:.1f} s")

    def say(self, line: str) -> None:
        """Show one line above the panel."""
        self._print(line)

    def _emphasize(self, line: str) -> None:
        self._print(line, style="yellow")

    def start(self, summary: RunSummary) -> None:
        """Begin to draw the panel."""
        self.close()
        self._panel = PanelState(summary, now=self._now, unicode=self._console.encoding.startswith("utf"), hints=self._hints)
        self._show(self._panel.draw, transient=False)

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
        self._console.print(Text(printable(line), style=style or ""), soft_wrap=True)


class PanelState:
    """The values on the panel and their layout."""

    def __init__(
        self,
        summary: RunSummary,
        *,
        now: Callable[[], float],
        unicode: bool = True,
        hints: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        self._summary = summary
        self._hints = _own_hints(summary) if hints is None else hints
        self._timer = StepTimer(summary, now)
        self._unicode = unicode
        self._step = summary.first_step
        self._metrics: Mapping[str, float] = {}
        self._losses: deque[float] = deque(maxlen=_LOSSES_KEPT)
        self.evaluating = False
        self.evaluation: tuple[int, dict[str, float]] | None = None
        self.checkpoint: str | None = None
        self._alerts = 0
        self._last_alert = ""

    def alert(self, step: int, text: str) -> None:
        """Count an alert, and show it at the next draw."""
        self._alerts += 1
        self._last_alert = f"step {step:,}: {text}"

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of `step` for the next draw."""
        self._timer.update(step)
        self._step, self._metrics = step, dict(metrics)
        if "train/loss" in metrics:
            self._losses.append(metrics["train/loss"])

    def draw(self) -> Panel:
        """Return the panel with the current values."""
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        rows = [(name, Text(text)) for name, text in summary_rows(self._summary)]
        rows += [
            ("progress", Text(self._progress())),
            ("loss", Text(self._loss())),
            ("update", Text(self._update())),
            ("speed", Text(self._speed())),
            ("memory", Text(self._memory())),
            *([("alerts", Text(f"{self._alerts}, newest: {self._last_alert}"))] if self._alerts else []),
            ("files", Text(self._files())),
            *((name, Text(text)) for name, text in self._hints),
        ]
        for name, content in rows:
            table.add_row(name, content)
        return Panel(table, title=Text(self._summary.run_id), title_align="left", border_style="dim", padding=(0, 1))

    def _progress(self) -> str:
        done, horizon, epochs = self._step, self._summary.horizon, self._summary.epochs
        filled = _BAR_WIDTH * done // horizon
        full, empty = "━─" if self._unicode else "#-"
        bar = f"{full * filled}{empty * (_BAR_WIDTH - filled)}"
        text = f"{bar} step {done:,} of {horizon:,}, {show_seconds(self._timer.elapsed())} elapsed"
        left = self._timer.left()
        text += f", {show_seconds(left)} left" if left is not None else ""
        return text + f", epoch {epochs * done / horizon:.2f}/{epochs:g}" + (", evaluating ..." if self.evaluating else "")

    def _loss(self) -> str:
        if not self._losses:
            return "none yet: the first step may take longer than the others" + self._last_evaluation()
        names = {"train/reward": "reward", "train/pair_accuracy": "pair accuracy", "train/answer_accuracy": "answer accuracy"}
        measured = "".join(f", {words} {self._metrics[name]:.4f}" for name, words in names.items() if name in self._metrics)
        line = sparkline(self._losses, width=24, unicode=self._unicode)
        return f"{self._losses[-1]:.4f}  {line}{measured}" + self._last_evaluation()

    def _last_evaluation(self) -> str:
        if self.evaluation is None:
            return ""
        step, metrics = self.evaluation
        loss = metrics.get("eval/loss")
        shown = ("eval/loss", "eval/perplexity", "eval/token_accuracy")
        scores = "".join(f", {name.removeprefix('eval/')} {value:.4f}" for name, value in metrics.items() if name not in shown)
        return f"  held-out {loss:.4f}{scores} at step {step}" if loss is not None else ""

    def _update(self) -> str:
        norm, rate = self._metrics.get("train/grad_norm"), self._metrics.get("train/learning_rate")
        return f"gradient norm {norm:.3f}, learning rate {rate:.2e}" if norm is not None and rate is not None else "-"

    def _speed(self) -> str:
        metrics = self._metrics
        if "speed/tokens_per_s" not in metrics:
            return "-"
        text = f"{show_count(metrics['speed/tokens_per_s'])} tokens/s"
        if "speed/mfu" in metrics:
            text += f", {metrics['speed/mfu']:.0%} of the peak"
        parts = {name.removeprefix("time/"): seconds for name, seconds in metrics.items() if name.startswith("time/")}
        total = sum(parts.values())
        shares = [f"{name} {seconds / total:.0%}" for name, seconds in parts.items() if total and seconds / total >= 0.005]
        return text + (": " + ", ".join(shares) if shares else "")

    def _memory(self) -> str:
        metrics = self._metrics
        if "memory/rss" not in metrics:
            return "-"
        text = f"{show_bytes(metrics['memory/rss'])} now, {show_bytes(metrics.get('memory/peak', metrics['memory/rss']))} at most"
        if "memory/gpu_allocated" in metrics and "memory/gpu_reserved" in metrics:
            text += f"; GPU {show_bytes(metrics['memory/gpu_allocated'])} used, {show_bytes(metrics['memory/gpu_reserved'])} reserved"
        return text

    def _files(self) -> str:
        return f"{self._summary.folder}" + (f", newest {self.checkpoint}" if self.checkpoint else "")


def _own_hints(summary: RunSummary) -> list[tuple[str, str]]:
    return [
        ("watch", f"llamahome runs show {summary.run_id}"),
        ("stop", "Ctrl-C saves a checkpoint and stops; a second one leaves at once"),
    ]
