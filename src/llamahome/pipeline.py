"""The table of contents: one function per verb, which parts in which order. No numerics, no formats.

    train     session -> data -> settings and learner -> run folder -> loop -> final model
    resume    the same from a checkpoint, in the same run folder
    evaluate  a model on a file of rows

Every function may be called from Python as well as from cli/; errors are LlamaHomeErrors. With several processes all of them call it.
"""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llamahome import assembly, resuming, system_message
from llamahome.assembly import Job, assemble, read_data
from llamahome.checkpoint import store
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.checkpoint.state import TrainerState
from llamahome.checkpoint.target import resolve
from llamahome.config.check import check_config
from llamahome.config.load import LoadedConfig, read_saved_config, with_values
from llamahome.config.objectives import learns_rows
from llamahome.data.report import lost_lines
from llamahome.data.steps.loader import Loader
from llamahome.distributed.agreement import require_agreement
from llamahome.distributed.failures import note_run, run_to_go_on
from llamahome.distributed.rank_status import RankStatus
from llamahome.distributed.standing import CHECKPOINT, LOAD, READ, START
from llamahome.distributed.watchdog import open_watchdog
from llamahome.errors import ConfigError, Problem, Stopped
from llamahome.evaluation_report import report
from llamahome.final_model import write_chosen
from llamahome.measuring import NOTHING_MORE, Asked
from llamahome.model.adapter import restore_model
from llamahome.monitoring.recorder import Recorder
from llamahome.monitoring.trackers import require_installed
from llamahome.recording import MemoryPlan, begin_to_show, first_line, make_clock, open_recorder, with_memory_plan, write_report_of
from llamahome.reference_values import with_reference
from llamahome.rollback import Rollback, plan_rollback, roll_back
from llamahome.run_folder import branched_run, new_run, output_of_resumed, refuse_output, resumed_run
from llamahome.rundir import RunPaths, as_typed, open_run
from llamahome.saving import Saver, require_space
from llamahome.session import Session, open_session
from llamahome.stages import check_stage, make_steps
from llamahome.starting_adapter import with_adapter
from llamahome.training.answer_metric import open_answer_metric
from llamahome.training.evaluate import Evaluation, Evaluator, SampleAnswer
from llamahome.training.loop import train as train_loop
from llamahome.training.optimizer import restore_optimizer
from llamahome.training.recovery import RunDiverged
from llamahome.training.run import Outcome, Run, after_evaluation, first_state


@dataclass(frozen=True)
class Result:
    """How a run ended, and what it achieved."""

    paths: RunPaths
    outcome: Outcome
    first: Evaluation | None
    """Before the first update; None without held-out rows."""
    last: Evaluation | None
    samples: list[SampleAnswer]
    """Prompts with the answers before the first update and now."""
    loaded: LoadedConfig
    format_name: str
    """Of the rows."""
    final_note: str | None = None
    """Which step final/ is, and why, if output.final is best."""
    kwh: float | None = None
    """Energy of the run as far as counters have measured it; None if none could be read."""


def check(loaded: LoadedConfig) -> None:
    """Raise ConfigError with every rule across settings that is broken."""
    problems = check_config(loaded.config, loaded.origins)
    if problems:
        raise ConfigError(problems)
    open_answer_metric(loaded.config.evaluation.metric)


def check_run(loaded: LoadedConfig) -> None:
    """What `check` does, and raise MachineError if the package of a tracker is missing."""
    check(loaded)
    require_installed(loaded.config.monitoring.trackers)
    check_stage(loaded)


def train(
    data_path: str | Sequence[str], loaded: LoadedConfig, *, command: Sequence[str] = (), memory_plan: MemoryPlan | None = None
) -> Result:
    """Train on `data_path`, one or several, in a new run folder. Raises Stopped when it was asked to stop and has saved."""
    check_run(loaded)
    begun = run_to_go_on()
    if begun is not None and open_run(begun).checkpoints():
        return resume(str(begun), read_saved_config, command=command, memory_plan=memory_plan)
    refuse_output(loaded, begun)
    if begun is not None and loaded.config.model.adapter is not None:  # `latest` would name the run itself now
        named = read_saved_config(open_run(begun).config).config.model.adapter
        loaded = with_values(loaded, {"model.adapter": named}, origin=loaded.origins["model.adapter"])
    with open_session(loaded) as session:
        session.watchdog.enter(START)
        settings, adapter = with_adapter(loaded, say=session.progress.say)
        with session.phase("data", READ):
            data = read_data(session, settings, data_path, adapter=adapter)
        with session.phase("model", LOAD):
            job = with_memory_plan(with_reference(assemble(session, data)), memory_plan)
        paths = open_run(begun) if begun is not None else new_run(job, command, parent=adapter)
        note_run(paths.root)
        extra = {"data_path": [*data.paths], **system_message.noted(data.prepared), "reference": job.reference}
        state = replace(first_state(int(job.config.training.micro_batch_tokens)), extra=extra)
        return _run(job, paths, resuming.with_plan(state, job.settings, job.plan))


