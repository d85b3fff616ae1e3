"""A leap of loss or gradient is refused, clean runs are left alone, and a resumed run judges as the one that went on."""

import json
import math

import numpy as np
import pytest
import torch
from tests.support.series import CLEAN, EXTREME, judged, memorised, normal, two_kinds

from llamahome.training.spikes import APPLIED, NOT_FINITE, SPIKE, WINDOW, Limits, Spikes

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", CLEAN)
def test_a_thousand_clean_steps_raise_nothing(kind) -> None:
    found, _ = judged(kind(np.random.default_rng(0), 1000))
    assert not any(found), [step for step, refused in enumerate(found) if refused]


@pytest.mark.parametrize("kind", EXTREME)
def test_of_extreme_series_less_than_a_step_in_a_thousand_is_refused(kind) -> None:
    assert sum(refused > 0 for refused in judged(kind(np.random.default_rng(0), 1000))[0]) <= 1


@pytest.mark.parametrize("kind", [each for each in CLEAN if each is not memorised])
@pytest.mark.parametrize("harmed", [(100, 1), (1, 100), (100, 100)])
def test_a_hundred_times_the_usual_is_refused(kind, harmed: tuple[int, int]) -> None:
    losses, norms = kind(np.random.default_rng(5), 200)
    losses[150], norms[150] = np.median(losses[100:]) * harmed[0], np.median(norms[100:]) * harmed[1]
    assert [step for step, refused in enumerate(judged((losses, norms))[0]) if refused] == [150]


def test_a_run_whose_loss_stays_up_is_refused_step_after_step() -> None:
    losses, norms = normal(np.random.default_rng(0), 200)
    losses[150:] = 11.0
    assert judged((losses, norms))[0] == [APPLIED] * 150 + [SPIKE] * 50


def test_rows_of_a_rare_kind_are_not_refused_for_ever() -> None:
    losses, norms = two_kinds(np.random.default_rng(1), 600)
    easy = losses < 1
    losses[:60], norms[:60] = losses[easy][:60], norms[easy][:60]  # none of them in the beginning
    assert sum(refused > 0 for refused in judged((losses, norms))[0]) <= 3


def test_nothing_is_judged_before_half_a_window_was_applied() -> None:
    losses = np.ones(WINDOW)
    for spike in range(WINDOW):
        harmed = losses.copy()
        harmed[spike] = 1e6
        assert bool(judged((harmed, losses))[0][spike]) is (spike > WINDOW // 2), spike


def test_what_is_not_finite_is_refused_from_the_first_step_and_never_remembered() -> None:
    limits = Limits(1.0, Spikes(CPU))
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)):
        assert limits.refuse(torch.tensor(loss), torch.tensor(norm)) == NOT_FINITE
        assert Limits(1.0).refuse(torch.tensor(loss), torch.tensor(norm)) == NOT_FINITE
    assert limits.spikes.values() == Spikes(CPU).values() == {"recent": [[], []], "largest": [], "spike": []}


@pytest.mark.parametrize("cut", [0, 1, 40, 151, 152])
def test_a_restored_history_judges_as_the_one_that_was_saved(cut: int) -> None:
    """Also between two spikes; the state goes through JSON as in a checkpoint."""
    losses, norms = normal(np.random.default_rng(2), 240)
    losses[[150, 151, 200]] *= 100
    whole, _ = judged((losses, norms))
    first, spikes = judged((losses[:cut], norms[:cut]))
    saved = json.loads(json.dumps(spikes.values(), allow_nan=False))
    second, again = judged((losses[cut:], norms[cut:]), Spikes(CPU, saved))
    assert first + second == whole and {150, 151, 200} == {step for step, refused in enumerate(whole) if refused}
    assert Spikes(CPU, saved).values() == saved and again.values()["recent"][0]
