"""The nearest weight in few bits: NF4 with double quantisation, or int8 with one scale for each row.

NF4: codes of 4 bits for the quantiles of a normal distribution, in blocks of 64 or 32 numbers, whose scales are codes of 8 bits in blocks
of 256: 0.516 or 0.532 bytes a number. int8: rounded to 127 steps of the greatest value of each row: 1 byte a number.
Steps that are powers of two make int8 numbers exact in bfloat16, so a file may hold them in 16 bits.
Source: QLoRA, arXiv 2305.14314, appendix E for the values of NF4; 8-bit optimizers, arXiv 2110.02861, for those of the scales.
"""

import math

import torch
from torch import Tensor

from llamahome.model.packed_weight import EightBit, FourBit

BLOCK, SMALL_BLOCK, SCALE_BLOCK = 64, 32, 256
_CHUNK = 1 << 20
"""Numbers that are quantised at once; a multiple of all blocks."""
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_LEAST_EXPONENT = -100
_HALVINGS = 3
"""How many times the step that reaches the greatest value of a row is halved, in search of the best."""
_EXPONENTS = 7
_SHARES = tuple(0.05 * step for step in range(12, 22))
"""Of the greatest value of a block: the scales that are tried, 0.6 to 1.05, with both signs; then two beside the best."""
_BESIDE = (-0.025, 0.025)


def scale_table() -> Tensor:
    """float32 [256]: the values of 8-bit scales, dense near zero: 2^i values of each sign in the i-th of seven decades, zero and one."""
    values = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent + 1 - _EXPONENTS)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


def join_codes(codes: Tensor) -> Tensor:
    """uint8: two codes a byte, the first in the upper half."""
    pairs = codes.reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def nearest(numbers: Tensor, table: Tensor) -> Tensor:
    """uint8: the index of the nearest value in a sorted table."""
    middles = (table[1:] + table[:-1]) / 2
    if len(table) > 16:
        return torch.bucketize(numbers, middles).to(torch.uint8)
    found = torch.zeros(numbers.shape, dtype=torch.uint8)
    for middle in middles:  # measured: 5 times as fast as torch.bucketize for 16 values
        found += numbers > middle
    return found