def resume(
    target: str,
    change: Callable[[Path], LoadedConfig],
    *,
    allowed: Collection[str] = (),
    command: Sequence[str] = (),
    memory_plan: MemoryPlan | None = None,
) -> Result:
    """Continue from a checkpoint, a run or `latest`: in the run's own folder, or in a new run when `change` sets output.dir or output.name.

    `change` makes the settings from the checkpoint's config.yaml (and may change some). Raises CheckpointError when there is nothing
    to resume, or when data or base model are not those of the checkpoint and not `allowed` by name ("data", "base").
    """
    damaged: list[Problem] = []
    with open_watchdog("auto", RankStatus()).watching(CHECKPOINT):
        own_paths, chosen = resolve(target)
        folder = chosen or store.choose(own_paths, warn=damaged.append)
        saved = store.load(folder, verified=chosen is None)  # `choose` has verified it
    before = read_saved_config(saved.config_path)
    loaded, in_new_run = output_of_resumed(change(saved.config_path))
    check_run(loaded)
    resuming.refuse_other_objective(before, loaded, checkpoint=as_typed(saved.model_dir))
    resuming.refuse_other_adapter(before, loaded)
    resuming.refuse_other_weights(before, loaded)
    resuming.refuse_other_state(before, loaded, allowed=allowed, updated=bool(saved.optimizer_tensors))
    phases = 3 if saved.state.eval_loss is None and not saved.state.step else 2
    with open_session(loaded, phases=phases, resumes=saved) as session:
        session.watchdog.enter(START)
        say = session.progress.say
        saved = resuming.agreed(session, saved, alone=not in_new_run)
        before, own_paths = read_saved_config(saved.config_path), open_run(saved.folder.parent)
        for problem in damaged:
            session.progress.warn(problem.message, "an older checkpoint is used")
        if (changed := resuming.changed_settings(before, loaded)) is not None:
            say(changed)
        with session.phase("data", READ):
            adapter = saved.model_dir if loaded.config.model.adapter is not None else None  # the one of the beginning may be gone
            data = read_data(session, loaded, saved.state.extra["data_path"], adapter=adapter)
        with session.phase("model", LOAD):
            begun = saved.model_dir if loaded.config.training.method == "lora" and loaded.config.lora.init == "eva" else None
            job = assemble(session, data, step=saved.state.step, consumed=saved.state.consumed, begun=begun)
            job = with_memory_plan(with_reference(job, saved.state.extra.get("reference")), memory_plan)
            _restore(job, saved, allowed, resuming.changed_rows(before, loaded))
        paths = branched_run(job, saved.folder, saved, command) if in_new_run else resumed_run(job, own_paths, saved, command)
        session.world.barrier()
        note_run(paths.root)  # not before, because a checkpoint that is to be set aside must not look like the newest one
        say(f"resuming {paths.run_id} after step {saved.state.step:,}, at row {saved.state.consumed:,}")
        rows = data.prepared.order.epoch_rows
        started = replace(saved.state, micro_batch_tokens=int(job.config.training.micro_batch_tokens))
        state = resuming.with_changes(started, before, job.settings, job.plan, rows, session.progress)
        if (why := resuming.nothing_left(state, job.plan, job.settings)) is not None:
            say(f"{why}; to go on: {resuming.further(paths, job.settings, state, job.plan)}")
        return _run(job, paths, state)


def evaluate(target: str, data_path: str | Sequence[str] | None, loaded: LoadedConfig, asked: Asked = NOTHING_MORE) -> dict[str, Any]:
    """Loss, perplexity and token accuracy of a model, run or checkpoint on every row of `data_path`, and what else is `asked`.

    The result is what `train-eval --json` prints (docs/Evaluate.md). Without `data_path` only the tasks of lm-eval are measured.
    """
    check(loaded)
    all_rows = with_values(loaded, {"data.eval_split": 0, "data.eval_path": None}, origin="train-eval")
    with open_session(all_rows, phases=3 * (data_path is not None) + bool(asked.tasks), saves=False) as session:
        return report(target, data_path, all_rows, asked, session)


