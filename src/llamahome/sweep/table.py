"""The table of a sweep: its settings from the best held-out figure on, the spread over seeds, and which cannot be told apart.

The figure is the loss, or an accuracy where constants of the loss are listed.
"""

import csv
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from llamahome.sweep.grid import Trial
from llamahome.sweep.trials import Progress, best_of
from llamahome.units import aligned, many, show_seconds


@dataclass(frozen=True)
class Row:
    """One setting with all of its seeds."""

    values: dict[str, str]
    trials: list[tuple[Trial, Progress]]

    @property
    def figure(self) -> str:
        """What the setting is ranked by."""
        return self.trials[0][0].figure

    @property
    def last(self) -> list[float]:
        """The held-out figure of the final model of each finished seed: after its last step, or of the step that became final/."""
        found = [final_value(trial, progress) for trial, progress in self.trials if progress.state == "finished"]
        return [value for value in found if value is not None and math.isfinite(value)]

    @property
    def mean(self) -> float | None:
        """Over the finished seeds; None unless all have finished."""
        return statistics.fmean(self.last) if len(self.last) == len(self.trials) else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.last) if self.mean is not None and len(self.last) > 1 else None

    @property
    def noise(self) -> float:
        """Of its mean: that of one evaluation and the standard error over seeds, as two standard errors."""
        if self.trials[0][0].chosen_by != "loss":  # a score of whole answers, whose number and range are not known: seeds say how it varies
            return 2 * (self.deviation or 0.0) / math.sqrt(max(1, len(self.last)))
        targets = max((progress.targets for _, progress in self.trials), default=0)
        of_one = 2.0 if self.figure == "loss" else 1.0  # two standard deviations of one target, and of one answer that is right or not
        return math.hypot(of_one / math.sqrt(max(1, targets)), 2 * (self.deviation or 0.0) / math.sqrt(max(1, len(self.last))))

    @property
    def cost(self) -> float | None:
        """The mean, so that less is better."""
        return None if self.mean is None else self.mean if self.figure == "loss" else -self.mean


def shown_figure(figure: str) -> str:
    """The figure in words: loss, pair accuracy, answer accuracy."""
    return figure.replace("_", " ")


def final_value(trial: Trial, progress: Progress) -> float | None:
    """The held-out figure of the final model of a trial; None if it was not evaluated."""
    if not progress.losses:
        return None
    if trial.final != "best":
        return progress.figures.get(max(progress.losses))
    best = best_of(replace(progress, figure=trial.chosen_by))
    return None if best is None else progress.figures.get(best[0])


def _cost(trial: Trial, progress: Progress) -> float:
    value = final_value(trial, progress)
    return math.inf if value is None else value if trial.figure == "loss" else -value


def make_rows(trials: Sequence[tuple[Trial, Progress]]) -> list[Row]:
    """One row for each setting, the finished ones first and by the mean figure of their final models."""
    rows: dict[tuple[tuple[str, str], ...], Row] = {}
    for trial, progress in trials:
        rows.setdefault(trial.setting, Row(trial.values, [])).trials.append((trial, progress))
    return sorted(rows.values(), key=lambda row: (row.cost is None, row.cost or 0.0, row.trials[0][0].number))


def tied(rows: Sequence[Row]) -> int:
    """How many rows from the top cannot be told apart: their means differ from the first by less than the noise of the difference."""
    if not rows or rows[0].cost is None:
        return 0
    top, least = rows[0], rows[0].cost
    count = 0
    for row in rows:
        if row.cost is None or row.cost - least > math.hypot(row.noise, top.noise):
            break
        count += 1
    return count


