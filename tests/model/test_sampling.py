"""Tokens are drawn with the probabilities that transformers gives them, and settings out of range are refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llamahome.errors import ConfigError
from llamahome.model.sampling import Sampling, choose_token, generator_for, penalized, probabilities


def logits(seed: int, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
    penalty=st.floats(0.5, 3),
)
def test_probabilities_are_those_of_transformers(seed, temperature, top_k, top_p, min_p, penalty) -> None:
    scores, seen = logits(seed), [3, 4, 4, 9]
    expected, ids = scores[None].clone(), torch.tensor([seen])
    steps = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [MinPLogitsWarper(min_p)] if min_p else []
    for step in steps:
        expected = step(ids, expected)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    found = probabilities(penalized(scores, seen, penalty), sampling)
    torch.testing.assert_close(found, expected[0].softmax(-1), rtol=1e-9, atol=1e-12)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    scores, sampling = logits(1, 6), Sampling(temperature=2.0, top_k=4)
    source, draws = generator_for(0, 0), 20_000
    counts = torch.bincount(torch.tensor([choose_token(scores, [], sampling, source) for _ in range(draws)]), minlength=6) / draws
    expected = probabilities(scores, sampling)
    assert (counts[expected == 0] == 0).all()
    assert ((counts - expected).abs() < 4 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("worst", [0.0, math.inf, -math.inf, math.nan])
def test_extreme_temperatures_and_logits_still_give_a_token(temperature: float, worst: float) -> None:
    scores = logits(2)
    scores[7] = worst
    number = choose_token(scores, [], Sampling(temperature=temperature), generator_for(1, 0))
    assert 0 <= number < 50
    if temperature < 1e-20 and worst != math.inf:
        assert number == int(torch.nan_to_num(scores, nan=-math.inf).argmax())


def test_the_likeliest_token_is_taken_without_chance() -> None:
    scores = logits(3)
    for sampling in (
        Sampling(),
        Sampling(temperature=3.0, top_k=1),
        Sampling(temperature=3.0, top_p=0.0),
        Sampling(temperature=3, min_p=1),
    ):
        assert choose_token(scores, [], sampling, generator_for(5, 0)) == int(scores.argmax())


BAD = (
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": True},
    {"top_p": 1.01},
    {"top_p": -1.0},
    {"top_k": -1},
    {"top_k": 1.5},
    {"min_p": 2.0},
    {"repetition_penalty": 0.0},
    {"seed": 2**63},
    {"seed": 1.0},
    {"max_new_tokens": 0},
    {"max_new_tokens": 2**40},
)


@pytest.mark.parametrize("values", BAD, ids=str)
def test_a_value_out_of_range_is_refused_by_its_name(values) -> None:
    with pytest.raises(ConfigError) as refused:
        Sampling(**values)
    (problem,) = refused.value.problems
    assert problem.code == "model.bad-sampling" and problem.where == next(iter(values))
