"""The values of `auto` settings: within their bounds, and changing smoothly with data, model and length of the run."""

from typing import Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.config.objectives import ObjectiveName
from llamahome.config.schema import Config
from llamahome.training.auto import auto_batch_size, auto_epochs, auto_learning_rate, plan_evaluations, rate_factors, slower_rate
from llamahome.training.schedule import Due
from llamahome.units import Interval

ROWS = st.integers(1, 10**9)
PER_ROW = st.floats(0.1, 5000)
OWN = st.floats(0, 1)


def passes(rows: int, per_row: float, own: float, batch_size: int | None = None) -> int:
    return auto_epochs(rows, per_row, own, batch_size=batch_size or auto_batch_size(rows))


@given(rows=ROWS, more=ROWS)
def test_the_batch_is_a_power_of_two_within_its_bounds_and_grows_with_the_rows(rows: int, more: int) -> None:
    small, large = auto_batch_size(rows), auto_batch_size(rows + more)
    assert 4 <= small <= large <= 32 and small.bit_count() == large.bit_count() == 1


@given(rows=ROWS, per_row=PER_ROW, own=OWN)
def test_passes_are_whole_and_from_one_to_twelve(rows: int, per_row: float, own: float) -> None:
    found = passes(rows, per_row, own)
    assert isinstance(found, int) and 1 <= found <= 12


@given(rows=ROWS, more=ROWS, per_row=PER_ROW, longer=st.floats(1, 100), own=OWN, owned=OWN)
def test_more_to_learn_never_asks_for_more_passes(rows: int, more: int, per_row: float, longer: float, own: float, owned: float) -> None:
    own, owned = sorted((own, owned))
    assert passes(rows + more, per_row, own) <= passes(rows, per_row, own)
    assert passes(rows, per_row * longer, own) <= passes(rows, per_row, own)
    assert passes(rows, per_row, owned) <= passes(rows, per_row, own)


@given(rows=ROWS, per_row=PER_ROW, own=OWN, batch=st.integers(1, 4096), more=st.integers(0, 4096))
def test_a_larger_batch_than_the_rule_gets_no_fewer_passes(rows: int, per_row: float, own: float, batch: int, more: int) -> None:
    assert passes(rows, per_row, own, batch) <= passes(rows, per_row, own, batch + more) <= 24
    assert passes(rows, per_row, own, min(batch, auto_batch_size(rows))) == passes(rows, per_row, own)


@given(rows=st.integers(1, 10**6), epochs=st.floats(0.01, 100), more=st.floats(0, 100))
def test_given_passes_make_the_batch_at_most_smaller_and_only_to_take_steps(rows: int, epochs: float, more: float) -> None:
    small, large, free = (auto_batch_size(rows, epochs=each) for each in (epochs, epochs + more, None))
    assert 1 <= small <= large <= free
    assert small == free or rows * epochs < 24 * 2 * small, "it needs not be so small"
    assert small == 1 or rows * epochs >= 24 * small


@pytest.mark.parametrize(
    ("size", "expected"), [(576, 1.3e-3), (960, 8.9e-4), (2048, 4.9e-4), (3072, 3.6e-4), (4096, 2.9e-4), (8192, 1.7e-4)]
)
def test_the_rule_in_numbers(size: int, expected: float) -> None:
    assert auto_learning_rate("lora", size) == expected
    assert auto_learning_rate("full", size) == pytest.approx(expected / 10, rel=0.05)


def test_the_rate_advised_after_a_divergence_is_lower_and_at_most_the_usual_one() -> None:
    usual = auto_learning_rate("lora", 576)
    assert slower_rate(1.0, usual, share=0.1) == pytest.approx(usual, rel=0.05)
    assert slower_rate(usual, usual, share=0.1) == pytest.approx(usual / 10, rel=0.05)


def rate_of(**sections: dict[str, object]) -> float:
    config = Config.model_validate(sections)
    return auto_learning_rate(config.training.method, 576, *rate_factors(config).values())


def test_preferences_and_rewards_are_learned_more_slowly() -> None:
    usual = auto_learning_rate("lora", 576)
    rates = {name: rate_of(training={"objective": name}) for name in get_args(ObjectiveName)}
    assert rates["sft"] == rates["distill"] == usual
    assert rates["grpo"] == pytest.approx(usual / 5, rel=0.05)
    assert [rates[name] for name in ("dpo", "ipo", "orpo", "simpo", "kto")] == pytest.approx([usual / 10] * 5, rel=0.05)


