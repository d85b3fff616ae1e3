"""Which charts a run has: their titles, metrics and units. The browser draws what is listed here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Shown = Literal["number", "small", "count", "bytes", "share", "seconds"]
"""How values are written: 2.4171, 1.3e-3, 12.3 k, 1.8 GiB, 35 %, 2.4 s."""


@dataclass(frozen=True)
class Chart:
    """One chart."""

    name: str
    title: str
    about: str
    """What one sees, in a line below the title."""
    lines: Sequence[tuple[str, str]]
    """Metric and label of each curve."""
    shown: Shown = "number"
    stacked: bool = False
    """The curves are parts of a whole and lie on top of each other."""
    shares: bool = False
    """Stacked curves are drawn as shares of their sum."""
    log: bool = False
    """The log axis that the page offers makes sense here."""
    smooth: bool = False
    """The smoothing that the page offers makes sense here."""
    machine: bool = False
    """The values are in system.jsonl, which knows no steps."""

    def as_json(self) -> dict[str, Any]:
        """What charts.js reads."""
        return {name: value for name, value in vars(self).items() if name != "about"}


PLANNED_MEMORY = "plan/memory"
_PARTS = ("data", "forward", "backward", "exchange", "update", "save", "evaluate", "profile")
_LOSSES = (("train/loss", "training"), ("eval/loss", "held-out"))
_RATES = (("train/learning_rate", "done"), ("plan/learning_rate", "planned"))
_SPEEDS = (("speed/tokens_per_s", "tokens/s"), ("speed/targets_per_s", "targets/s"))
_HELD = (("memory/rss", "now"), ("memory/peak", "peak"), ("memory/gpu_allocated", "GPU tensors"), ("memory/gpu_reserved", "GPU reserved"))
_SHARES_USED = (("system/cpu", "processors"), ("system/ram", "memory"), ("system/disk", "disk"), ("system/gpu_util", "GPU"))
_TRAFFIC = (("system/net_sent", "sent"), ("system/net_received", "received"))

LOSS = Chart("loss", "Loss", "Nats per target. Held-out rows are never trained on.", _LOSSES, log=True, smooth=True)
_RATE = Chart("learning-rate", "Learning rate", "Of each step, and as planned.", _RATES, "small")
_NORM = Chart(
    "gradient-norm", "Gradient norm", "L2 norm of the whole gradient before clipping.", [("train/grad_norm", "norm")], log=True, smooth=True
)
_SPEED = Chart("speed", "Speed", "Real tokens per second over all processes, without padding.", _SPEEDS, "count", smooth=True)
_TIME = Chart(
    "step-time",
    "Time of a step",
    "Seconds per step, part on part.",
    tuple((f"time/{part}", part) for part in _PARTS),
    "seconds",
    stacked=True,
)
_SHARES = replace(
    _TIME, name="step-shares", title="Where the time goes", about="Share of each part in a step, as bands.", shown="share", shares=True
)
_MEMORY = Chart("memory", "Memory", "Of the main process.", (*_HELD, (PLANNED_MEMORY, "planned")), "bytes")
_MFU = Chart(
    "mfu",
    "Model FLOPS utilisation",
    "Share of the best matrix product measured on this machine.",
    [("speed/mfu", "MFU")],
    "share",
    smooth=True,
)
_USE = Chart("use", "Machine", "Share of processors, memory, disk and GPU in use.", _SHARES_USED, "share", machine=True)
_NETWORK = Chart("network", "Network", "Bytes per second over all interfaces.", _TRAFFIC, "bytes", machine=True)
_PROCESS = Chart(
    "process-memory", "Memory of the process", "Resident memory of the main process.", [("memory/rss", "resident")], "bytes", machine=True
)
_POWER = Chart("gpu-power", "GPU power", "Watts.", [("system/gpu_power", "power")], "count", machine=True)
_HEAT = Chart("gpu-temperature", "GPU temperature", "Degrees Celsius.", [("system/gpu_temperature", "temperature")], "count", machine=True)
_ALWAYS = ("loss", "learning-rate", "gradient-norm", "speed", "step-time", "step-shares", "memory", "use")
"""Charts that are there before their first value, because every run will have them."""


def run_charts(metrics: Sequence[str], machine: Sequence[str], *, memory: str | None = None, planned: str | None = None) -> list[Chart]:
    """The charts of the page of a run that has these metrics in metrics.jsonl and in system.jsonl.

    `memory` is what the machine has, `planned` what of it the run was planned to take, in words.
    """
    about = [_MEMORY.about, f"The machine has {memory}." if memory else "", f"Planned: {planned}." if planned else ""]
    held = replace(_MEMORY, about=" ".join(filter(None, about)))
    charts = [LOSS, _RATE, _NORM, _SPEED, _TIME, _SHARES, held, *_scores(metrics), _MFU, _USE]
    plans = {name for name, known in (("plan/learning_rate", "train/learning_rate" in metrics), (PLANNED_MEMORY, planned)) if known}
    return _with_values(charts, {*metrics, *machine, *plans})


def machine_charts(machine: Sequence[str]) -> list[Chart]:
    """The charts of the page of the machine."""
    return _with_values([_USE, _PROCESS, _NETWORK, _POWER, _HEAT], set(machine))


def compared_charts() -> list[Chart]:
    """The charts in which runs are drawn together, one curve for each run."""
    held_out = Chart("eval-loss", "Held-out loss", "Nats per target.", [("eval/loss", "")], log=True)
    training = Chart("loss", "Training loss", LOSS.about, [("train/loss", "")], log=True, smooth=True)
    rate = Chart("learning-rate", "Learning rate", "Of each step.", [("train/learning_rate", "")], "small")
    norm = Chart("gradient-norm", "Gradient norm", _NORM.about, [("train/grad_norm", "")], log=True, smooth=True)
    speed = Chart("speed", "Tokens per second", _SPEED.about, [("speed/tokens_per_s", "")], "count", smooth=True)
    return [training, held_out, rate, norm, speed]


def _scores(metrics: Sequence[str]) -> list[Chart]:
    """Every figure of an evaluation that is neither the loss nor its exponential."""
    names = [name for name in metrics if name.startswith("eval/") and name not in ("eval/loss", "eval/perplexity")]
    lines = tuple((name, name.removeprefix("eval/").replace("_", " ")) for name in names)
    about = "Of the held-out rows; higher is better."
    return [Chart("scores", "Evaluation", about, lines)] if lines else []


def _with_values(charts: Sequence[Chart], known: set[str]) -> list[Chart]:
    """The charts without curves that have no value; a chart without any stays only if every run will have it."""
    found = []
    for chart in charts:
        lines = tuple(line for line in chart.lines if line[0] in known)
        if lines:
            found.append(replace(chart, lines=lines))
        elif chart.name in _ALWAYS:
            found.append(chart)
    return found
