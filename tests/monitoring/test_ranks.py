"""What ranks tell each other; the exchange is a sum, so it is one here too."""

from collections.abc import Sequence

import pytest

from llamahome.monitoring.ranks import Ranks


def exchange(ranks: Sequence[Ranks]) -> None:
    sums = [sum(values) for values in zip(*(rank.send() for rank in ranks), strict=True)]
    for rank in ranks:
        rank.receive(sums)


def test_every_rank_learns_which_one_is_slowest_and_by_how_much() -> None:
    ranks = [Ranks(number, 3) for number in range(3)]
    for rank, seconds in zip(ranks, (1.0, 3.0, 1.2), strict=True):
        rank.own({"data": 0.5, "forward": 2 * seconds - 0.5, "backward": 2 * seconds, "exchange": 99.0, "evaluate": 99.0}, steps=4)
    exchange(ranks)
    assert all(rank.metrics() == {"ranks/slowest": 1, "ranks/slowest_s": 3.0, "ranks/median_s": 1.2} for rank in ranks)


def test_nothing_is_told_before_all_have_worked_and_one_process_has_no_slowest() -> None:
    ranks = [Ranks(0, 2), Ranks(1, 2)]
    ranks[0].own({"forward": 1.0}, steps=1)
    exchange(ranks)
    assert ranks[0].metrics() == {}
    alone = Ranks()
    alone.own({"forward": 1.0}, steps=1)
    exchange([alone])
    assert alone.metrics() == {}


def test_energy_is_the_sum_of_all_ranks_that_measure_and_of_the_time_before_a_resume() -> None:
    ranks = [Ranks(0, 2, joules=lambda: 1.8e6, kwh_before=0.25), Ranks(1, 2, joules=lambda: 3.6e6)]
    exchange(ranks)
    assert ranks[0].metrics()["energy/kwh"] == pytest.approx(0.25 + 0.5 + 1.0)


def test_without_a_measurement_there_is_no_energy_and_what_was_measured_before_stays() -> None:
    ranks = [Ranks(0, 2), Ranks(1, 2)]
    exchange(ranks)
    assert ranks[0].kwh() is None and "energy/kwh" not in ranks[0].metrics()
    assert Ranks(kwh_before=0.25).kwh() == 0.25
