"""Draws a chart as HTML with an inline SVG that stretches to the width of the page, while text and strokes keep their size. No torch.

The SVG has no text: a stretched letter cannot be read on a phone. Labels are HTML beside it, placed by percentages. Dots are strokes of
length zero with round ends, which stay round in a stretched SVG. Every curve is thinned so that its spikes stay (series.py).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from llamahome.monitoring.charts.curves import Chart, Curve, log_ticks, smoothed, ticks
from llamahome.monitoring.series import thin

WIDTH, HEIGHT = 1000, 300
"""Of the view box; the page decides the real size."""
_POINTS = 500
"""Of one curve: a wide screen has about two pixels for each."""
_MARGIN = 0.06
"""Of the height, above and below the curves."""
_ROWS = 12
"""Of the table of values below a chart."""


@dataclass(frozen=True)
class _Frame:
    """From values to places in the view box."""

    first: float
    last: float
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        return WIDTH * (step - self.first) / (self.last - self.first)

    def share(self, value: float) -> float:
        """0 at the bottom, 1 at the top."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def y(self, value: float) -> float:
        return HEIGHT * (1 - self.share(value))


def draw(chart: Chart) -> str:
    """A `<figure>` with title, legend, plot and a table of values."""
    frame = _frame(chart)
    drawn = [(index, curve, _thinned(curve)) for index, curve in enumerate(chart.curves)]
    y_labels = "".join(
        f'<span style="bottom:{100 * frame.share(tick):.2f}%">{escape(chart.show(tick))}</span>' for tick in _y_ticks(chart, frame)
    )
    x_labels = "".join(f'<span style="{_place(frame.x(tick) / WIDTH)}">{_step(tick)}</span>' for tick in _x_ticks(frame))
    data = {
        "x": [frame.first, frame.last],
        "curves": [
            {"name": curve.name, "points": [[x, _digits(y), chart.show(y)] for x, y in zip(xs, ys, strict=True) if y is not None]}
            for _, curve, (xs, ys) in drawn
        ],
    }
    scale = ", logarithmic" if frame.log else ""
    return "\n".join(
        [
            '<figure class="chart">',
            f"<figcaption><h3>{escape(chart.title)}</h3><p>{escape(chart.unit)}{scale}</p>{_legend(chart)}</figcaption>",
            f'<div class="plot" data-chart="{escape(json.dumps(data), quote=True)}"><div class="y" aria-hidden="true">{y_labels}</div>',
            f'<div class="area"><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(describe(chart), quote=True)}">',
            _grid(chart, frame),
            *(_draw_curve(chart, index, curve, thinned, frame) for index, curve, thinned in drawn),
            _best_mark(chart, frame),
            "</svg></div>",
            f'<div class="x" aria-hidden="true">{x_labels}</div></div>',
            _table(chart),
            "</figure>",
        ]
    )


def describe(chart: Chart) -> str:
    """The chart in a sentence, for screen readers."""
    parts = []
    for curve in chart.curves:
        (first, begin), (last, end) = curve.known[0], curve.known[-1]
        lowest, highest = min(value for _, value in curve.known), max(value for _, value in curve.known)
        parts.append(
            f"{curve.name} from {chart.show(begin)} at step {first:,.0f} to {chart.show(end)} at step {last:,.0f}, "
            f"between {chart.show(lowest)} and {chart.show(highest)}"
        )
    best = f"; best {chart.show(chart.best[1])} at step {chart.best[0]:,.0f}" if chart.best else ""
    return f"{chart.title}: " + "; ".join(parts) + best


def _frame(chart: Chart) -> _Frame:
    steps = [step for curve in chart.curves for step, _ in curve.known]
    values = [value for curve in chart.curves for _, value in curve.known]
    first, last = min(steps), max(steps)
    low, high = min(values), max(values)
    if first == last:
        first, last = first - 1, last + 1
    if chart.log:
        return _Frame(first, last, low / 1.3, high * 1.3, log=True)
    if chart.unit == "bytes" or (low >= 0 and low < 0.3 * high):
        low = 0.0  # the axis begins at zero where that costs little
    room = (high - low) * _MARGIN or abs(high) * 0.05 or 1.0
    return _Frame(first, last, low - (room if low else 0.0), high + room, log=False)


