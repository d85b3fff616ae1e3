"""Linear layers that read the same input, multiplied as one: q, k and v; gate and up; a single one is the simplest case.

Our own products (products.py) read frozen weights where they are mapped; for torch's they are laid below each other in one array and
each layer's own weight becomes a view of its rows, so nothing is kept twice.
The small matrices of their adapters become one [all ranks, I] and one block-diagonal [all ranks, O], made anew at each call: a
thousandth of the work. Trained float32 weights under autocast are cast once per update into one array in the type of the products;
those that are in this type already are read where they lie.

Legend: T tokens, I inputs, O outputs of all layers of the fan together, S their ranks together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamahome.model.backends.cpu.elementwise import AsItIs, Reading
from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.cpu.products import Stack, adapted_product, multiplies, outer_product, product
from llamahome.model.backends.cpu.race import Multipliers, Shape, Speeds
from llamahome.model.lora import LEAN, lean_factors

_AS_IT_IS = AsItIs()


@dataclass(frozen=True, eq=False)
class _Weights:
    """The matrices of a fan in the type of its products, their biases, and who multiplies."""

    stack: Stack
    bias_O: Tensor | None
    by: Multipliers


@dataclass(frozen=True)
class _Source:
    """How what a product reads is made, and of how many tensors."""

    reading: Reading
    count: int


class _AdaptedProduct(torch.autograd.Function):
    """x W' + bias + (x A') B with frozen W: A [S, I], B [S, O] block-diagonal and scaled."""

    @staticmethod
    def forward(ctx: Any, source: _Source, weights: _Weights, blocks: tuple[tuple[int, int, float], ...], *tensors: Tensor) -> Tensor:
        """`blocks` has the first row, the row after the last and the scale of each adapter; `tensors` the sources, then each A and B."""
        sources, factors = tensors[: source.count], tensors[source.count :]
        x_TI, kept = source.reading.read(*sources)
        ctx.weights, ctx.blocks, ctx.source = weights, blocks, source
        stack, kernels, bias_O = weights.stack, weights.by.forward, weights.bias_O
        if not blocks:
            ctx.save_for_backward(*sources, *kept)
            return product(x_TI, stack, turned=True, kernels=kernels, bias=bias_O)
        ranks = [a.shape[0] for a in factors[::2]]
        a_SI = x_TI.new_zeros(sum(ranks) + sum(ranks) % 2, x_TI.shape[1])  # an even rank, as our products want it
        a_SI[: sum(ranks)] = torch.cat(factors[::2])
        b_SO = x_TI.new_zeros(a_SI.shape[0], stack.rows)
        first = 0
        for (start, stop, scale), b in zip(blocks, factors[1::2], strict=True):
            b_SO[first : first + b.shape[1], start:stop] = (b * scale).t()
            first += b.shape[1]
        low_TS, out_TO = adapted_product(x_TI, stack, a_SI, b_SO, turned=True, kernels=kernels, bias=bias_O)
        ctx.save_for_backward(low_TS, a_SI, b_SO, *sources, *kept)
        ctx.dtypes, ctx.ranks = [factor.dtype for factor in factors], ranks
        return out_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_TO, wanted = gradients[0], ctx.needs_input_grad[3 : 3 + ctx.source.count]
        stack, by, reading = ctx.weights.stack, ctx.weights.by, ctx.source.reading
        if not ctx.blocks:
            grad_x = product(grad_TO, stack, turned=False, kernels=by.inputs) if any(wanted) else None
            return None, None, None, *reading.back(grad_x, *ctx.saved_tensors, wanted=wanted, again=False)[1]
        low_TS, a_SI, b_SO, *kept = ctx.saved_tensors
        if any(wanted):
            grad_low_TS, grad_x = adapted_product(grad_TO, stack, b_SO, a_SI, turned=False, kernels=by.inputs)
        else:
            grad_low_TS, grad_x = product(grad_TO, Stack([b_SO]), turned=True, kernels=by.inputs), None
        x_TI, grads = reading.back(grad_x, *kept, wanted=wanted, again=True)
        grad_a_SI = outer_product(grad_low_TS, x_TI, kernels=by.weights)
        grad_b_SO = outer_product(low_TS, grad_TO, kernels=by.weights)
        found: list[Tensor] = []
        first = 0
        for index, ((start, stop, scale), rank) in enumerate(zip(ctx.blocks, ctx.ranks, strict=True)):
            own = slice(first, first + rank)
            found.append(grad_a_SI[own].to(ctx.dtypes[2 * index]))
            found.append(grad_b_SO[own, start:stop].t().to(ctx.dtypes[2 * index + 1]) * scale)
            first += rank
        return None, None, None, *grads, *found


class _TrainedProduct(torch.autograd.Function):
    """x W' + bias with trained weights or a cast copy of them; gradients go to the weights themselves."""

    @staticmethod
    def forward(ctx: Any, source: _Source, weights: _Weights, rows: tuple[int, ...], *tensors: Tensor) -> Tensor:
        sources, trained = tensors[: source.count], tensors[source.count :]
        x_TI, kept = source.reading.read(*sources)
        if isinstance(source.reading, AsItIs):
            x_TI = x_TI.to(weights.stack.parts[0].dtype)
            sources = (x_TI,)
        ctx.save_for_backward(*sources, *kept)
        ctx.rows, ctx.dtypes, ctx.weights, ctx.source = rows, [each.dtype for each in trained], weights, source
        return product(x_TI, weights.stack, turned=True, kernels=weights.by.forward, bias=weights.bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_TO, stack, by = gradients[0], ctx.weights.stack, ctx.weights.by
        wanted = ctx.needs_input_grad[3 : 3 + ctx.source.count]
        grad_x = product(grad_TO, stack, turned=False, kernels=by.inputs) if any(wanted) else None
        x_TI, grads = ctx.source.reading.back(grad_x, *ctx.saved_tensors, wanted=wanted, again=True)
        found = list(torch.split(outer_product(grad_TO, x_TI, kernels=by.weights), list(ctx.rows)))
        if len(ctx.dtypes) > len(ctx.rows):
            found += torch.split(grad_TO.sum(0, dtype=torch.float32), list(ctx.rows))
        return None, None, None, *grads, *(grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True))


