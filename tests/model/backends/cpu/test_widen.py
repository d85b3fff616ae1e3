"""The kernels that widen packed weights give the same bits as plain torch, at any level, and write nothing beside their result."""

import pytest
import torch
from tests.support.levels import CASES, kernels_at

from llamahome.model.backends.cpu.widen import widen_with
from llamahome.model.rounding import BLOCK, SMALL_BLOCK, in_steps, steps_for, to_int8, to_nf4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(1, 32), (7, 192), (130, 576)], ids=str)
def test_kernels_give_the_bits_of_plain_torch(case: tuple[str, torch.dtype], shape: tuple[int, int]) -> None:
    level, dtype = case
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    four = [to_nf4(weight, block) for block in (BLOCK, SMALL_BLOCK) if weight.numel() % block == 0]
    widen = widen_with(kernels_at(level, "widen_codes", dtype))
    for packed in (*four, to_int8(weight), in_steps(weight, steps_for(weight))):
        expected, whole = torch.empty(shape, dtype=dtype), torch.full((weight.numel() + 16,), 3.0, dtype=dtype)
        packed.fill(expected)
        widen(packed, whole[8:-8].view(shape))
        assert torch.equal(whole[8:-8].view(shape), expected)
        assert (whole[:8] == 3.0).all() and (whole[-8:] == 3.0).all()
