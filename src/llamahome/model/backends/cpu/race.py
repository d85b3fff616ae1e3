"""Our products against torch's on this machine, a short race for each shape: who multiplies is measured, not guessed from processor flags.

Forward, gradient of inputs and gradient of weights race separately, in turns, about a tenth of a second for a shape. What was found is
kept beside the compiled library, so a later run on this machine decides alike and gives the same bits.

Legend: T tokens, I inputs, O outputs of all layers of a fan together.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from llamahome.model.backends.cpu.native import Kernels, cache_folder
from llamahome.model.backends.cpu.products import Stack, outer_product, product
from llamahome.model.backends.measured import measured

_WORK = 5e8
"""Operations of one product in the race, about at most: 5 ms at the 100 GFLOP/s of two cores with AVX2."""
_MOST_TOKENS, _LEAST_TOKENS, _MOST_WIDTH = 1024, 256, 1024
"""Fewer tokens would not stand for many: gradients of weights are sums over them."""
_EVEN = 0.95
"""Ours are used down to this: what is closer is noise, and torch's products want weights that are joined first."""
_SECONDS, _LEAST_ROUNDS, _MOST_ROUNDS = 0.03, 2, 12
"""Of one kind of product; in a round each multiplies once, and the first is not counted."""
_TRIES = 4
_WEIGHTS = 3
"""Matrices in turn, so that the one that is read was not read just before."""


@dataclass(frozen=True)
class Shape:
    """Of the products of a fan."""

    tokens: int
    inputs: int
    outputs: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Speeds:
    """How many times faster our products are than torch's."""

    forward: float
    inputs: float
    weights: float

    def ours(self) -> tuple[bool, bool, bool]:
        """Whether ours are used, for each kind."""
        return self.forward > _EVEN, self.inputs > _EVEN, self.weights > _EVEN


@dataclass(frozen=True)
class Multipliers:
    """Our products for each kind, or None where torch multiplies."""

    forward: Kernels | None
    inputs: Kernels | None
    weights: Kernels | None

    @classmethod
    def of(cls, kernels: Kernels | None, speeds: Speeds | None = None) -> "Multipliers":
        """The faster one for each kind; without speeds ours, where they are there."""
        faster = (True, True, True) if speeds is None else speeds.ours()
        return cls(*(kernels if ours else None for ours in faster))


def race(shapes: Sequence[Shape], kernels: Kernels) -> dict[Shape, Speeds]:
    """How fast our products are beside torch's for each shape that they take; measured once per machine, then looked up."""
    raced = {shape: _raced(shape) for shape in shapes if kernels.has("product", shape.dtype)}
    small = {_key(each): each for each in raced.values()}
    found = measured(cache_folder() / f"{kernels.name}.json", list(small), lambda key: astuple(_measured(small[key], kernels)), count=3)
    return {shape: Speeds(*found[_key(each)]) for shape, each in raced.items()}


def told(found: dict[Shape, Speeds]) -> str:
    """One line for the log: who multiplies what, and how fast our products are beside torch's."""

    def each(speeds: Speeds) -> str:
        kinds = zip(("forward", "inputs", "weights"), speeds.ours(), astuple(speeds), strict=True)
        return ", ".join(f"{kind} {'ours' if ours else 'torch'} ({ratio:.2f})" for kind, ours, ratio in kinds)

    return "; ".join(f"{shape.inputs} -> {shape.outputs}: {each(speeds)}" for shape, speeds in found.items())


def summary(found: dict[Shape, Speeds]) -> str:
    """One line for people: how fast our products are where they are used, and how many are left to torch."""
    kinds = [(ours, ratio) for speeds in found.values() for ours, ratio in zip(speeds.ours(), astuple(speeds), strict=True)]
    faster = [ratio for ours, ratio in kinds if ours]
    if not faster:
        return "in a race torch's products are faster than ours and are used"
    line = f"in a race our products are {min(faster):.2f} to {max(faster):.2f} times as fast as torch's"
    slower = len(kinds) - len(faster)
    return line + (f"; {slower} of {len(kinds)} are left to torch" if slower else "")


def _raced(shape: Shape) -> Shape:
    """The shape that runs in the place of `shape`: large ones in part, and one for all numbers of tokens above it."""
    inputs, outputs = min(shape.inputs, _MOST_WIDTH), min(shape.outputs, _MOST_WIDTH)
    tokens = int(_WORK / (2 * inputs * outputs))
    return Shape(min(shape.tokens, max(_LEAST_TOKENS, min(tokens, _MOST_TOKENS))), inputs, outputs, shape.dtype)


def _key(shape: Shape) -> str:
    sizes = f"{shape.tokens} x {shape.inputs} -> {shape.outputs} {shape.dtype}"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {sizes}"


def _measured(shape: Shape, kernels: Kernels) -> Speeds:
    weights = [torch.full((shape.outputs, shape.inputs), 0.5, dtype=shape.dtype) for _ in range(_WEIGHTS)]
    x = torch.full((shape.tokens, shape.inputs), 0.5, dtype=shape.dtype)
    grad = torch.full((shape.tokens, shape.outputs), 0.5, dtype=shape.dtype)
    stacks = [Stack([weight]) for weight in weights]

    def ways(who: Kernels | None) -> tuple[Callable[[int], Tensor], ...]:
        return (
            lambda n: product(x, stacks[n], turned=True, kernels=who),
            lambda n: product(grad, stacks[n], turned=False, kernels=who),
            lambda n: outer_product(grad, x, kernels=who).float(),
        )

    return Speeds(*(_sure_ratio(ours, theirs) for ours, theirs in zip(ways(kernels), ways(None), strict=True)))


def _sure_ratio(ours: Callable[[int], Tensor], theirs: Callable[[int], Tensor]) -> float:
    """A race that torch wins is repeated, because other work on the machine may have spoilt it, and what is found here is kept."""
    found = 0.0
    for _ in range(_TRIES):
        found = max(found, _ratio(ours, theirs))
        if found > _EVEN:
            break
    return found


@torch.no_grad()
def _ratio(ours: Callable[[int], Tensor], theirs: Callable[[int], Tensor]) -> float:
    """Their seconds over ours, the best of runs in turn: what else the machine does only adds."""
    taken: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + _SECONDS
    for number in range(_MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for way, found in zip((ours, theirs), taken, strict=True):
            begin = time.perf_counter()
            way(number % _WEIGHTS)
            found.append(time.perf_counter() - begin)
    mine, other = (min(each[1:]) for each in taken)
    return other / mine
