"""The lengths of rows as a picture, when the extra `plots` (matplotlib) is installed."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from llamahome.data.checks.stats import Bin
from llamahome.errors import MachineError, Problem


def require_plots() -> None:
    """MachineError when pictures cannot be drawn."""
    if find_spec("matplotlib") is None:
        message = "matplotlib, which draws the picture, is not installed"
        raise MachineError(Problem(code="machine.no-matplotlib", message=message, where="--png", hint="pip install 'llamahome[plots]'"))


def write_histogram(bins: Sequence[Bin], path: Path, *, max_length: int, title: str) -> None:
    """Write a PNG: rows by length, and where data.max_length cuts. Raises MachineError when it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.bar(
        [found.begin for found in bins], [found.rows for found in bins], width=[found.end - found.begin for found in bins], align="edge"
    )
    axes.set_xscale("symlog", base=2, linthresh=16)
    borders = [found.begin for found in bins] + [bins[-1].end]
    shown = borders[:: max(1, len(borders) // 10)]
    axes.set_xticks(shown, [f"{border:,}" for border in shown])
    axes.axvline(max_length, color="black", linestyle="--", linewidth=1, label=f"data.max_length {max_length:,}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("rows")
    axes.set_title(title)
    axes.legend()
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        message = f"cannot write the picture: {error.strerror}"
        raise MachineError(
            Problem(code="machine.cannot-write", message=message, where=str(path), hint="--png with another place")
        ) from error
