"""Speed of our own products beside torch's, for the sizes of a decoder's linear layers: prints a table.

    python benchmarks/product_speed.py [--hidden 576 --inner 1536 --keys 192] [--tokens 1525] [--threads 2]

Both multiply the same numbers in turns in one process, each time with other weights (so many that no cache holds them), into fresh memory.
Told are GFLOP/s, medians, and the ratio. Gradients of weights are float32 for both.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llamahome.model.backends.cpu.native import Kernels, load_kernels
from llamahome.model.backends.cpu.products import Stack, outer_product, product

_WEIGHTS = 24


def main() -> None:
    """Measure and print."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 576), ("inner", 1536), ("keys", 192), ("tokens", 1525)):
        words.add_argument(f"--{name}", type=int, default=default)
    words.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = words.parse_args()
    torch.set_num_threads(asked.threads)
    kernels = load_kernels()
    if isinstance(kernels, str) or not kernels.has("product", torch.bfloat16):
        raise SystemExit("there are no products of our own on this processor")
    hidden, inner, keys = asked.hidden, asked.inner, asked.keys
    layers = (("q, k, v", hidden + 2 * keys, hidden), ("o", hidden, hidden), ("gate, up", 2 * inner, hidden), ("down", hidden, inner))
    print(f"{asked.tokens} tokens, {asked.threads} threads, GFLOP/s\n\n| layer | what | torch | ours | ratio |\n|---|---|---|---|---|")
    for title, outputs, inputs in layers:
        for what, (theirs, ours) in _ways(asked.tokens, outputs, inputs, kernels).items():
            taken = _in_turns(theirs, ours)
            rates = [2 * asked.tokens * outputs * inputs / each / 1e9 for each in taken]
            print(f"| {title} | {what} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} |")


_Way = Callable[[int], Tensor]


def _ways(tokens: int, outputs: int, inputs: int, kernels: Kernels) -> dict[str, tuple[_Way, _Way]]:
    weights = [torch.randn(outputs, inputs).bfloat16() for _ in range(_WEIGHTS)]
    x, grad = torch.randn(tokens, inputs).bfloat16(), torch.randn(tokens, outputs).bfloat16()
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
