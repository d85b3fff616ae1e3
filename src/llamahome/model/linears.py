"""Linear layers that read the same input, multiplied as one: q, k and v; gate and up; a single one is the simplest case.

Frozen weights of a fan lie below each other in one array and each layer's own weight becomes a view of its rows, so nothing is kept twice.
The small matrices of their adapters become one [all ranks, I] and one block-diagonal [all ranks, O], made anew at each call: a
thousandth of the work. Trained float32 weights under autocast are cast once per update into one array in the type of the products.

Legend: T tokens, I inputs, O outputs of all layers of the fan together, S their ranks together.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamahome.model.lora import LeanLoraLinear, lean_factors


class _AdaptedProduct(torch.autograd.Function):
    """x W' + bias + (x A') B with frozen W: A [S, I], B [S, O] block-diagonal and scaled."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, blocks: tuple[tuple[int, int, float], ...], *factors: Tensor
    ) -> Tensor:
        out_TO = F.linear(x_TI, weight_OI, bias_O)
        ctx.blocks = blocks
        if not blocks:
            ctx.save_for_backward(weight_OI)
            return out_TO
        a_SI = torch.cat(factors[::2]).to(x_TI.dtype)
        b_SO = x_TI.new_zeros(a_SI.shape[0], weight_OI.shape[0])
        first = 0
        for (start, stop, scale), b in zip(blocks, factors[1::2], strict=True):
            b_SO[first : first + b.shape[1], start:stop] = (b * scale).t()
            first += b.shape[1]
        low_TS = x_TI @ a_SI.t()
        out_TO.addmm_(low_TS, b_SO)
        ctx.save_for_backward(weight_OI, x_TI, low_TS, a_SI, b_SO)
        ctx.dtypes = [factor.dtype for factor in factors]
        ctx.ranks = [a.shape[0] for a in factors[::2]]
        return out_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_TO, wanted = gradients[0], ctx.needs_input_grad[0]
        if not ctx.blocks:
            return grad_TO @ ctx.saved_tensors[0] if wanted else None, None, None, None
        weight_OI, x_TI, low_TS, a_SI, b_SO = ctx.saved_tensors
        grad_low_TS = grad_TO @ b_SO.t()
        grad_x = (grad_TO @ weight_OI).addmm_(grad_low_TS, a_SI) if wanted else None
        grad_a_SI = grad_low_TS.t() @ x_TI
        found: list[Tensor] = []
        first = 0
        for index, ((start, stop, scale), rank) in enumerate(zip(ctx.blocks, ctx.ranks, strict=True)):
            grad_b = grad_TO[:, start:stop].t() @ low_TS[:, first : first + rank]
            found.append(grad_a_SI[first : first + rank].to(ctx.dtypes[2 * index]))
            found.append(grad_b.to(ctx.dtypes[2 * index + 1]).mul_(scale))
            first += rank
        return grad_x, None, None, None, *found


class _TrainedProduct(torch.autograd.Function):
    """x W' + bias in the type of `low_OI`, the cast copy of the trained weights; gradients go to the weights themselves."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, low_OI: Tensor, low_bias_O: Tensor | None, rows: tuple[int, ...], *trained: Tensor) -> Tensor:
        x_TI = x_TI.to(low_OI.dtype)
        ctx.save_for_backward(x_TI, low_OI)
        ctx.rows, ctx.dtypes = rows, [each.dtype for each in trained]
        return F.linear(x_TI, low_OI, low_bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, low_OI = ctx.saved_tensors
        grad_TO = gradients[0]
        grad_x = grad_TO @ low_OI if ctx.needs_input_grad[0] else None
        found = list(torch.split(grad_TO.t() @ x_TI, list(ctx.rows)))
        if len(ctx.dtypes) > len(ctx.rows):
            found += torch.split(grad_TO.sum(0, dtype=torch.float32), list(ctx.rows))
        return grad_x, None, None, None, *(grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True))


class Fan:
    """One product for several linear layers; `usable` says whether it stands for them now."""

    def __init__(self, layers: Sequence[nn.Module], *, compute: torch.dtype) -> None:
        self._layers = list(layers)
        self._linears = [_linear(layer) for layer in layers]
        self._rows = tuple(linear.out_features for linear in self._linears)
        self._compute = compute
        self._trained = any(linear.weight.requires_grad for linear in self._linears)
        self._biased = self._linears[0].bias is not None
        self._bias_O: Tensor | None = None
        self._cast_from: tuple[tuple[int, int], ...] = ()
        self._low_OI = torch.empty(0)
        self._low_bias_O: Tensor | None = None
        self._weight_OI = torch.empty(0) if self._trained else self._lay_together()

    @torch.no_grad()
    def _lay_together(self) -> Tensor:
        if self._biased:
            self._bias_O = torch.cat([linear.bias for linear in self._linears])
        if len(self._linears) == 1:
            alone: Tensor = self._linears[0].weight.detach()
            return alone
        whole = torch.cat([linear.weight for linear in self._linears])
        for linear, part in zip(self._linears, torch.split(whole, list(self._rows)), strict=True):
            linear.weight.data = part
        return whole

    @property
    def usable(self) -> bool:
        """No adapter is switched off, merged or another one, and types are as they were when the fan was made."""
        if torch.is_autocast_enabled("cpu") != self._trained:
            return False
        return all(not isinstance(layer, LeanLoraLinear) or lean_factors(layer) is not None for layer in self._layers)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], the layers' outputs side by side."""
        x_TI = x.reshape(-1, x.shape[-1])
        result: Tensor
        if self._trained:
            self._cast()
            parameters = [linear.weight for linear in self._linears] + [linear.bias for linear in self._linears if self._biased]
            result = _TrainedProduct.apply(x_TI, self._low_OI, self._low_bias_O, self._rows, *parameters)  # type: ignore[no-untyped-call]
        else:
            blocks: list[tuple[int, int, float]] = []
            factors: list[Tensor] = []
            start = 0
            for layer, rows in zip(self._layers, self._rows, strict=True):
                if isinstance(layer, LeanLoraLinear) and (found := lean_factors(layer)):
                    blocks.append((start, start + rows, found[2]))
                    factors += found[:2]
                start += rows
            result = _AdaptedProduct.apply(x_TI, self._weight_OI, self._bias_O, tuple(blocks), *factors)  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], result.shape[-1])

    @torch.no_grad()
    def _cast(self) -> None:
        """Renew the cast copy when a weight has changed since."""
        now = tuple((linear.weight.data_ptr(), linear.weight._version) for linear in self._linears)
        if now == self._cast_from:
            return
        self._low_OI = torch.cat([linear.weight.to(self._compute) for linear in self._linears])
        if self._biased:
            self._low_bias_O = torch.cat([linear.bias.to(self._compute) for linear in self._linears])
        self._cast_from = now


def can_fan(layers: Sequence[nn.Module], *, autocast: bool) -> bool:
    """Plain linear layers, all frozen (perhaps with a lean adapter) in one type, or all trained under autocast; biases on all or none."""
    linears = [_linear(layer) for layer in layers]
    if any(type(linear) is not nn.Linear for linear in linears):
        return False
    alike = len({(linear.bias is None, linear.weight.dtype, linear.weight.requires_grad, linear.in_features) for linear in linears}) == 1
    return alike and linears[0].weight.device.type == "cpu" and linears[0].weight.requires_grad == autocast


def _linear(layer: nn.Module) -> Any:
    return layer.base_layer if isinstance(layer, LeanLoraLinear) else layer
