import time

import pytest
import torch

from llamahome.monitoring.throughput import PartClock, measured_peak_flops, model_flops_per_token


class FakeClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_parts_add_up_until_a_cut() -> None:
    time_now = FakeClock()
    clock = PartClock(time_now)
    for _ in range(2):
        with clock.part("forward"):
            time_now.seconds += 2.0
        time_now.seconds += 100.0
        with clock.part("backward"):
            time_now.seconds += 3.0
    assert clock.cut().read() == {"forward": 4.0, "backward": 6.0}
    assert clock.cut().read() == {}


def test_time_in_an_inner_part_is_not_counted_twice() -> None:
    time_now = FakeClock()
    clock = PartClock(time_now)
    with clock.part("evaluate"):
        time_now.seconds += 1.0
        with clock.part("data"):
            time_now.seconds += 10.0
        time_now.seconds += 1.0
    assert clock.cut().read() == {"evaluate": 2.0, "data": 10.0}


def test_a_part_that_raises_is_counted() -> None:
    time_now = FakeClock()
    clock = PartClock(time_now)
    with pytest.raises(RuntimeError), clock.part("forward"):
        time_now.seconds += 5.0
        raise RuntimeError
    assert clock.cut().read() == {"forward": 5.0}


def test_an_open_part_is_counted_up_to_now() -> None:
    time_now = FakeClock()
    clock = PartClock(time_now)
    with clock.part("save"):
        time_now.seconds += 1.0
        assert clock.cut().read() == {"save": 1.0}
        time_now.seconds += 2.0
    assert clock.cut().read() == {"save": 2.0}


def test_full_fine_tuning_on_every_token_costs_six_operations_per_weight() -> None:
    cost = model_flops_per_token(matmul_weights=100, trained_matmul_weights=100, head_weights=50, head_is_trained=True, target_share=1.0)
    assert cost == 6 * 150


def test_a_frozen_base_costs_four_operations_per_weight_and_its_head_only_counts_targets() -> None:
    cost = model_flops_per_token(matmul_weights=110, trained_matmul_weights=10, head_weights=50, head_is_trained=False, target_share=0.2)
    assert cost == 4 * 110 + 2 * 10 + 0.2 * 4 * 50


def test_the_measured_peak_is_at_least_the_rate_of_the_whole_measurement() -> None:
    started = time.perf_counter()
    peak = measured_peak_flops(torch.device("cpu"), torch.float32)
    assert peak >= 3 * 2 * 1024**3 / (time.perf_counter() - started)


def test_device_timestamps_are_read_when_the_times_are_read_or_there_are_many() -> None:
    time_now, read = FakeClock(), []

    def between(earlier: float, later: float) -> float:
        read.append((earlier, later))
        return later - earlier

    clock = PartClock(time_now, between)
    with clock.part("forward"):
        time_now.seconds += 2.0
    assert not read
    assert clock.cut().read() == {"forward": 2.0} and read == [(0.0, 2.0)]
    for _ in range(3000):
        with clock.part("forward"):
            time_now.seconds += 1.0
    assert 2000 <= len(read) < 3000
    assert clock.cut().read() == {"forward": 3000.0}
