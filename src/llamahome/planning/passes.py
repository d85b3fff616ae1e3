"""The passes of a planned step, sized as a run sizes them: by what is free when its weights are loaded (pass_memory.py)."""

from llamahome.config.schema import Config
from llamahome.model.place import LARGEST_SHARE
from llamahome.pass_memory import auto_pass_tokens, documents_of_row
from llamahome.planning.forecast import Cluster, Work
from llamahome.planning.measure import Activations
from llamahome.planning.memory import FLOAT32, ShardLayout, quantized_numbers
from llamahome.planning.shapes import ModelShape

LOADED_LATER = 85 << 20
"""Bytes that a run on a processor takes beside what a plan has loaded: PEFT, compiled passes, tests of the model. measured: 89 MiB."""


def free_for_passes(shape: ModelShape, layout: ShardLayout, free_bytes: int) -> int:
    """What remains of `free_bytes` on a rank that has loaded its weights, less what full fine-tuning adds to them; adapters come later."""
    frozen = -(-(shape.weights - shape.trained) // layout.shards)
    saved = 0 if layout.packed is None else int(quantized_numbers(shape) * (layout.stored - layout.packed))
    free = free_bytes - (frozen * layout.stored - saved)
    if layout.apart:
        return free
    rows = -(-shape.trained // layout.shards)
    gradients = rows if layout.sums_each_pass else shape.trained
    return free - round(rows * (FLOAT32 + shape.state_bytes)) - gradients * FLOAT32


def pass_tokens(activations: Activations, free: int, *, compiled: bool) -> int:
    """training.micro_batch_tokens, or where it is auto what a run takes that has `free` bytes for activations."""
    config, wished = activations.config, activations.config.training.micro_batch_tokens
    longest = documents_of_row(config) * config.data.max_length

    def keeps(tokens: int) -> int:
        return activations.of(tokens, longest=longest, compiled=compiled)[0]

    return auto_pass_tokens(config, activations.backend, keeps=keeps, free=free) if wished == "auto" else wished


def simulated_work(
    activations: Activations, shape: ModelShape, layout: ShardLayout, cluster: Cluster, *, passes: int, target_share: float
) -> Work:
    """A step of `passes` full micro-batches on each rank, with the weights in `layout`; layers that are whole on each rank are compiled."""
    config, backend = activations.config, activations.backend
    compiled = layout.shards == 1 and config.training.compile is not False
    tokens = pass_tokens(activations, free_for_passes(shape, layout, cluster.device.memory_bytes), compiled=compiled)
    tile = backend.tile_bytes(int(activations.whole.config.get_text_config().vocab_size))
    kept, recomputed = activations.of(tokens, compiled=compiled)
    length = min(config.data.max_length, tokens)
    return Work(
        tokens=tokens,
        passes=passes,
        length=length,
        target_share=target_share,
        kept_bytes=kept,
        recomputed_bytes=recomputed,
        recomputes=_recomputes(config),
        largest_share=LARGEST_SHARE,
        tile_bytes=tile,
        offloaded_bytes=activations.offloaded(tokens, recomputed),
        layer_bytes=activations.layer(tokens, recomputed),
        offloads=activations.offloads if layout.shards == 1 else False,  # a run does not move inputs of sharded layers
    )


def fullest_pass(activations: Activations, *, tokens: int, share: float) -> Work:
    """A step on this machine of one pass that is as full as a pass may be; `share` of its tokens is learned."""
    config, backend = activations.config, activations.backend
    kept, recomputed = activations.of(tokens)
    return Work(
        tokens=tokens,
        passes=1,
        length=config.data.max_length,
        target_share=share,
        kept_bytes=kept,
        recomputed_bytes=recomputed,
        recomputes=_recomputes(config),
        largest_share=LARGEST_SHARE,
        tile_bytes=backend.tile_bytes(int(activations.whole.config.get_text_config().vocab_size)),
        offloaded_bytes=activations.offloaded(tokens, recomputed),
        layer_bytes=activations.layer(tokens, recomputed),
        offloads=activations.offloads if activations.moves(tokens) else False,
    )


def _recomputes(config: Config) -> bool | None:
    wanted = config.training.gradient_checkpointing
    return None if wanted == "auto" else wanted
