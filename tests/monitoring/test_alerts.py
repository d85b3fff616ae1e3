"""Each alert: a run that must raise it, once, with its own numbers in the text; clean runs raise none."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.curves import PEAK, Record, alerts_of, changed, clean_run, facts

from llamahome.monitoring.alerts import Alert, AlertSink, Watch
from llamahome.monitoring.episodes import Average, Episode

GIB = 2.0**30


def only(name: str, value: Callable[[int, Record], float]) -> Callable[[int, Record], Record]:
    """Changes one metric of the records that have it."""
    return lambda step, record: {name: value(step, record)} if name in record else {}


def loss_times(factor: Callable[[int], float]) -> Callable[[int, Record], Record]:
    return only("train/loss", lambda step, record: record["train/loss"] * factor(step))


def flat(step: int, record: Record) -> Record:
    """What a learning rate near zero gives: the same losses from the first step to the last."""
    if "eval/loss" in record:
        return {"eval/loss": 2.3456 - 1e-5 * step}
    return {"train/loss": 2.4 * random.Random(step).lognormvariate(0, 0.05)} if "train/loss" in record else {}


def rewarded(step: int, record: Record) -> Record:
    """What learning from rewards records: losses around zero, whose jumps and rises mean nothing."""
    if "train/loss" not in record:
        return {}
    return {"train/loss": random.Random(step).gauss(0.001 * step, 0.3), "train/reward": 0.5 + 0.001 * step}


def flat_without_evaluation(step: int, record: Record) -> Record:
    if "eval/loss" in record:
        return {"eval/loss": math.nan} if step else {"eval/loss": 0.0}
    return {"train/loss": 2.4 * random.Random(step).lognormvariate(0, 0.01)} if "train/loss" in record else {}


def overfits(step: int, record: Record) -> Record:
    return {"eval/loss": 2.0 - 0.004 * min(step, 200) + 0.002 * max(0, step - 200)} if "eval/loss" in record else {}


def slow_process(step: int, record: Record) -> Record:
    if "ranks/slowest" not in record or step < 100:
        return {}
    return {"ranks/slowest": 3.0, "ranks/slowest_s": 1.7, "ranks/median_s": 1.0}


def waits(step: int, record: Record) -> Record:
    return {"time/data": 0.8 * record["time/forward"]} if "time/data" in record and step > 200 else {}


def without_spread(step: int, record: Record, share: float = 1.0) -> Record:
    """What a reward gives that is the same for all answers to a prompt."""
    return {"train/reward": 1.0, "train/groups_without_spread": share} if "train/loss" in record else {}


SEED = 12
TROUBLES: dict[str, tuple[Callable[[int, Record], Record], list[str]]] = {
    "loss-not-finite": (only("train/loss", lambda step, r: math.nan if step in (70, 71) else r["train/loss"]), ["step 70", "7e-05"]),
    "loss-spike": (loss_times(lambda step: 6.0 if step == 150 else 1.0), ["step 150"]),
    "clipping": (only("train/grad_norm", lambda step, r: r["train/grad_norm"] * 20), ["max_grad_norm is 1"]),
    "overfitting": (overfits, ["at step 200", "--max-steps 200", "output.final=best"]),
    "learning-rate-low": (flat, ["2.3456", "training.learning_rate=0.002"]),
    "learning-rate-high": (loss_times(lambda step: 1 + 0.02 * max(0, step - 100)), ["training.learning_rate=6.7e-05"]),
    "rewards-equal": (without_spread, ["up to 5", "the same reward", "grpo.group_size"]),
    "data-wait": (waits, ["% of a step waits", "llamahome data prepare chats.jsonl"]),
    "throughput": (only("speed/tokens_per_s", lambda step, r: r["speed/tokens_per_s"] * (0.5 if step > 300 else 1)), ["tokens/s"]),
    "slow-rank": (slow_process, ["process 3 takes 1.7 times"]),
    "memory": (only("system/ram", lambda step, r: 0.97 if step > 60 else 0.9), ["97% of the memory", "training.micro_batch_tokens=2048"]),
    "disk": (
        only("system/disk_free", lambda step, r: 0.5 * GIB if step > 60 else 5 * GIB),
        ["512.0 MiB are free", "checkpoint prune latest"],
    ),
    "swap": (only("memory/swap", lambda step, r: 0.75 * GIB if step > 60 else 0.0), ["768.0 MiB of this process"]),
    "throttled": (only("system/ram", lambda step, r: r["system/ram"]), ["used up in 40% of its periods"]),
}
NEAR: dict[str, Callable[[int, Record], Record]] = {
    "loss-not-finite": only("train/loss", lambda step, r: 1e30 if step == 1 else r["train/loss"]),
    "loss-spike": loss_times(lambda step: 1.3 if step == 150 else 1.0),
    "clipping": only("train/grad_norm", lambda step, r: r["train/grad_norm"] * (8 if step < 90 else 1)),
    "overfitting": lambda step, r: {"eval/loss": 2.0 - 0.004 * min(step, 200) + (0.015 if step > 200 else 0)} if "eval/loss" in r else {},
    "learning-rate-low": lambda step, r: {"eval/loss": 2.3456 - 1e-4 * step} if "eval/loss" in r else {},
    "learning-rate-high": loss_times(lambda step: 1.15 if 200 < step < 215 else 1.0),
    "rewards-equal": lambda step, r: without_spread(step, r, 0.9 if step == 4 else 1.0),
    "data-wait": lambda step, r: {"time/data": 0.05 * r["time/forward"]} if "time/data" in r else {},
    "throughput": only("speed/tokens_per_s", lambda step, r: r["speed/tokens_per_s"] * (0.2 if step % 10 == 0 else 1)),
    "slow-rank": lambda step, r: (
        {"ranks/slowest": float(step % 4), "ranks/slowest_s": 1.7, "ranks/median_s": 1.0} if "ranks/slowest" in r else {}
    ),
    "memory": only("system/ram", lambda step, r: 0.97 if step == 60 else 0.94),
    "disk": only("system/disk_free", lambda step, r: 1.1 * GIB),
    "swap": only("memory/swap", lambda step, r: 30 * 2.0**20),
    "throttled": only("system/ram", lambda step, r: r["system/ram"]),
}
TROUBLES["throttled"] = (
    lambda step, r: {"system/cpu_throttled": 0.4 if step > 60 else 0.0} if "system/ram" in r else {},
    TROUBLES["throttled"][1],
)
NEAR["throttled"] = lambda step, r: {"system/cpu_throttled": 0.4 if step % 3 == 0 else 0.0} if "system/ram" in r else {}


def raised(change: Callable[[int, Record], Record], **known: Any) -> list[Alert]:
    return list(alerts_of(changed(clean_run(SEED), change), facts(**known)))


def test_every_rule_has_both_proofs() -> None:
    assert {rule.name for rule in Watch(facts())._rules} == set(TROUBLES) == set(NEAR)


@pytest.mark.parametrize("name", TROUBLES)
def test_a_run_with_this_trouble_raises_its_alert_once_and_names_the_numbers(name: str) -> None:
    change, words = TROUBLES[name]
    found = [alert for alert in raised(change) if alert.name == name]
    assert len(found) == 1
    said = f"{found[0].text}; {found[0].help}"
    assert [word for word in words if word not in said] == [], said
    assert found[0].step > 0


@pytest.mark.parametrize("name", NEAR)
def test_a_run_that_comes_near_this_trouble_raises_nothing(name: str) -> None:
    assert raised(NEAR[name]) == []


def test_fifty_clean_runs_of_500_steps_raise_nothing() -> None:
    assert [(seed, alert) for seed in range(50) for alert in alerts_of(clean_run(seed), facts())] == []


@pytest.mark.slow
def test_a_thousand_clean_runs_raise_nothing() -> None:
    assert [(seed, alert) for seed in range(50, 1050) for alert in alerts_of(clean_run(seed), facts())] == []


def test_the_flat_loss_of_a_run_without_held_out_rows_is_told_too() -> None:
    run = (record for record in changed(clean_run(SEED), flat_without_evaluation) if "eval/loss" not in record)
    assert [alert.name for alert in alerts_of(run, facts())] == ["learning-rate-low"]


def test_a_resumed_run_is_not_called_flat() -> None:
    assert "learning-rate-low" not in {alert.name for alert in raised(flat, first_step=200)}


def test_losses_of_a_run_that_learns_from_rewards_raise_nothing_unless_they_are_not_finite() -> None:
    records = [record for seed in range(5) for record in changed(clean_run(seed), rewarded)]
    assert list(alerts_of(records, facts())) == []
    without = [{name: value for name, value in record.items() if name != "train/reward"} for record in records]
    assert list(alerts_of(without, facts()))
    assert [alert.name for alert in alerts_of([{"step": 7, "train/loss": None, "train/reward": 0.1}], facts())] == ["loss-not-finite"]


def test_a_null_in_a_file_counts_as_not_finite() -> None:
    assert [a.name for a in alerts_of([{"step": 7, "train/loss": None}], facts())] == ["loss-not-finite"]


def test_a_gradient_and_an_evaluation_that_are_not_finite_are_named() -> None:
    records: list[Any] = [
        {"step": 3, "train/loss": 1.0, "train/grad_norm": math.inf},
        {"step": 4, "train/loss": 1.0, "train/grad_norm": 1.0},
    ]
    records += [{"step": 4, "eval/loss": math.nan}]
    found = list(alerts_of(records, facts()))
    assert [alert.text for alert in found] == ["the gradient of step 3 is not finite", "the held-out loss of step 4 is not finite"]


def test_trouble_that_comes_back_is_told_again() -> None:
    def twice(step: int, record: Record) -> Record:
        return {"system/ram": 0.97 if step in range(50, 60) or step in range(100, 110) else 0.5} if "system/ram" in record else {}

    assert [alert.name for alert in raised(twice)] == ["memory", "memory"]


def test_a_gpu_that_is_throttled_or_full_is_told_with_its_temperature() -> None:
    samples = [{"step": step, "system/gpu_throttled": 1.0, "system/gpu_temperature": 91.0, "system/gpu_memory": 0.99} for step in range(9)]
    assert sorted(alert.text for alert in alerts_of(samples, facts())) == [
        "99% of the GPU memory is in use",
        "the GPU slows down because of heat or power at 91 degrees",
    ]


def test_a_limit_of_two_checkpoints_counts_for_the_disk() -> None:
    records = [{"step": 1, "system/disk_free": 15 * GIB}]
    assert [alert.text for alert in alerts_of(records, facts(checkpoint_bytes=int(10 * GIB)))] == [
        "15.0 GiB are free on the disk of the run; a checkpoint takes 10.0 GiB"
    ]
    assert list(alerts_of(records, facts(checkpoint_bytes=int(GIB)))) == []


def test_without_a_limit_nothing_is_clipped_and_a_spike_advises_one() -> None:
    assert raised(TROUBLES["clipping"][0], max_grad_norm=None) == []
    (alert,) = raised(TROUBLES["loss-spike"][0], max_grad_norm=None)
    assert "training.max_grad_norm=1.0" in alert.help


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(sorted({name for record in [*clean_run(1, steps=5)] for name in record} - {"step"})),
            st.one_of(st.none(), st.floats()),
            max_size=6,
        ),
        max_size=80,
    )
)
def test_no_record_whatever_it_holds_makes_a_rule_fail(records: list[dict[str, Any]]) -> None:
    list(alerts_of(({"step": step, **record} for step, record in enumerate(records)), facts()))


def test_a_watch_keeps_as_much_after_a_long_run_as_after_a_short_one() -> None:
    def size(steps: int) -> int:
        watch = Watch(facts(horizon=steps))
        for record in clean_run(3, steps=steps):
            watch.observe(int(record.get("step", 0)), record)
        return sum(_parts(rule) for rule in watch._rules)

    assert size(4000) == size(400)


def _parts(value: Any) -> int:
    """How many values an object holds, with those of its own parts."""
    if isinstance(value, tuple | list | dict):
        return sum(_parts(part) for part in (value.values() if isinstance(value, dict) else value))
    return sum(_parts(part) for part in vars(value).values()) if hasattr(value, "__dict__") else 1


def test_an_average_is_plain_at_first_and_follows_later() -> None:
    average = Average(10)
    for value in (1.0, 2.0, 3.0):
        average.add(value)
    assert (average.mean, average.variance) == (pytest.approx(2.0), pytest.approx(2 / 3))
    for _ in range(100):
        average.add(5.0)
    assert average.mean == pytest.approx(5.0, abs=1e-6)


def test_the_standard_error_of_an_average_is_that_of_many_repetitions() -> None:
    chance, means, errors = random.Random(0), [], []
    for _ in range(400):
        average = Average(30)
        for _ in range(100):
            average.add(chance.gauss(0, 1))
        means.append(average.mean)
        errors.append(average.error)
    spread = math.sqrt(sum(mean * mean for mean in means) / len(means))
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.1)


def test_an_episode_begins_once_and_ends_below_the_milder_bound() -> None:
    episode = Episode(patience=2)
    values = [1, 1, 1, 0, 1, 1, 0.5, 1, 1, 0, 1, 1]
    assert [index for index, value in enumerate(values) if episode.begins(value >= 1, over=value < 0.3)] == [1, 5, 11]


def test_a_sink_reads_each_sample_of_the_machine_once() -> None:
    samples: Iterator[dict[str, float]] = iter([{"system/ram": 0.99}])
    sample, found = next(samples), []
    sink = AlertSink(Watch(facts()), found.append, system=lambda: sample)
    for step in range(5):
        sink.log(step, 0.0, {"train/loss": 2.0, "train/learning_rate": PEAK})
    assert found == [], "one sample, read five times, is one observation"
    sample = {"system/ram": 0.99}
    sink.log(6, 0.0, {"train/loss": 2.0})
    sink.close()
    assert [(alert.name, alert.step) for alert in found] == [("memory", 6)]
