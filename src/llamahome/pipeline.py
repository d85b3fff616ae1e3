"""The table of contents: one function per verb, which parts in which order. No numerics, no formats.

    train     data -> run folder -> learner -> loop -> final model
    resume    the same from a checkpoint, in the same run folder
    evaluate  a model on a file of rows

Every function may be called from Python as well as from cli/; errors are LlamaHomeError. Under several processes all call it.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llamahome import amounts, assembly, continuing, evaluating
from llamahome.assembly import Job, Learner, Plan, Session
from llamahome.checkpoint import retention, store
from llamahome.checkpoint.branch import branch
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.checkpoint.state import TrainerState
from llamahome.checkpoint.target import resolve
from llamahome.config.check import check_config, config_warnings
from llamahome.config.load import LoadedConfig, dump_config, read_saved_config, with_values
from llamahome.conversation import base_of_run, model_folder, open_to_measure, read_fitted
from llamahome.data.text.place import tokenizer_place
from llamahome.data.text.tokens import open_tokenizer
from llamahome.data_limits import prepare_fitted, warn_of_length
from llamahome.distributed.agreement import require_agreement, settings_and_versions
from llamahome.distributed.failures import note_run, run_to_go_on
from llamahome.distributed.world import open_world
from llamahome.errors import ConfigError, LeftAtOnce, MachineError, Problem, Stopped
from llamahome.model.adapter import restore_model
from llamahome.model.backends.choose import choose_backend
from llamahome.model.objective import Objective
from llamahome.monitoring.environment import write_environment
from llamahome.monitoring.progress import open_progress
from llamahome.run_parts import Answers, SampleAnswer, make_run, open_recorder, summary, tell_rows
from llamahome.rundir import NEWEST, RunPaths, as_typed, create_run, nearby, open_run, point_newest_to, refuse_unwritable, refuse_used
from llamahome.saving import require_space, write_final
from llamahome.training.evaluate import Evaluation
from llamahome.training.evaluate import evaluate as evaluate_batches
from llamahome.training.loop import Outcome
from llamahome.training.loop import train as train_loop
from llamahome.training.optimizer import restore_optimizer
from llamahome.training.state import after_evaluation, first_state
from llamahome.training.stop import StopRequest


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    paths: RunPaths
    outcome: Outcome
    first: Evaluation | None
    """Before the first update; None without held-out rows."""
    last: Evaluation | None
    samples: list[SampleAnswer]
    """Prompts with the answers before the first update and now."""
    loaded: LoadedConfig


@contextmanager
def _session(loaded: LoadedConfig, *, phases: int = 3, saves: bool = True) -> Iterator[Session]:
    """Join the other processes, own the terminal, and listen to signals when there is something to save; give all back at the end."""
    with ExitStack() as stack:
        notes: list[str] = []
        stop = stack.enter_context(StopRequest().listening()) if saves else StopRequest()
        world = stack.enter_context(open_world(loaded.config.distributed, say=notes.append, processor=loaded.config.model.backend == "cpu"))
        progress = open_progress(sys.stderr, world.is_main, phases=phases)
        stack.callback(progress.close)
        for note in notes:
            progress.say(note)
        require_agreement(world, settings_and_versions(loaded.config))
        for warning in config_warnings(loaded.config, loaded.origins) if saves else ():
            progress.warn(warning.message, warning.hint or "it has no effect")
        yield Session(world, progress, stop, stack)


def check(loaded: LoadedConfig) -> None:
    """ConfigError with every rule across settings that is broken."""
    problems = check_config(loaded.config, loaded.origins)
    if problems:
        raise ConfigError(problems)


def train(data_path: str | Sequence[str], loaded: LoadedConfig, *, command: Sequence[str] = ()) -> Result:
    """Train on `data_path`, one or several, in a new run folder. Raises Stopped when it was asked to stop and has saved."""
    check(loaded)
    begun = run_to_go_on()
    if begun is not None and open_run(begun).checkpoints():
        return resume(str(begun), read_saved_config, command=command)
    _refuse_output(loaded, begun)
    with _session(loaded) as session:
        job = _prepare(data_path, loaded, session)
        plan = assembly.make_plan(job.loaded, job.prepared.order.epoch_rows)
        with session.progress.phase("model"):
            learner, loaded = assembly.load_learner(job.loaded, job, plan, session.world, say=session.progress.say)
        loaded = evaluating.resolve_evaluation(loaded, job.prepared, plan, learner.objective.backend, say=session.progress.say)
        paths = open_run(begun) if begun is not None else _new_run(loaded, command, session)
        note_run(paths.root)
        state = replace(first_state(int(loaded.config.training.micro_batch_tokens)), extra={"data_path": [*job.data_paths]})
        return _run(session, replace(job, loaded=loaded), plan, learner, paths, continuing.with_plan(state, loaded, plan))


def resume(target: str, change: Callable[[Path], LoadedConfig], *, allowed: Collection[str] = (), command: Sequence[str] = ()) -> Result:
    """Go on from a checkpoint, a run or `latest`: in the run's own folder, or in a new run when `change` sets output.dir or output.name.

    `change` makes the settings from the checkpoint's config.yaml (and may change some). Raises CheckpointError when there is nothing
    to resume, or when data or base model are not those of the checkpoint and not `allowed` by name ("data", "base").
    """
    paths, folder = resolve(target)
    damaged: list[Problem] = []
    folder = folder or store.choose(paths, warn=damaged.append)
    saved = store.load(folder)
    begun_with = read_saved_config(saved.config_path)
    loaded, apart = _apart(change(saved.config_path))
    changed = continuing.changed_settings(begun_with, loaded)
    check(loaded)
    with _session(loaded, phases=3 if saved.state.eval_loss is None and not saved.state.step else 2) as session:
        for problem in damaged:
            session.progress.warn(problem.message, "an older checkpoint is used")
        if changed is not None:
            session.progress.say(changed)
        job = _prepare(saved.state.extra["data_path"], loaded, session)
        done = {"step": saved.state.step, "consumed": saved.state.consumed}
        plan = assembly.make_plan(job.loaded, job.prepared.order.epoch_rows, **done)
        with session.progress.phase("model"):
            learner, loaded = assembly.load_learner(job.loaded, job, plan, session.world, say=session.progress.say)
            now = Fingerprints(job.prepared.fingerprint, learner.base_fingerprint)
            store.compare_fingerprints(saved.fingerprints, now, allowed=allowed)
            restore_model(learner.saved, saved.model_dir, learner.placement)
            restore_optimizer(learner.optimizer, learner.parameters, saved.optimizer_tensors, part=learner.placement.part)
        loaded = evaluating.resolve_evaluation(loaded, job.prepared, plan, learner.objective.backend, say=session.progress.say)
        if apart:
            paths = _new_run(loaded, command, session)
            if session.world.is_main:
                told = branch(folder, saved.state.step, paths)
                session.progress.say(f"{as_typed(told)}: where the new run begins; {as_typed(folder)} stays")
        elif session.world.is_main:
            _describe(paths, loaded, command)
            for aside in retention.set_aside(paths, after=saved.state.step):
                session.progress.say(f"{as_typed(aside)}: a later checkpoint, set aside because this run now takes another course")
        session.world.barrier()
        note_run(paths.root)  # not before: what is to be set aside must not look like the newest checkpoint
        state = replace(saved.state, micro_batch_tokens=int(loaded.config.training.micro_batch_tokens))
        session.progress.say(f"resuming {paths.run_id} after step {state.step:,}, at row {state.consumed:,}")
        state = continuing.with_changes(state, begun_with, loaded, plan, job.prepared.order.epoch_rows, session.progress)
        if state.step >= plan.horizon:
            session.progress.say(f"nothing is left to do; to go on: {continuing.further(paths, loaded, state)}")
        return _run(session, replace(job, loaded=loaded, start=state.consumed), plan, learner, paths, state)


def evaluate(target: str, data_path: str | Sequence[str], loaded: LoadedConfig) -> dict[str, Any]:
    """Loss, perplexity and token accuracy of a model, run or checkpoint on every row of `data_path`."""
    check(loaded)
    loaded = with_values(loaded, {"data.eval_split": 0, "data.eval_path": None}, origin="train-eval")
    with _session(loaded, saves=False) as session:
        folder = model_folder(target, loaded, say=session.progress.say)
        with session.progress.phase("data"):
            loaded, rows = read_fitted(loaded, data_path, folder, say=session.progress.say, warn=session.progress.warn)
        with session.progress.phase("model"):
            backend = choose_backend(loaded.config, session.world.device)
            model = open_to_measure(folder, loaded, backend, session.world.device, say=session.progress.say)
        objective = Objective(model, backend)
        with session.progress.phase("evaluation"):
            batches = assembly.evaluation_batches(rows.table, loaded, session.world, backend)
            found = evaluate_batches(objective.stats, model, batches, world=session.world)
    counts = {"rows": rows.counts.kept, "tokens": rows.counts.tokens, "targets": found.targets}
    return {"model": str(nearby(folder)), "data": data_path, **found.metrics, **counts}


def _prepare(data_path: str | Sequence[str], loaded: LoadedConfig, session: Session) -> Job:
    """Fetch the base's folder and make the examples; process 0 first, so that the others find everything in the caches."""
    world, progress, model = session.world, session.progress, loaded.config.model
    backend = choose_backend(loaded.config, world.device)  # refuses before anything is read what this machine cannot do
    world.roll.enter("while reading the data")
    with progress.phase("data"):
        if not world.is_main:
            world.barrier()
        base = _find_base(loaded, session)
        if world.is_main:
            world.barrier()
        tokenizer = open_tokenizer(tokenizer_place(base, model))
        loaded, prepared = prepare_fitted(loaded, data_path, base, tokenizer, say=progress.say)
        session.closing.callback(prepared.close)
        for line in prepared.report.lines()[1:]:  # the first was said while reading
            progress.say(line)
        warn_of_length(loaded, base, prepared.report.longest_tokens, warn=progress.warn)
        loaded = amounts.resolve_amount(loaded, prepared, processes=world.size, say=progress.say)
    world.roll.enter("while loading the model")
    return Job(prepared.reading.opened, loaded, prepared, tokenizer, base, backend)