def test_adapters_that_begin_with_the_greatest_parts_of_weights_learn_more_slowly() -> None:
    usual = auto_learning_rate("lora", 576)
    for init in ("pissa", "pissa_niter_4", "olora"):
        assert rate_of(lora={"init": init}) == pytest.approx(0.15 * usual, rel=0.05)
        assert rate_of(lora={"init": init}, model={"adapter": "mine"}) == usual, "an adapter that is there has its values"
        assert rate_of(lora={"init": init}, training={"method": "full"}) == auto_learning_rate("full", 576)
        both = rate_of(lora={"init": init}, training={"objective": "dpo"})
        assert both == pytest.approx(0.015 * usual, rel=0.05)
    assert rate_of(lora={"init": "loftq"}) == rate_of(lora={"init": "eva"}) == usual


def test_vectors_of_vera_learn_faster() -> None:
    usual = auto_learning_rate("lora", 576)
    assert (
        rate_of(lora={"use_vera": True})
        == rate_of(lora={"use_vera": True}, model={"adapter": "mine"})
        == pytest.approx(30 * usual, rel=0.05)
    )
    assert rate_of(lora={"use_vera": True}, training={"method": "full"}) == auto_learning_rate("full", 576)


def test_wider_models_never_get_a_higher_rate() -> None:
    rates = [auto_learning_rate("full", size) for size in range(64, 20_000, 64)]
    assert rates == sorted(rates, reverse=True)


def times_of(every: Interval, horizon: int, steps_per_epoch: float) -> int:
    """How often a run evaluates, counted as the loop does: before, whenever it is due and another step follows, at the end."""
    due = Due(every, steps_per_epoch=steps_per_epoch)
    return 2 + sum(due.after(step) for step in range(1, horizon))


intervals = st.one_of(
    st.none(),
    st.builds(Interval, st.integers(1, 3000).map(float), st.just("steps")),
    st.builds(Interval, st.floats(0.1, 3), st.just("epochs")),
)


@settings(deadline=None, max_examples=150)
@given(
    row_tokens=st.lists(st.integers(1, 2000), max_size=200),
    work=st.floats(0, 1e8),
    answers=st.sampled_from([0.0, 6400.0]),
    horizon=st.integers(1, 2000),
    steps_per_epoch=st.floats(1, 500),
    rows=st.one_of(st.just("auto"), st.integers(1, 300)),
    every=intervals,
)
def test_all_evaluations_take_a_tenth_of_the_work_or_are_the_fewest_there_can_be(
    row_tokens: list[int],
    work: float,
    answers: float,
    horizon: int,
    steps_per_epoch: float,
    rows: int | Literal["auto"],
    every: Interval | None,
) -> None:
    given = {"work": work, "answers": answers, "horizon": horizon, "steps_per_epoch": steps_per_epoch, "rows": rows, "every": every}
    found = plan_evaluations(row_tokens, **given)
    times, every_step = times_of(found.every, horizon, steps_per_epoch), horizon + 1
    cost = times * (sum(row_tokens[: found.rows]) + answers)
    assert found.share == pytest.approx(cost / max(1.0, work), rel=1e-9)
    fewest_rows = found.rows <= 16 if rows == "auto" else found.rows == min(rows, len(row_tokens))
    fewest_times = times == 2 if every is None else found.every == every
    assert cost <= 0.1 * work * (1 + 1e-9) or (fewest_rows and fewest_times)
    assert min(16, len(row_tokens)) <= found.rows <= len(row_tokens) or rows != "auto"
    assert times <= 12 or every is not None
    assert times <= every_step


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 2000), min_size=20, max_size=200), st.floats(1e3, 1e8), st.floats(1, 10), st.integers(1, 500))
def test_a_longer_run_evaluates_no_fewer_rows(row_tokens: list[int], work: float, longer: float, horizon: int) -> None:
    given = {"answers": 0.0, "horizon": horizon, "steps_per_epoch": 10.0, "rows": "auto", "every": None}
    assert plan_evaluations(row_tokens, work=work, **given).rows <= plan_evaluations(row_tokens, work=work * longer, **given).rows


@pytest.mark.parametrize(
    ("work", "rows", "every", "share"),
    [
        (1e7, 1000, "12 steps", 0.1),  # ten times 100,000 tokens
        (4e6, 1000, "34 steps", 0.1),  # four times 100,000
        (1e6, 250, "34 steps", 0.1),
        (6e4, 16, "50 steps", 0.08),  # 16 rows are 1,600 tokens, three times
        (1e4, 16, "100 steps", 0.32),  # before and at the end
    ],
)
def test_evaluations_in_numbers(work: float, rows: int, every: str, share: float) -> None:
    found = plan_evaluations([100] * 1000, work=work, answers=0.0, horizon=100, steps_per_epoch=10, rows="auto", every=None)
    assert (found.rows, str(found.every)) == (rows, every) and found.share == pytest.approx(share)


def test_nothing_held_out_is_evaluated_never() -> None:
    found = plan_evaluations([], work=1e6, answers=0.0, horizon=100, steps_per_epoch=10, rows="auto", every=None)
    assert found.rows == 0 and found.share == 0
