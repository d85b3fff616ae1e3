"""Draws the charts of a run as PNG pictures, one for each chart, with matplotlib, which the extra `plots` brings. No torch."""

import itertools
from importlib.util import find_spec
from pathlib import Path

from llamahome.errors import MachineError, Problem
from llamahome.monitoring.charts.curves import Chart, Curve, smoothed
from llamahome.monitoring.series import thin

_COLORS = ("#2459d6", "#c2410c", "#0f766e", "#7c3aed")
_POINTS = 1500
"""Of one curve; a picture is 1,350 pixels wide."""


def require_plots() -> None:
    """Raise MachineError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        message = "matplotlib, which draws the pictures, is not installed; report.html needs nothing"
        raise MachineError(Problem(code="machine.no-matplotlib", message=message, where="--png", hint="pip install 'llamahome[plots]'"))


def write_pictures(charts: list[Chart], page: Path) -> list[Path]:
    """Write a picture of each chart beside `page`, as report-loss.png beside report.html, and return the paths. Raises OSError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    written = []
    for chart in charts:
        figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for curve, color in zip(chart.curves, itertools.cycle(_COLORS)):
            median = smoothed(chart, curve)
            label = curve.name if median is None else f"{curve.name} (thick: running median)"
            style = {"marker": "o", "markersize": 5, "linewidth": 1.3} if curve.dots else {"linewidth": 0.7 if median else 1.7}
            axes.plot(*_points(curve), color=color, label=label, alpha=0.45 if median else 1.0, **style)
            if median is not None:
                axes.plot(*_points(median), color=color, linewidth=1.9)
        if chart.best is not None:
            label = f"best {chart.show(chart.best[1])} at step {chart.best[0]:,.0f}"
            axes.plot([chart.best[0]], [chart.best[1]], "o", color="black", markersize=8, label=label, linestyle="none")
        if chart.log:
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _, chart=chart: chart.show(value)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.set_title(chart.title, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.set_ylabel(chart.unit)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(chart.curves) > 1 or chart.best is not None:
            axes.legend(frameon=False)
        path = page.with_name(f"{page.stem}-{chart.title.lower().replace(' ', '-')}.png")
        figure.savefig(path, format="png")
        written.append(path)
    return written


def _points(curve: Curve) -> tuple[list[float], list[float]]:
    steps, values = thin(curve.steps, curve.values, _POINTS)
    return steps, [float("nan") if value is None else value for value in values]
