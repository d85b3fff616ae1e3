"""A Run put together by hand: a two-layer model, examples in memory, no command line. Every part is the real one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from tests.support.models import CPU, objective_of, our_model
from torch import Tensor, nn

from llamahome.checkpoint.state import TrainerState
from llamahome.config.schema import LoraConfig
from llamahome.data.records import Example, Microbatch
from llamahome.data.steps.loader import Extent, Loader, sequential_microbatches
from llamahome.data.steps.mixture import plain_order
from llamahome.data.store.table import ExampleTable, RowRead, build_table
from llamahome.distributed.exchange import FlatExchange
from llamahome.distributed.world import World
from llamahome.model.adapter import SavedModel, restore_model, save_model
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import place, trained_parameters
from llamahome.monitoring.progress import QuietProgress
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.throughput import PartClock
from llamahome.training.evaluate import Evaluation, evaluate
from llamahome.training.loop import Limits, Run
from llamahome.training.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from llamahome.training.saves import SaveBeside, never_beside
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
    optimizer: torch.optim.AdamW

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
    base: Path, method: Method, *, seed: int = 0, checkpointing: bool = False, weight_decay: float = 0.0, **lora: Any
) -> Learner:
    model = our_model(base)
    saved: SavedModel = model
    if method == "lora":
        saved = add_lora(model, LoraConfig(**{"rank": 4, **lora}), base=str(base), seed=seed, lean=True)
    place(model, world=ALONE, checkpointing=checkpointing, sync_batch_norm=False)
    parameters = trained_parameters(model)
    optimizer = make_optimizer("adamw", parameters, weight_decay=weight_decay)
    return Learner(base, saved, objective_of(model), parameters, optimizer)


def table_of(examples: Sequence[Example]) -> ExampleTable:
    return build_table([RowRead([example], "whole") for example in examples], ("rows.jsonl",))


@dataclass
class Plan:
    """What a test wants of a run."""

    table: ExampleTable
    folder: Path
    evaluation: ExampleTable | None = None
    batch_size: int = 4
    micro_batch_tokens: int = 60
    steps: int = 6
    start: int = 0
    """Position in the data."""
    peak: float = 3e-3
    log: str = "1 step"
    evaluate: str = "1000 steps"
    save: str = "1000 steps"
    limits: dict[str, Any] = field(default_factory=dict)
    objective: Callable[[Microbatch], Tensor] | None = None
    saves: Callable[[TrainerState], Path] | None = None
    saves_beside: SaveBeside = never_beside
    stop: StopRequest = field(default_factory=StopRequest)
    said: "Said" = field(default_factory=lambda: Said())
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)


class Said(QuietProgress):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str, consequence: str) -> None:
        self.warnings.append(f"{message}: {consequence}")


def make_run(learner: Learner, plan: Plan) -> Run:
    """All parts of a run; close its loader and recorder, or let `close_run` do it."""
    planned = Extent(epochs=1, batch_size=plan.batch_size, max_steps=plan.steps).horizon(len(plan.table))
    positions = Extent(epochs=1, batch_size=plan.batch_size, max_steps=plan.steps).positions(len(plan.table))
    held_out = [] if plan.evaluation is None else sequential_microbatches(plan.evaluation, micro_batch_tokens=plan.micro_batch_tokens)

    def look(step: int) -> Evaluation | None:
        if plan.evaluation is None:
            return None
        plan.evaluations.append((step, evaluate(learner.objective.stats, learner.model, held_out, world=ALONE)))
        return plan.evaluations[-1][1]

    def save(state: TrainerState) -> Path:
        folder = plan.folder / f"checkpoint-{state.step}"
        folder.mkdir(parents=True, exist_ok=True)
        learner.save(folder)
        return folder

    limits = {"max_grad_norm": 1.0, "max_bad_steps": 3, "patience": None, "keeps_best": False, "seed": 7, **plan.limits}
    due = {name: Due(parse_interval(text), steps_per_epoch=len(plan.table) / plan.batch_size) for name, text in _every(plan)}
    return Run(
        objective=plan.objective or learner.objective.loss_sum,
        optimizer=learner.optimizer,
        loader=Loader(
            plan.table,
            plain_order(plan.table.num_rows),
            batch_size=plan.batch_size,
            micro_batch_tokens=plan.micro_batch_tokens,
            seed=7,
            total_positions=positions,
            start_position=plan.start,
        ),
        rate=lambda step: learning_rate(step, peak=plan.peak, horizon=planned, warmup=1, shape="cosine"),
        evaluate=look,
        save=plan.saves or save,
        save_beside=plan.saves_beside,
        rows_at=lambda first, last: [f"row {position}" for position in range(first, last)],
        go_on=lambda: f"llamahome train-resume {plan.folder}",
        recorder=Recorder(
            plan.folder / "metrics",
            tensorboard_dir=None,
            is_main=True,
            resume_step=None,
            flops_per_token=1.0,
            peak_flops=None,
            warn=plan.said.warnings.append,
        ),
        progress=plan.said,
        clock=PartClock(),
        world=ALONE,
        exchange=FlatExchange(ALONE, list(learner.parameters.values())),
        stop=plan.stop,
        limits=Limits(horizon=planned, batch_size=plan.batch_size, positions=positions, **limits),
        log_due=due["log"],
        evaluate_due=due["evaluate"],
        save_due=due["save"],
    )


def _every(plan: Plan) -> list[tuple[str, str]]:
    return [("log", plan.log), ("evaluate", plan.evaluate), ("save", plan.save)]


def close_run(run: Run) -> None:
    run.loader.close()
    run.recorder.close()
