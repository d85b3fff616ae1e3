"""What is computed again in the backward pass, so that a long row fits: layers, and within them feed-forward blocks in tiles of tokens.

Gradient checkpointing keeps the input of each layer and computes one layer at a time again. The widest values of that layer are those of
its feed-forward block, [T, F] several times over. `tile_blocks` lets such a block run on tiles of tokens: forward without keeping anything
but its input, and backward tile by tile, each computed again just before its gradients. Every token gets the same values, and gradients of
weights are summed over tiles in float32. Cost: none, because the block is not computed when its layer is computed again: torch's checkpoint
stops once everything that a layer saves is there, and the input of the block is the last of it. The idea of tiles over the sequence: Arctic
Long Sequence Training, arXiv 2506.13996.

Legend: T tokens, D hidden size, F feed-forward size.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.model.load import decoder_layers

_WRAPPER = "forward_with_checkpointing"
"""The function that transformers 5.23 wraps around the forward of a layer; before, recomputation was in `__call__`."""
_NAMES = ("mlp", "feed_forward", "ffn")
_EXPERTS = {"experts", "router", "gate"}
_PROBED = 6
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Relative distance up to which a block's results are the same in tiles."""


def plain_forward(layer: Any) -> Callable[..., Any]:
    """The forward of a layer's class without the recomputation that transformers wraps around it; unbound."""
    forward: Any = type(layer).forward
    plain: Callable[..., Any] = forward.__wrapped__ if _is_wrapped(forward) else forward
    return plain


def recomputing(layer: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` as the forward of `layer`, computed again in the backward pass if gradient checkpointing is on."""
    if not _is_wrapped(type(layer).forward):
        return run

    def forward(*args: Any, **kwargs: Any) -> Any:
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(partial(run, **kwargs), *args)
        return run(*args, **kwargs)

    return forward


def _is_wrapped(forward: Any) -> bool:
    return bool(forward.__code__.co_name == _WRAPPER)


@torch.no_grad()
def tile_blocks(model: PreTrainedModel, *, tokens: int) -> int:
    """Let the dense feed-forward blocks of `model` run on tiles of `tokens` at most while gradients are computed; returns their number.

    Call it after compiling, because it changes the forward that a block has then. Blocks with experts or dropout stay whole, and blocks
    whose result for a token depends on other tokens.
    """
    embedding = model.get_input_embeddings().weight
    noise = torch.randn(1, _PROBED, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0))
    probe = noise.to(embedding.device, embedding.dtype)
    blocks = [block for layer in decoder_layers(model) for name, block in layer.named_children() if name in _NAMES]
    tiled = [block for block in blocks if _is_dense(block) and _sees_tokens_alone(block, probe)]
    for block in tiled:
        block.forward = _tiled(block, block.forward, tokens)
    return len(tiled)


def _is_dense(block: nn.Module) -> bool:
    """Whether a block has neither experts nor dropout, and takes hidden states alone."""
    names = {name.rpartition(".")[2] for name, _ in block.named_modules()}
    if names & _EXPERTS or any(isinstance(part, nn.Dropout) and part.p > 0 for part in block.modules()):
        return False
    needed = [each for each in signature(type(block).forward).parameters.values() if each.default is each.empty]
    return len(needed) == 2


def _sees_tokens_alone(block: nn.Module, probe_1TD: Tensor) -> bool:
    whole = block(probe_1TD)
    if not isinstance(whole, Tensor) or whole.shape[:2] != probe_1TD.shape[:2]:
        return False
    halves = torch.cat([block(part) for part in torch.split(probe_1TD, _PROBED // 2, 1)], 1)
    return bool((halves - whole).float().norm() <= _TOLERANCE[probe_1TD.dtype] * whole.float().norm())


def _tiled(block: nn.Module, run: Callable[..., Tensor], tokens: int) -> Callable[..., Tensor]:
    def forward(x_1TD: Tensor, *, norm: Any = None) -> Tensor:
        """`norm` is the one before a fused block, which then computes it."""
        work = run if norm is None else partial(run, norm=norm)
        if x_1TD.shape[1] <= tokens or not torch.is_grad_enabled():
            return work(x_1TD)
        weights = [*block.parameters(), *(norm.module.parameters() if norm is not None else ())]
        trained = [each for each in weights if each.requires_grad]
        result: Tensor = _Tiles.apply(work, tokens, x_1TD, *trained)  # type: ignore[no-untyped-call]
        return result

    return forward


class _Kept(torch.autograd.Function):
    """Saves a tensor at once. torch's checkpoint then stops here when it computes a layer again, before the work that follows."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return start.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        raise RuntimeError("nothing is differentiated through what is kept")


class _Tiles(torch.autograd.Function):
    """`run` on tiles of `tokens`, without a graph; the backward pass runs each tile again with one."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], tokens: int, x_1TD: Tensor, *trained: Tensor) -> Tensor:
        with torch.enable_grad():
            start = torch.zeros((), requires_grad=True)
            ctx.kept = _Kept.apply(start, x_1TD.detach()).grad_fn  # type: ignore[no-untyped-call]
        ctx.run, ctx.tokens, ctx.trained = run, tokens, trained
        device = x_1TD.device.type
        ctx.autocast = {"device_type": device, "dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        out: Tensor | None = None
        for tile in _spans(x_1TD.shape[1], tokens):
            part = run(x_1TD[:, tile])
            if out is None:
                out = part.new_empty(*x_1TD.shape[:2], part.shape[2])
            out[:, tile] = part
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (grad_1TD,), (x_1TD,) = gradients, ctx.kept.saved_tensors
        ctx.kept = None  # its graph is not run through and would hold the inputs of layers that are done
        needs_x, *needs = ctx.needs_input_grad[2:]
        wanted = [weight for weight, needed in zip(ctx.trained, needs, strict=True) if needed]
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in wanted]
        grad_x = torch.empty_like(x_1TD) if needs_x else None
        for tile in _spans(x_1TD.shape[1], ctx.tokens):
            part = x_1TD[:, tile].detach().requires_grad_(needs_x)
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                out = ctx.run(part)
            inputs = [part, *wanted] if needs_x else wanted
            found = list(torch.autograd.grad(out, inputs, grad_1TD[:, tile], allow_unused=True))
            if grad_x is not None:
                grad_x[:, tile] = found.pop(0)
            for total, grad in zip(sums, found, strict=True):
                if grad is not None:
                    total += grad
        given = iter(total.to(weight.dtype) for total, weight in zip(sums, wanted, strict=True))
        return None, None, grad_x, *(next(given) if needed else None for needed in needs)


def _spans(count: int, most: int) -> list[slice]:
    return [slice(start, min(count, start + most)) for start in range(0, count, most)]
