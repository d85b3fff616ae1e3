"""Answers do not depend on the batch, memory stays bounded, and the losses of rows add up to the loss of all."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models import KINDS, examples_of, our_model, save_tiny
from tests.support.runs import ALONE, make_learner, table_of

from llamahome.data.steps.loader import sequential_microbatches
from llamahome.errors import OutOfMemory
from llamahome.model.generate import generate
from llamahome.training.answering import generate_answers, in_batches
from llamahome.training.answers import evaluation_of, last_span, row_losses, without_end
from llamahome.training.evaluate import evaluate

SOURCE = random.Random(0)
PROMPTS = [[SOURCE.randrange(4, 60) for _ in range(length)] for length in (3, 17, 1, 9, 3, 30, 8)] + [[5, 6, 7]] * 2
END = [2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_one_prompt_at_a_time_in_the_order_of_the_prompts(tmp_path: Path, kind: str) -> None:
    model = our_model(save_tiny(tmp_path, kind))
    expected = [generate(model, [prompt], end_ids=END, max_new_tokens=6)[0] for prompt in PROMPTS]
    for budget in (1, 60, 10_000):
        assert generate_answers(model, PROMPTS, end_ids=END, max_new_tokens=6, batch_tokens=budget) == expected


FULL = torch.OutOfMemoryError("too much")


def watch(model: torch.nn.Module, *, most: int | None = None, error: Exception = FULL) -> list[tuple[int, int]]:
    """The shapes of all inputs; raises `error` beyond `most` prompts."""
    shapes: list[tuple[int, int]] = []

    def before(module, args, kwargs):
        rows = kwargs["input_ids"].shape[0]
        if most is not None and rows > most:
            raise error
        shapes.append((rows, kwargs["input_ids"].shape[1] + kwargs["past_key_values"].get_seq_length()))

    model.register_forward_pre_hook(before, with_kwargs=True)
    return shapes


def test_a_batch_holds_no_more_tokens_than_its_budget_and_equal_prompts_are_answered_once(tmp_path: Path) -> None:
    model = our_model(save_tiny(tmp_path))
    shapes = watch(model)
    generate_answers(model, PROMPTS, end_ids=[], max_new_tokens=6, batch_tokens=60)
    assert all(rows == 1 or rows * width <= 60 for rows, width in shapes) and max(rows for rows, _ in shapes) > 1
    assert sum(rows for rows, _ in shapes) == 6 * len({tuple(prompt) for prompt in PROMPTS})


@pytest.mark.parametrize(
    "error", [FULL, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")], ids=repr
)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(tmp_path: Path, error: Exception) -> None:
    folder = save_tiny(tmp_path)
    expected = generate_answers(our_model(folder), PROMPTS, end_ids=END, max_new_tokens=6)
    model = our_model(folder)
    watch(model, most=2, error=error)
    halved: list[int] = []
    assert generate_answers(model, PROMPTS, end_ids=END, max_new_tokens=6, ran_out=halved.append) == expected
    assert sorted(halved) == [4, 4, 8]
    watch(model, most=0)
    with pytest.raises(OutOfMemory, match="max-new-tokens"):
        generate_answers(model, PROMPTS, end_ids=END, max_new_tokens=6)


def test_a_rank_that_others_wait_for_in_the_same_passes_halves_nothing(tmp_path: Path) -> None:
    model = our_model(save_tiny(tmp_path))
    watch(model, most=2)
    with pytest.raises(OutOfMemory, match="prompts and answers"):
        generate_answers(model, PROMPTS, end_ids=END, max_new_tokens=6, alone=False)


def test_another_error_while_answers_are_generated_is_raised_as_it_is(tmp_path: Path) -> None:
    model = our_model(save_tiny(tmp_path))
    watch(model, most=0, error=RuntimeError("a shape is wrong"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        generate_answers(model, PROMPTS, end_ids=END, max_new_tokens=6)


def test_no_prompts_are_no_answers(tmp_path: Path) -> None:
    assert generate_answers(our_model(save_tiny(tmp_path)), [], end_ids=END, max_new_tokens=6) == []


@pytest.mark.parametrize("budget", [1, 25, 1000])
def test_the_losses_of_rows_add_up_to_the_evaluation(tmp_path: Path, budget: int) -> None:
    learner = make_learner(save_tiny(tmp_path, "llama"), "lora")
    table = table_of(examples_of([20, 3, 14, 31, 2], seed=4))
    batches = sequential_microbatches(table, micro_batch_tokens=budget)
    rows = row_losses(learner.objective, batches, table, world=ALONE)
    whole, each = evaluate(learner.objective.stats, learner.model, batches, world=ALONE), evaluation_of(rows)
    assert each.loss == pytest.approx(whole.loss, rel=1e-6) and (each.accuracy, each.targets) == (whole.accuracy, whole.targets)
    for row, found in rows.items():
        alone = table_of([table.example(row)])
        expected = evaluate(learner.objective.stats, learner.model, sequential_microbatches(alone, micro_batch_tokens=99), world=ALONE)
        assert found.loss == pytest.approx(expected.loss * expected.targets, rel=1e-5) and found.targets == expected.targets


@given(st.lists(st.booleans(), min_size=1).filter(any))
def test_the_last_span_is_the_last_run_of_targets(targets: list[bool]) -> None:
    start, end = last_span(targets)
    assert all(targets[start:end]) and not any(targets[end:]) and (start == 0 or not targets[start - 1]) and end > start


def test_end_tokens_are_cut_only_at_the_end() -> None:
    assert without_end([2, 5, 2, 3], [2, 3]) == [2, 5] and without_end([2], [2]) == []


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 10), st.integers(1, 200), st.one_of(st.none(), st.integers(12, 45)))
def test_every_prompt_is_in_one_batch_and_padding_takes_no_position_from_it(
    lengths: list[int], room: int, budget: int, positions: int | None
) -> None:
    batches = in_batches(lengths, lambda length: length, room, budget=budget, positions=positions)
    assert sorted(length for batch in batches for length in batch) == sorted(lengths)
    for batch in batches:
        width = max(batch) + room
        assert len(batch) == 1 or len(batch) * width <= budget
        assert len(batch) == 1 or positions is None or width <= positions
