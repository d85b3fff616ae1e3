"""Verdicts are right: no difference is claimed where there is none, a plain one is found, and clusters and weights count."""

import math

import numpy as np
import pytest

from llamahome.comparison import NATS, SCORE, _student, compare

SIMULATED = 200


def claimed(verdict: str) -> bool:
    return verdict.startswith(("better on ", "worse on "))


PAIRS = {
    "continuous": lambda random, n: (random.normal(size=n), random.normal(size=n)),
    "heavy tails": lambda random, n: (random.standard_t(3, size=n), random.standard_t(3, size=n)),
    "skewed": lambda random, n: (random.exponential(size=n), random.exponential(size=n)),
    "0/1": lambda random, n: (random.random(n) < 0.5, random.random(n) < 0.5),
    "0/1, nearly all right": lambda random, n: (random.random(n) < 0.9, random.random(n) < 0.9),
    "0/1, nearly all equal": lambda random, n: (lambda same, moved: (same ^ (moved == 1), same ^ (moved == 2)))(
        random.random(n) < 0.5, random.integers(0, 8, n)
    ),
}


@pytest.mark.parametrize("rows", [8, 20, 80])
@pytest.mark.parametrize(
    ("kind", "resamples"),
    [("continuous", 500), ("0/1", 500), *(pytest.param(kind, 10_000, marks=pytest.mark.slow) for kind in PAIRS)],
)
def test_of_200_pairs_without_difference_at_most_6_percent_are_called_better_or_worse(kind: str, resamples: int, rows: int) -> None:
    random = np.random.default_rng(rows)
    pairs = [PAIRS[kind](random, rows) for _ in range(SIMULATED)]
    verdicts = [compare(model.astype(float), base.astype(float), unit=SCORE, resamples=resamples).verdict for model, base in pairs]
    assert sum(map(claimed, verdicts)) <= 0.06 * SIMULATED


def test_of_200_weighted_and_clustered_pairs_without_difference_at_most_6_percent_are_claimed() -> None:
    random = np.random.default_rng(1)
    count = 0
    for _ in range(SIMULATED):
        clusters = np.repeat(np.arange(20), 4)
        shared = random.normal(size=20)[clusters]
        weights = random.integers(1, 200, 80)
        values = [random.normal(size=80) * 0.1 + sign * shared for sign in (0, 1)]
        count += claimed(compare(*values, clusters=clusters.tolist(), weights=weights.tolist(), unit=NATS, resamples=500).verdict)
    assert count <= 0.06 * SIMULATED


@pytest.mark.parametrize("rows", [20, 80])
def test_the_interval_holds_the_true_difference(rows: int) -> None:
    random = np.random.default_rng(7)
    inside = 0
    for _ in range(SIMULATED):
        found = compare(random.normal(0.7, 1, rows), np.zeros(rows), unit=SCORE, resamples=500)
        inside += found.low <= 0.7 <= found.high
    assert inside >= 0.94 * SIMULATED


@pytest.mark.parametrize("gain", [1, -1])
def test_a_plain_difference_is_found_and_said_in_words(gain: int) -> None:
    random = np.random.default_rng(2)
    base = random.random(80) < 0.4
    model = np.where(random.random(80) < 0.5, gain > 0, base)
    found = compare(model.astype(float), base.astype(float))
    word = "better" if gain > 0 else "worse"
    moved = int((model != base).sum())
    assert found.verdict == f"{word} on {moved} of 80 rows, 95 % interval {found.low * 100:+.1f} to {found.high * 100:+.1f} points"
    assert found.low < found.mean < found.high and found.low * found.high > 0
    assert found.mean == pytest.approx(model.mean() - base.mean())


def test_a_lower_loss_is_better() -> None:
    found = compare([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.2], [2.0] * 8, unit=NATS)
    assert found.verdict.startswith("better on 8 of 8 rows, 95 % interval -") and found.verdict.endswith(" nats per target")
    assert found.high < 0


@pytest.mark.parametrize("rows", range(7))
def test_with_few_rows_no_difference_is_claimed_however_large(rows: int) -> None:
    found = compare([1.0] * rows, [0.0] * rows)
    assert found.verdict.startswith("no difference can be shown")
    assert found.low is None or found.low <= 0


def test_equal_answers_are_no_difference() -> None:
    found = compare([0.5] * 30, [0.5] * 30)
    assert (found.mean, found.low, found.high) == (0, 0, 0) and found.verdict == "no difference can be shown: all 30 rows are equal"


def test_copies_of_a_row_add_no_evidence() -> None:
    model, base, names = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], ["a", "b", "c", "d"]
    once = compare(model, base, clusters=names)
    often = compare(model * 50, base * 50, clusters=names * 50)
    assert (often.low, often.high) == pytest.approx((once.low, once.high)) and not claimed(often.verdict)
    assert claimed(compare(model * 50, base * 50).verdict), "without clusters, copies look like evidence"
    assert "one prompt" in compare(model, base, clusters=["a"] * 4).verdict


def test_the_difference_of_losses_is_that_of_all_targets() -> None:
    random = np.random.default_rng(3)
    model, base, targets = random.random(30), random.random(30), random.integers(1, 500, 30)
    found = compare(model, base, weights=targets.tolist(), unit=NATS)
    assert found.mean == pytest.approx(float((model * targets).sum() / targets.sum() - (base * targets).sum() / targets.sum()))


def test_the_same_values_give_the_same_interval_and_the_seed_is_not_torch_s() -> None:
    random = np.random.default_rng(4)
    model, base = random.random(50), random.random(50)
    first = compare(model, base)
    np.random.default_rng(9).random()
    assert compare(model, base) == first


def test_the_verdict_and_the_interval_agree() -> None:
    random = np.random.default_rng(5)
    for rows in (8, 15, 40):
        for shift in np.linspace(-1.5, 1.5, 13):
            found = compare(random.normal(shift, 1, rows), np.zeros(rows), unit=SCORE)
            expected = "better" if found.low > 0 else "worse" if found.high < 0 else "no difference"
            assert found.verdict.startswith(expected)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (7, 2.3646), (19, 2.0930), (79, 1.9905), (5000, 1.9604)])
def test_the_quantiles_of_student_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert math.isclose(_student(0.975, freedom), quantile, abs_tol=2e-4)
