"""lora.init eva: the first rows of a new run decide ranks and initial values of its adapters, before anything is trained.

Which rows, and how they are laid out, depends on the data and the seed alone, so a run on other processes begins alike. A resumed run takes
its ranks from the adapter of its checkpoint.
"""

from collections.abc import Callable

import numpy as np
import torch

from llamahome.config.schema import Config
from llamahome.data.prepare import Prepared
from llamahome.data.steps.loader import sequential_microbatches
from llamahome.distributed.world import World
from llamahome.errors import ConfigError, Problem
from llamahome.model.lora_eva import Directions, find_directions, with_ranks
from llamahome.training.loaded_model import BaseModel
from llamahome.units import many

_ROWS = 64
"""Rows that are looked at."""
_PASS_TOKENS = 2048
"""Tokens of a forward pass over them, on every machine."""


def from_rows(
    config: Config, base: BaseModel, prepared: Prepared, world: World, *, say: Callable[[str], None]
) -> tuple[Config, Directions]:
    """`config` with the ranks that the rows decide, and the directions to begin with; both as they are without lora.init eva.

    All ranks call it; the values of process 0 count. Raises ConfigError lora.no-initial-values if the rows do not decide.
    """
    if config.training.method != "lora" or config.lora.init != "eva" or base.adapter is not None:
        return config, {}
    if base.strategy.strategy != "replicate":
        message = f"lora.init eva runs the whole base on one process, and the weights are placed by {base.strategy.strategy}"
        raise ConfigError(Problem(code="lora.no-initial-values", message=message, where="lora.init", hint="--set lora.init=default"))
    rows = min(_ROWS, prepared.order.epoch_rows)
    order = prepared.order.rows_at(np.arange(rows), seed=config.training.seed)
    table = prepared.examples.examples_of(order)
    passes = sequential_microbatches(table, micro_batch_tokens=_PASS_TOKENS, deliver=base.backend.to_device)
    directions = find_directions(base.model, config.lora, base.backend, passes)
    shapes = world.broadcast_object({path: list(each.shape) for path, each in directions.items()})
    if not world.is_main:  # two processors may choose between two equal directions differently
        directions = {path: torch.zeros(shape) for path, shape in shapes.items()}
    lora = with_ranks(config.lora, directions)
    ranks = sorted(len(each) for each in directions.values())
    none = f"; {many(ranks.count(0), 'layer')} get none" if ranks[0] == 0 else ""
    say(f"lora.init eva: {many(rows, 'row')} decide the ranks, {ranks[0] or min(each for each in ranks if each)} to {ranks[-1]}{none}")
    return config.model_copy(update={"lora": lora}), directions
