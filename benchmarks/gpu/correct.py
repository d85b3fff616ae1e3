"""Whether the device computes the right thing: its back end beside the reference, packed beside alone, many steps, waits, recompiles."""

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
"""Relative distance of gradients that rounding explains: TF32 has 10 bits, bfloat16 has 8."""
_STEPS = 50


def run(device: torch.device, toy: bool) -> Iterator[dict[str, Any]]:
    """Every check, one result each."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from _beside_reference(device, dtype)
    yield _many_steps(device, steps=10 if toy else _STEPS)


def _beside_reference(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    random = torch.Generator().manual_seed(1)
    batch = batch_of((300, 180, 33, 2), _SMALL.vocabulary, random)
    exact = _gradients("reference", device, torch.float32, [batch])
    packed = _gradients(device.type, device, dtype, [batch])
    alone = _gradients(device.type, device, dtype, _apart(batch))
    for name, other in (("reference", exact), ("alone", alone)):
        distance = float((packed[1] - other[1]).norm() / other[1].norm())
        loss = abs(float(packed[0] / other[0]) - 1)
        told = {"check": f"packed beside {name}", "dtype": str(dtype), "loss": loss, "gradients": distance}
        yield {**told, "ok": distance < _LIMITS[dtype] and loss < _LIMITS[dtype]}


def _gradients(name: str, device: torch.device, dtype: torch.dtype, batches: list[Microbatch]) -> tuple[Tensor, Tensor]:
    """Summed loss and all gradients in one row, on the processor."""
    register_attention()
    backend = backend_of(name, device, Precision(dtype, dtype, "a check"))
    model = random_model(_SMALL, device, dtype=dtype, attention=ATTENTION_NAME)
    objective = Objective(model.train(), backend)
    loss = torch.zeros((), device=device)
    for batch in batches:
        share = objective.loss_sum(backend.deliver(batch))
        share.backward()  # type: ignore[no-untyped-call]
        loss += share.detach()
    grads = [each.grad.float().flatten().cpu() for each in model.parameters() if each.grad is not None]
    return loss.float().cpu(), torch.cat(grads)


def _apart(batch: Microbatch) -> list[Microbatch]:
    """Each document as a micro-batch of its own."""
    found, start = [], 0
    for length in batch.lengths:
        mine = (batch.rows_N >= start) & (batch.rows_N < start + length)
        whole = slice(start, start + length)
        parts = batch.tokens_T[whole], batch.positions_T[whole], (length,), batch.rows_N[mine] - start, batch.labels_N[mine]
        found.append(Microbatch(*parts))
        start += length
    return found


def _many_steps(device: torch.device, *, steps: int) -> dict[str, Any]:
    """Steps of changing lengths: the loss falls, nothing is NaN, no step waits for the device, nothing compiles after the warm-up."""
    trained = Trained(_SMALL, device, compiled=True)
    random = torch.Generator().manual_seed(2)
    batches = [batch_of(lengths_of(400 + 13 * n, 90, random), 64, random) for n in range(4)]
    losses = []
    for number, batch in zip(range(steps), itertools.cycle(batches), strict=False):
        with trained.watched(warm=number < 2 * len(batches)):
            losses.append(trained.step([batch]).loss)
    found = torch.stack(losses).cpu()
    quiet = not (trained.waits or trained.recompiles)
    told = {"check": f"{steps} steps", "first": float(found[0]), "last": float(found[-1])}
    told |= {"recompiles": trained.recompiles, "waits": trained.waits}
    return {**told, "ok": bool(found.isfinite().all() and found[-1] < found[0]) and quiet}
