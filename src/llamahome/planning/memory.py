"""What lies in the memory of one rank at the worst moment of a step, by what it is for.

How much a token keeps for the backward pass is handed in: model/place.py knows it, and decides with it whether to recompute.
Frozen weights lie in their stored type; what is trained, its gradient and the two moments of AdamW are float32.
"""

from dataclasses import dataclass, fields

from llamahome.planning.shapes import Part, Shape

FLOAT32 = 4
TILE_BYTES = 2 * 4 * 128 * 49_152
"""Of the loss head: a tile of float32 logits and as much for what is made of it, where the back end does not say."""


@dataclass(frozen=True)
class Layout:
    """How the weights lie over the ranks and in which types they are stored and multiplied."""

    shards: int
    """Ranks that share one copy of the weights; 1 replicates."""
    copies: int
    """Such groups."""
    stored: int
    """Bytes of a frozen weight."""
    computed: int
    """Bytes of a weight in a matrix product."""
    apart: bool
    """What is trained (adapters) stays whole on every rank; only frozen weights are cut."""
    sums_each_pass: bool = False
    """Gradients of cut weights are summed in every pass instead of the last, so that no rank keeps whole ones."""

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.shards * self.copies

    def gathered(self, part: Part, *, inside_layer: bool) -> int:
        """Bytes of a part put together for a pass: frozen weights as stored, trained ones of layers as multiplied, the others float32."""
        if self.apart:
            return part.frozen * self.stored
        return part.frozen * self.stored + part.trained * (self.computed if inside_layer else FLOAT32)


@dataclass(frozen=True)
class Pass:
    """One forward and backward on one rank."""

    tokens: int
    targets: int
    kept_bytes: int
    """For the backward pass, when nothing is recomputed."""
    recomputes: bool
    several: bool = False
    """A step has more than one of them."""
    tile_bytes: int = TILE_BYTES
    """Of the loss head's tile."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    """A tile of logits, the gradient of the states that predict targets, and that of a trained head."""
    buffers: int
    """Weights gathered or cast for a while, and gradients on their way to other ranks."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory_of(shape: Shape, layout: Layout, work: Pass) -> Memory:
    """What one rank holds."""
    trained = shape.trained if layout.apart else _share(shape.trained, layout.shards)
    frozen = _share(shape.weights - shape.trained, layout.shards)
    return Memory(
        weights=frozen * layout.stored + trained * FLOAT32,
        gradients=trained * FLOAT32,
        optimizer=2 * trained * FLOAT32,
        activations=activations(shape, layout, work),
        loss=_loss(shape, layout, work),
        buffers=_buffers(shape, layout, work),
    )


def activations(shape: Shape, layout: Layout, work: Pass) -> int:
    """Kept for the backward pass: all of it, or the input of every layer and all of one layer."""
    if not work.recomputes:
        return work.kept_bytes
    return work.tokens * shape.hidden * layout.computed * shape.layers + work.kept_bytes // shape.layers


def _loss(shape: Shape, layout: Layout, work: Pass) -> int:
    grad_hidden = work.targets * shape.hidden * layout.computed
    cast_head = shape.head * layout.computed if layout.computed != layout.stored else 0
    return work.tile_bytes + grad_hidden + cast_head + (shape.head * FLOAT32 if shape.head_trained else 0)


def _buffers(shape: Shape, layout: Layout, work: Pass) -> int:
    """Casts and flat gradients of whole weights; of cut ones two whole layers, the rest, and gradients that are not cut yet."""
    flat = shape.trained * FLOAT32 if layout.ranks > 1 and layout.apart else 0
    if layout.shards == 1:
        casts = 0 if layout.apart or layout.computed == FLOAT32 else shape.layers * shape.layer.trained_products * layout.computed
        return casts + flat
    whole = 2 * layout.gathered(shape.layer, inside_layer=True) + layout.gathered(shape.rest, inside_layer=False)
    if layout.apart:
        return whole + flat
    uncut = shape.trained if work.several and not layout.sums_each_pass else max(2 * shape.layer.trained, shape.rest.trained)
    return whole + uncut * FLOAT32


def _share(weights: int, ranks: int) -> int:
    return -(-weights // ranks)