def _y_ticks(chart: Chart, frame: _Frame) -> list[float]:
    if frame.log:
        return log_ticks(frame.low, frame.high)
    if chart.unit != "bytes":
        return ticks(frame.low, frame.high)
    unit = 1024.0 ** max(0, int(math.log(max(frame.high, 1.0), 1024)))
    return [tick * unit for tick in ticks(frame.low / unit, frame.high / unit)]


def _x_ticks(frame: _Frame) -> list[float]:
    inside = [tick for tick in ticks(frame.first, frame.last, 5) if tick == int(tick)]
    return inside or [frame.first, frame.last]


def _place(share: float) -> str:
    """Centred below its step, but for the last one, which would leave the card."""
    return f"left:{100 * share:.2f}%" if share < 0.96 else f"right:{100 - 100 * share:.2f}%;transform:none"


def _step(step: float) -> str:
    return f"{step:,.0f}" if step < 100_000 else f"{step / 1000:,.0f}k"


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def _thinned(curve: Curve) -> tuple[list[float], list[float | None]]:
    return thin(curve.steps, curve.values, _POINTS)


def _grid(chart: Chart, frame: _Frame) -> str:
    lines = "".join(f"M0 {frame.y(tick):.1f}H{WIDTH}" for tick in _y_ticks(chart, frame))
    return f'<path class="grid" d="{lines}"/>'


def _draw_curve(chart: Chart, index: int, curve: Curve, thinned: tuple[list[float], list[float | None]], frame: _Frame) -> str:
    color = f"c{index}"
    if curve.dots:
        dots = "".join(f"M{frame.x(step):.1f} {frame.y(value):.1f}h0" for step, value in curve.known)
        return f'<path class="line thin {color}" d="{_line(*thinned, frame)}"/><path class="dot {color}" d="{dots}"/>'
    median = smoothed(chart, curve)
    if median is None:
        alone = len(curve.known) == 1
        mark = f'<path class="dot {color}" d="{_line(curve.steps, curve.values, frame)}h0"/>' if alone else ""
        return f'<path class="line {color}" d="{_line(*thinned, frame)}"/>{mark}'
    return (
        f'<path class="line raw {color}" d="{_line(*thinned, frame)}"/><path class="line {color}" d="{_line(*_thinned(median), frame)}"/>'
    )


def _line(steps: Sequence[float], values: Sequence[float | None], frame: _Frame) -> str:
    """The path through the points; a missing value interrupts it."""
    parts, pen = [], "M"
    for step, value in zip(steps, values, strict=True):
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{frame.x(step):.1f} {frame.y(value):.1f}")
        pen = "L"
    return "".join(parts)


def _best_mark(chart: Chart, frame: _Frame) -> str:
    if chart.best is None or not frame.low <= chart.best[1] <= frame.high or not frame.first <= chart.best[0] <= frame.last:
        return ""
    x, y = frame.x(chart.best[0]), frame.y(chart.best[1])
    return f'<path class="best" d="M{x:.1f} {y:.1f}V{HEIGHT}"/><path class="dot ring" d="M{x:.1f} {y:.1f}h0"/>'


def _legend(chart: Chart) -> str:
    named = len(chart.curves) > 1 or chart.curves[0].name not in chart.title.lower()
    items = [f'<li class="c{index}">{escape(curve.name)}</li>' for index, curve in enumerate(chart.curves) if named]
    if any(smoothed(chart, curve) for curve in chart.curves):
        items.append('<li class="plain">thick: running median</li>')
    if chart.best is not None:
        items.append(f'<li class="ring">best {escape(chart.show(chart.best[1]))} at step {chart.best[0]:,.0f}</li>')
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _table(chart: Chart) -> str:
    """Some of the values as a table, closed at first: the first, the last, and steps in between."""
    rows = []
    for curve in chart.curves:
        known = curve.known
        chosen = sorted({round(number * (len(known) - 1) / (_ROWS - 1)) for number in range(_ROWS)})
        cells = "".join(f"<tr><td>{known[index][0]:,.0f}</td><td>{escape(chart.show(known[index][1]))}</td></tr>" for index in chosen)
        of = "" if len(chosen) == len(known) else f" ({len(chosen)} of {len(known):,} values)"
        rows.append(
            f"<table><caption>{escape(curve.name)}{of}</caption>"
            f"<thead><tr><th>step</th><th>{escape(chart.unit)}</th></tr></thead><tbody>{cells}</tbody></table>"
        )
    return f'<details><summary>Values</summary><div class="tables">{"".join(rows)}</div></details>'
