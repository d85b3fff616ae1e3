"""The settings of what a run writes and measures: checkpoints, evaluations, metrics and its folder."""

from typing import Annotated, Literal

from pydantic import Field

from llamahome.config.quantities import Ages, AutoInterval, IntervalText, PositiveInt, SecondsText, StepsText, TrackerName
from llamahome.config.section import Auto, Section


class CheckpointConfig(Section):
    """When checkpoints are saved, and which are kept."""

    every: IntervalText = "10 min"
    """How often a checkpoint is saved: "500 steps", "1 epoch" or "10 min". The last step is always saved."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints are kept."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """How many checkpoints with the best evaluations by evaluation.metric are kept besides."""
    keep_ages: Ages = []
    """A ladder in time, such as [1 h, 6 h, 24 h] of training: besides, the oldest checkpoint between two of these ages is kept."""
    async_: bool = True
    """Write checkpoints while training continues, from a copy in memory; the run waits for the last one. Several processes always wait,
    and so does one process if a quarter of the free memory does not hold the copy."""


class EvaluationConfig(Section):
    """Evaluation on held-out rows before, during and after training."""

    every: AutoInterval = "auto"
    """How often during training: "100 steps", "1 epoch" or "10 min". auto: up to ten times, so that all evaluations of the run take at most
    a tenth of the time of training."""
    rows: Auto | Literal["all"] | PositiveInt = "auto"
    """Held-out rows, or rows of data.eval_path, that are evaluated: all of them or this number, chosen by content and always the same.
    auto: as many as that tenth allows at the frequency of `every`, or four times in a run if that is auto; at least 16."""
    sample_prompts: Annotated[int, Field(ge=0)] = 3
    """Held-out prompts that the model answers at each evaluation, always the same ones."""
    metric: str = "loss"
    """What decides which evaluation is best, for checkpoint.keep_best, early_stop_patience and output.final: loss, token_accuracy, or a
    score of generated answers: exact, f1, rouge, json, json_equal, or a function of yours as FILE.py:FUNCTION, higher is better. For a
    score the model answers up to 32 held-out rows at each evaluation, always the same, in at most 256 tokens each."""
    early_stop_patience: PositiveInt | None = None
    """Stop after this many consecutive evaluations without a better value of `metric`; null never stops."""


class MonitoringConfig(Section):
    """What is recorded during training."""

    log_every: IntervalText = "1 step"
    """How often metrics are read from the device and written."""
    system_every: SecondsText = "2 s"
    """How often the use of processor, memory and disk is sampled."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    trackers: list[TrackerName] = []
    """Trackers that get the metrics too, out of trackio, wandb and mlflow; each is an extra: pip install 'llamahome[wandb]'. What a tracker
    sends, and where to, is its own affair: WANDB_MODE=offline keeps W&B on this machine. One that fails is reported once and never stops a
    run."""
    notify: str | None = None
    """A shell command that is run when the run ends, fails or raises an alert, for at most 10 s, with LLAMAHOME_EVENT, LLAMAHOME_RUN,
    LLAMAHOME_STEP and LLAMAHOME_TEXT in its environment and the same as JSON on stdin. Other variables, such as tokens, are not passed."""
    profile: StepsText | None = None
    """Steps to profile, like "steps 20-25": a trace that Perfetto opens and a table of what took the time, in the run's folder."""


class OutputConfig(Section):
    """Where a run is written."""

    dir: str | None = None
    """Folder of this run, exactly; null makes output/runs/<run-id>."""
    name: str | None = None
    """Last part of the run id; null picks two words."""
    final: Literal["last", "best"] = "last"
    """Which step final/ holds: the last one, or the one with the best evaluation by evaluation.metric, the earlier of equal ones. The
    untrained model is never taken: if it was best, final/ is the best step after it, and the end of the run says so."""
