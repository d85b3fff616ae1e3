"""The rules behind the settings that are `auto`: batch size, passes, learning rate, evaluations. Pure functions.

A small model must see a row with a short answer (a fact, a label) about twelve times before it gives that answer by itself, however many
rows there are. From long answers it learns what they have in common, in fewer passes the more each answer holds of its own, and over-fits
after more, unless the rows are so few that it is to learn them by heart. Fitted to a grid of runs: docs/decisions/0018-passes.md, measured
by benchmarks/small_data.py.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from llamahome.config.initial import SUBTRACTED
from llamahome.config.objectives import ObjectiveName
from llamahome.config.schema import Config
from llamahome.units import Interval

_FEWEST_ROWS, _MOST_ROWS = 4, 32
"""Rows per step."""
_ROWS_PER_ROOT = 2.5
_PASSES, _MOST_PASSES = 12, 24
_SHORT = 16
"""Targets in a row up to which its answer counts as short."""
_LENGTH_POWER = 3.5
"""The number of passes falls with this power of the length of longer answers."""
_IN_COMMON = 5
"""Passes that learn what rows have in common, where each holds one target of its own; they fall with the cube root of those."""
_FEW, _MANY, _MOST_SEEN = 5, 100, 400
"""Rows: up to 5 the length of answers does not matter, from 100 on it matters fully. Passes fall with the fourth root of the rows: passes
that learn by heart from 100 rows on, passes that learn what rows have in common from 400 on."""
_STEPS = 24
"""Least number of updates of a run over few rows, where the number of passes is set and the batch size is auto."""
_EVALUATION_SHARE, _FEWEST_EVALUATED, _USUAL_TIMES, _MOST_TIMES = 0.1, 16, 2, 10
"""The rule of evaluation.rows and evaluation.every auto, as their texts in config/schema.py say it."""
_FULL_AT_2000 = 5e-5
_LORA_FACTOR = 10.0
_PAIRS: tuple[ObjectiveName, ...] = ("dpo", "ipo", "orpo", "simpo")
RATE_FACTORS: Mapping[ObjectiveName, float] = MappingProxyType({**dict.fromkeys((*_PAIRS, "kto"), 0.1), "grpo": 0.2})
"""The rate of an objective over that of supervised fine-tuning, if it is another. Preferences: the rates of the papers of DPO, ORPO and
SimPO and of their public recipes, 5e-7 to 8e-6 for all weights of 7B models, ten times that for adapters. Rewards: gradients are mostly
noise. Not measured here."""
INIT_FACTORS: Mapping[str, float] = MappingProxyType(dict.fromkeys(SUBTRACTED, 0.15))
"""The same for adapters that begin with the greatest parts of the weights, which each step moves. measured on the starter (docs/log.md)."""
VERA_FACTOR = 30.0
"""The same for VeRA, whose few vectors stand before products that random matrices make small. measured on the starter (docs/log.md)."""
ONE_PASS: Mapping[ObjectiveName, str] = MappingProxyType(
    {
        **dict.fromkeys(_PAIRS, "pairs of answers are seen in 1 pass"),
        "kto": "labelled answers are seen in 1 pass",
        "grpo": "every prompt gets a new group of answers in every pass",
    }
)
"""Objectives whose rows are seen once unless the user sets more, and why; the recipes for preferences take one to three passes."""
_WIDTH_POWER = 0.78
"""Wider models need smaller steps: rate ~ (2000 / hidden size) ^ 0.78, and LoRA ten times the rate of full fine-tuning. Source: the fit
for Llama models in "LoRA Without Regret" (Thinking Machines, 2025). Other families and our check: docs/decisions/0004-learning-rate.md."""


def auto_batch_size(rows: int, *, epochs: float | None = None) -> int:
    """Rows per step for an epoch of `rows`: a power of two from 4 to 32 that grows with the square root of the rows.

    Where the user set `epochs`, the batch is smaller if 24 updates need that, down to one row.
    """
    size = 1 << round(math.log2(max(1.0, math.sqrt(rows) / _ROWS_PER_ROOT)))
    size = min(_MOST_ROWS, max(_FEWEST_ROWS, size))
    while epochs is not None and size > 1 and rows * epochs < _STEPS * size:
        size //= 2
    return size


def auto_epochs(rows: int, targets_per_row: float, own_share: float, *, batch_size: int) -> int:
    """Passes over `rows` in steps of `batch_size` rows: a whole number from 1 to 24.

    It is the larger of the passes that learn rows by heart and those that learn what rows have in common. It falls with the number of rows,
    the length of their answers, and the share (0 to 1) of an answer that no other answer holds.
    A batch size k times that of the rule gets sqrt(k) times as many passes.
    """
    weight = min(1.0, max(0.0, math.log(rows / _FEW) / math.log(_MANY / _FEW)))
    by_heart = _PASSES * math.pow(min(1.0, _SHORT / max(1.0, targets_per_row)), _LENGTH_POWER * weight)
    in_common = _IN_COMMON / math.cbrt(max(1.0, own_share * targets_per_row))
    passes = max(by_heart * _fourth_root(_MANY, rows), in_common * _fourth_root(_MOST_SEEN, rows))
    larger = min(batch_size, rows) / min(auto_batch_size(rows), rows)
    return min(_MOST_PASSES, max(1, round(passes * math.sqrt(max(1.0, larger)))))


def _fourth_root(limit: int, rows: int) -> float:
    """The factor by which passes fall with rows beyond `limit`."""
    return math.pow(min(1.0, limit / rows), 0.25)


def auto_learning_rate(method: str, hidden_size: int, *factors: float) -> float:
    """The rate for training.learning_rate auto, to two digits: 1.3e-3 for LoRA at hidden size 576, 2.9e-4 at 4,096, a tenth for full.

    `factors` are those of `rate_factors`.
    """
    rate = _FULL_AT_2000 * (2000 / hidden_size) ** _WIDTH_POWER * (_LORA_FACTOR if method == "lora" else 1.0)
    return float(f"{rate * math.prod(factors):.1e}")


def rate_factors(config: Config) -> dict[str, float]:
    """What a run takes of the usual rate, by the setting that it takes it for."""
    objective, init, factors = config.training.objective, config.lora.init, dict[str, float]()
    if objective in RATE_FACTORS:
        factors[objective] = RATE_FACTORS[objective]
    if config.training.method == "lora" and config.model.adapter is None and init in INIT_FACTORS:
        factors[f"lora.init {init}"] = INIT_FACTORS[init]
    if config.training.method == "lora" and config.lora.use_vera:
        factors["lora.use_vera"] = VERA_FACTOR
    return factors


def slower_rate(peak: float, usual: float, *, share: float) -> float:
    """A rate to advise where `peak` was too high: that share of it, and no more than the `usual` one."""
    return float(f"{min(peak * share, usual):.2g}")


@dataclass(frozen=True)
class EvaluationPlan:
    """How many held-out rows are evaluated, and how often."""

    rows: int
    every: Interval
    share: float
    """Cost of all evaluations over the cost of training."""


def plan_evaluations(
    row_tokens: Iterable[int],
    *,
    work: float,
    answers: float,
    horizon: int,
    steps_per_epoch: float,
    rows: int | Literal["auto"],
    every: Interval | None,
) -> EvaluationPlan:
    """Let all evaluations of a run take at most a tenth of its `work`: before training, during it, and at the end.

    Costs are counted in tokens of a forward pass: `row_tokens` of each held-out row, in the order in which rows are selected, and
    `answers` for the sample answers of one evaluation. Rows: as many as a tenth of the work allows at the frequency that was set, or at
    four evaluations, but at least 16. Frequency, where none was set: as often as these rows allow, up to ten times during training.
    """
    cumulative, budget, most = [0, *itertools.accumulate(map(int, row_tokens))], _EVALUATION_SHARE * work, max(0, horizon - 1)
    between = min(_USUAL_TIMES, most) if every is None else _times_between(every, horizon, steps_per_epoch)
    affordable = bisect.bisect_right(cumulative, max(0.0, budget / (2 + between) - answers)) - 1
    selected = min(len(cumulative) - 1, max(affordable, _FEWEST_EVALUATED) if rows == "auto" else rows)
    cost = cumulative[selected] + answers
    if every is None:
        between = max(0, min(_MOST_TIMES, most, int(budget / max(1.0, cost)) - 2))
        every = Interval(math.ceil(horizon / (between + 1)), "steps")
        between = _times_between(every, horizon, steps_per_epoch)
    return EvaluationPlan(selected, every, (2 + between) * cost / max(1.0, work))


def _times_between(every: Interval, horizon: int, steps_per_epoch: float) -> int:
    """How often it is due before the last step; an interval in seconds, whose number is unknown, counts as two."""
    if every.unit == "seconds":
        return min(_USUAL_TIMES, max(0, horizon - 1))
    gap = every.value * (steps_per_epoch if every.unit == "epochs" else 1.0)
    return min(max(0, horizon - 1), math.floor((horizon - 1) / gap + 1e-6))
