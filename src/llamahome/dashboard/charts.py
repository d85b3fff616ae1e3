"""Which charts a run has: their titles, metrics and units. The browser draws what is listed here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Shown = Literal["number", "small", "count", "bytes", "share", "seconds"]
"""How values are written: 2.4171, 1.3e-3, 12.3 k, 1.8 GiB, 35 %, 2.4 s."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart."""

    name: str
    title: str
    about: str
    """What one sees, in a line below the title."""
    lines: tuple[tuple[str, str], ...]
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
LOSS = Chart(
    name="loss",
    title="Loss",
    about="Nats per target. Held-out rows are never trained on.",
    lines=(("train/loss", "training"), ("eval/loss", "held-out")),
    log=True,
    smooth=True,
)
_RATE = Chart(
    name="learning-rate",
    title="Learning rate",
    about="Of each step, and as planned.",
    lines=(("train/learning_rate", "done"), ("plan/learning_rate", "planned")),
    shown="small",
)
_NORM = Chart(
    name="gradient-norm",
    title="Gradient norm",
    about="L2 norm of the whole gradient before clipping.",
    lines=(("train/grad_norm", "norm"),),
    log=True,
    smooth=True,
)
_SPEED = Chart(
    name="speed",
    title="Speed",
    about="Real tokens per second over all processes, without padding.",
    lines=(("speed/tokens_per_s", "tokens/s"), ("speed/targets_per_s", "targets/s")),
    shown="count",
    smooth=True,
)
_PARTS = ("data", "forward", "backward", "exchange", "update", "save", "evaluate", "profile")
_TIME = Chart(
    name="step-time",
    title="Time of a step",
    about="Seconds per step, part on part.",
    lines=tuple((f"time/{part}", part) for part in _PARTS),
    shown="seconds",
    stacked=True,
)
_SHARES = replace(
    _TIME, name="step-shares", title="Where the time goes", about="Share of each part in a step, as bands.", shown="share", shares=True
)
_MEMORY = Chart(
    name="memory",
    title="Memory",
    about="Of the main process.",
    lines=(
        ("memory/rss", "now"),
        ("memory/peak", "peak"),
        ("memory/gpu_allocated", "GPU tensors"),
        ("memory/gpu_reserved", "GPU reserved"),
        (PLANNED_MEMORY, "planned"),
    ),
    shown="bytes",
)
_MFU = Chart(
    name="mfu",
    title="Model FLOPS utilisation",
    about="Share of the best matrix product measured on this machine.",
    lines=(("speed/mfu", "MFU"),),
    shown="share",
    smooth=True,
)
_USE = Chart(
    name="use",
    title="Machine",
    about="Share of processors, memory, disk and GPU in use.",
    lines=(("system/cpu", "processors"), ("system/ram", "memory"), ("system/disk", "disk"), ("system/gpu_util", "GPU")),
    shown="share",
    machine=True,
)
_NETWORK = Chart(
    name="network",
    title="Network",
    about="Bytes per second over all interfaces.",
    lines=(("system/net_sent", "sent"), ("system/net_received", "received")),
    shown="bytes",
    machine=True,
)
_PROCESS = Chart(
    name="process-memory",
    title="Memory of the process",
    about="Resident memory of the main process.",
    lines=(("memory/rss", "resident"),),
    shown="bytes",
    machine=True,
)
_POWER = Chart(name="gpu-power", title="GPU power", about="Watts.", lines=(("system/gpu_power", "power"),), shown="count", machine=True)
_HEAT = Chart(
    name="gpu-temperature",
    title="GPU temperature",
    about="Degrees Celsius.",
    lines=(("system/gpu_temperature", "temperature"),),
    shown="count",
    machine=True,
)
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
    held_out = Chart(name="eval-loss", title="Held-out loss", about="Nats per target.", lines=(("eval/loss", ""),), log=True)
    training = Chart(name="loss", title="Training loss", about=LOSS.about, lines=(("train/loss", ""),), log=True, smooth=True)
    rate = Chart(name="learning-rate", title="Learning rate", about="Of each step.", lines=(("train/learning_rate", ""),), shown="small")
    norm = Chart(name="gradient-norm", title="Gradient norm", about=_NORM.about, lines=(("train/grad_norm", ""),), log=True, smooth=True)
    speed = Chart(
        name="speed", title="Tokens per second", about=_SPEED.about, lines=(("speed/tokens_per_s", ""),), shown="count", smooth=True
    )
    return [training, held_out, rate, norm, speed]


def _scores(metrics: Sequence[str]) -> list[Chart]:
    """Every figure of an evaluation that is neither the loss nor its exponential."""
    names = [name for name in metrics if name.startswith("eval/") and name not in ("eval/loss", "eval/perplexity")]
    lines = tuple((name, name.removeprefix("eval/").replace("_", " ")) for name in names)
    about = "Of the held-out rows; higher is better."
    return [Chart(name="scores", title="Evaluation", about=about, lines=lines)] if lines else []


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
