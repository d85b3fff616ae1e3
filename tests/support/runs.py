"""A Run put together by hand: a two-layer model, examples in memory, no command line. Every part is the real one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from tests.support.models import CPU, FP32, objective_of, our_model
from torch import Tensor, nn

from llamahome.checkpoint.state import TrainerState
from llamahome.config.optimizers import OptimizerName
from llamahome.config.schema import LoraConfig
from llamahome.data.records import Example, Microbatch
from llamahome.data.steps.loader import Extent, Loader, sequential_microbatches
from llamahome.data.steps.mixture import plain_order
from llamahome.data.store.table import ExampleTable, RowRead, build_table
from llamahome.distributed.reducer import FlatReducer
from llamahome.distributed.world import World
from llamahome.model.adapter import SavedModel, restore_model, save_model
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import place, trained_parameters
from llamahome.model.precision import Precision
from llamahome.monitoring.progress import Progress
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.throughput import PartClock
from llamahome.training.checkpointing import Checkpointing, SaveAsync
from llamahome.training.evaluate import Evaluation, evaluate
from llamahome.training.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from llamahome.training.run import LoopSettings, Run, Schedule, StepLoss
from llamahome.training.schedule import Due, learning_rate
from llamahome.training.stop import StopRequest
from llamahome.units import parse_interval

ALONE = World(0, 1, 0, CPU)
Method = Literal["lora", "full"]


@dataclass
class Learner:
    """A model that is being trained, and what belongs to its weights."""

    base: Path
    saved: SavedModel
    objective: Objective
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    @property
    def model(self) -> nn.Module:
        return self.objective.model

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def gradients_of_first_step(self) -> dict[str, Tensor]:
        """What the first update saw, after clipping: AdamW's first moment is then a tenth of it."""
        return {name: self.optimizer.state[parameter]["exp_avg"] / 0.1 for name, parameter in self.parameters.items()}

    def save(self, folder: Path) -> None:
        save_model(self.saved, folder / "model", base=self.base)
        safetensors.torch.save_file(optimizer_tensors(self.optimizer, self.parameters), folder / "optimizer.safetensors")

    def restore(self, folder: Path) -> None:
        restore_model(self.saved, folder / "model")
        restore_optimizer(self.optimizer, self.parameters, safetensors.torch.load_file(folder / "optimizer.safetensors"))


def make_learner(
    base: Path,
    method: Method,
    *,
    seed: int = 0,
    checkpointing: bool = False,
    weight_decay: float = 0.0,
    optimizer: OptimizerName = "adamw",
    precision: Precision = FP32,
    **lora: Any,
) -> Learner:
    model = our_model(base, dtype=precision.storage)
    saved: SavedModel = model
    if method == "lora":
        saved = add_lora(model, LoraConfig(**{"rank": 4, **lora}), base=str(base), seed=seed, lean=not precision.autocast)
    place(model, world=ALONE, checkpointing=checkpointing, sync_batch_norm=False)
    parameters = trained_parameters(model)
    tables = {name for name in parameters if "embed" in name}
    made = make_optimizer(optimizer, parameters, weight_decay=weight_decay, tables=tables)
    backend = "reference" if precision.compute == torch.float16 else "cpu"
    return Learner(base, saved, objective_of(model, backend, precision), parameters, made)


def table_of(examples: Sequence[Example]) -> ExampleTable:
    return build_table([RowRead([example], "whole") for example in examples], ("rows.jsonl",))


@dataclass
class RunOptions:
    """What a test requests of a run."""

    table: ExampleTable
    folder: Path
    evaluation: ExampleTable | None = None
    batch_size: int = 4
    micro_batch_tokens: int = 60
    steps: int = 6
    start: int = 0
    """Position in the data."""
    peak: float = 3e-3
    log_every: str = "1 step"
    evaluate_every: str = "1000 steps"
    save_every: str = "1000 steps"
    settings: dict[str, Any] = field(default_factory=dict)
    objective: Callable[[Microbatch], Tensor] | None = None
    save: Callable[[TrainerState], Path] | None = None
    save_async: SaveAsync = lambda state: None
    stop: StopRequest = field(default_factory=StopRequest)
    progress: "KeptWarnings" = field(default_factory=lambda: KeptWarnings())
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)

    def names_of(self, begin: int, end: int) -> list[str]:
        """Names of the rows that are consumed from `begin` to before `end`."""
        return [f"row {row}" for row in plain_order(self.table.num_rows).rows_at(np.arange(begin, end), seed=7)]


class KeptWarnings(Progress):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str, consequence: str) -> None:
        self.warnings.append(f"{message}: {consequence}")


def make_run(learner: Learner, plan: RunOptions) -> Run:
    """All parts of a run; close its loader and recorder, or let `close_run` do it."""
    extent, rows = Extent(epochs=1, batch_size=plan.batch_size, max_steps=plan.steps), len(plan.table)
    held_out = [] if plan.evaluation is None else sequential_microbatches(plan.evaluation, micro_batch_tokens=plan.micro_batch_tokens)

    def evaluate_held_out(step: int) -> Evaluation | None:
        if plan.evaluation is None:
            return None
        plan.evaluations.append((step, evaluate(learner.objective.stats, learner.model, held_out, world=ALONE)))
        return plan.evaluations[-1][1]

    def save(state: TrainerState) -> Path:
        folder = plan.folder / f"checkpoint-{state.step}"
        folder.mkdir(parents=True, exist_ok=True)
        learner.save(folder)
        return folder

    recorder = Recorder(
        plan.folder / "metrics",
        tensorboard_dir=None,
        is_main=True,
        resume_step=None,
        flops_per_token=1.0,
        peak_flops=None,
        warn=plan.progress.warnings.append,
    )
    clock = PartClock()
    every = {"log": plan.log_every, "evaluate": plan.evaluate_every, "save": plan.save_every}
    due = {name: Due(parse_interval(text), steps_per_epoch=rows / plan.batch_size) for name, text in every.items()}
    settings = {"max_grad_norm": 1.0, "max_bad_steps": 3, "early_stop_patience": None, "save_best": False, "seed": 7, **plan.settings}
    return Run(
        loss=StepLoss(plan.objective or learner.objective.loss_sum),
        optimizer=learner.optimizer,
        reducer=FlatReducer(ALONE, list(learner.parameters.values())),
        loader=Loader(
            plan.table,
            plain_order(plan.table.num_rows),
            batch_size=plan.batch_size,
            micro_batch_tokens=plan.micro_batch_tokens,
            seed=7,
            total_positions=extent.positions(rows),
            start_position=plan.start,
            row_names=lambda rows: [f"row {row}" for row in rows],
        ),
        schedule=Schedule(
            horizon=extent.horizon(rows),
            learning_rate=lambda step: learning_rate(step, peak=plan.peak, horizon=extent.horizon(rows), warmup=1, shape="cosine"),
            **due,
        ),
        settings=LoopSettings(advice_if_diverged=lambda: f"llamahome train-resume {plan.folder}", **settings),
        evaluate=evaluate_held_out,
        checkpoints=Checkpointing(plan.save or save, plan.save_async, recorder=recorder, progress=plan.progress, clock=clock),
        recorder=recorder,
        progress=plan.progress,
        clock=clock,
        stop=plan.stop,
    )


def close_run(run: Run) -> None:
    run.loader.close()
    run.recorder.close()
