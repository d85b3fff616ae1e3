"""Round weights to NF4 or int8 so that the outputs of their layers change least, not each number for itself.

The columns are rounded one after the other, those with the largest inputs first. What rounding a column changes in the outputs, the columns
that are still exact make good, as far as their inputs go together. Then each column is rounded again beside all the others, twice. Scales
are searched before, so that columns with large inputs are rounded well. Cost: outputs x inputs^2 of a layer, five times.
Source: GPTQ, arXiv 2210.17323, for the first part; QuantEase, arXiv 2309.01885, for the second.

Legend: O outputs, I inputs, J inputs of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from llamahome.model.packed_weight import EightBit, FourBit, Packed
from llamahome.model.rounding import (
    SMALL_BLOCK,
    in_steps,
    int8_multiples,
    join_codes,
    nearest,
    scales_for,
    steps_for,
    to_nf4,
    with_scales,
)

_DAMPING = 0.05
"""Added to the diagonal of the moments, as a share of its mean. GPTQ adds 0.01, but the text is short."""
_MORE_DAMPING = (1, 10, 100, 1000)
"""Factors of it that are tried until the inverse exists."""
_SWEEPS = 2
_COLUMNS = 64
"""Columns whose effect on each other is followed one by one; the rest is corrected once for all of them."""

_Packed = TypeVar("_Packed", bound=Packed)
Round = Callable[[Tensor, int], Tensor]
"""Rounds the numbers [O] of the column with this index."""


def damped(moments_II: Tensor, factor: float = 1.0) -> Tensor:
    """The moments with more on their diagonal; an input that never was anything but zero counts as one."""
    diagonal_I = moments_II.diagonal()
    used_I = diagonal_I.where(diagonal_I > 0, 1.0)
    return moments_II + torch.diag(used_I - diagonal_I + factor * _DAMPING * used_I.mean())


def weighted_error(difference_OI: Tensor, moments_II: Tensor) -> Tensor:
    """float32 [O]: what a difference of weights changes in each output, squared, summed over the inputs whose x x^T `moments_II` sums."""
    return ((difference_OI @ moments_II) * difference_OI).sum(1)


def to_nf4_for(weights: Sequence[Tensor], moments_II: Tensor) -> list[FourBit]:
    """Weights [O, I] with the same inputs in NF4 with small blocks, for inputs whose products x x^T add up to `moments_II`, float32.

    No weight has a larger `weighted_error` in all with the damped moments than `to_nf4` gives it.
    """
    exact_OI = torch.cat([weight_OI.float() for weight_OI in weights])
    factored = _factored(moments_II)
    damped_II, rows = factored[0], [len(weight) for weight in weights]
    empty = [
        with_scales(_shape(weight), torch.empty(0, dtype=torch.uint8), scales_for(weight, damped_II.diagonal(), SMALL_BLOCK), SMALL_BLOCK)
        for weight in weights
    ]
    scales_OI = torch.cat([each.scales_B().view(each.shape[0], -1) for each in empty]).repeat_interleave(SMALL_BLOCK, dim=1)
    scales_IO = scales_OI.t().contiguous()
    divisors_IO, table = scales_IO.where(scales_IO != 0, 1.0), empty[0].table

    def to_code(numbers_O: Tensor, column: int) -> Tensor:
        return table.index_select(0, nearest(numbers_O / divisors_IO[column], table).int()) * scales_IO[column]

    rounded_OI = _fitted(exact_OI, factored, to_code)
    codes_OI = nearest(rounded_OI / divisors_IO.t(), table)
    found = [replace(each, codes=join_codes(codes)) for each, codes in zip(empty, torch.split(codes_OI, rows), strict=True)]
    return [_better(fitted, to_nf4(weight, SMALL_BLOCK), weight, damped_II) for fitted, weight in zip(found, weights, strict=True)]


def to_int8_for(weights: Sequence[Tensor], moments_II: Tensor) -> list[EightBit]:
    """The same in int8 with steps that are powers of two."""
    factored = _factored(moments_II)
    damped_II, rows = factored[0], [len(weight) for weight in weights]
    exact_OI = torch.cat([weight.float() for weight in weights])
    steps_O = steps_for(exact_OI, damped_II.diagonal())
    rounded_OI = _fitted(exact_OI, factored, lambda numbers_O, _: int8_multiples(numbers_O, steps_O))
    parts, steps = torch.split(rounded_OI, rows), torch.split(steps_O, rows)
    return [
        _better(in_steps(part, own), in_steps(weight, own), weight, damped_II)
        for part, weight, own in zip(parts, weights, steps, strict=True)
    ]


def _shape(weight_OI: Tensor) -> tuple[int, int]:
    return weight_OI.shape[0], weight_OI.shape[1]


def _better(fitted: _Packed, plain: _Packed, weight_OI: Tensor, moments_II: Tensor) -> _Packed:
    """`fitted`, or the plainly rounded weight if its error is smaller."""
    errors = list[Tensor]()
    for each in (fitted, plain):
        values_OI = torch.empty(each.shape)
        each.fill(values_OI)
        errors.append(weighted_error(weight_OI.float() - values_OI, moments_II).sum())
    return plain if errors[1] < errors[0] else fitted


def _factored(moments_II: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The damped moments, the upper Cholesky factor of their inverse with large inputs first, and the order of the inputs there."""
    for factor in _MORE_DAMPING:
        more_II = damped(moments_II, factor)
        order_I = more_II.diagonal().argsort(descending=True, stable=True)
        lower_II, failed = torch.linalg.cholesky_ex(more_II[order_I][:, order_I])
        if not failed:
            upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
            if not failed:
                return more_II, upper_II, order_I
    raise ValueError("the inputs of a layer are not finite, or too large for float32")