def _find_base(loaded: LoadedConfig, session: Session) -> Path:
    """The folder of the base. A Ctrl-C while it is fetched reaches pip as well, which then fails: nothing is saved yet."""
    try:
        return base_of_run(loaded, say=session.progress.say)
    except MachineError as error:
        if session.stop.asked:
            raise LeftAtOnce(Problem(code="run.left-at-once", message="left while fetching the model; nothing was to be saved")) from error
        raise


def _describe(paths: RunPaths, loaded: LoadedConfig, command: Sequence[str]) -> None:
    """Write what the run is made of now: settings with origins, versions, machine, command."""
    paths.config.write_text(dump_config(loaded), encoding="utf-8")
    write_environment(paths.environment, command)


def _output(loaded: LoadedConfig) -> Path | None:
    return Path(loaded.config.output.dir) if loaded.config.output.dir else None


def _refuse_output(loaded: LoadedConfig, begun: Path | None) -> None:
    """ConfigError or MachineError when a new run cannot be written where it is wanted; one that was `begun` already stands there."""
    if begun is None and (output := _output(loaded)) is not None:
        refuse_used(output)
    refuse_unwritable(_output(loaded))


def _apart(loaded: LoadedConfig) -> tuple[LoadedConfig, bool]:
    """Whether a new place or name was typed for what is resumed; an old place is then forgotten. Raises what `_refuse_output` raises."""
    typed = {key for key in ("output.dir", "output.name") if loaded.origins[key] in ("--output", "--set")}
    if run_to_go_on() is not None or not typed:
        return loaded, False
    new = with_values(loaded, dict.fromkeys({"output.dir", "output.name"} - typed), origin="default")
    _refuse_output(new, None)
    return new, True


