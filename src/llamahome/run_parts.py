"""The moving parts around the loop, made from the settings: recorder, loader, answers, checkpoints, and the `Run` that holds them all."""

from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.assembly import Job, Learner, Plan, Session, evaluation_batches, flops_per_token
from llamahome.checkpoint.state import TrainerState
from llamahome.config.schema import interval
from llamahome.continuing import rate_of
from llamahome.data.report import lost_lines
from llamahome.data.steps.loader import Loader
from llamahome.data.store.table import ExampleTable
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.distributed.world import World
from llamahome.evaluating import ANSWER_TOKENS, evaluated
from llamahome.logs import log_to_file
from llamahome.model.generate import generate
from llamahome.monitoring.progress import RunSummary
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.resources import ResourceSampler
from llamahome.monitoring.throughput import PartClock, measured_peak_flops
from llamahome.rundir import RunPaths, as_typed, nearby
from llamahome.saving import Beside, save_checkpoint
from llamahome.training.evaluate import Evaluation, evaluate
from llamahome.training.loop import Limits, Run
from llamahome.training.saves import Save, SaveBeside, Tell
from llamahome.training.schedule import Due

_TEXT_PROMPT = 32
"""Tokens of a plain text that are given as the prompt of a sample."""


@dataclass(frozen=True)
class SamplePrompt:
    """A held-out prompt and what the data answers."""

    tokens: list[int]
    prompt: str
    """As the model sees it."""
    shown: str
    """As people read it, without control tokens."""
    reference: str


@dataclass(frozen=True)
class SampleAnswer:
    """What the model said to a prompt before and after."""

    prompt: SamplePrompt
    before: str
    after: str