def _fitted(exact_OI: Tensor, factored: tuple[Tensor, Tensor, Tensor], rounds: Round) -> Tensor:
    """The columns rounded one after the other, and again. `factored` is what `_factored` gives."""
    moments_II, upper_II, order_I = factored
    rounded_OI = torch.empty_like(exact_OI)
    rounded_OI[:, order_I] = _in_turn(exact_OI[:, order_I], upper_II, order_I.tolist(), rounds)
    for _ in range(_SWEEPS):
        _again(rounded_OI, exact_OI, moments_II, rounds)
    return rounded_OI


def _in_turn(exact_OI: Tensor, upper_II: Tensor, order: Sequence[int], rounds: Round) -> Tensor:
    """Round the columns, which are those of `order`, from the first to the last."""
    left_OI, rounded_OI = exact_OI.clone(), torch.empty_like(exact_OI)
    for start in range(0, exact_OI.shape[1], _COLUMNS):
        block = slice(start, start + _COLUMNS)
        left_JO, upper_JJ = left_OI[:, block].t().contiguous(), upper_II[block, block]
        errors_JO = torch.empty_like(left_JO)
        for j, column_O in enumerate(left_JO):
            value_O = rounds(column_O, order[start + j])
            rounded_OI[:, start + j] = value_O
            errors_JO[j] = (column_O - value_O) / upper_JJ[j, j]
            left_JO[j + 1 :].addr_(upper_JJ[j, j + 1 :], errors_JO[j], alpha=-1)
        left_OI[:, start + _COLUMNS :] -= errors_JO.t() @ upper_II[block, start + _COLUMNS :]
    return rounded_OI


def _again(rounded_OI: Tensor, exact_OI: Tensor, moments_II: Tensor, rounds: Round) -> None:
    """Round each column to what is best beside all the others; changes `rounded_OI`, and no change makes the error larger."""
    for start in range(0, exact_OI.shape[1], _COLUMNS):
        block = slice(start, start + _COLUMNS)
        pull_JO = ((exact_OI - rounded_OI) @ moments_II[:, block]).t().contiguous()
        values_JO, moments_JJ = rounded_OI[:, block].t().contiguous(), moments_II[block, block]
        for j, value_O in enumerate(values_JO):
            better_O = rounds(value_O + pull_JO[j] / moments_JJ[j, j], start + j)
            pull_JO.addr_(moments_JJ[j], better_O - value_O, alpha=-1)
            values_JO[j] = better_O
        rounded_OI[:, block] = values_JO.t()
