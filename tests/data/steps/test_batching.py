"""Dividing a step keeps every example, the budget and the balance."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.data.steps.batching import cost, divide

lengths = st.lists(st.integers(1, 500), max_size=60)


@settings(deadline=None, max_examples=150)
@given(lengths, st.integers(1, 5), st.integers(1, 800))
def test_every_example_occurs_once_and_no_micro_batch_is_too_large(lengths: list[int], world_size: int, budget: int) -> None:
    ranks = divide(lengths, world_size=world_size, micro_batch_tokens=budget)
    packs = [pack for rank in ranks for pack in rank]
    assert len(ranks) == world_size
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[index] for index in pack) <= budget or len(pack) == 1
        assert [lengths[index] for index in pack] == sorted((lengths[index] for index in pack), reverse=True)


@settings(deadline=None, max_examples=100)
@given(lengths, st.integers(1, 5))
def test_no_rank_has_more_than_another_by_more_than_one_example(lengths: list[int], world_size: int) -> None:
    ranks = divide(lengths, world_size=world_size, micro_batch_tokens=1000)
    loads = [sum(cost(lengths[index]) for pack in rank for index in pack) for rank in ranks]
    assert max(loads) - min(loads) <= max((cost(length) for length in lengths), default=0) + 1e-9


@settings(deadline=None, max_examples=100)
@given(lengths, st.integers(500, 2000))
def test_micro_batches_are_few(lengths: list[int], budget: int) -> None:
    """Less than twice the least number that could hold so many tokens, and one."""
    (packs,) = divide(lengths, world_size=1, micro_batch_tokens=budget)
    assert len(packs) <= 2 * sum(lengths) / budget + 1


def test_micro_batches_of_a_rank_hold_about_as_many_tokens_each() -> None:
    (packs,) = divide([256] * 8, world_size=1, micro_batch_tokens=1536)
    assert [len(pack) for pack in packs] == [4, 4]
    (packs,) = divide([900, 600, 500, 100], world_size=1, micro_batch_tokens=1100)
    assert sorted(sum([900, 600, 500, 100][index] for index in pack) for pack in packs) == [1000, 1100]


def test_if_spreading_evenly_would_exceed_the_budget_documents_stay_packed() -> None:
    lengths = [6, 6, 4, 4, 4, 4, 4]  # two sixes beside each other leave room for the fours, one each does not
    (packs,) = divide(lengths, world_size=1, micro_batch_tokens=16)
    assert sorted(sum(lengths[index] for index in pack) for pack in packs) == [16, 16]


def test_the_division_is_the_same_every_time() -> None:
    same = [100] * 10 + [7, 7, 300]
    assert divide(same, world_size=3, micro_batch_tokens=250) == divide(same, world_size=3, micro_batch_tokens=250)


def test_with_fewer_examples_than_ranks_some_ranks_have_none() -> None:
    assert divide([5, 9], world_size=3, micro_batch_tokens=100) == [[[1]], [[0]], []]
