"""Plans a run on this machine whose frozen base is larger than the free memory: the passes that stream it (model/stream.py), from shapes.

The rate of the disk is not measured before a run: RATE stands for it.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from llamahome.data.report import DataReport
from llamahome.distributed.world import World
from llamahome.errors import Problem
from llamahome.model.place import LARGEST_SHARE, longest_pass
from llamahome.model.precision import Precision
from llamahome.model.quantized_copy import expected_sizes
from llamahome.model.stream import LAYERS_AT_ONCE
from llamahome.model.stream_choice import Rates, StreamedBase, must_stream
from llamahome.model.weights_size import refuse_larger_than_memory, size_in, size_quantized
from llamahome.pass_memory import MOST_TOKENS, documents_of_row
from llamahome.planning.forecast import Forecast
from llamahome.planning.measure import Activations
from llamahome.planning.shapes import ModelShape
from llamahome.streamed import choose_passes_of, describe

RATE = 1e9
"""Bytes a second that a plan assumes to be read: a solid-state disk."""


@dataclass(frozen=True)
class BasePlan:
    """How the base of a run is held or read."""

    step: Forecast
    lines: list[str] = field(default_factory=list)
    """What is said of a base that is streamed; none if it is held."""
    read_seconds: float = 0.0
    """Of reading the base in a pass without gradients, as each token of drawn answers is one."""
    longest_row: int | None = None
    """Tokens of the longest row that fits beside a streamed base, alone in its pass."""
    refusal: Problem | None = None
    """Why a run would end before training, where it can be neither."""


def plan_base(step: Forecast, shape: ModelShape, folder: Path, *, report: DataReport, activations: Activations, free: int) -> BasePlan:
    """The same step with the base in `folder` held, if it fits, or streamed."""
    config, backend = activations.config, activations.backend
    precision, kind = backend.precision, config.model.quantization
    if backend.free_bytes(1) is not None:
        return BasePlan(step)
    size = size_in(folder, precision.storage) if kind is None else size_quantized(folder, precision.storage, expected_sizes(folder, kind))
    alone = World(0, 1, 0, torch.device("cpu"))
    refusal = refuse_larger_than_memory(config, size, folder, precision.storage, strategy="replicate", world=alone, free=free)
    base_bytes = step.memory.weights - 4 * shape.trained
    if not size.mapped or config.training.method != "lora" or not must_stream(base_bytes, free_bytes=free):
        return BasePlan(step, refusal=refusal)
    sizes = _sizes(shape, precision, step, base_bytes, activations=activations, free=free)
    passes = choose_passes_of(config, sizes, Rates(1 / RATE, step.compute_seconds / max(1, step.tokens)), report)
    weights = sizes.room_bytes + sizes.kept_with(passes.keep_bytes) + 4 * shape.trained
    memory = replace(step.memory, weights=weights, activations=sizes.needs(passes.tokens, passes.recomputes))
    lines = [*describe(passes, sizes, 1 / RATE, free=free), f"the disk is assumed to read {RATE / 1e9:g} GB a second"]
    seconds = max(step.compute_seconds, passes.seconds)
    together, usable = documents_of_row(config), sizes.free_bytes - sizes.room_bytes

    def fits(tokens: int) -> bool:
        kept, recomputed = activations.of(together * tokens, longest=tokens)
        again = activations.offloaded(together * tokens, recomputed) if activations.offloads else recomputed
        return (again if passes.recomputes else kept) <= LARGEST_SHARE * usable

    longest = longest_pass(fits, most=MOST_TOKENS)
    moves = activations.offloads is True
    step = replace(step, memory=memory, fits=passes.fits, recomputes=passes.recomputes, offloads=moves, compute_seconds=seconds)
    return BasePlan(step, lines, passes.read_bytes / RATE, longest)


def _sizes(
    shape: ModelShape, precision: Precision, step: Forecast, base_bytes: int, *, activations: Activations, free: int
) -> StreamedBase:
    head = shape.head * precision.storage.itemsize
    layer = max(1, (base_bytes - shape.rest.frozen * precision.storage.itemsize) // shape.layers)
    memory, streamed = step.memory, layer * shape.layers + head

    def needs(tokens: int, recomputes: bool) -> int:
        kept, recomputed = activations.of(tokens)
        again = activations.offloaded(tokens, recomputed) if activations.offloads else recomputed
        return again if recomputes else kept

    return StreamedBase(
        nbytes=streamed,
        room_bytes=min(streamed, max(LAYERS_AT_ONCE * layer, layer + head)),
        kept_with=lambda room: streamed if room >= streamed else min(shape.layers, max(0, room) // layer) * layer,
        free_bytes=free - 4 * shape.trained - memory.gradients - memory.optimizer - memory.loss - memory.buffers,
        needs=needs,
    )