class Fan:
    """One product for several linear layers; `usable` says whether it stands for them now."""

    def __init__(self, layers: Sequence[nn.Module], *, compute: torch.dtype, kernels: Kernels | None, speeds: Speeds | None = None) -> None:
        """`speeds` (race.py, for `fan_shape`) say who multiplies; without them our products do, where they can."""
        self._layers = list(layers)
        self._linears = [_linear(layer) for layer in layers]
        self._rows = tuple(linear.out_features for linear in self._linears)
        self._compute = compute
        self._trained = any(linear.weight.requires_grad for linear in self._linears)
        self._autocast = self._trained and self._linears[0].weight.dtype != compute
        self._biased = self._linears[0].bias is not None
        self._kernels, self._speeds = kernels, speeds
        self._cast_from: tuple[tuple[int, int], ...] = ()
        self._frozen = None if self._trained else self._lay_together()

    @torch.no_grad()
    def _lay_together(self) -> _Weights:
        parts = [linear.weight.detach() for linear in self._linears]
        by = self._by(parts)
        if (by.forward is None or by.inputs is None) and len(parts) > 1:
            parts = [torch.cat(parts)]
            for linear, part in zip(self._linears, torch.split(parts[0], list(self._rows)), strict=True):
                linear.weight.data = part
        return _Weights(Stack(parts), self._biases(), by)

    def _by(self, parts: Sequence[Tensor]) -> Multipliers:
        return Multipliers.of(self._kernels if multiplies(self._kernels, parts) else None, self._speeds)

    def _biases(self) -> Tensor | None:
        return torch.cat([linear.bias.detach().float() for linear in self._linears]) if self._biased else None

    @property
    def usable(self) -> bool:
        """No adapter is switched off, merged or another one, and types are as they were when the fan was made."""
        if torch.is_autocast_enabled("cpu") != self._autocast:
            return False
        return all(not isinstance(layer, LEAN) or lean_factors(layer) is not None for layer in self._layers)

    def __call__(self, x: Tensor, *more: Tensor, reading: Reading = _AS_IT_IS) -> Tensor:
        """[..., I] -> [..., O], the layers' outputs side by side; what `reading` makes of x and more is read."""
        sources = x.reshape(-1, x.shape[-1]).contiguous(), *more
        source = _Source(reading, len(sources))
        result: Tensor
        if self._frozen is None:
            parameters = [linear.weight for linear in self._linears] + [linear.bias for linear in self._linears if self._biased]
            result = _TrainedProduct.apply(source, self._cast(), self._rows, *sources, *parameters)  # type: ignore[no-untyped-call]
        else:
            blocks: list[tuple[int, int, float]] = []
            factors: list[Tensor] = []
            start = 0
            for layer, rows in zip(self._layers, self._rows, strict=True):
                if isinstance(layer, LEAN) and (found := lean_factors(layer)):
                    blocks.append((start, start + rows, found[2]))
                    factors += found[:2]
                start += rows
            result = _AdaptedProduct.apply(source, self._frozen, tuple(blocks), *sources, *factors)  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], result.shape[-1])

    @torch.no_grad()
    def _cast(self) -> _Weights:
        """The weights in the type of the products, cast or looked up anew when one has changed since; a bias is copied in any case."""
        tensors = [tensor for linear in self._linears for tensor in (linear.weight, linear.bias) if tensor is not None]
        now = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if now != self._cast_from:
            parts = [linear.weight.detach() for linear in self._linears]
            if self._autocast:
                parts = [torch.cat([part.to(self._compute) for part in parts])]
            self._low = _Weights(Stack(parts), self._biases(), self._by(parts))
            self._cast_from = now
        return self._low


def fan_shape(layers: Sequence[nn.Module], *, tokens: int, compute: torch.dtype) -> Shape:
    """What products of a fan of these layers look like, for the race that decides who makes them."""
    linears = [_linear(layer) for layer in layers]
    return Shape(tokens, linears[0].in_features, sum(linear.out_features for linear in linears), compute)


def can_fan(layers: Sequence[nn.Module], *, autocast: bool) -> bool:
    """Plain linear layers in one type, all frozen (perhaps with a lean adapter; no autocast) or all trained; biases on all or none."""
    linears = [_linear(layer) for layer in layers]
    if any(type(linear) is not nn.Linear for linear in linears):
        return False
    alike = len({(linear.bias is None, linear.weight.dtype, linear.weight.requires_grad, linear.in_features) for linear in linears}) == 1
    return alike and linears[0].weight.device.type == "cpu" and (linears[0].weight.requires_grad or not autocast)


def _linear(layer: nn.Module) -> Any:
    return layer.base_layer if isinstance(layer, LEAN) else layer
