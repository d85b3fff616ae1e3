"""Checks the device: its back end against the reference, packed against single documents, many steps, waits, recompilations."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Shape, batch_of, lengths_of, random_model
from benchmarks.gpu.trained import Trained
from llamahome.data.records import Microbatch
from llamahome.model.attention import ATTENTION_NAME, register_attention
from llamahome.model.backends.choose import backend_of
from llamahome.model.objective import Objective
from llamahome.model.precision import Precision

_SMALL = Shape("small", 256, 512, 2, 4, 2, 1024, True)
_LIMITS = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
"""Largest relative difference of gradients that is due to rounding: TF32 has 10 bits, bfloat16 has 8."""
_STEPS = 50


def run(device: torch.device, toy: bool) -> Iterator[dict[str, Any]]:
    """Run every check and yield its result."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from _compare_gradients(device, dtype)
    yield _many_steps(device, steps=10 if toy else _STEPS)


def _compare_gradients(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    random = torch.Generator().manual_seed(1)
    batch = batch_of((300, 180, 33, 2), _SMALL.vocabulary, random)
    reference = _gradients("reference", device, torch.float32, [batch])
    packed = _gradients(device.type, device, dtype, [batch])
    single = _gradients(device.type, device, dtype, _split(batch))
    for name, other in (("reference", reference), ("alone", single)):
        distance = float((packed[1] - other[1]).norm() / other[1].norm())
        loss = abs(float(packed[0] / other[0]) - 1)
        result = {"check": f"packed beside {name}", "dtype": str(dtype), "loss": loss, "gradients": distance}
        yield {**result, "ok": distance < _LIMITS[dtype] and loss < _LIMITS[dtype]}


def _gradients(name: str, device: torch.device, dtype: torch.dtype, batches: list[Microbatch]) -> tuple[Tensor, Tensor]:
    """Return the summed loss and all gradients in one flat tensor, on the CPU."""
    register_attention()
    backend = backend_of(name, device, Precision(dtype, dtype, "a check"))
    model = random_model(_SMALL, device, dtype=dtype, attention=ATTENTION_NAME)
    objective = Objective(model.train(), backend)
    loss = torch.zeros((), device=device)
    for batch in batches:
        share = objective.loss_sum(backend.to_device(batch))
        share.backward()  # type: ignore[no-untyped-call]
        loss += share.detach()
    grads = [each.grad.float().flatten().cpu() for each in model.parameters() if each.grad is not None]
    return loss.float().cpu(), torch.cat(grads)


def _split(batch: Microbatch) -> list[Microbatch]:
    """Split a batch into one micro-batch per document."""
    batches, start = [], 0
    for length in batch.lengths:
        in_document = (batch.rows_N >= start) & (batch.rows_N < start + length)
        document = slice(start, start + length)
        parts = (
            batch.tokens_T[document],
            batch.positions_T[document],
            (length,),
            batch.rows_N[in_document] - start,
            batch.labels_N[in_document],
        )
        batches.append(Microbatch(*parts))
        start += length
    return batches


def _many_steps(device: torch.device, *, steps: int) -> dict[str, Any]:
    """Train on changing lengths. The loss must fall and stay finite; no step may wait for the device or recompile after the warm-up."""
    trained = Trained(_SMALL, device, compiled=True)
    random = torch.Generator().manual_seed(2)
    batches = [batch_of(lengths_of(400 + 13 * n, 90, random), 64, random) for n in range(4)]
    losses = []
    for number, batch in zip(range(steps), itertools.cycle(batches), strict=False):
        with trained.watched(warm=number < 2 * len(batches)):
            losses.append(trained.step([batch]).loss)
    values = torch.stack(losses).cpu()
    asynchronous = not (trained.waits or trained.recompiles)
    result = {"check": f"{steps} steps", "first": float(values[0]), "last": float(values[-1])}
    result |= {"recompiles": trained.recompiles, "waits": trained.waits}
    return {**result, "ok": bool(values.isfinite().all() and values[-1] < values[0]) and asynchronous}
