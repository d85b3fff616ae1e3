"""TensorBoard shows what metrics.jsonl holds, value by value, and its pages of texts, hyperparameters and charts find what they need."""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data, parse_session_end_info_plugin_data
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data as parse_start

from llamahome.config.describe import settings
from llamahome.config.schema import Config
from llamahome.monitoring.recorder import Recorder


def as_float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EventAccumulator]:
    """A run of 120 steps with evaluations and samples; its folder of metrics, and TensorBoard's own reader."""
    folder = tmp_path_factory.mktemp("recorded")
    recorder = Recorder(
        folder / "metrics",
        tensorboard_dir=folder / "tensorboard",
        is_main=True,
        resume_step=None,
        flops_per_token=4e8,
        peak_flops=1e12,
        warn=pytest.fail,
        system=lambda: {"system/cpu": 0.5},
    )
    recorder.describe({key: setting.of(Config()) for key, setting in settings().items()}, "20260101-000000-amber-finch")
    recorder.status("running", 0, 120)
    for step in range(1, 121):
        loss = torch.tensor(float("nan") if step == 50 else 3.0 / step)
        recorder.record(step, loss=loss, grad_norm=torch.tensor(step / 7), learning_rate=1e-3 / step, tokens=961, targets=317)
        window = recorder.cut(step)
        assert window is not None
        recorder.write(window, {"forward": 0.1 / step, "backward": 0.3, "data": 1e-7})
        if step % 40 == 0:
            recorder.log(step, {"eval/loss": 2.0 / step, "eval/perplexity": math.exp(2.0 / step), "eval/token_accuracy": step / 200})
            for prompt in ("Which day? *bold*", "Which year?"):
                recorder.sample(step, prompt, f"Answer of step {step}", "Monday.")
    recorder.status("finished", 120, 120)
    recorder.close()
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return folder / "metrics", reader


def test_every_value_equals_that_of_metrics_jsonl(recorded: tuple[Path, EventAccumulator]) -> None:
    """TensorBoard keeps numbers of 32 bits, so equal means: rounded to these."""
    metrics, reader = recorded
    written: dict[tuple[str, int], Any] = {}
    for line in (metrics / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        del record["t"]
        written |= {(name, step): value for name, value in record.items()}
    read = {(name, event.step): event.value for name in reader.Tags()["scalars"] for event in reader.Scalars(name)}
    assert {key for key in read if not key[0].startswith("system/")} == written.keys() and len(written) > 1500
    for key, value in written.items():
        assert math.isnan(read[key]) if value is None else read[key] == as_float32(value), key


def test_one_chart_shows_the_losses_of_training_and_evaluation(recorded: tuple[Path, EventAccumulator]) -> None:
    _, reader = recorded
    (event,) = reader.Tensors("custom_scalars__config__")
    assert "custom_scalars__config__" in reader.PluginTagToContent("custom_scalars")
    found = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in found.category for chart in category.chart}
    assert charts["Loss, training and held out"] == ["^train/loss$", "^eval/loss$"]


def test_every_chart_of_the_layout_finds_metrics(recorded: tuple[Path, EventAccumulator]) -> None:
    _, reader = recorded
    (event,) = reader.Tensors("custom_scalars__config__")
    names = reader.Tags()["scalars"]
    for category in Layout.FromString(event.tensor_proto.string_val[0]).category:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                assert any(re.match(pattern, name) for name in names), (chart.title, pattern)


def test_settings_and_samples_are_texts(recorded: tuple[Path, EventAccumulator]) -> None:
    _, reader = recorded
    assert set(reader.PluginTagToContent("text")) == {"settings", "samples/1", "samples/2"}
    settings = reader.Tensors("settings")[0].tensor_proto.string_val[0].decode()
    assert "| lora.rank | `16` |" in settings
    samples = reader.Tensors("samples/1")
    assert [event.step for event in samples] == [40, 80, 120]
    shown = samples[-1].tensor_proto.string_val[0].decode()
    assert "    Answer of step 120" in shown and "    Which day? *bold*" in shown, "as code, so that nothing is read as Markdown"


def test_hyperparameters_hold_every_setting_with_its_type_and_the_end_of_the_run(recorded: tuple[Path, EventAccumulator]) -> None:
    _, reader = recorded
    found = reader.PluginTagToContent("hparams")
    start = parse_start(found["_hparams_/session_start_info"])
    assert start.hparams["training.seed"].number_value == 0 and start.hparams["training.method"].string_value == "lora"
    assert start.hparams["monitoring.tensorboard"].bool_value is True
    assert start.group_name == "20260101-000000-amber-finch"
    experiment = parse_experiment_plugin_data(found["_hparams_/experiment"])
    assert {info.name for info in experiment.hparam_infos} == set(start.hparams)
    assert "eval/loss" in {info.name.tag for info in experiment.metric_infos}
    assert parse_session_end_info_plugin_data(found["_hparams_/session_end_info"]).status == 1, "STATUS_SUCCESS"
