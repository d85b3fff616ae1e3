"""Estimates the peak memory of one rank in a step, by purpose.

The caller passes the bytes that a micro-batch keeps for its backward pass, with and without recomputing layers; the run decides by the
same numbers whether to recompute. Frozen weights have their storage dtype; quantised ones are widened into one buffer as they are used.
Trained weights and their gradients are float32, and the optimizer has its own bytes.
"""

from dataclasses import dataclass, fields

from llamahome.planning.shapes import LayerShape, ModelShape

FLOAT32 = 4
TILE_BYTES = 2 * 4 * 128 * 49_152
"""Default for the loss head: a tile of float32 logits and as much again for its gradient."""

_WIDENED_AT_ONCE = 0.6
"""Share of a layer that is widened at once at most: the gate and the input of its feed-forward block, which are one product."""


@dataclass(frozen=True)
class ShardLayout:
    """How the weights are distributed over the ranks, and the sizes of their dtypes."""

    shards: int
    """Ranks that share one copy of the weights; 1 means replication."""
    copies: int
    """Number of copies, each on `shards` ranks."""
    stored: int
    """Bytes per stored frozen weight."""
    computed: int
    """Bytes per weight in a matrix product."""
    apart: bool
    """Trained weights (adapters) are replicated on every rank; only frozen weights are sharded."""
    sums_each_pass: bool = False
    """Gradients of sharded weights are reduced after every micro-batch, not once per step, so that no rank keeps full gradients."""
    packed: float | None = None
    """Bytes per number of the frozen linear layers if they are quantised, which is only done to whole copies."""

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.shards * self.copies

    def gathered(self, part: LayerShape, *, inside_layer: bool) -> int:
        """Bytes of an all-gathered part: frozen weights as stored, trained weights of layers as computed, other trained weights float32."""
        if self.apart:
            return part.frozen * self.stored
        return part.frozen * self.stored + part.trained * (self.computed if inside_layer else FLOAT32)


@dataclass(frozen=True)
class Pass:
    """One micro-batch: forward and backward on one rank."""

    tokens: int
    targets: int
    kept_bytes: int
    """Kept for the backward pass if nothing is recomputed."""
    recomputed_bytes: int
    """Kept at most if layers are recomputed."""
    recomputes: bool
    several: bool = False
    """Whether a step has more than one micro-batch."""
    tile_bytes: int = TILE_BYTES
    """Bytes of a tile of logits in the loss head."""
    offloaded_bytes: int = 0
    """Kept at most if the inputs of recomputed layers wait outside of the device's memory."""
    offloads: bool = False
    layer_bytes: int = 0
    """Of the recomputed or offloaded bytes, those of the one layer that is computed again, when the loss head's are gone."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    """A tile of logits, the hidden states of targets and their gradient, a cast head, and the gradient of a trained head. If layers are
    recomputed, only what these take beyond a layer, because they are gone when the first layer is computed again."""
    buffers: int
    """Temporarily gathered or cast weights, and gradients in communication buffers."""

    @property
    def total(self) -> int:
        """Sum over all purposes."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory_of(shape: ModelShape, layout: ShardLayout, work: Pass) -> Memory:
    """Estimate the peak memory of one rank."""
    trained = shape.trained if layout.apart else _share(shape.trained, layout.shards)
    frozen = _share(shape.weights - shape.trained, layout.shards)
    saved = 0 if layout.packed is None else int(quantized_numbers(shape) * (layout.stored - layout.packed))
    return Memory(
        weights=frozen * layout.stored - saved + (trained + shape.started) * FLOAT32,
        gradients=trained * FLOAT32,
        optimizer=round(trained * shape.state_bytes),
        activations=work.offloaded_bytes if work.offloads else work.recomputed_bytes if work.recomputes else work.kept_bytes,
        loss=_loss(shape, layout, work),
        buffers=_buffers(shape, layout, work),
    )


def _loss(shape: ModelShape, layout: ShardLayout, work: Pass) -> int:
    cast_head = shape.head * layout.computed if layout.computed != layout.stored else 0
    passing = work.tile_bytes + work.targets * shape.hidden * layout.computed + cast_head
    if work.recomputes or work.offloads:
        passing = max(0, passing + (work.tokens + work.targets) * shape.hidden * layout.stored - work.layer_bytes)
    return passing + (shape.head * FLOAT32 if shape.head_trained else 0)


def _buffers(shape: ModelShape, layout: ShardLayout, work: Pass) -> int:
    """Replicated: casts and flat gradients. Sharded: two gathered layers, the gathered rest, and gradients before they are scattered."""
    flat_gradients = shape.trained * FLOAT32 if layout.ranks > 1 and layout.apart else 0
    if layout.shards == 1:
        casts = 0 if layout.apart or layout.computed == FLOAT32 else shape.layers * shape.layer.trained_products * layout.computed
        widened = 0 if layout.packed is None else int(_WIDENED_AT_ONCE * quantized_numbers(shape) / shape.layers) * layout.computed
        return casts + flat_gradients + widened
    gathered = 2 * layout.gathered(shape.layer, inside_layer=True) + layout.gathered(shape.rest, inside_layer=False)
    if layout.apart:
        return gathered + flat_gradients
    unscattered = shape.trained if work.several and not layout.sums_each_pass else max(2 * shape.layer.trained, shape.rest.trained)
    return gathered + unscattered * FLOAT32


def quantized_numbers(shape: ModelShape) -> int:
    """Numbers in the frozen linear layers, which model.quantization packs."""
    return shape.layers * (shape.layer.products - shape.layer.trained_products)


def _share(weights: int, ranks: int) -> int:
    return -(-weights // ranks)
