"""What a run plans: the learning rate of each step, and its memory.

The rate comes from its settings or, after a resume that changed the plan, from its newest checkpoint; the memory was planned at its start.
"""

import math

from llamahome.config.load import LoadedConfig
from llamahome.dashboard.charts import PLANNED_MEMORY
from llamahome.dashboard.curves import Axis, Curves, Line
from llamahome.dashboard.pages import planned_memory
from llamahome.durable import read_object
from llamahome.monitoring.readings import whole
from llamahome.rundir import RunPaths
from llamahome.training.schedule import Curve, planned_curve

_POINTS = 200


def planned_rates(config: LoadedConfig | str, paths: RunPaths, metrics: Curves, axis: Axis) -> dict[str, Line]:
    """The planned rate of each step up to the horizon by its name, or nothing if it is not known.

    Along tokens and time it ends with the last step that was done, because nobody knows where later steps will lie.
    """
    horizon = whole(read_object(paths.metrics_dir / "status.json").get("horizon"))
    curve = _saved_curve(paths) or (_configured_curve(config, horizon) if horizon else None)
    last = metrics.last_step
    if curve is None or curve.horizon < 1 or (axis != "step" and last < 1):
        return {}
    end = curve.horizon if axis == "step" else min(curve.horizon, int(last))
    steps = sorted({1 + round(at * (end - 1) / _POINTS) for at in range(_POINTS + 1)})
    places = [float(step) if axis == "step" else metrics.place_of_step(step, axis) for step in steps]
    return {"plan/learning_rate": Line(places, [float(f"{curve.rate(step - 1):.6g}") for step in steps])}


def planned_memory_line(paths: RunPaths, metrics: Curves, axis: Axis) -> dict[str, Line]:
    """Their sum, from the first step to the last one, by its name."""
    total, last = sum(planned_memory(paths).values()), metrics.last_step
    if not total or last < 1:
        return {}
    return {PLANNED_MEMORY: Line([metrics.place_of_step(step, axis) for step in (1, last)], [float(total)] * 2)}


def _saved_curve(paths: RunPaths) -> Curve | None:
    checkpoints = paths.checkpoints()
    saved = read_object(checkpoints[-1][1] / "trainer_state.json").get("extra") if checkpoints else None
    schedule = saved.get("schedule") if isinstance(saved, dict) else None
    try:
        curve = Curve(**schedule) if isinstance(schedule, dict) else None
        return curve if curve is not None and curve.horizon > 0 and math.isfinite(curve.rate(0) + curve.rate(curve.horizon - 1)) else None
    except (TypeError, ValueError, ArithmeticError):
        return None


def _configured_curve(config: LoadedConfig | str, horizon: int) -> Curve | None:
    training = config.config.training if isinstance(config, LoadedConfig) else None
    if training is None or not isinstance(training.learning_rate, float):
        return None
    return planned_curve(peak=training.learning_rate, horizon=horizon, warmup=training.warmup, shape=training.schedule)
