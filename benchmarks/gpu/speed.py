"""Measures speed and memory of LoRA steps in real shapes: llamahome, a plain loop of transformers and PEFT, and that with Liger's kernels.

Every system trains rank 16 on all linear layers of a frozen bfloat16 base, on the same number of real tokens. The plain loops get rows
without padding and ignore document boundaries, which is an advantage for them.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from benchmarks.gpu.shapes import Shape, batch_of, lengths_of, random_model
from benchmarks.gpu.trained import Trained
from llamahome.model.place import trained_parameters

_WARM, _ROUNDS = 3, 8
_PLAIN_ROW = 4096


def ours(shape: Shape, device: torch.device, *, tokens: int, length: int) -> dict[str, Any]:
    """Measure llamahome's step; each round has documents of other lengths."""
    started = time.perf_counter()
    trained, random = Trained(shape, device, compiled=True), torch.Generator().manual_seed(0)
    batches = [batch_of(lengths_of(tokens, length, random), shape.vocabulary, random) for _ in range(_WARM + _ROUNDS)]
    load_s = time.perf_counter() - started
    measured = _timed(device, lambda number: trained.step([batches[number]]).loss, tokens=tokens)
    return {
        "system": "ours",
        "shape": shape.name,
        "documents": length,
        "compiled": trained.compiled,
        "load_s": round(load_s, 1),
        **measured,
    }


def plain(shape: Shape, device: torch.device, *, tokens: int, length: int) -> dict[str, Any]:
    """Measure transformers and PEFT with scaled_dot_product_attention and autocast."""
    return {"system": "plain", "shape": shape.name, "documents": length, **_plain(shape, device, tokens=tokens)}


def plain_with_liger(shape: Shape, device: torch.device, *, tokens: int, length: int) -> dict[str, Any]:
    """Measure the plain loop with Liger's kernels and its fused linear cross-entropy."""
    result = {"system": "plain with Liger", "shape": shape.name, "documents": length}
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]
    except ImportError:
        return {**result, "skipped": "liger_kernel is not installed"}
    apply_liger_kernel_to_llama()
    return {**result, **_plain(shape, device, tokens=tokens)}


def _plain(shape: Shape, device: torch.device, *, tokens: int) -> dict[str, Any]:
    model = random_model(shape, device, dtype=torch.bfloat16)
    adapted = get_peft_model(model, PeftLoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-3, fused=True)
    random, width = torch.Generator().manual_seed(0), min(tokens, _PLAIN_ROW)
    rows = [torch.randint(0, shape.vocabulary, (tokens // width, width), generator=random) for _ in range(_WARM + _ROUNDS)]

    def step(number: int) -> torch.Tensor:
        ids = rows[number].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss: torch.Tensor = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return _timed(device, step, tokens=tokens // width * width)


def _timed(device: torch.device, step: Callable[[int], torch.Tensor], *, tokens: int) -> dict[str, Any]:
    """Time each step including the device; return the first one and the median after the warm-up."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for number in range(_WARM + _ROUNDS):
        begin = time.perf_counter()
        loss = float(step(number))  # waits for the device
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[_WARM:])
    return {
        "tokens": tokens,
        "first_step_s": round(seconds[0], 2),
        "step_s": round(median, 4),
        "tokens_per_s": round(tokens / median, 1),
        "peak_gb": _peak_gb(device),
        "loss": round(loss, 3),
    }


def _peak_gb(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else None


def compare_estimate(shape: Shape, device: torch.device, *, tokens: int) -> dict[str, Any]:
    """Compare the estimate of weights and activations with the peak allocation of two steps."""
    trained, random = Trained(shape, device, compiled=True), torch.Generator().manual_seed(0)
    weights = sum(each.numel() * each.element_size() for each in trained.model.parameters())
    trained_bytes = 3 * sum(each.numel() * each.element_size() for each in trained_parameters(trained.model).values())
    config, mean = trained.config, 1024 if tokens > 1024 else 64
    kept = trained.backend.kept_bytes(config, trained.model, tokens, longest=mean * 2, compiled=trained.compiled)
    for _ in range(2):
        trained.step([batch_of(lengths_of(tokens, mean, random), shape.vocabulary, random)])
    result = {"shape": shape.name, "tokens": tokens, "estimate_gb": round((weights + trained_bytes + kept) / 1e9, 2)}
    return {**result, "peak_gb": _peak_gb(device)}