def _run(job: Job, paths: RunPaths, state: TrainerState) -> Result:
    """Train to the end, from earlier checkpoints again where the run has diverged, and write the final model."""
    session, world = job.session, job.session.world
    fingerprints = {"data with the fingerprint": job.data.prepared.fingerprint, "a base model with": job.learner.base_fingerprint}
    require_agreement(world, fingerprints)
    world.rank_status.enter("in training")
    rollback: Rollback | None = None
    began = time.perf_counter() - state.elapsed_s
    while True:
        if rollback is not None:
            state = replace(roll_back(job, paths, rollback), elapsed_s=time.perf_counter() - began)  # what is repeated takes time, too
        with ExitStack() as closing:
            opened = _open(job, paths, state, closing)
            try:
                evaluated = _evaluate_untrained(session, opened.evaluator, state)
                begin_to_show(job, paths, state)
                session.stop.training = True
                with session.watchdog.training(paths.rank_log(world.rank)):
                    outcome = train_loop(opened.run, evaluated)
                for line in (
                    lost_lines(opened.loader.seen, learned=learns_rows(job.config.training.objective)) if job.data.prepared.streams else ()
                ):
                    session.progress.say(f"since step {state.step:,}: {line}")
                final_note = write_chosen(job, paths, outcome.state, opened.saver.world) if outcome.reason != "asked to stop" else None
            except BaseException as error:
                rollback = plan_rollback(job, paths, state, error, opened.recorder) if isinstance(error, RunDiverged) else None
                if rollback is not None:
                    del opened  # and its memory, before the weights of the checkpoint are read
                    continue
                _note_failure(job, paths, opened.recorder, error, step=state.step)
                raise
            _note_ending(job, paths, opened.recorder, outcome)
        evaluator, kwh = opened.evaluator, opened.recorder.ranks.kwh()
        format_name = job.data.prepared.reading.format_name
        return Result(paths, outcome, evaluator.first, evaluator.last, evaluator.samples(), job.settings, format_name, final_note, kwh)


@dataclass(frozen=True)
class _Opened:
    """What is open while a run trains."""

    run: Run
    loader: Loader
    evaluator: Evaluator
    recorder: Recorder
    saver: Saver


def _open(job: Job, paths: RunPaths, state: TrainerState, closing: ExitStack) -> _Opened:
    """Open the files of the run and everything that it trains with, from `state` on."""
    job.session.watchdog.enter(START)
    recorder = open_recorder(job, paths, state, closing, checkpoint_bytes=require_space(job, paths))
    evaluator = assembly.make_evaluator(job, recorder, state)
    loader = assembly.make_loader(job, state)
    closing.callback(loader.close)
    clock = make_clock(job, paths, state, closing, watch=job.session.watchdog.enter)
    saver = Saver(job, paths, recorder, loader, clock)
    closing.callback(saver.close)
    save, steps = (saver.save, saver.save_async), make_steps(job, loader, clock)
    run = assembly.make_run(job, paths, state, loader=steps, recorder=recorder, evaluator=evaluator, save=save, clock=clock)
    recorder.status("running", state.step, job.plan.horizon, folder=str(paths.root.resolve()))
    return _Opened(run, loader, evaluator, recorder, saver)


def _note_failure(job: Job, paths: RunPaths, recorder: Recorder, error: BaseException, *, step: int) -> None:
    """Record that the run which began at `step` has failed."""
    recorder.status("failed", step, job.plan.horizon, folder=str(paths.root.resolve()))
    recorder.event("failed", step=recorder.step, text=first_line(error))
    write_report_of(job.session, paths)


def _note_ending(job: Job, paths: RunPaths, recorder: Recorder, outcome: Outcome) -> None:
    """Record how the run has ended. Raises Stopped when it was asked to stop."""
    ending: Literal["stopped", "finished"] = "stopped" if outcome.reason == "asked to stop" else "finished"
    step, reason, horizon = outcome.state.step, outcome.reason, job.plan.horizon
    recorder.status(ending, step, horizon, folder=str(paths.root.resolve()), reason=reason)
    recorder.event(ending, step=step, reason=reason, text=f"{reason} after step {step:,} of {horizon:,}")
    write_report_of(job.session, paths)
    job.session.world.barrier()
    if ending == "stopped":
        raise Stopped(resuming.stopped(outcome, job.plan, paths))


def _evaluate_untrained(session: Session, evaluator: Evaluator, state: TrainerState) -> TrainerState:
    """Evaluate the untrained model, unless that was done before or a stop was requested. The state keeps the results."""
    if state.step or state.eval_loss is not None or session.world.any(session.stop.asked):
        return state
    with session.phase("evaluation before training", "evaluate"):
        evaluation = evaluator.evaluate(0)
    kept = replace(state, extra={**state.extra, "first": evaluator.results()})
    return kept if evaluation is None else after_evaluation(kept, evaluation)


def _restore(job: Job, saved: store.Saved, allowed: Collection[str], by_settings: str) -> None:
    """Restore weights and optimizer. Raises CheckpointError when data, also `by_settings`, or base changed and that is not `allowed`."""
    learner = job.learner
    now = Fingerprints(job.data.prepared.fingerprint, learner.base_fingerprint)
    store.compare_fingerprints(saved.fingerprints, now, allowed=allowed, by_settings=by_settings)
    restore_model(learner.saved, saved.model_dir, learner.placement)
    restore_optimizer(learner.optimizer, learner.placement.parameters, saved.optimizer_tensors, local=learner.placement.part)