def _new_run(loaded: LoadedConfig, command: Sequence[str], session: Session) -> RunPaths:
    """Process 0 makes the folder; the others are told."""
    made = None
    if session.world.is_main:
        paths = create_run(_output(loaded), loaded.config.output.name)
        _describe(paths, loaded, command)
        try:
            point_newest_to(paths.root)
        except OSError as error:
            session.progress.warn(f"{NEWEST} cannot point to this run: {error.strerror}", f"its name is {paths.root}")
        made = [str(paths.root), paths.run_id]
    root, run_id = session.world.broadcast_object(made)
    return RunPaths(Path(root), run_id)


def _run(session: Session, job: Job, plan: Plan, learner: Learner, paths: RunPaths, state: TrainerState) -> Result:
    """Open the files of the run, train, write the final model, tell what came of it."""
    world, told = session.world, {"folder": str(paths.root.resolve())}
    require_agreement(world, {"data with the fingerprint": job.prepared.fingerprint, "a base model with": learner.base_fingerprint})
    world.roll.enter("in training")
    with ExitStack() as stack:
        require_space(paths, learner, world)
        recorder = open_recorder(stack, session, job, learner, paths, state)
        recorder.event("resumed" if state.step else "started", step=state.step, horizon=plan.horizon)
        answers = Answers(job, learner, recorder, world, first=state.extra.get("first"))
        run = make_run(session, job, plan, learner, paths, recorder, answers, state)
        stack.callback(run.loader.close)
        recorder.status("running", state.step, plan.horizon, **told)
        try:
            state = _evaluate_first(session, answers, state)
            session.progress.start(summary(job, plan, learner, paths, world, state))
            session.stop.training = True
            outcome = train_loop(run, state)
            tell_rows(session, job, run.loader, since=state.step)
            asked = outcome.reason == "asked to stop"
            if not asked:
                write_final(job, learner, paths, world)
        except BaseException:
            recorder.status("failed", state.step, plan.horizon, **told)
            recorder.event("failed", step=state.step)
            raise
        ending: Literal["stopped", "finished"] = "stopped" if asked else "finished"
        recorder.status(ending, outcome.state.step, plan.horizon, **told, reason=outcome.reason)
        recorder.event(ending, step=outcome.state.step, reason=outcome.reason)
        world.barrier()
        if asked:
            raise Stopped(continuing.stopped(outcome, plan, paths))
    return Result(paths, outcome, answers.first, answers.last, answers.samples(), job.loaded)


def _evaluate_first(session: Session, answers: Answers, state: TrainerState) -> TrainerState:
    """Evaluate the untrained model, unless that was done or somebody wants to stop. The state remembers what came of it."""
    if state.step or state.eval_loss is not None or session.world.any(session.stop.asked):
        return state
    with session.progress.phase("evaluation before training"):
        found = answers.evaluate(0)
    first = {"evaluation": asdict(found) if found is not None else None, "answers": answers.said[0] if answers.said else []}
    state = replace(state, extra={**state.extra, "first": first})
    return state if found is None else after_evaluation(state, found)
