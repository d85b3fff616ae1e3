"""Compares our matrix products with torch's, in the sizes of a decoder's linear layers: prints a table.

    python benchmarks/product_speed.py [--dtype bfloat16|float32] [--level native|avx2|avx512] [--tokens 1525] [--threads 2]
                                       [--hidden 576 --inner 1536 --keys 192 --words 49152]

Both multiply the same numbers alternately in one process, each time with other weights (more than the caches hold), into new memory. The
table has the median GFLOP/s and the ratio. Gradients of weights are float32 for both. In float32, the rate of numpy's OpenBLAS on
2,048 x 2,048 x 2,048 is printed first, as the peak of the machine.

--level only limits our products. To limit torch to AVX2, set ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and
MKL_ENABLE_INSTRUCTIONS=AVX2 in the environment.
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

_REPEATS = 24
_MATRIX_NUMBERS = 50_000_000
"""Numbers in all matrices of one shape: more than the caches hold."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 576), ("inner", 1536), ("keys", 192), ("words", 49152), ("tokens", 1525)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--level", choices=tuple(LEVELS), default="native")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype, kernels = getattr(torch, options.dtype), load_kernels(options.level)
    if isinstance(kernels, str) or not kernels.has("product", dtype):
        raise SystemExit(kernels if isinstance(kernels, str) else f"{options.level} has no products of our own in {options.dtype}")
    hidden, inner, keys = options.hidden, options.inner, options.keys
    layers = (("q, k, v", hidden + 2 * keys, hidden), ("o", hidden, hidden), ("gate, up", 2 * inner, hidden), ("down", hidden, inner))
    print(f"{options.dtype}, ours for {options.level}, {options.tokens} tokens (head: a quarter), {options.threads} threads, GFLOP/s")
    if dtype == torch.float32:
        core = os.environ.get("OPENBLAS_CORETYPE", "its default kernel")
        print(f"OpenBLAS ({core}) on 2048 x 2048 x 2048: {_openblas():.0f}")
    print("\n| layer | what | torch | ours | ratio |\n|---|---|---|---|---|")
    for title, outputs, inputs in (*layers, ("head", options.words, hidden)):
        tokens = options.tokens // 4 if title == "head" else options.tokens
        for what, (theirs, ours) in _pairs(tokens, outputs, inputs, kernels, dtype).items():
            seconds = _alternate(theirs, ours)
            rates = [2 * tokens * outputs * inputs / each / 1e9 for each in seconds]
            print(f"| {title} | {what} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} |", flush=True)


def _openblas() -> float:
    """GFLOP/s of numpy's OpenBLAS product, with OPENBLAS_NUM_THREADS threads (by default all)."""
    left = np.ones((2048, 2048), np.float32)
    seconds = []
    for _ in range(9):
        begin = time.perf_counter()
        left @ left
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048**3 / statistics.median(seconds) / 1e9


_Product = Callable[[int], Tensor]


def _pairs(tokens: int, outputs: int, inputs: int, kernels: Kernels, dtype: torch.dtype) -> dict[str, tuple[_Product, _Product]]:
    count = min(_REPEATS, 2 + _MATRIX_NUMBERS // (outputs * inputs))
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(count)] * _REPEATS
    x, grad = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
    stacks = [Stack([weight]) for weight in weights]
    return {
        "forward": (lambda n: x @ weights[n].t(), lambda n: product(x, stacks[n], transposed=True, kernels=kernels)),
        "gradient of inputs": (lambda n: grad @ weights[n], lambda n: product(grad, stacks[n], transposed=False, kernels=kernels)),
        "gradient of weights": (lambda n: (grad.t() @ x).float(), lambda n: outer_product(grad, x, kernels=kernels)),
    }


def _alternate(*products: _Product) -> list[float]:
    """Run the products alternately and return their median seconds."""
    times: list[list[float]] = [[] for _ in products]
    for number in range(_REPEATS):
        for run, seconds in zip(products, times, strict=True):
            begin = time.perf_counter()
            run(number)
            if number > 1:
                seconds.append(time.perf_counter() - begin)
    return [statistics.median(each) for each in times]


if __name__ == "__main__":
    main()
