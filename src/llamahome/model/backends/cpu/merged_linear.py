"""Linear layers that read the same input, merged into one product: q, k and v; gate and up; a single layer is the simplest case.

Our own products (products.py) read frozen weights in place. For torch's products they are concatenated, and each layer's own weight becomes
a view of its rows, so nothing is held twice. Packed weights (packed_weight.py) are widened into one buffer, once in the forward and once in
the backward pass, and copied there if only some are packed; weights that must stay in their file (stream.py) are concatenated there. The
small matrices of the adapters become one [all ranks, I] and one block-diagonal [all ranks, O], built at each call, which costs a thousandth
of the work; those that share a frozen A (VeRA) are one block. Trained float32 weights under autocast are cast once per update into one
matrix in the dtype of the products; weights that have this dtype already are read in place.

Legend: T tokens, I inputs, O outputs of all merged layers together, S their ranks together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llamahome.model.backends.cpu.autotune import ProductDispatch, ProductShape, Speedups
from llamahome.model.backends.cpu.elementwise import Identity, InputTransform
from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.cpu.products import Stack, adapted_product, can_multiply, outer_product, product
from llamahome.model.lora_layers import LEAN, has_magnitude, is_active, lean_factors, output_gain, scale_outputs
from llamahome.model.packed_weight import PackedWeight, widened_rows

_IDENTITY = Identity()


@dataclass(frozen=True, eq=False)
class _Weights:
    """The matrices in the dtype of the products, their biases, and the choice of kernels."""

    matrices: Stack | tuple[Tensor, ...]
    """If these are tensors, some are packed or all stay in their file, and they lie one below the other only while they are used."""
    bias_O: Tensor | None
    dispatch: ProductDispatch

    @property
    def stack(self) -> Stack:
        """The matrices; tensors are copied or widened now, one below the other, into a buffer that the next call uses again."""
        return self.matrices if isinstance(self.matrices, Stack) else Stack([widened_rows(self.matrices)])


@dataclass(frozen=True)
class _Input:
    """How the input is computed, and from how many source tensors."""

    transform: InputTransform
    sources: int


class _AdaptedProduct(torch.autograd.Function):
    """x W' + bias + (x A') B with frozen W: A [S, I], B [S, O] block-diagonal and scaled."""

    @staticmethod
    def forward(ctx: Any, input: _Input, weights: _Weights, blocks: tuple[tuple[int, int, float], ...], *tensors: Tensor) -> Tensor:
        """`blocks` holds the first row, the end and the scale of each adapter; `tensors` the sources, then A and B of each adapter."""
        sources, factors = tensors[: input.sources], tensors[input.sources :]
        x_TI, kept = input.transform.forward(*sources)
        ctx.weights, ctx.blocks, ctx.input = weights, blocks, input
        stack, kernels, bias_O = weights.stack, weights.dispatch.forward, weights.bias_O
        if not blocks:
            ctx.save_for_backward(*sources, *kept)
            return product(x_TI, stack, transposed=True, kernels=kernels, bias=bias_O)
        ranks = [a.shape[0] for a in factors[::2]]
        a_SI = x_TI.new_zeros(sum(ranks) + sum(ranks) % 2, x_TI.shape[1])  # the kernels require an even rank
        a_SI[: sum(ranks)] = torch.cat(factors[::2])
        b_SO = x_TI.new_zeros(a_SI.shape[0], stack.rows)
        first = 0
        for (start, stop, scale), b in zip(blocks, factors[1::2], strict=True):
            b_SO[first : first + b.shape[1], start:stop] = (b * scale).t()
            first += b.shape[1]
        low_TS, out_TO = adapted_product(x_TI, stack, a_SI, b_SO, transposed=True, kernels=kernels, bias=bias_O)
        ctx.save_for_backward(low_TS, a_SI, b_SO, *sources, *kept)
        ctx.dtypes, ctx.ranks = [factor.dtype for factor in factors], ranks
        return out_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_TO, needs_grad = gradients[0], ctx.needs_input_grad[3 : 3 + ctx.input.sources]
        weights, dispatch, transform = ctx.weights, ctx.weights.dispatch, ctx.input.transform
        if not ctx.blocks:
            grad_x = product(grad_TO, weights.stack, transposed=False, kernels=dispatch.inputs) if any(needs_grad) else None
            return None, None, None, *transform.backward(grad_x, *ctx.saved_tensors, needs_grad=needs_grad, recompute=False)[1]
        low_TS, a_SI, b_SO, *kept = ctx.saved_tensors
        if any(needs_grad):
            grad_low_TS, grad_x = adapted_product(grad_TO, weights.stack, b_SO, a_SI, transposed=False, kernels=dispatch.inputs)
        else:
            grad_low_TS, grad_x = product(grad_TO, Stack([b_SO]), transposed=True, kernels=dispatch.inputs), None
        trains_a = ctx.needs_input_grad[3 + ctx.input.sources :: 2]
        x_TI, source_grads = transform.backward(grad_x, *kept, needs_grad=needs_grad, recompute=any(trains_a))
        grad_a_SI = outer_product(grad_low_TS, x_TI, kernels=dispatch.weights) if any(trains_a) else None
        grad_b_SO = outer_product(low_TS, grad_TO, kernels=dispatch.weights)
        factor_grads: list[Tensor | None] = []
        first = 0
        for index, ((start, stop, scale), rank) in enumerate(zip(ctx.blocks, ctx.ranks, strict=True)):
            rows = slice(first, first + rank)
            factor_grads.append(grad_a_SI[rows].to(ctx.dtypes[2 * index]) if grad_a_SI is not None and trains_a[index] else None)
            factor_grads.append(grad_b_SO[rows, start:stop].t().to(ctx.dtypes[2 * index + 1]) * scale)
            first += rank
        return None, None, None, *source_grads, *factor_grads


class _TrainedProduct(torch.autograd.Function):
    """x W' + bias with trained weights or a cast copy of them; gradients go to the weights themselves."""

    @staticmethod
    def forward(ctx: Any, input: _Input, weights: _Weights, rows: tuple[int, ...], *tensors: Tensor) -> Tensor:
        sources, trained = tensors[: input.sources], tensors[input.sources :]
        x_TI, kept = input.transform.forward(*sources)
        if isinstance(input.transform, Identity):
            x_TI = x_TI.to(weights.stack.parts[0].dtype)
            sources = (x_TI,)
        ctx.save_for_backward(*sources, *kept)
        ctx.rows, ctx.dtypes, ctx.weights, ctx.input = rows, [tensor.dtype for tensor in trained], weights, input
        return product(x_TI, weights.stack, transposed=True, kernels=weights.dispatch.forward, bias=weights.bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_TO, stack, dispatch = gradients[0], ctx.weights.stack, ctx.weights.dispatch
        needs_grad = ctx.needs_input_grad[3 : 3 + ctx.input.sources]
        grad_x = product(grad_TO, stack, transposed=False, kernels=dispatch.inputs) if any(needs_grad) else None
        x_TI, source_grads = ctx.input.transform.backward(grad_x, *ctx.saved_tensors, needs_grad=needs_grad, recompute=True)
        grads = list(torch.split(outer_product(grad_TO, x_TI, kernels=dispatch.weights), list(ctx.rows)))
        if len(ctx.dtypes) > len(ctx.rows):
            grads += torch.split(grad_TO.sum(0, dtype=torch.float32), list(ctx.rows))
        return None, None, None, *source_grads, *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))


