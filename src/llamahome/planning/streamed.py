"""Plans a run on this machine whose frozen base is larger than the free memory: the passes that stream it (model/stream.py), from shapes.

The rate of the disk is not measured before a run: RATE stands for it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from llamahome.data.report import DataReport
from llamahome.model.place import LARGEST_SHARE, longest_pass
from llamahome.model.precision import Precision
from llamahome.model.stream import LAYERS_AT_ONCE
from llamahome.model.stream_choice import Rates, StreamedBase, mapped_bytes, must_stream
from llamahome.pass_memory import MOST_TOKENS, documents_of_row
from llamahome.planning.forecast import Forecast
from llamahome.planning.measure import Activations
from llamahome.planning.shapes import ModelShape
from llamahome.streamed import choose_passes_of, describe

RATE = 1e9
"""Bytes a second that a plan assumes to be read: a solid-state disk."""


@dataclass(frozen=True)
class StreamedPlan:
    """The step of a run that streams its base, and what is said of it."""

    step: Forecast
    lines: list[str]
    longest_row: int
    """Tokens of the longest row that fits, alone in its pass."""


def plan_streamed(
    step: Forecast, shape: ModelShape, folder: Path, *, report: DataReport, activations: Activations, free: int
) -> StreamedPlan | None:
    """The same step with the base in `folder` streamed; None if it is held."""
    config, backend = activations.config, activations.backend
    precision = backend.precision
    if config.model.quantization is None and not mapped_bytes(folder, precision.storage):
        return None
    base_bytes = step.memory.weights - 4 * shape.trained
    if config.training.method != "lora" or backend.free_bytes(1) is not None or not must_stream(base_bytes, free_bytes=free):
        return None
    sizes = _sizes(shape, precision, step, base_bytes, activations=activations, free=free)
    passes = choose_passes_of(config, sizes, Rates(1 / RATE, step.compute_seconds / max(1, step.tokens)), report)
    weights = sizes.room_bytes + sizes.kept_with(passes.keep_bytes) + 4 * shape.trained
    memory = replace(step.memory, weights=weights, activations=sizes.needs(passes.tokens, passes.recomputes))
    lines = [*describe(passes, sizes, 1 / RATE, free=free), f"the disk is assumed to read {RATE / 1e9:g} GB a second"]
    seconds = max(step.compute_seconds, passes.seconds)
    together, usable = documents_of_row(config), sizes.free_bytes - sizes.room_bytes

    def fits(tokens: int) -> bool:
        kept, recomputed = activations.of(together * tokens, longest=tokens)
        return (recomputed if passes.recomputes else kept) <= LARGEST_SHARE * usable

    longest = longest_pass(fits, most=MOST_TOKENS)
    return StreamedPlan(
        replace(step, memory=memory, fits=passes.fits, recomputes=passes.recomputes, compute_seconds=seconds), lines, longest
    )


def _sizes(
    shape: ModelShape, precision: Precision, step: Forecast, base_bytes: int, *, activations: Activations, free: int
) -> StreamedBase:
    head = shape.head * precision.storage.itemsize
    layer = max(1, (base_bytes - shape.rest.frozen * precision.storage.itemsize) // shape.layers)
    memory, streamed = step.memory, layer * shape.layers + head

    def needs(tokens: int, recomputes: bool) -> int:
        kept, recomputed = activations.of(tokens)
        return recomputed if recomputes else kept

    return StreamedBase(
        nbytes=streamed,
        room_bytes=min(streamed, max(LAYERS_AT_ONCE * layer, layer + head)),
        kept_with=lambda room: streamed if room >= streamed else min(shape.layers, max(0, room) // layer) * layer,
        free_bytes=free - 4 * shape.trained - memory.gradients - memory.optimizer - memory.loss,
        needs=needs,
    )