def sample_prompts(table: ExampleTable, tokenizer: ChatTokenizer, count: int) -> list[SamplePrompt]:
    """The first `count` examples of `table`: what stands before the last learned span, and that span."""
    found = []
    for number in range(min(count, len(table))):
        example = table.example(number)
        learned = example.targets.nonzero()[0]
        breaks = (learned[1:] - learned[:-1] > 1).nonzero()[0]
        start = int(learned[breaks[-1] + 1] if len(breaks) else learned[0])
        start = min(_TEXT_PROMPT, (len(example.tokens) + 1) // 2) if start < 2 else start
        tokens = example.tokens.tolist()
        ahead, behind = tokens[:start], tokens[start:]
        found.append(SamplePrompt(ahead, tokenizer.decode(ahead), tokenizer.decode_plain(ahead), tokenizer.decode_plain(behind)))
    return found


class Answers:
    """Evaluates the model as it is now and lets it answer the sample prompts; remembers the first and the last of both."""

    def __init__(self, job: Job, learner: Learner, recorder: Recorder, world: World, *, first: dict[str, Any] | None = None) -> None:
        """`first` is what a resumed run's state remembers of the untrained model."""
        table = job.prepared.evaluation
        self._learner, self._tokenizer, self._recorder, self._world = learner, job.tokenizer, recorder, world
        backend, equal = learner.objective.backend, learner.placement.equal_passes
        rows = evaluated(job.prepared, job.loaded)
        self._batches = [] if rows is None else evaluation_batches(rows, job.loaded, world, backend, equal_passes=equal)
        count = job.loaded.config.evaluation.sample_prompts
        self._prompts = sample_prompts(table if table is not None else job.prepared.first_examples(count), job.tokenizer, count)
        self._has_rows = table is not None
        self.said: list[list[str]] = [first["answers"]] if first and first["answers"] else []
        """Answers to each prompt, one list per evaluation."""
        self.first = Evaluation(**first["evaluation"]) if first and first["evaluation"] else None
        self.last: Evaluation | None = None

    def evaluate(self, step: int) -> Evaluation | None:
        """Write down and return the evaluation after `step` updates; all ranks call it. None without held-out rows."""
        if (self._world.is_main or self._learner.placement.equal_passes) and self._prompts:
            self._answer(step)
        if not self._has_rows:
            return None
        self.last = evaluate(self._learner.objective.stats, self._learner.model, self._batches, world=self._world)
        self.first = self.first or self.last
        self._recorder.log(step, self.last.metrics)
        return self.last

    def _answer(self, step: int) -> None:
        tokens = [prompt.tokens for prompt in self._prompts]
        model, end_ids = self._learner.model, self._tokenizer.all_ends
        ids = self._learner.placement.within(lambda: generate(model, tokens, end_ids=end_ids, max_new_tokens=ANSWER_TOKENS))
        said = [self._tokenizer.decode(row) for row in ids]
        self.said.append(said)
        for prompt, text in zip(self._prompts, said, strict=True):
            self._recorder.sample(step, prompt.prompt, text, prompt.reference)

    def samples(self) -> list[SampleAnswer]:
        """Each prompt with its first and its last answer; empty unless it was answered twice."""
        if len(self.said) < 2:
            return []
        return [SampleAnswer(*each) for each in zip(self._prompts, self.said[0], self.said[-1], strict=False)]


def open_recorder(stack: ExitStack, session: Session, job: Job, learner: Learner, paths: RunPaths, state: TrainerState) -> Recorder:
    """Open log, metrics and the sampler of the machine; `stack` closes them."""
    monitoring, world = job.loaded.config.monitoring, session.world
    stack.callback(log_to_file(paths.rank_log(world.rank)).close)
    sampler = ResourceSampler(paths.metrics_dir / "system.jsonl", interval(monitoring.system_every).value)
    recorder = Recorder(
        paths.metrics_dir,
        tensorboard_dir=paths.tensorboard_dir if monitoring.tensorboard else None,
        is_main=world.is_main,
        resume_step=state.step if state.step or (paths.metrics_dir / "metrics.jsonl").exists() else None,  # 0 when begun anew
        flops_per_token=flops_per_token(learner, job.prepared.report.targets / job.prepared.report.tokens),
        peak_flops=measured_peak_flops(world.device, learner.objective.backend.precision.compute),
        warn=lambda text: session.progress.say(f"warning: {text}"),
        system=sampler.latest,
    )
    recorder.restore_totals(state.tokens, state.targets)
    stack.callback(recorder.close)
    if world.is_main:
        sampler.start()
        stack.callback(sampler.stop)
    return recorder


def make_run(
    session: Session, job: Job, plan: Plan, learner: Learner, paths: RunPaths, recorder: Recorder, answers: Answers, state: TrainerState
) -> Run:
    """Everything the loop gets; `state` is where it begins. The caller closes the loader."""
    config, world, prepared = job.loaded.config, session.world, job.prepared
    training, peak, backend = config.training, float(config.training.learning_rate), learner.objective.backend
    loader = Loader(
        prepared.examples,
        prepared.order,
        batch_size=int(training.batch_size),
        micro_batch_tokens=int(training.micro_batch_tokens),
        seed=training.seed,
        total_positions=plan.positions,
        start_position=job.start,
        rank=world.rank,
        world_size=world.size,
        equal_passes=learner.placement.equal_passes,
        deliver=backend.deliver,
        judge=prepared.judge,
    )

    save, save_beside = _savers(session, job, learner, paths, recorder, loader)
    due = {
        name: Due(interval(every), steps_per_epoch=plan.steps_per_epoch)
        for name, every in (("log", config.monitoring.log_every), ("evaluate", config.evaluation.every), ("save", config.checkpoint.every))
    }
    return Run(
        objective=learner.objective.loss_sum,
        optimizer=learner.optimizer,
        loader=loader,
        rate=rate_of(state),
        evaluate=answers.evaluate,
        save=save,
        save_beside=save_beside,
        rows_at=lambda first, last: prepared.places(first, last, seed=training.seed),
        go_on=lambda: _more_gently(paths, peak),
        recorder=recorder,
        progress=session.progress,
        clock=PartClock(backend.mark, backend.seconds_between),
        world=world,
        exchange=learner.placement.exchange,
        stop=session.stop,
        limits=Limits(
            horizon=plan.horizon,
            batch_size=int(training.batch_size),
            positions=plan.positions,
            seed=training.seed,
            max_grad_norm=training.max_grad_norm,
            max_bad_steps=training.max_bad_steps,
            patience=config.evaluation.early_stop_patience,
            keeps_best=config.checkpoint.keep_best > 0,
        ),
        log_due=due["log"],
        evaluate_due=due["evaluate"],
        save_due=due["save"],
    )


def _savers(session: Session, job: Job, learner: Learner, paths: RunPaths, recorder: Recorder, loader: Loader) -> tuple[Save, SaveBeside]:
    """How a checkpoint is saved in the loop and beside it. What was read of a stream so far is noted with each."""
    beside = Beside(session, job, learner, paths, recorder)
    session.closing.callback(beside.close)

    def note_rows(state: TrainerState) -> None:
        if job.prepared.streams:
            recorder.event("rows", step=state.step, **loader.seen.sums())

    def save(state: TrainerState) -> Path:
        note_rows(state)
        return save_checkpoint(state, session, job, learner, paths, recorder)

    def save_beside(state: TrainerState) -> Future[Tell] | None:
        begun = beside.save(state)
        if begun is not None:
            note_rows(state)
        return begun

    return save, save_beside


def _more_gently(paths: RunPaths, peak: float) -> str:
    slower = f"--set training.learning_rate={peak / 10:.2g}"
    return f"llamahome train-resume {as_typed(paths.root)} {slower}" if paths.checkpoints() else f"start again with {slower}"


def tell_rows(session: Session, job: Job, loader: Loader, *, since: int) -> None:
    """Say what was lost of the rows of a stream; those of a prepared source were counted before training."""
    for line in lost_lines(loader.seen) if job.prepared.streams else ():
        session.progress.say(f"since step {since:,}: {line}")


def summary(job: Job, plan: Plan, learner: Learner, paths: RunPaths, world: World, state: TrainerState) -> RunSummary:
    """What is known before the first step, for people."""
    report, config = job.prepared.report, job.loaded.config
    rows = min(int(config.training.batch_size), plan.positions)  # fewer rows than a step may hold
    return RunSummary(
        run_id=paths.run_id,
        model=config.model.name,
        method=config.training.method,
        trained_share=learner.trained_share,
        train_rows=report.train_examples,
        eval_rows=len(job.prepared.evaluation) if job.prepared.evaluation is not None else 0,
        mean_tokens=report.mean_tokens,
        target_share=report.targets / report.tokens,
        batch_size=rows,
        tokens_per_step=report.tokens_per_row * rows,
        micro_batch_tokens=state.micro_batch_tokens,
        processes=world.size,
        horizon=plan.horizon,
        epochs=plan.horizon / plan.steps_per_epoch,
        folder=str(nearby(paths.root)),
        first_step=state.step,
    )
