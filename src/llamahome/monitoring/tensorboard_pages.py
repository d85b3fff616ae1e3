"""What TensorBoard shows of a run beside its scalars: charts with training and evaluation together, settings, hyperparameters, samples.

The values are built from protocol buffers alone, because the plugins' own helpers import TensorFlow or half of TensorBoard.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

LAYOUT_TAG, SETTINGS_TAG = "custom_scalars__config__", "settings"
_START_TAG, _END_TAG, _EXPERIMENT_TAG = "_hparams_/session_start_info", "_hparams_/session_end_info", "_hparams_/experiment"
_CHARTS = {
    "Course": {
        "Loss, training and held out": ["^train/loss$", "^eval/loss$"],
        "Held-out answers": ["^eval/(?!loss$|perplexity$).*"],
        "Learning rate": ["^train/learning_rate$"],
        "Gradient norm": ["^train/grad_norm$"],
    },
    "Machine": {
        "Tokens per second": ["^speed/.*_per_s$"],
        "Seconds of a step by part": ["^time/.*"],
        "Memory": ["^memory/.*"],
        "Use of the machine": ["^system/(cpu|ram|disk|gpu_util)$"],
    },
}
_RESULTS = ("eval/loss", "train/loss", "eval/token_accuracy", "speed/tokens_per_s")


def layout() -> "Summary.Value":
    """The charts of the page Custom Scalars; each names its metrics by regular expressions."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent

    categories = [
        Category(title=title, chart=[Chart(title=name, multiline=MultilineChartContent(tag=tags)) for name, tags in charts.items()])
        for title, charts in _CHARTS.items()
    ]
    return _text_value(LAYOUT_TAG, "custom_scalars", [Layout(category=categories).SerializeToString()])


def text(tag: str, markdown: str) -> "Summary.Value":
    """A text of the page Text, which renders Markdown."""
    return _text_value(tag, "text", [markdown.encode()])


def settings_text(settings: Mapping[str, str]) -> "Summary.Value":
    """All settings as a table."""
    cells = (f"| {key} | `{value.replace('`', '').replace('|', '/')}` |" for key, value in settings.items())
    return text(SETTINGS_TAG, "\n".join(["| setting | value |", "|---|---|", *cells]))


def sample_text(number: int, prompt: str, answer: str, reference: str) -> "Summary.Value":
    """An answer of the model of one step; TensorBoard has a slider over the steps."""
    blocks = (f"**{name}**\n\n{_indented(content)}" for name, content in (("prompt", prompt), ("reference", reference), ("answer", answer)))
    return text(f"samples/{number}", "\n\n".join(blocks))


def _indented(content: str) -> str:
    """`content` as a code block, so that nothing in it is read as Markdown."""
    return "\n".join(f"    {line}" for line in content.splitlines() or ["(nothing)"])


def hyperparameters(settings: Mapping[str, Any], run_id: str) -> list["Summary.Value"]:
    """The settings and the names of the results for the page HParams, which compares runs."""
    from tensorboard.plugins.hparams.api_pb2 import Experiment, HParamInfo, MetricInfo, MetricName
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    start = SessionStartInfo(group_name=run_id, start_time_secs=time.time())
    infos = []
    for key, value in settings.items():
        if isinstance(value, bool):
            start.hparams[key].bool_value, kind = value, "DATA_TYPE_BOOL"
        elif isinstance(value, int | float):
            start.hparams[key].number_value, kind = value, "DATA_TYPE_FLOAT64"
        else:
            start.hparams[key].string_value, kind = "" if value is None else str(value), "DATA_TYPE_STRING"
        infos.append(HParamInfo(name=key, type=kind))
    metrics = [MetricInfo(name=MetricName(tag=tag)) for tag in _RESULTS]
    experiment = Experiment(name="llamahome", hparam_infos=infos, metric_infos=metrics)
    return [
        _hparams_value(_EXPERIMENT_TAG, HParamsPluginData(experiment=experiment).SerializeToString()),
        _hparams_value(_START_TAG, HParamsPluginData(session_start_info=start).SerializeToString()),
    ]


def session_end(*, succeeded: bool) -> "Summary.Value":
    """How the run ended, for the page HParams."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    status = "STATUS_SUCCESS" if succeeded else "STATUS_FAILURE"
    end = SessionEndInfo(status=status, end_time_secs=time.time())
    return _hparams_value(_END_TAG, HParamsPluginData(session_end_info=end).SerializeToString())


def _text_value(tag: str, plugin: str, strings: Sequence[bytes]) -> "Summary.Value":
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(strings))] if plugin == "text" else [])
    return Summary.Value(tag=tag, metadata=metadata, tensor=TensorProto(dtype="DT_STRING", string_val=strings, tensor_shape=shape))


def _hparams_value(tag: str, content: bytes) -> "Summary.Value":
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="hparams", content=content))
    empty = TensorProto(dtype="DT_FLOAT", tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))
    return Summary.Value(tag=tag, metadata=metadata, tensor=empty)
