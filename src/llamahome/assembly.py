"""The parts of a run, each made once, in this order: data, base, settings, learner; then the files and the loop around it.

Nothing is changed after it was made. The settings are frozen when `assemble` returns; resolve.py says what every `auto` comes to.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from llamahome.checkpoint.state import TrainerState
from llamahome.config.load import LoadedConfig
from llamahome.config.objectives import LEARNS
from llamahome.config.schema import Config, interval
from llamahome.conversation import base_of_run
from llamahome.data.prepare import Prepared
from llamahome.data.steps.layout import EACH_ALONE, Layout
from llamahome.data.steps.loader import Loader, Steps
from llamahome.data.steps.taught_steps import with_teacher
from llamahome.data.store.table import ExampleTable
from llamahome.data.store.taught import Taught
from llamahome.data.text.tokenizer_files import tokenizer_folder
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.distributed.world import World
from llamahome.errors import LeftAtOnce, MachineError, Problem
from llamahome.initial_values import from_rows
from llamahome.model.auxiliary_files import copy_both
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import choose_backend
from llamahome.model.lora_eva import begin_with
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.throughput import PartClock
from llamahome.pass_memory import remedies_of
from llamahome.resolve import answers_to_score, evaluated_rows, resolve_settings
from llamahome.resuming import passed_over, rate_of, show_rows
from llamahome.run_rows import check_rows, new_rows, read_rows
from llamahome.rundir import RunPaths, as_typed
from llamahome.session import Session
from llamahome.training.auto import auto_learning_rate, rate_factors, slower_rate
from llamahome.training.checkpointing import Checkpointing, Save, SaveAsync
from llamahome.training.evaluate import Evaluator, HeldOut, Judge, sample_prompts
from llamahome.training.learner import Learner, make_learner
from llamahome.training.loaded_model import load_base
from llamahome.training.objective import memory_of
from llamahome.training.run import LoopSettings, Plan, Run, Schedule, StepLoss, max_seconds
from llamahome.training.schedule import Due


@dataclass(frozen=True)
class RunData:
    """The rows of a run, and the base whose tokenizer turns them into tokens."""

    paths: tuple[str, ...]
    prepared: Prepared
    tokenizer: ChatTokenizer
    base: Path
    adapter: Path | None
    """The PEFT folder that is trained further: model.adapter's, or at a resume the checkpoint's own."""
    backend: Backend
    taught: Taught | None
    """What a teacher says about the rows, if they are learned from it."""
    fitted: LoadedConfig
    """The settings with which the rows were read: data.max_length is at most what the base can take."""


@dataclass(frozen=True)
class Job:
    """Everything of a run before its first step."""

    session: Session
    data: RunData
    settings: LoadedConfig
    plan: Plan
    learner: Learner
    layout: Layout
    """How the examples of a row lie in micro-batches."""
    reference: str | None = None
    """Fingerprint of the weights of the reference, where the objective has one."""
    planned_memory: Mapping[str, int] | None = None
    """Bytes that the main process is planned to take, by purpose; None if nobody has planned them."""

    @property
    def config(self) -> Config:
        """The values of the settings."""
        return self.settings.config

    def slower_rate(self, share: float) -> float:
        """What to advise where the learning rate is too high: that share of it, or less if it is above the usual one."""
        training, width = self.config.training, self.learner.model.get_output_embeddings().weight.shape[1]
        usual = auto_learning_rate(training.method, width, *rate_factors(self.config).values())
        return slower_rate(float(training.learning_rate), usual, share=share)


def read_data(session: Session, loaded: LoadedConfig, data_path: str | Sequence[str], *, adapter: Path | None = None) -> RunData:
    """Fetch the base and make the examples; rank 0 fetches first, so that the other ranks find the base in the cache."""
    world, progress = session.world, session.progress
    backend = choose_backend(loaded.config, world.device)  # first, because it refuses settings that this machine cannot run
    world.rank_status.enter("while reading the data")
    if not world.is_main:
        world.barrier()
    base = _fetch_base(session, loaded)
    if world.is_main:
        world.barrier()
    rows = read_rows(loaded, data_path, base, adapter, say=progress.say)
    prepared = rows.prepared
    session.closing.callback(prepared.close)
    for line in prepared.report.lines()[1:]:  # the first line was shown while reading
        progress.say(line)
    taught = check_rows(rows, base, warn=progress.warn)
    return RunData(prepared.reading.opened, prepared, rows.tokenizer, base, adapter, backend, taught, rows.fitted)


def assemble(session: Session, data: RunData, *, step: int = 0, consumed: int = 0, begun: Path | None = None) -> Job:
    """Load the base, resolve the settings and make the learner of a run of which `step` updates over `consumed` rows are done.

    The adapter in `begun` decides ranks and layers if the rows did so when the run began.
    """
    world, say, fitted = session.world, session.progress.say, data.fitted
    world.rank_status.enter("while loading the model")
    rows = new_rows(data.tokenizer, fitted.config.model)
    base = load_base(fitted.config, data.base, data.backend, world, rows=rows, adapter=data.adapter or begun, say=say)
    settings, plan = resolve_settings(fitted, data.prepared, base, world, step=step, consumed=consumed, say=say)
    auxiliary = _auxiliary(session, data.base, data.adapter)
    ahead = {"rows": plan.rows_ahead, "tokens": plan.rows_ahead * data.prepared.report.tokens_per_row}
    config, directions = from_rows(settings.config, base, data.prepared, world, say=say)
    learner = make_learner(config, base, world, auxiliary=auxiliary, begins=step == 0, say=say, **ahead)
    begin_with(learner.model, directions, world)
    return Job(session, data, settings, plan, learner, _layout(settings.config, learner, say))


def _layout(config: Config, learner: Learner, say: Callable[[str], None]) -> Layout:
    """Pairs of answers stay together, and their prompt is computed once where the back end and the model can."""
    if LEARNS[config.training.objective] != "pairs":
        return EACH_ALONE
    shares = learner.objective.backend.shares_prefixes(learner.model)
    if not shares:
        say("the prompt of a pair is computed for each of its answers: this model or back end cannot compute it once for both")
    return Layout(whole_rows=True, shares=shares)


def _auxiliary(session: Session, base: Path, adapter: Path | None) -> Path:
    """The folder whose tokenizer and other files are saved with the model. Those of an adapter are copied, because it may be deleted."""
    if adapter is None or tokenizer_folder(base, adapter) == base:
        return base
    return copy_both(base, adapter, Path(session.closing.enter_context(tempfile.TemporaryDirectory(prefix="llamahome-"))))


def _fetch_base(session: Session, loaded: LoadedConfig) -> Path:
    """The folder of the base. Ctrl-C during a download also ends pip, whose failure then is no error, because nothing is saved yet."""
    try:
        return base_of_run(loaded, say=session.progress.say)
    except MachineError as error:
        if session.stop.asked:
            raise LeftAtOnce(Problem(code="run.left-at-once", message="left while fetching the model; nothing was to be saved")) from error
        raise


def make_evaluator(job: Job, recorder: Recorder, state: TrainerState) -> Evaluator:
    """Evaluates the rows that evaluation.rows selects; answers the first held-out prompts, or those of training without any."""
    learner, prepared, world = job.learner, job.data.prepared, job.session.world
    rows, count = evaluated_rows(prepared, job.config), job.config.evaluation.sample_prompts
    equal = learner.placement.equal_passes
    table = prepared.evaluation if prepared.evaluation is not None else prepared.first_examples(count)
    scored = answers_to_score(prepared, job.config, job.data.tokenizer)
    return Evaluator(
        learner.objective,
        learner.placement,
        job.data.tokenizer,
        recorder,
        held_out=None if rows is None else held_out(rows, job.config, world, job.data.backend, equal_passes=equal, layout=job.layout),
        prompts=sample_prompts(table, job.data.tokenizer, count),
        untrained=state.extra.get("first"),
        judge=Judge(job.config.evaluation.metric, None if scored is None else partial(scored.mean, learner.model, learner.placement)),
    )


def held_out(
    table: ExampleTable, config: Config, world: World, backend: Backend, *, equal_passes: bool = False, layout: Layout = EACH_ALONE
) -> HeldOut:
    """Every example of `table`, to be evaluated in micro-batches of training's size."""
    tokens = config.training.micro_batch_tokens
    return HeldOut(table, backend.micro_batch_tokens if tokens == "auto" else tokens, world, backend.to_device, equal_passes, layout)


