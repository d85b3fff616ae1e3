"""Records of runs that were never trained: clean ones with realistic noise, to which a test adds one trouble."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping

from llamahome.monitoring.alerts import Watch
from llamahome.monitoring.episodes import Alert, Facts

Record = dict[str, float]
PEAK = 2e-4


def facts(**changes: object) -> Facts:
    """Of a run of 500 steps."""
    values = {
        "run": "latest",
        "data": "chats.jsonl",
        "horizon": 500,
        "learning_rate": PEAK,
        "slower_rate": PEAK / 3,
        "max_grad_norm": 1.0,
        "micro_batch_tokens": 4096,
    }
    return Facts(**{**values, **changes})  # type: ignore[arg-type]


def clean_run(seed: int, *, steps: int = 500, evaluate_every: int = 50) -> Iterator[Record]:
    """A healthy run: warm-up, a loss that falls to its floor, in half of the runs over passes through small data; noise of every kind.

    The noise of a loss is log-normal with a deviation of 2 to 35 %, larger in smaller batches; norms, times and speeds vary too.
    """
    chance = random.Random(seed)
    first, share = chance.uniform(0.8, 4.5), chance.uniform(0.45, 0.92)
    pace, noise, warmup = chance.uniform(20, 160), math.exp(chance.uniform(math.log(0.02), math.log(0.35))), chance.choice([5, 15, 40])
    passes = chance.choice([1, 1, 2, 5])
    step_s, norm, ram = math.exp(chance.uniform(-4, 2)), chance.uniform(0.1, 1.2), chance.uniform(0.2, 0.8)
    yield {"step": 0, "eval/loss": first}
    for step in range(1, steps + 1):
        learned = max(0.0, step - warmup / 2) / pace
        level = first * (share + (1 - share) * math.exp(-learned))
        seen = (step - 1) * passes // steps  # each pass over the same rows begins lower than the one before
        rows = chance.choice([1, 1, 1, 0.5]) if step % (steps // passes) == 0 else 1  # the last batch of a pass is smaller
        loss = level * (0.93**seen) * chance.lognormvariate(0, noise / math.sqrt(rows))
        rate = PEAK * min(1, step / warmup) * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))
        took = step_s * chance.lognormvariate(0, 0.2)
        times = {"data": 0.01 * took * chance.lognormvariate(0, 1), "forward": 0.3 * took, "backward": 0.6 * took, "update": 0.05 * took}
        yield {
            "step": step,
            "train/loss": loss,
            "train/grad_norm": norm * (1 + 2 * math.exp(-step / 10)) * chance.lognormvariate(0, 0.3),
            "train/learning_rate": rate,
            **{f"time/{name}": seconds for name, seconds in times.items()},
            "speed/tokens_per_s": 2000 * step_s / took,
            "ranks/slowest": chance.randrange(4),
            "ranks/slowest_s": step_s * 1.15,
            "ranks/median_s": step_s,
        }
        yield {
            "system/ram": ram + 0.02 * chance.random(),
            "system/disk_free": 80e9,
            "memory/rss": 4e9,
            "memory/swap": 0.0,
            "system/gpu_memory": 0.9,
        }
        if step % evaluate_every == 0:
            yield {
                "step": step,
                "eval/loss": first * (share + 0.03 + (0.97 - share) * math.exp(-learned)) * chance.lognormvariate(0, 0.002),
            }


def changed(run: Iterator[Record], change: Callable[[int, Record], Record]) -> Iterator[Record]:
    """The run with another record in the place of each; `change` gets the step too."""
    step = 0
    for record in run:
        step = int(record.get("step", step))
        yield {**record, **change(step, record)}


def alerts_of(records: Iterable[Mapping[str, float | None]], known: Facts) -> Iterator[Alert]:
    """The alerts of a run by its records, in the order in which they were written."""
    watch, step = Watch(known), known.first_step
    for record in records:
        step = int(record.get("step") or step)
        yield from watch.observe(step, record)