def best_trial(rows: Sequence[Row]) -> Trial | None:
    """The trial of the first row whose final model has the best figure."""
    if not rows or rows[0].mean is None:
        return None
    return min(rows[0].trials, key=lambda pair: (_cost(*pair), pair[0].number))[0]


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every trial in the order of the table, under names that do not change; a missing or infinite loss is null.

    `deviation` and `noise` are of `ranked_by`, whose value for the final model is `final_value`, and `mean_value` over the seeds.
    """
    found = []
    for rank, row in enumerate(rows, 1):
        for trial, progress in row.trials:
            best = best_of(replace(progress, figure="loss"))
            last = progress.losses[max(progress.losses)] if progress.losses else None
            found.append(
                {
                    "rank": rank if row.mean is not None else None,
                    "trial": trial.name,
                    "values": trial.values,
                    "seed": trial.seed,
                    "state": progress.state,
                    "reason": progress.reason,
                    "step": progress.step,
                    "steps": progress.horizon,
                    "first_loss": _finite(progress.first),
                    "best_loss": _finite(best[1] if best else None),
                    "best_step": best[0] if best else None,
                    "last_loss": _finite(last),
                    "mean_loss": row.mean if row.figure == "loss" else None,
                    "ranked_by": row.figure,
                    "final_value": _finite(final_value(trial, progress)),
                    "mean_value": row.mean,
                    "deviation": row.deviation,
                    "noise": row.noise if progress.targets else None,
                    "seconds": round(progress.seconds, 3),
                    "run_id": progress.run_id,
                }
            )
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def as_csv(rows: Sequence[Row]) -> str:
    """The records with one column for each listed key."""
    lines = [{**record["values"], **{key: value for key, value in record.items() if key != "values"}} for record in records(rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def table_lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table for people."""
    keys = list(rows[0].values)
    figure = rows[0].figure
    if figure != "loss":
        why = "" if rows[0].trials[0][0].chosen_by == figure else ": the losses of runs with other constants do not compare"
        yield f"ranked by held-out {shown_figure(figure)}, higher first{why}"
    cells = [[*keys, "seed", "last", "best", "at step", "steps", "time", "state"]]
    for row in rows:
        for trial, progress in row.trials:
            best = best_of(progress)
            last = f"{progress.figures[max(progress.figures)]:.4f}" if progress.figures else "-"
            figures = [last, f"{best[1]:.4f}" if best else "-", str(best[0]) if best else "-"]
            steps = f"{progress.step}/{progress.horizon}" if progress.horizon else "-"
            cells.append([*trial.values.values(), str(trial.seed), *figures, steps, show_seconds(progress.seconds), progress.state])
    yield from aligned(cells)
    for row in rows:
        for trial, progress in row.trials:
            if progress.state == "failed":
                yield f"trial {trial.name}: {progress.reason}"
    for row in rows:
        if row.deviation is not None and row.mean is not None:
            shown = ", ".join(f"{key}={value}" for key, value in row.values.items()) or "all"
            yield f"{shown}: {row.mean:.4f} +- {row.deviation:.4f} (standard deviation over {many(len(row.last), 'seed')})"
    counts = sorted({progress.targets for row in rows for _, progress in row.trials if progress.targets})
    if figure == "loss" and len(counts) > 1:
        yield f"the losses are means over other held-out tokens ({counts[0]:,} to {counts[-1]:,} of them), so they hardly compare"
    if (count := tied(rows)) > 1:
        yield f"the first {count} settings cannot be told apart: they differ by less than the noise of {rows[0].noise:.4f}"


_WIDTH, _LEFT, _LINE, _TOP = 860, 330, 26, 46


def draw(rows: Sequence[Row]) -> str:
    """An SVG with one line for each setting, in the order of the table; a setting without a finished trial says why."""
    losses = [loss for row in rows for loss in row.last]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    span = (high - low) or 1.0

    def at(loss: float) -> float:
        return _LEFT + 20 + (loss - low) / span * (_WIDTH - _LEFT - 60)

    height = _TOP + _LINE * len(rows) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-size="15">Held-out {_title(rows)} of the final model; a dot for each run</text>',
    ]
    for number, row in enumerate(rows):
        y = _TOP + _LINE * number + _LINE / 2
        name = ", ".join(f"{key.partition('.')[2] or key}={value}" for key, value in row.values.items()) or "all"
        short = name if len(name) <= 46 else name[:45] + "…"
        parts.append(f'<text x="{_LEFT}" y="{y + 4}" text-anchor="end">{escape(short)}</text>')
        if row.last:
            parts.append(f'<line x1="{_LEFT + 20}" x2="{_WIDTH - 40}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts += [f'<circle cx="{at(loss):.1f}" cy="{y}" r="4.5" fill="#2563eb" fill-opacity="0.7"/>' for loss in row.last]
        if row.mean is not None and len(row.last) > 1:
            parts.append(
                f'<line x1="{at(row.mean):.1f}" x2="{at(row.mean):.1f}" y1="{y - 9}" y2="{y + 9}" stroke="#111" stroke-width="2"/>'
            )
        if not row.last:
            ends = dict.fromkeys(f"{progress.state} after step {progress.step}" for _, progress in row.trials)
            parts.append(f'<text x="{_LEFT + 20}" y="{y + 4}" fill="#888">{escape(", ".join(ends))}</text>')
    bottom = _TOP + _LINE * len(rows) + 20
    if losses:
        parts.append(f'<text x="{_LEFT + 20}" y="{bottom}">{low:.4f}</text>')
        parts.append(f'<text x="{_WIDTH - 40}" y="{bottom}" text-anchor="end">{high:.4f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _title(rows: Sequence[Row]) -> str:
    return shown_figure(rows[0].figure) if rows and rows[0].figure != "loss" else "loss, in nats per target,"
