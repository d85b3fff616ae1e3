import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.durable import read_object
from llamahome.errors import MachineError
from llamahome.monitoring.recorder import Recorder

PARTS = {"data": 0.1, "forward": 0.4, "backward": 0.9, "exchange": 0.0, "update": 0.1}


def open_recorder(folder: Path, **changes: Any) -> Recorder:
    options: dict[str, Any] = {"tensorboard_dir": None, "is_main": True, "resume_step": None, "flops_per_token": 4e8, "peak_flops": None}
    return Recorder(folder, **{**options, "warn": pytest.fail, **changes})


def record(recorder: Recorder, step: int, *, loss: float | None = None, tokens: int = 100, targets: int = 25) -> None:
    value = torch.tensor(float(step) if loss is None else loss)
    recorder.record(step, loss=value, grad_norm=torch.tensor(0.5), learning_rate=1e-3, tokens=tokens, targets=targets)


def flush(recorder: Recorder, step: int, parts: dict[str, float], sent: dict[str, float] | None = None) -> dict[str, float]:
    """Cut and write at once, as on a synchronous device; empty if there is no step since the last cut."""
    window = recorder.cut(step, sent or {})
    return {} if window is None else recorder.write(window, parts)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_loss_of_one_step_is_written_exactly(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    loss = torch.tensor(1.0 / 3.0)
    recorder.record(1, loss=loss, grad_norm=torch.tensor(0.7), learning_rate=2e-4, tokens=70, targets=3)
    assert flush(recorder, 1, PARTS)["train/loss"] == loss.item()
    recorder.close()
    written = lines(tmp_path / "metrics.jsonl")
    assert len(written) == 1
    assert written[0]["step"] == 1
    assert written[0]["t"] > 1_600_000_000
    assert written[0]["train/loss"] == loss.item()
    assert written[0]["train/learning_rate"] == 2e-4


@settings(deadline=None, max_examples=30)
@given(steps=st.lists(st.tuples(st.floats(0, 20, width=32), st.integers(1, 5000)), min_size=1, max_size=20))
def test_the_loss_of_several_steps_is_weighted_by_targets(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[float, int]]) -> None:
    recorder = open_recorder(tmp_path_factory.mktemp("run"))
    for number, (loss, targets) in enumerate(steps, start=1):
        record(recorder, number, loss=loss, targets=targets)
    expected = sum(loss * targets for loss, targets in steps) / sum(targets for _, targets in steps)
    assert flush(recorder, len(steps), PARTS)["train/loss"] == pytest.approx(expected, rel=1e-9, abs=1e-30)
    recorder.close()


