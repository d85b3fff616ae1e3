"""The worker processes of test_pair_ranks.py: steps over pairs of answers, and the reference, on the share of a rank."""

from pathlib import Path

import numpy as np
from tests.support.models import FP32
from tests.support.pairs import SHAPES, pair_table
from tests.support.runs import make_learner

from llamahome.config.preference import PreferenceConfig
from llamahome.data.steps.layout import Layout
from llamahome.data.steps.loader import sequential_microbatches, stay
from llamahome.distributed.reducer import FlatReducer
from llamahome.distributed.world import World
from llamahome.model.shard import replicated, sharded
from llamahome.monitoring.throughput import PartClock
from llamahome.reference_values import Reference
from llamahome.training.evaluate import evaluate
from llamahome.training.optimizer import make_optimizer, set_learning_rate
from llamahome.training.preferences import PairObjective
from llamahome.training.spikes import Limits
from llamahome.training.step import train_step

LAYOUT = Layout(whole_rows=True, shares=True)


def two_steps(world: World, payload):
    """The reference, two steps (the second over one pair, so that ranks have nothing to do), and an evaluation, for each strategy."""
    return {strategy: _two_steps(world, payload, strategy) for strategy in payload["strategies"]}


def _two_steps(world: World, payload, strategy: str):
    learner = make_learner(Path(payload["base"]), payload["method"])
    placement = replicated(learner.model, world)
    if strategy == "shard":
        placement = sharded(learner.model, world, strategy="shard", precision=FP32)
        learner.optimizer = make_optimizer("adamw", placement.parameters, weight_decay=0.0)
    supervised = type(learner.objective)(learner.model, learner.objective.backend, placement.within)
    reference = Reference(supervised, placement, LAYOUT, 40, stay, "start", True, Path(payload["folder"]) / strategy, lambda line: None)
    tables = [reference.known(pair_table(shapes, known=False), np.arange(len(shapes)), "training") for shapes in (SHAPES, SHAPES[:1])]
    objective, found = PairObjective("dpo", PreferenceConfig(sft_weight=0.2), supervised), []
    set_learning_rate(learner.optimizer, 1e-2)
    for table in tables:
        share = {"rank": world.rank, "world_size": world.size, "equal_passes": strategy == "shard", "layout": LAYOUT}
        mine = sequential_microbatches(table, micro_batch_tokens=40, **share)
        settings = {"seed": 0, "limits": Limits(1.0), "clock": PartClock(), "divisors": [table.num_rows] * 5}
        reducer = placement.exchange if world.size > 1 else FlatReducer(world, list(learner.parameters.values()))
        result = train_step(objective.loss_sum, learner.optimizer, mine, reducer=reducer, **settings)
        found.append([float(result.loss), float(result.grad_norm), *result.measured.tolist()])
    share = {"rank": world.rank, "world_size": world.size, "equal_passes": strategy == "shard", "layout": LAYOUT}
    mine = sequential_microbatches(tables[0], micro_batch_tokens=60, **share)
    held_out = evaluate(objective.stats, learner.model, mine, world=world, units=objective.units)
    return {"reference": tables[0].known.tolist(), "steps": found, "evaluation": [held_out.loss, held_out.accuracy, held_out.targets]}