def make_loader(job: Job, state: TrainerState) -> Loader:
    """The steps from the position of `state` on; the caller closes it."""
    training, prepared, world = job.config.training, job.data.prepared, job.session.world
    deliver, taught = job.data.backend.to_device, job.data.taught
    return Loader(
        prepared.examples,
        replace(prepared.order, passed=passed_over(state)),
        batch_size=int(training.batch_size),
        micro_batch_tokens=int(training.micro_batch_tokens),
        seed=training.seed,
        total_positions=job.plan.positions,
        start_position=state.consumed,
        rank=world.rank,
        world_size=world.size,
        equal_passes=job.learner.placement.equal_passes,
        deliver=deliver if taught is None else with_teacher(taught, deliver),
        layout=job.layout,
        judge=prepared.judge,
        row_names=prepared.places,
    )


def make_run(
    job: Job,
    paths: RunPaths,
    state: TrainerState,
    *,
    loader: Steps,
    recorder: Recorder,
    evaluator: Evaluator,
    save: tuple[Save, SaveAsync],
    clock: PartClock,
) -> Run:
    """Everything that the loop works with; `state` is where it begins."""
    config, session, learner, objective = job.config, job.session, job.learner, job.learner.objective
    every = {"log": config.monitoring.log_every, "evaluate": config.evaluation.every, "save": config.checkpoint.every}
    due = {name: Due(interval(text), steps_per_epoch=job.plan.steps_per_epoch) for name, text in every.items()}
    return Run(
        loss=StepLoss(learner.watched_loss, objective.units, objective.measured, memory_of(objective)),
        optimizer=learner.optimizer,
        reducer=learner.placement.exchange,
        loader=loader,
        schedule=Schedule(horizon=job.plan.horizon, learning_rate=rate_of(state), **due),
        settings=LoopSettings(
            seed=config.training.seed,
            max_grad_norm=config.training.max_grad_norm,
            max_bad_steps=config.training.max_bad_steps,
            refuse_spikes=config.training.refuse_spikes and config.training.objective != "grpo",  # its losses are around zero
            scales_loss=objective.backend.precision.compute == torch.float16,
            show_rows=lambda rows: show_rows(job.data.paths, paths, rows),
            remedies=remedies_of(config),
            early_stop_patience=config.evaluation.early_stop_patience,
            max_seconds=max_seconds(config.training),
            save_best=config.checkpoint.keep_best > 0,
            final_is_best=config.output.final == "best",
            advice_if_diverged=lambda: _advise_lower_rate(paths, job.slower_rate(0.1)),
        ),
        evaluate=evaluator.evaluate,
        checkpoints=Checkpointing(*save, recorder=recorder, progress=session.progress, clock=clock),
        recorder=recorder,
        progress=session.progress,
        clock=clock,
        stop=session.stop,
    )


def _advise_lower_rate(paths: RunPaths, rate: float) -> str:
    slower = f"--set training.learning_rate={rate:.2g}"
    return f"llamahome train-resume {as_typed(paths.root)} {slower}" if paths.checkpoints() else f"start again with {slower}"