def test_the_caller_may_reuse_the_tensor_of_the_loss(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    loss = torch.tensor(2.0)
    recorder.record(1, loss=loss, grad_norm=loss, learning_rate=0.0, tokens=1, targets=1)
    loss.zero_()
    assert flush(recorder, 1, PARTS)["train/loss"] == 2.0
    recorder.close()


def test_counts_continue_over_windows_and_resumes(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    for step in range(1, 5):
        record(recorder, step)
        if step % 2 == 0:
            metrics = flush(recorder, step, PARTS)
    assert (metrics["train/tokens"], metrics["train/targets"]) == (400, 100)
    recorder.close()
    resumed = open_recorder(tmp_path, resume_step=2)
    resumed.restore_totals(200, 50)
    record(resumed, 3)
    metrics = flush(resumed, 3, PARTS)
    assert (metrics["train/tokens"], metrics["train/targets"]) == (300, 75)
    resumed.close()
    assert [(line["step"], line["train/tokens"]) for line in lines(tmp_path / "metrics.jsonl")] == [(2, 200), (3, 300)]


def test_nothing_is_written_without_a_new_step(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    assert flush(recorder, 0, PARTS) == {}
    record(recorder, 1)
    flush(recorder, 1, PARTS)
    assert flush(recorder, 1, PARTS) == {}
    recorder.close()
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_time_is_per_step_and_speed_excludes_evaluation_saving_and_writing_a_profile(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path, peak_flops=1e12)
    record(recorder, 1)
    record(recorder, 2)
    metrics = flush(recorder, 2, {"forward": 1.0, "backward": 3.0, "evaluate": 50.0, "save": 10.0, "profile": 30.0})
    assert metrics["time/forward"] == 0.5
    assert metrics["time/evaluate"] == 25.0
    assert metrics["speed/tokens_per_s"] == pytest.approx(200 / 4.0)
    assert metrics["speed/targets_per_s"] == pytest.approx(50 / 4.0)
    assert metrics["speed/mfu"] == pytest.approx(50 * 4e8 / 1e12)
    assert 0 < metrics["memory/rss"] <= metrics["memory/peak"]
    recorder.close()


def test_utilization_is_left_out_if_the_peak_is_not_known(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    record(recorder, 1)
    metrics = flush(recorder, 1, PARTS)
    assert "speed/mfu" not in metrics
    assert not [name for name in metrics if "gpu" in name]
    recorder.close()


def test_other_ranks_compute_metrics_but_write_nothing(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path / "run", is_main=False, tensorboard_dir=tmp_path / "tensorboard")
    record(recorder, 1, loss=3.0)
    recorder.event("saved", step=1)
    recorder.sample(1, "a", "b", "c")
    recorder.status("running", 1, 10)
    metrics = flush(recorder, 1, PARTS)
    assert (metrics["train/loss"], metrics["train/tokens"], metrics["train/targets"]) == (3.0, 100, 25)
    recorder.close()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "tensorboard").exists()


@settings(deadline=None, max_examples=40)
@given(resume_step=st.integers(0, 12), cut=st.integers(0, 120), torn=st.booleans())
def test_after_a_resume_each_step_is_recorded_once(
    tmp_path_factory: pytest.TempPathFactory, resume_step: int, cut: int, torn: bool
) -> None:
    folder = tmp_path_factory.mktemp("run")
    recorder = open_recorder(folder)
    for step in range(1, 11):
        record(recorder, step)
        flush(recorder, step, PARTS)
        recorder.sample(step, "prompt", "answer", "reference")
    recorder.close()
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_bytes()
    if torn:
        metrics.write_bytes(whole[: len(whole) - cut] if cut else whole)
    survived = metrics.read_bytes().count(b"\n")
    resumed = open_recorder(folder, resume_step=resume_step)
    for step in range(resume_step + 1, 14):
        record(resumed, step)
        flush(resumed, step, PARTS)
    resumed.close()
    kept = list(range(1, min(resume_step, survived) + 1))
    assert [line["step"] for line in lines(metrics)] == kept + list(range(resume_step + 1, 14))
    superseded = lines(folder / "superseded.jsonl") if (folder / "superseded.jsonl").exists() else []
    moved = [line["step"] for line in superseded if line["file"] == "metrics.jsonl"]
    assert moved == list(range(resume_step + 1, survived + 1))
    assert [line["step"] for line in lines(folder / "samples.jsonl")] == list(range(1, min(resume_step, 10) + 1))


def test_tensorboard_shows_the_same_names_and_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "tensorboard"
    first = open_recorder(tmp_path / "run", tensorboard_dir=folder)
    for step in range(1, 6):
        record(first, step)
        flush(first, step, PARTS)
    first.log(5, {"eval/loss": 2.0})
    first.close()
    second = open_recorder(tmp_path / "run", tensorboard_dir=folder, resume_step=3, system=lambda: {"system/cpu": 0.5, "memory/rss": 1.0})
    for step in range(4, 7):
        record(second, step, loss=10.0 + step)
        flush(second, step, PARTS)
    second.log(6, {"eval/loss": 1.5})
    second.close()
    reader = EventAccumulator(str(folder)).Reload()
    in_file = {name for line in lines(tmp_path / "run" / "metrics.jsonl") for name in line} - {"t", "step"}
    assert set(reader.Tags()["scalars"]) == in_file | {"system/cpu"}
    assert [(event.step, event.value) for event in reader.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 14.0),
        (5, 15.0),
        (6, 16.0),
    ]
    assert [event.value for event in reader.Scalars("eval/loss")] == [1.5]


def test_a_sample_of_the_machine_is_in_tensorboard_once_at_the_step_after_it(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    samples: list[dict[str, float]] = [{}, {"system/cpu": 0.25}, {"system/cpu": 0.75}]
    newest = [samples[0]]
    recorder = open_recorder(tmp_path / "run", tensorboard_dir=tmp_path / "tensorboard", system=lambda: newest[0])
    for step, sample in enumerate((0, 1, 1, 1, 2, 2), start=1):
        newest[0] = samples[sample]
        record(recorder, step)
        flush(recorder, step, PARTS)
    recorder.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("system/cpu")
    assert [(event.step, event.value) for event in shown] == [(2, 0.25), (5, 0.75)]


def test_the_next_resume_completes_a_trim_that_was_killed(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    for step in range(1, 5):
        record(recorder, step)
        flush(recorder, step, PARTS)
    recorder.close()
    (tmp_path / ".metrics.jsonl.kept").write_text('{"step": 1}\n{"st')
    (tmp_path / "superseded.jsonl").write_text('{"step": 3, "file": "metrics.jsonl"}\n')
    open_recorder(tmp_path, resume_step=2).close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert {line["step"] for line in lines(tmp_path / "superseded.jsonl")} == {3, 4}
    assert not (tmp_path / ".metrics.jsonl.kept").exists()


def test_a_full_disk_at_the_trim_stops_the_resume_and_keeps_the_metrics(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    for step in range(1, 5):
        record(recorder, step)
        flush(recorder, step, PARTS)
    recorder.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(MachineError) as caught:
            open_recorder(tmp_path, resume_step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.problems[0].code == "machine.metrics-not-writable"
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_training_continues_if_no_file_can_be_written(tmp_path: Path) -> None:
    warnings: list[str] = []
    recorder = open_recorder(tmp_path, tensorboard_dir=tmp_path / "tensorboard", warn=warnings.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        recorder.status("running", 0, 3)
        for step in range(1, 4):
            record(recorder, step)
            assert flush(recorder, step, PARTS)["train/loss"] == step
            recorder.event("saved", step=step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(warnings) == 1
    recorder.event("finished")
    record(recorder, 4)
    flush(recorder, 4, PARTS)
    recorder.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [line["kind"] for line in lines(tmp_path / "events.jsonl")] == ["saved", "saved", "saved", "finished"]


def test_events_samples_and_status_are_complete_records(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    recorder.status("running", 3, 10, folder="output/runs/x")
    assert read_object(tmp_path / "status.json")["state"] == "running"
    recorder.event("refused", step=3, rows=[1, 2], loss=float("nan"))
    recorder.sample(3, "Say hi", "hi\nthere", "Hi!")
    recorder.status("finished", 10, 10)
    recorder.close()
    event = lines(tmp_path / "events.jsonl")[0]
    assert (event["kind"], event["rows"], event["loss"]) == ("refused", [1, 2], None)
    sample = lines(tmp_path / "samples.jsonl")[0]
    assert (sample["step"], sample["prompt"], sample["answer"], sample["reference"]) == (3, "Say hi", "hi\nthere", "Hi!")
    status = read_object(tmp_path / "status.json")
    assert (status["state"], status["step"], status["horizon"], status["folder"]) == ("finished", 10, 10, "output/runs/x")
    assert {"pid", "host", "t"} <= set(status)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "samples.jsonl", "status.json"]
