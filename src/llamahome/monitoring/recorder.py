"""Records a run in metrics.jsonl, events.jsonl, samples.jsonl, status.json and TensorBoard's event files.

A step reads nothing from the device: `record` keeps device scalars, `cut` starts one transfer of the scalars since the last cut to the
host, and `write` reads them. Only `write` waits for the device. Tokens and targets are counted from the start of the run, over resumes.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llamahome.config.yamltext import write_value
from llamahome.distributed.devices import HostCopy
from llamahome.monitoring.ranks import Ranks
from llamahome.monitoring.resources import recent_memory
from llamahome.monitoring.sinks import AppendFile, DiskTrouble, JsonlSink, Sink, TensorBoardSink, json_line, supersede_after
from llamahome.monitoring.status import RunState, StatusFile
from llamahome.monitoring.tensorboard_pages import hyperparameters, layout, sample_text, session_end, settings_text
from llamahome.redaction import redact_values

_NOT_TRAINING = ("evaluate", "save", "profile")
"""Parts whose time is left out of tokens per second."""


@dataclass(frozen=True)
class Window:
    """The steps of one line of metrics. Their losses may still be in transfer from the device."""

    step: int
    """The last step."""
    values: HostCopy
    """The gradient norm of the last step, then of each step its loss and what else was measured."""
    units: list[tuple[int, ...]]
    """Over how many units, of all ranks, each of these values of a step is a mean."""
    measured: tuple[str, ...]
    """Metrics of each step besides its loss."""
    targets: int
    tokens: int
    known: dict[str, float]
    """Metrics that need no transfer."""
    sent: Mapping[str, float]
    """Sums over the steps of what this process sent to other processes, by metric."""
    device: torch.device


class Recorder:
    """Records one run. Every rank may hold a Recorder; only the main one writes files.

    At a resume, records of steps after `resume_step` are moved to superseded.jsonl. `system` returns the newest sample of the machine,
    which is written to TensorBoard with each line of metrics. A speed/mfu is recorded only if `peak_flops` is known.
    """

    def __init__(
        self,
        metrics_dir: Path,
        *,
        tensorboard_dir: Path | None,
        is_main: bool,
        resume_step: int | None,
        flops_per_token: float,
        peak_flops: float | None,
        warn: Callable[[str], None],
        system: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._system = system
        self._sampled: Mapping[str, float] | None = None
        """The sample of the machine that TensorBoard has."""
        self._losses: list[torch.Tensor] = []
        """Of each step its loss and what else was measured, [1 + M]."""
        self._measured: tuple[str, ...] = ()
        self._units: list[tuple[int, ...]] = []
        self._window_tokens = self._window_targets = 0
        self._grad_norm: torch.Tensor | None = None
        self._learning_rate = 0.0
        self._total_tokens = 0
        self._total_targets = 0
        self._last_write: float | None = None
        self.step = resume_step or 0
        """The last step that was recorded."""
        self.ranks = Ranks()
        """What the processes tell each other; a run of several has its own."""
        self.trouble = DiskTrouble(warn)
        self._sinks: list[Sink] = []
        self._tensorboard: TensorBoardSink | None = None
        self._prompts: dict[str, int] = {}
        """Number of each sample prompt in TensorBoard."""
        self._events = AppendFile(metrics_dir / "events.jsonl", self.trouble)
        self._samples = AppendFile(metrics_dir / "samples.jsonl", self.trouble)
        self._status = StatusFile(metrics_dir / "status.json", trouble=self.trouble)
        self.standing_out: Callable[[], Mapping[str, Any]] = dict
        """While a line of metrics is written: the rows of its step that stands out, as fields of an event about it."""
        self._is_main = is_main
        self._listeners: list[Callable[[str, Mapping[str, Any]], None]] = []
        if is_main:
            superseded = 0 if resume_step is None else supersede_after(metrics_dir, resume_step)
            self._sinks.append(JsonlSink(metrics_dir / "metrics.jsonl", trouble=self.trouble))
            if tensorboard_dir is not None:
                purge_step = None if resume_step is None else resume_step + 1
                self._tensorboard = TensorBoardSink(tensorboard_dir, purge_step=purge_step, trouble=self.trouble)
                self._sinks.append(self._tensorboard)
            if superseded:
                self.event("superseded", step=resume_step, records=superseded)

    def attach(self, sink: Sink) -> None:
        """Give everything that is logged from now on to another sink too; only on the main rank."""
        if self._is_main:
            self._sinks.append(sink)

    def listen(self, listener: Callable[[str, Mapping[str, Any]], None]) -> None:
        """Call `listener` with the kind and the fields of each event; only on the main rank."""
        if self._is_main:
            self._listeners.append(listener)

    @property
    def waits(self) -> bool:
        """Whether steps have been recorded since the last cut."""
        return bool(self._losses)

    def restore_totals(self, tokens: int, targets: int) -> None:
        """Set the counts to those of the checkpoint."""
        self._total_tokens, self._total_targets = tokens, targets

    def record(
        self,
        step: int,
        *,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        learning_rate: float,
        tokens: int,
        targets: int,
        units: Sequence[int] = (),
        measured: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Keep one step without reading the device. `tokens` and `targets` count all ranks.

        `loss` and what else was `measured`, by metric, the same in every step, are means (0-dim) over `units`, by default the targets.
        """
        values = torch.stack([loss.detach(), *(value.detach() for value in measured.values())])
        self._losses.append(values.float())  # a copy, because the caller may reuse the tensor
        self._measured = tuple(measured)
        self._grad_norm = grad_norm.detach().float().clone()
        self._units.append(tuple(units) or (targets,) * (1 + len(measured)))
        self._learning_rate = learning_rate
        self._window_tokens += tokens
        self._window_targets += targets
        self._total_tokens += tokens
        self._total_targets += targets
        self.step = step
        self._status.step(step)

    def cut(self, step: int, sent: Mapping[str, float] = MappingProxyType({})) -> Window | None:
        """Return the window of the steps since the last cut, up to `step`, without waiting; None if there are none.

        `sent` holds sums over these steps of what this process sent to other processes, by metric.
        """
        if not self._losses or self._grad_norm is None:
            return None
        known = {"train/learning_rate": self._learning_rate, "train/tokens": self._total_tokens, "train/targets": self._total_targets}
        values, targets = HostCopy((self._grad_norm, *self._losses)), self._window_targets
        window = Window(step, values, self._units, self._measured, targets, self._window_tokens, known, sent, self._losses[-1].device)
        self._losses, self._units, self._window_tokens, self._window_targets = [], [], 0, 0
        return window

    def write(
        self, window: Window, parts: Mapping[str, float], *, rows: Callable[[int], Mapping[str, Any]] = lambda _: {}
    ) -> dict[str, float]:
        """Write and return the metrics of `window`; `parts` holds its seconds per part. Waits for the device once.

        `rows` gives the rows of a step of the window, by its place in it, as fields of an event.
        """
        steps, names = len(window.units), ("train/loss", *window.measured)
        self.ranks.own(parts, steps)
        grad_norm, *values = window.values.read()
        columns = [values[number :: len(names)] for number in range(len(names))]
        metrics = {
            **{name: _weighted(*each) for name, *each in zip(names, columns, zip(*window.units, strict=True), strict=True)},
            "train/grad_norm": grad_norm,
            **window.known,
            **self._speed(parts, window.tokens, window.targets),
            **{f"time/{part}": seconds / steps for part, seconds in parts.items()},
            **{name: total / steps for name, total in window.sent.items()},
            **_memory(window.device),
            **self.ranks.metrics(),
        }
        self.standing_out = partial(rows, _standing_out(columns[0], grad_norm))
        self.log(window.step, metrics)
        self.standing_out = dict
        self._log_machine(window.step)
        return metrics

    def _log_machine(self, step: int) -> None:
        """Show the newest sample of the machine in TensorBoard, once."""
        sample = self._system() if self._tensorboard is not None and self._system is not None else {}
        if self._tensorboard is None or not sample or sample is self._sampled:
            return
        self._sampled = sample
        self._tensorboard.log(step, time.time(), {name: value for name, value in sample.items() if name.startswith("system/")})

    def _speed(self, parts: Mapping[str, float], tokens: int, targets: int) -> dict[str, float]:
        now = time.perf_counter()
        # the first window has no previous write to measure from: time since the start would include loading the model
        wall = sum(parts.values()) if self._last_write is None else now - self._last_write
        self._last_write = now
        seconds = wall - sum(parts.get(part, 0.0) for part in _NOT_TRAINING)
        if seconds <= 0:
            return {}
        speed = {"speed/tokens_per_s": tokens / seconds, "speed/targets_per_s": targets / seconds}
        if self._peak_flops is not None:
            speed["speed/mfu"] = self._flops_per_token * speed["speed/tokens_per_s"] / self._peak_flops
        return speed

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write `metrics` of `step` unchanged; for metrics that are not measured in a step, such as eval/loss."""
        now = time.time()
        for sink in self._sinks:
            sink.log(step, now, metrics)

    def describe(self, values: Mapping[str, Any], run_id: str) -> None:
        """Show the values of the settings in TensorBoard, and its charts of training and evaluation together."""
        if self._tensorboard is not None:
            shown = settings_text({key: write_value(value) for key, value in values.items()})
            self._tensorboard.show(0, [layout(), shown, *hyperparameters(values, run_id)])

    def event(self, kind: str, **fields: Any) -> None:
        """Write an event: a save, a refused step, a signal."""
        if self._is_main:
            fields = redact_values(fields)
            self._events.append(json_line({"t": round(time.time(), 3), "kind": kind, **fields}))
            for listener in self._listeners:
                listener(kind, fields)

    def sample(self, step: int, prompt: str, answer: str, reference: str) -> None:
        """Write the answer of the model of `step` to a held-out prompt."""
        if self._is_main:
            record = {"t": round(time.time(), 3), "step": step, "prompt": prompt, "answer": answer, "reference": reference}
            self._samples.append(json_line(record))
            if self._tensorboard is not None:
                number = self._prompts.setdefault(prompt, len(self._prompts) + 1)
                self._tensorboard.show(step, [sample_text(number, prompt, answer, reference)])

    def status(self, state: RunState, step: int, horizon: int, **fields: Any) -> None:
        """Write status.json. "running" starts the heartbeat, any other state ends it."""
        if self._is_main:
            self._status.set(state, step=step, horizon=horizon, fields=fields)
            if self._tensorboard is not None and state != "running":
                self._tensorboard.show(step, [session_end(succeeded=state != "failed")])

    def close(self) -> None:
        """Write the pending records and end the heartbeat. Steps since the last cut are not written."""
        self._status.close()
        for sink in self._sinks:
            sink.close()
        self._events.close()
        self._samples.close()


def _weighted(values: Sequence[float], units: Sequence[int]) -> float:
    """The mean of the values of some steps, weighted by their units if there are any."""
    if len(values) == 1:
        return values[0]
    weights = units if sum(units) else [1] * len(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _standing_out(losses: list[float], grad_norm: float) -> int:
    """The place of the step with the highest loss, or the first that is not finite; `grad_norm` is that of the last step."""
    judged = [loss if math.isfinite(loss) else math.inf for loss in losses]
    if not math.isfinite(grad_norm) and math.inf not in judged:
        return len(losses) - 1
    return judged.index(max(judged))


def _memory(device: torch.device) -> dict[str, float]:
    resident, peak = recent_memory()
    memory: dict[str, float] = {"memory/rss": resident, "memory/peak": peak}
    if device.type == "cpu":
        return memory
    module: Any = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):  # the peak, because a step has freed most of its memory when it ends
        memory["memory/gpu_allocated"] = module.max_memory_allocated(device)
        memory["memory/gpu_reserved"] = module.max_memory_reserved(device)
    return memory
