"""Speed of our own products beside torch's, for the sizes of a decoder's linear layers: prints a table.

    python benchmarks/product_speed.py [--dtype bfloat16|float32] [--level native|avx2|avx512] [--tokens 1525] [--threads 2]
                                       [--hidden 576 --inner 1536 --keys 192 --words 49152]

Both multiply the same numbers in turns in one process, each time with other weights (so many that no cache holds them), into fresh memory.
Told are GFLOP/s, medians, and the ratio. Gradients of weights are float32 for both. In float32 the machine's own rate comes first:
numpy's OpenBLAS on 2048 cubed, which loses nothing by layout.

--level is for our products alone. To see torch as it is on a processor with AVX2, set ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2
and MKL_ENABLE_INSTRUCTIONS=AVX2 in the environment.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from llamahome.model.backends.cpu.native import LEVELS, Kernels, load_kernels
from llamahome.model.backends.cpu.products import Stack, outer_product, product

_WEIGHTS = 24
_HELD = 50_000_000
"""Numbers in the matrices of one shape: a large one is no longer in the caches when its turn comes again."""


def main() -> None:
    """Measure and print."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 576), ("inner", 1536), ("keys", 192), ("words", 49152), ("tokens", 1525)):
        words.add_argument(f"--{name}", type=int, default=default)
    words.add_argument("--threads", type=int, default=torch.get_num_threads())
    words.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    words.add_argument("--level", choices=tuple(LEVELS), default="native")
    asked = words.parse_args()
    torch.set_num_threads(asked.threads)
    dtype, kernels = getattr(torch, asked.dtype), load_kernels(asked.level)
    if isinstance(kernels, str) or not kernels.has("product", dtype):
        raise SystemExit(kernels if isinstance(kernels, str) else f"{asked.level} has no products of our own in {asked.dtype}")
    hidden, inner, keys = asked.hidden, asked.inner, asked.keys
    layers = (("q, k, v", hidden + 2 * keys, hidden), ("o", hidden, hidden), ("gate, up", 2 * inner, hidden), ("down", hidden, inner))
    print(f"{asked.dtype}, ours for {asked.level}, {asked.tokens} tokens (head: a quarter), {asked.threads} threads, GFLOP/s")
    if dtype == torch.float32:
        core = os.environ.get("OPENBLAS_CORETYPE", "its own choice of kernel")
        print(f"OpenBLAS ({core}) on 2048 x 2048 x 2048: {_openblas():.0f}")
    print("\n| layer | what | torch | ours | ratio |\n|---|---|---|---|---|")
    for title, outputs, inputs in (*layers, ("head", asked.words, hidden)):
        tokens = asked.tokens // 4 if title == "head" else asked.tokens
        for what, (theirs, ours) in _ways(tokens, outputs, inputs, kernels, dtype).items():
            taken = _in_turns(theirs, ours)
            rates = [2 * tokens * outputs * inputs / each / 1e9 for each in taken]
            print(f"| {title} | {what} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} |", flush=True)


def _openblas() -> float:
    """GFLOP/s of numpy, whose product is OpenBLAS's; its threads are OPENBLAS_NUM_THREADS, by default all."""
    left = np.ones((2048, 2048), np.float32)
    taken = []
    for _ in range(9):
        begin = time.perf_counter()
        left @ left
        taken.append(time.perf_counter() - begin)
    return 2 * 2048**3 / statistics.median(taken) / 1e9


_Way = Callable[[int], Tensor]


def _ways(tokens: int, outputs: int, inputs: int, kernels: Kernels, dtype: torch.dtype) -> dict[str, tuple[_Way, _Way]]:
    count = min(_WEIGHTS, 2 + _HELD // (outputs * inputs))
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(count)] * _WEIGHTS
    x, grad = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
    stacks = [Stack([weight]) for weight in weights]
    return {
        "forward": (lambda n: x @ weights[n].t(), lambda n: product(x, stacks[n], turned=True, kernels=kernels)),
        "gradient of inputs": (lambda n: grad @ weights[n], lambda n: product(grad, stacks[n], turned=False, kernels=kernels)),
        "gradient of weights": (lambda n: (grad.t() @ x).float(), lambda n: outer_product(grad, x, kernels=kernels)),
    }


def _in_turns(*ways: _Way) -> list[float]:
    """Median seconds of each."""
    taken: list[list[float]] = [[] for _ in ways]
    for number in range(_WEIGHTS):
        for way, found in zip(ways, taken, strict=True):
            begin = time.perf_counter()
            way(number)
            if number > 1:
                found.append(time.perf_counter() - begin)
    return [statistics.median(each) for each in taken]


if __name__ == "__main__":
    main()
