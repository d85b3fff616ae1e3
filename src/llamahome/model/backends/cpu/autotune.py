"""Chooses between our matrix products and torch's for each shape, by a short measurement on this machine.

The forward product, the gradient of the inputs and the gradient of the weights are measured separately, which takes about a tenth of a
second per shape. The results are cached beside the compiled library, so later runs on this machine make the same choice and get the same
bits.

Legend: T tokens, I inputs, O outputs of all merged layers together.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from llamahome.model.backends.cpu.native import Kernels, cache_folder
from llamahome.model.backends.cpu.products import Stack, outer_product, product
from llamahome.model.backends.measurement_cache import cached_measurements

_MAX_OPERATIONS = 5e8
"""Approximate limit of one trial product: 5 ms at the 100 GFLOP/s of two cores with AVX2."""
_MIN_TOKENS, _MAX_TOKENS, _MAX_WIDTH = 256, 1024, 1024
"""Fewer tokens would not be representative, because gradients of weights are sums over tokens."""
_THRESHOLD = 0.95
"""Our products are used above this speed-up. Smaller differences are noise, and torch's products need concatenated weights."""
_SECONDS, _MIN_TRIALS, _MAX_TRIALS = 0.03, 2, 12
"""Time and number of trials for each kind of product. A trial runs both products once; the first trial is a warm-up."""
_REPEATS = 4
_WEIGHTS = 3
"""Number of weight matrices, used in turn so that none is still in the cache."""


@dataclass(frozen=True)
class ProductShape:
    """The shape and dtype of the products of merged layers."""

    tokens: int
    inputs: int
    outputs: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Speedups:
    """The factor by which our products are faster than torch's, for each kind of product."""

    forward: float
    inputs: float
    weights: float

    def use_kernels(self) -> tuple[bool, bool, bool]:
        """Whether our products are used, for each kind."""
        return self.forward > _THRESHOLD, self.inputs > _THRESHOLD, self.weights > _THRESHOLD


@dataclass(frozen=True)
class ProductDispatch:
    """The kernels for each kind of product, or None if torch multiplies."""

    forward: Kernels | None
    inputs: Kernels | None
    weights: Kernels | None

    @classmethod
    def of(cls, kernels: Kernels | None, speedups: Speedups | None = None) -> "ProductDispatch":
        """The faster choice for each kind; without speed-ups the kernels."""
        choices = (True, True, True) if speedups is None else speedups.use_kernels()
        return cls(*(kernels if use_kernels else None for use_kernels in choices))


def measure_speedups(shape: ProductShape, kernels: Kernels) -> Speedups:
    """Run the products of `shape` by the kernels and by torch."""
    weights = [torch.full((shape.outputs, shape.inputs), 0.5, dtype=shape.dtype) for _ in range(_WEIGHTS)]
    x = torch.full((shape.tokens, shape.inputs), 0.5, dtype=shape.dtype)
    grad = torch.full((shape.tokens, shape.outputs), 0.5, dtype=shape.dtype)
    stacks = [Stack([weight]) for weight in weights]

    def products(by: Kernels | None) -> tuple[Callable[[int], Tensor], ...]:
        return (
            lambda n: product(x, stacks[n], transposed=True, kernels=by),
            lambda n: product(grad, stacks[n], transposed=False, kernels=by),
            lambda n: outer_product(grad, x, kernels=by).float(),
        )

    return Speedups(*(_confirmed_speedup(ours, torchs) for ours, torchs in zip(products(kernels), products(None), strict=True)))


def autotune(
    shapes: Sequence[ProductShape], kernels: Kernels, *, measure: Callable[[ProductShape, Kernels], Speedups] = measure_speedups
) -> dict[ProductShape, Speedups]:
    """The speed-ups for each shape that the kernels support, from the cache or from `measure`."""
    trial_shapes = {shape: _trial_shape(shape) for shape in shapes if kernels.has("product", shape.dtype)}
    by_key = {_key(trial_shape): trial_shape for trial_shape in trial_shapes.values()}
    path = cache_folder() / f"{kernels.name}.json"
    measurements = cached_measurements(path, list(by_key), lambda key: astuple(measure(by_key[key], kernels)), count=3)
    return {shape: Speedups(*measurements[_key(trial_shape)]) for shape, trial_shape in trial_shapes.items()}


def details(results: dict[ProductShape, Speedups]) -> str:
    """One line for the log: the choice and the speed-up for each kind of product of each shape."""

    def line(speedups: Speedups) -> str:
        kinds = zip(("forward", "inputs", "weights"), speedups.use_kernels(), astuple(speedups), strict=True)
        return ", ".join(f"{kind} {'ours' if use_kernels else 'torch'} ({speedup:.2f})" for kind, use_kernels, speedup in kinds)

    return "; ".join(f"{shape.inputs} -> {shape.outputs}: {line(speedups)}" for shape, speedups in results.items())


def summary(results: dict[ProductShape, Speedups]) -> str:
    """One line for the user: the range of speed-ups of our products where they are used, and how many products torch computes."""
    kinds = [kind for speedups in results.values() for kind in zip(speedups.use_kernels(), astuple(speedups), strict=True)]
    used = [speedup for use_kernels, speedup in kinds if use_kernels]
    if not used:
        return "torch's matrix products are faster than ours on this machine and are used"
    line = f"our matrix products are {min(used):.2f} to {max(used):.2f} times as fast as torch's on this machine"
    rest = len(kinds) - len(used)
    return line + (f"; torch computes {rest} of {len(kinds)}" if rest else "")


def _trial_shape(shape: ProductShape) -> ProductShape:
    """The shape that is measured instead of `shape`: large shapes are cut, so that they share a measurement."""
    inputs, outputs = min(shape.inputs, _MAX_WIDTH), min(shape.outputs, _MAX_WIDTH)
    tokens = int(_MAX_OPERATIONS / (2 * inputs * outputs))
    return ProductShape(min(shape.tokens, max(_MIN_TOKENS, min(tokens, _MAX_TOKENS))), inputs, outputs, shape.dtype)


def _key(shape: ProductShape) -> str:
    sizes = f"{shape.tokens} x {shape.inputs} -> {shape.outputs} {shape.dtype}"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {sizes}"


def _confirmed_speedup(ours: Callable[[int], Tensor], torchs: Callable[[int], Tensor]) -> float:
    """The speed-up; measured again while torch is faster, because other work may have disturbed it and the result is cached."""
    best = 0.0
    for _ in range(_REPEATS):
        best = max(best, _speedup(ours, torchs))
        if best > _THRESHOLD:
            break
    return best


@torch.no_grad()
def _speedup(ours: Callable[[int], Tensor], torchs: Callable[[int], Tensor]) -> float:
    """torch's time divided by ours: the fastest of alternating trials of each, because other work on the machine only adds time."""
    seconds: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + _SECONDS
    for trial in range(_MAX_TRIALS):
        if trial >= _MIN_TRIALS and time.perf_counter() > end:
            break
        for run, times in zip((ours, torchs), seconds, strict=True):
            start = time.perf_counter()
            run(trial % _WEIGHTS)
            times.append(time.perf_counter() - start)
    ours_best, torch_best = (min(times[1:]) for times in seconds)
    return torch_best / ours_best