class MergedLinear:
    """One product that replaces several linear layers while `usable`."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        compute: torch.dtype,
        kernels: Kernels | None,
        speedups: Speedups | None = None,
        in_file: bool = False,
    ) -> None:
        """`speedups` (of autotune.py, for `merged_shape`) choose who multiplies; without them the kernels are used if they can be.

        Weights that are `in_file` stay where they are, because no copy of them may be kept.
        """
        self._layers = list(layers)
        self._linears = [_linear(layer) for layer in layers]
        self._rows = tuple(linear.out_features for linear in self._linears)
        self._compute = compute
        self._trained = any(linear.weight.requires_grad for linear in self._linears)
        self._autocast = self._trained and self._linears[0].weight.dtype != compute
        self._biased = self._linears[0].bias is not None
        self._kernels, self._speedups, self._in_file = kernels, speedups, in_file
        self._cast_versions: tuple[tuple[int, int], ...] = ()
        self._frozen = None if self._trained else self._frozen_weights()

    @torch.no_grad()
    def _frozen_weights(self) -> _Weights:
        packed = tuple(linear.weight for linear in self._linears)
        if any(isinstance(weight, PackedWeight) for weight in packed):
            return _Weights(packed, self._biases(), self._dispatch([widened_rows(packed)]))
        parts = [linear.weight.detach() for linear in self._linears]
        dispatch = self._dispatch(parts)
        if (dispatch.forward is None or dispatch.inputs is None) and len(parts) > 1:
            if self._in_file:
                return _Weights(tuple(parts), self._biases(), dispatch)
            parts = [torch.cat(parts)]
            for linear, part in zip(self._linears, torch.split(parts[0], list(self._rows)), strict=True):
                linear.weight.data = part
        return _Weights(Stack(parts), self._biases(), dispatch)

    def _dispatch(self, parts: Sequence[Tensor]) -> ProductDispatch:
        return ProductDispatch.of(self._kernels if can_multiply(self._kernels, parts) else None, self._speedups)

    def _biases(self) -> Tensor | None:
        return torch.cat([linear.bias.detach().float() for linear in self._linears]) if self._biased else None

    @property
    def usable(self) -> bool:
        """Whether every adapter is active, unmerged and the only one of its layer, and autocast is as expected."""
        if torch.is_autocast_enabled("cpu") != self._autocast:
            return False
        return all(not isinstance(layer, LEAN) or is_active(layer) for layer in self._layers)

    @property
    def scaled(self) -> bool:
        """Whether the outputs are multiplied by the magnitudes of DoRA, whose gradients need them once more."""
        return any(isinstance(layer, LEAN) and has_magnitude(layer) for layer in self._layers)

    def __call__(self, x: Tensor, *more: Tensor, transform: InputTransform = _IDENTITY) -> Tensor:
        """[..., I] -> [..., O], the concatenated outputs of the layers for the input that `transform` computes from x and `more`."""
        sources = x.reshape(-1, x.shape[-1]).contiguous(), *more
        input = _Input(transform, len(sources))
        result: Tensor
        if self._frozen is None:
            parameters = [linear.weight for linear in self._linears] + [linear.bias for linear in self._linears if self._biased]
            result = _TrainedProduct.apply(input, self._trained_weights(), self._rows, *sources, *parameters)  # type: ignore[no-untyped-call]
        else:
            blocks: list[tuple[int, int, float]] = []
            factors: list[Tensor] = []
            start = 0
            for layer, rows in zip(self._layers, self._rows, strict=True):
                if isinstance(layer, LEAN) and (adapter := lean_factors(layer)):
                    if blocks and blocks[-1][1] == start and _are_same(factors[-2], adapter[0]):
                        blocks[-1], factors[-1] = (blocks[-1][0], start + rows, adapter[2]), torch.cat([factors[-1], adapter[1]])
                    else:
                        blocks.append((start, start + rows, adapter[2]))
                        factors += adapter[:2]
                start += rows
            gain_O, weights = self._gain(), self._frozen
            if gain_O is not None:
                weights = replace(weights, bias_O=None)
            result = _AdaptedProduct.apply(input, weights, tuple(blocks), *sources, *factors)  # type: ignore[no-untyped-call]
            if gain_O is not None:
                result = scale_outputs(result, gain_O, self._frozen.bias_O)
        return result.view(*x.shape[:-1], result.shape[-1])

    def _gain(self) -> Tensor | None:
        """float32 [O]: what DoRA multiplies the outputs with, one where a layer has none; None if none has."""
        if not self.scaled:
            return None
        gains = [output_gain(layer) if isinstance(layer, LEAN) else None for layer in self._layers]
        return torch.cat([torch.ones(rows) if gain is None else gain for gain, rows in zip(gains, self._rows, strict=True)])

    @torch.no_grad()
    def _trained_weights(self) -> _Weights:
        """The weights in the dtype of the products, made again only if a parameter has changed; biases are copied."""
        tensors = [tensor for linear in self._linears for tensor in (linear.weight, linear.bias) if tensor is not None]
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if versions != self._cast_versions:
            parts = [linear.weight.detach() for linear in self._linears]
            if self._autocast:
                parts = [torch.cat([part.to(self._compute) for part in parts])]
            self._cast = _Weights(Stack(parts), self._biases(), self._dispatch(parts))
            self._cast_versions = versions
        return self._cast


def merged_shape(layers: Sequence[nn.Module], *, tokens: int, compute: torch.dtype) -> ProductShape:
    """The shape of the products of these merged layers, for autotuning."""
    linears = [_linear(layer) for layer in layers]
    return ProductShape(tokens, linears[0].in_features, sum(linear.out_features for linear in linears), compute)


def can_merge(layers: Sequence[nn.Module], *, autocast: bool) -> bool:
    """Whether all layers are plain linear layers on the processor, alike in dtype, bias and training; frozen ones only without autocast."""
    linears = [_linear(layer) for layer in layers]
    if any(type(linear) is not nn.Linear for linear in linears):
        return False
    kinds = {(linear.bias is None, linear.weight.dtype) for linear in linears}
    alike = len(kinds) == len({(linear.weight.requires_grad, linear.in_features) for linear in linears}) == 1
    return alike and linears[0].weight.device.type == "cpu" and (linears[0].weight.requires_grad or not autocast)


def _are_same(a_RI: Tensor, other_RI: Tensor) -> bool:
    """Whether both are one frozen matrix."""
    return not (a_RI.requires_grad or other_RI.requires_grad) and a_RI.data_ptr() == other_RI.data_ptr() and a_RI.shape == other_RI.shape


def _linear(layer: nn.Module) -> Any:
    return layer.base_layer if isinstance(layer, LEAN) else layer
