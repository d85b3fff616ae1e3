"""Rounding for the inputs of a layer is never worse than plain rounding, and as a plain implementation of its steps gives it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamahome.model.compensated import damped, to_int8_for, to_nf4_for, weighted_error
from llamahome.model.packed_weight import Packed
from llamahome.model.rounding import SMALL_BLOCK, in_steps, scales_for, steps_for, to_nf4


def inputs_of(width: int, tokens: int, *, seed: int, together: float = 1.0) -> Tensor:
    """Inputs [tokens, width] of which `together` says how much they depend on each other, some of them much larger than others."""
    source = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, 8, generator=source) @ torch.randn(8, width, generator=source)
    return (together * few + torch.randn(tokens, width, generator=source)) * torch.logspace(1, -2, width)


def numbers(packed: Packed) -> Tensor:
    """The matrix that `packed` stands for."""
    out = torch.empty(packed.shape)
    packed.fill(out)
    return out


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 20),
    blocks=st.integers(1, 2),
    tokens=st.integers(0, 300),
    together=st.floats(0, 10),
    silent=st.integers(0, 64),
    seed=st.integers(0, 2**16),
)
def test_no_weight_is_worse_than_plainly_rounded(rows: int, blocks: int, tokens: int, together: float, silent: int, seed: int) -> None:
    x = inputs_of(64 * blocks, tokens, seed=seed, together=together)
    x[:, :silent] = 0.0
    moments, weight = x.t() @ x, torch.randn(rows, 64 * blocks, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight[0, :64] = 0.0
    measure = damped(moments)
    in_8_bits = in_steps(weight, steps_for(weight, measure.diagonal()))
    for (fitted,), plain in ((to_nf4_for([weight], moments), to_nf4(weight, SMALL_BLOCK)), (to_int8_for([weight], moments), in_8_bits)):
        ours, theirs = (weighted_error(weight - numbers(each), measure).sum() for each in (fitted, plain))
        assert ours <= theirs * (1 + 1e-4) + 1e-12


def test_outputs_change_by_a_fifth_of_what_plain_rounding_changes_where_inputs_go_together() -> None:
    x, weight = inputs_of(128, 1000, seed=1, together=3.0), torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    in_8_bits = in_steps(weight, steps_for(weight))
    for (fitted,), nearest in (
        (to_nf4_for([weight], x.t() @ x), to_nf4(weight, SMALL_BLOCK)),
        (to_int8_for([weight], x.t() @ x), in_8_bits),
    ):
        ours, plain = ((x @ (weight - numbers(packed)).t()).square().sum() for packed in (fitted, nearest))
        assert ours < 0.2 * plain


def test_it_ends_where_no_single_number_can_be_rounded_better_but_for_few() -> None:
    x, weight = inputs_of(64, 500, seed=2), torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    moments = damped(x.t() @ x)
    (fitted,) = to_nf4_for([weight], x.t() @ x)
    values, scales = numbers(fitted), fitted.scales_B().view(16, -1).repeat_interleave(SMALL_BLOCK, dim=1)
    error, better = weighted_error(weight - values, moments), 0
    for column in range(64):
        for level in fitted.table:
            other = values.clone()
            other[:, column] = level * scales[:, column]
            better += int((weighted_error(weight - other, moments) < error * (1 - 1e-4)).sum())
    assert better <= 16 * 64 * 16 // 100


def test_weights_with_the_same_inputs_are_rounded_as_each_alone() -> None:
    x = inputs_of(128, 400, seed=3)
    weights = [torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).bfloat16() for rows in (8, 24)]
    for fit in (to_nf4_for, to_int8_for):
        for weight, packed in zip(weights, fit(weights, x.t() @ x), strict=True):
            (alone,) = fit([weight], x.t() @ x)
            assert packed.shape == tuple(weight.shape)
            torch.testing.assert_close(numbers(packed), numbers(alone))


def test_numbers_in_8_bits_are_exact_in_16_and_within_half_a_step_unless_cutting_off_a_few_is_better() -> None:
    weight = torch.randn(12, 200, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 6, 12)[:, None]
    weight[0] = 0.0
    steps = steps_for(weight)
    assert torch.equal(torch.frexp(steps).mantissa, torch.full((12,), 0.5)), "powers of two"
    found = numbers(in_steps(weight, steps))
    assert torch.equal(found.bfloat16().float(), found) and torch.equal(found[0], weight[0])
    assert ((found - weight).abs() <= steps[:, None] / 2).all()
    importance = torch.ones(200)
    importance[3] = 0.0
    weight[:, 3] = 10 * weight.abs().amax(1)
    assert (steps_for(weight, importance)[1:] < steps_for(weight)[1:]).all(), "a column of which nothing depends may be cut off"


def test_scales_are_searched_for_the_columns_that_count() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)) * 0.1
    weight[:, 0] = 1.0  # an outlier, in a column of which nothing depends
    counts = torch.ones(64)
    counts[0] = 0.0
    blocks = slice(0, None, 64 // SMALL_BLOCK)  # those with the outlier
    plain, searched, other = (
        each[blocks]
        for each in (
            to_nf4(weight, SMALL_BLOCK).scales_B(),
            scales_for(weight, counts, SMALL_BLOCK),
            scales_for(weight, 1 - counts, SMALL_BLOCK),
        )
    )
    assert (searched.abs() < 0.8 * plain).all() and (other.abs() > 0.9 * plain).all()


def test_a_scale_is_negative_where_the_values_of_the_other_side_are_nearer() -> None:
    table = torch.tensor(to_nf4(torch.ones(1, 64)).table.tolist())
    weight = torch.stack([table.repeat(4), -table.repeat(4)]) * 0.25
    torch.testing.assert_close(scales_for(weight, torch.ones(64), SMALL_BLOCK).view(2, -1)[:, 0], torch.tensor([0.25, -0.25]))
    (packed,) = to_nf4_for([weight], torch.eye(64))
    torch.testing.assert_close(numbers(packed), weight, atol=2e-3, rtol=0)


def test_inputs_that_do_not_differ_still_give_a_rounding_and_others_are_refused() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    (fitted,) = to_nf4_for([weight], torch.full((64, 64), 1e6))
    assert numbers(fitted).isfinite().all()
    with pytest.raises(ValueError, match="not finite"):
        to_nf4_for([weight], torch.full((64, 64), torch.nan))