def to_nf4(weight_OI: Tensor, block: int = BLOCK) -> FourBit:
    """The nearest weight in NF4 with double quantisation; its number of elements must be a multiple of `block`."""
    table, flat = torch.tensor(_NF4), weight_OI.reshape(-1)
    codes = torch.empty(flat.numel() // 2, dtype=torch.uint8)
    scales = torch.empty(flat.numel() // block)
    for start in range(0, flat.numel(), _CHUNK):
        blocks = flat[start : start + _CHUNK].float().view(-1, block)
        greatest = blocks.abs().amax(1)
        scales[start // block : (start + _CHUNK) // block] = greatest
        codes[start // 2 : (start + _CHUNK) // 2] = join_codes(nearest(blocks / greatest.where(greatest > 0, 1.0).unsqueeze(1), table))
    return with_scales((weight_OI.shape[0], weight_OI.shape[1]), codes, scales, block)


def with_scales(shape: tuple[int, int], codes: Tensor, scales_B: Tensor, block: int) -> FourBit:
    """A weight in NF4 with such codes, two a byte, and the nearest double quantised scales."""
    offset = float(scales_B.mean())
    scales = scales_B - offset
    groups = math.ceil(scales.numel() / SCALE_BLOCK)
    padded = torch.nn.functional.pad(scales, (0, groups * SCALE_BLOCK - scales.numel())).view(groups, SCALE_BLOCK)
    scale_scales, values = padded.abs().amax(1), scale_table()
    scale_codes = nearest(padded / scale_scales.where(scale_scales > 0, 1.0).unsqueeze(1), values).view(-1)[: scales.numel()]
    return FourBit(shape, codes, torch.tensor(_NF4), scale_codes.contiguous(), block, values, scale_scales, SCALE_BLOCK, offset)


def scales_for(weight_OI: Tensor, importance_I: Tensor, block: int) -> Tensor:
    """float32 [B]: the scale of each block with the least error of plain rounding, where the columns count as `importance_I` says.

    A scale may be negative: NF4 has seven values below zero and eight above, and some blocks are nearer to the other side's.
    """
    blocks = weight_OI.float().reshape(-1, block)
    weights = importance_I.reshape(-1, block).repeat(weight_OI.shape[0], 1)
    greatest = blocks.abs().amax(1)
    best, least = greatest.clone(), torch.full_like(greatest, torch.inf)
    for share in (*_SHARES, *(-share for share in _SHARES)):
        best, least = _better_scales(blocks, weights, greatest * share, best, least)
    coarse = best
    for step in _BESIDE:
        best, least = _better_scales(blocks, weights, coarse + greatest * step, best, least)
    return best


def _better_scales(blocks: Tensor, weights: Tensor, scales: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """`best` and its error `least`, or `scales` where its error is less."""
    table = torch.tensor(_NF4)
    divided = blocks / scales.where(scales != 0, 1.0).unsqueeze(1)
    off = table.index_select(0, nearest(divided, table).view(-1).int()).view_as(divided).sub_(divided).square_()
    error = off.mul_(weights).sum(1) * scales.square()
    return torch.where(error < least, scales, best), torch.minimum(error, least)


def to_int8(weight_OI: Tensor) -> EightBit:
    """The nearest weight in int8 with one scale for each row."""
    rows, width = weight_OI.shape
    numbers, scales = torch.empty((rows, width), dtype=torch.int8), torch.empty(rows)
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        part = weight_OI[start : start + step].float()
        scales[start : start + step] = greatest = part.abs().amax(1)
        numbers[start : start + step] = (part * (127 / greatest.where(greatest > 0, 1.0)).unsqueeze(1)).round_().to(torch.int8)
    return EightBit((rows, width), numbers, scales)


def steps_for(weight_OI: Tensor, importance_I: Tensor | None = None) -> Tensor:
    """float32 [O]: for each row the power of two with the least error of rounding to int8, where the columns count as `importance_I` says.

    Numbers beyond 127 steps become 127 steps.
    """
    numbers_OI = weight_OI.float()
    greatest_O = numbers_OI.abs().amax(1)
    largest_O = power_of_two_steps(greatest_O)
    best_O, least_O = largest_O, torch.full_like(largest_O, torch.inf)
    for halving in range(_HALVINGS + 1):
        steps_O = largest_O / 2**halving
        off_OI = int8_multiples(numbers_OI, steps_O.unsqueeze(1)).sub_(numbers_OI).square_()
        error_O = off_OI.sum(1) if importance_I is None else off_OI @ importance_I
        best_O, least_O = torch.where(error_O < least_O, steps_O, best_O), torch.minimum(error_O, least_O)
    return best_O


def power_of_two_steps(greatest_O: Tensor) -> Tensor:
    """The least powers of two of which 127 reach the greatest value of each row; 1 for a row of zeros."""
    parts_O, exponents_O = torch.frexp(greatest_O.where(greatest_O > 0, 127.0))
    return torch.exp2((exponents_O - 7 + (parts_O > 127 / 128)).clamp_(_LEAST_EXPONENT).float())


def int8_multiples(numbers: Tensor, steps: Tensor) -> Tensor:
    """float32: the nearest multiples of steps from -127 to 127 of them."""
    return (numbers / steps).round_().clamp_(-127, 127).mul_(steps)


def in_steps(weight_OI: Tensor, steps_O: Tensor) -> EightBit:
    """The nearest weight in int8 with such steps, powers of two."""
    numbers_OI = (weight_OI.float() / steps_O.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return EightBit((weight_OI.shape[0], weight_OI.shape[1]), numbers_OI, steps_O * 127)
