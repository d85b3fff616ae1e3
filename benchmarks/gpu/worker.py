"""Runs one part of the benchmark in its own process: `python -m benchmarks.gpu.worker PART DEVICE [toy]` prints JSON lines."""

import gc
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import correct, resume, speed
from benchmarks.gpu.shapes import EIGHT_B, ONE_B, TOY, Shape
from llamahome.distributed.processors import bound_caches, share_processors

Results = Iterator[dict[str, Any]]
_SMALL_GPU_BYTES = 40 * 10**9
"""With less memory, the 8B shape does not fit and the 1B shape gets smaller micro-batches."""


def machine(device: torch.device, toy: bool) -> Results:
    """Describe the machine."""
    info: dict[str, Any] = {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers"), "device": str(device)}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        info |= {"card": card.name, "memory_gb": round(card.total_memory / 1e9, 1), "cuda": torch.version.cuda}
        info |= {"capability": f"{card.major}.{card.minor}", "gpus": torch.cuda.device_count(), "driver": _driver()}
    yield info


def _driver() -> str | None:
    try:
        import pynvml  # type: ignore[import-not-found]
    except ImportError:
        return None
    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


def one_b(device: torch.device, toy: bool) -> Results:
    """The 1B shape: llamahome, a plain loop, a plain loop with Liger."""
    tokens = 8192 if _is_small(device) else 16_384
    yield from _compare(TOY if toy else ONE_B, device, [(256, 64)] if toy else [(tokens, 1024)])


def eight_b(device: torch.device, toy: bool) -> Results:
    """The 8B shape: documents of 1,024 and 4,096 tokens on average."""
    if _is_small(device):
        yield {"skipped": "this GPU has less than 40 GB"}
        return
    yield from _compare(TOY if toy else EIGHT_B, device, [(256, 64), (256, 128)] if toy else [(8192, 1024), (8192, 4096)])


def _compare(shape: Shape, device: torch.device, workloads: list[tuple[int, int]]) -> Results:
    for measure in (speed.ours, speed.plain, speed.plain_with_liger):  # Liger last: it patches the classes of transformers permanently
        for tokens, length in workloads:
            yield _or_error(lambda: measure(shape, device, tokens=tokens, length=length))  # noqa: B023  # called at once


def _or_error(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Free the memory of the previous model and measure; running out of memory is a result."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error).splitlines()[0][:160]}"}


def memory(device: torch.device, toy: bool) -> Results:
    """Compare the memory estimate with the peak of a step."""
    shapes = [(TOY, 256)] if toy else [(ONE_B, 16_384), (EIGHT_B, 8192), (EIGHT_B, 12_288)]
    for shape, tokens in shapes[: 1 if _is_small(device) else None]:
        yield _or_error(lambda: speed.compare_estimate(shape, device, tokens=tokens))  # noqa: B023  # called at once


def _is_small(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < _SMALL_GPU_BYTES


PARTS: dict[str, Callable[[torch.device, bool], Results]] = {
    "machine": machine,
    "correct": correct.run,
    "1b": one_b,
    "8b": eight_b,
    "memory": memory,
    "resume": resume.run,
    "ranks": resume.two_processes,
}


def main(arguments: list[str]) -> None:
    """Run one part and print its results."""
    part, device, *toy = arguments
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU on this machine; --device cpu --toy runs the same parts on the CPU")
    for result in PARTS[part](torch.device(device, 0) if device == "cuda" else torch.device(device), bool(toy)):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    import os

    share_processors(os.environ)
    bound_caches(os.environ)
    main(sys.argv[1:])
