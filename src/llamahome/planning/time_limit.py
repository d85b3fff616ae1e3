"""Where training.max_time ends a planned run."""

import math

from llamahome.config.schema import TrainingConfig
from llamahome.training.run import max_seconds
from llamahome.training.schedule import planned_curve, time_limit_line


def within_limit(training: TrainingConfig, *, horizon: int, seconds: float) -> tuple[float, str | None]:
    """The time that a run takes whose `horizon` steps take `seconds`, and a line about the step at which training.max_time ends it."""
    limit = max_seconds(training)
    if limit is None or (step := math.ceil(horizon * limit / seconds)) >= horizon:
        return seconds, None
    curve = planned_curve(peak=1.0, horizon=horizon, warmup=training.warmup, shape=training.schedule)
    return limit, time_limit_line(f"training.max_time {training.max_time} ends it at about", curve, step)
