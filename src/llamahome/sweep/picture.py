"""Draws sweep.svg: the held-out loss or accuracy of the final model of every trial, for each setting, with a line through the means."""

from collections.abc import Sequence
from html import escape

from llamahome.sweep.table import Row, shown_figure

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
