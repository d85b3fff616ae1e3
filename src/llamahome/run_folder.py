"""The folder of a run: made new, begun with a copy of a checkpoint, or taken up again, with its settings, versions and command."""

from collections.abc import Sequence
from pathlib import Path

from llamahome import durable
from llamahome.assembly import Job
from llamahome.checkpoint import retention, store
from llamahome.checkpoint.store import branch
from llamahome.config.load import LoadedConfig, dump_config, with_values
from llamahome.copied_run import original_of, with_own_id
from llamahome.distributed.failures import run_to_go_on
from llamahome.monitoring.environment import write_environment
from llamahome.monitoring.lineage import write_lineage
from llamahome.rundir import NEWEST, RunPaths, as_typed, create_run, point_newest_to, refuse_unwritable, refuse_used, writing


def new_run(job: Job, command: Sequence[str], *, parent: Path | None = None) -> RunPaths:
    """Rank 0 makes the folder and tells the other ranks. `parent` is the adapter or checkpoint that the run begins with."""
    made, session = None, job.session
    if session.world.is_main:
        paths = create_run(_output(job.settings), job.config.output.name)
        _describe(paths, job, command)
        if parent is not None:
            with writing(paths.root):
                write_lineage(paths, parent)
        try:
            point_newest_to(paths.root)
        except OSError as error:
            session.progress.warn(f"{NEWEST} cannot point to this run: {error.strerror}", f"its name is {paths.root}")
        made = [str(paths.root), paths.run_id]
    root, run_id = session.world.broadcast_object(made)
    return RunPaths(Path(root), run_id)


def branched_run(job: Job, folder: Path, saved: store.Saved, command: Sequence[str]) -> RunPaths:
    """A new run that begins with a copy of the checkpoint in `folder`."""
    paths = new_run(job, command, parent=folder / store.MODEL)
    if job.session.world.is_main:
        copy = branch(folder, saved.state.step, paths)
        job.session.progress.say(f"{as_typed(copy)}: where the new run begins; {as_typed(folder)} stays")
    return paths


def resumed_run(job: Job, paths: RunPaths, saved: store.Saved, command: Sequence[str]) -> RunPaths:
    """The run of the checkpoint; its later checkpoints are set aside. A copy of another run's folder gets an id of its own."""
    world, say = job.session.world, job.session.progress.say
    if world.is_main:
        if (original := original_of(paths)) is not None:
            paths = with_own_id(paths, saved.state.step)
            records = f"with copies of the records up to step {saved.state.step:,}"
            say(f"{as_typed(paths.root)} is a copy of {as_typed(original)}: it goes on as {paths.run_id}, {records}")
        _describe(paths, job, command)
        for aside in retention.set_aside(paths, after=saved.state.step):
            say(f"{as_typed(aside)}: a later checkpoint, set aside because this run now takes another course")
    return RunPaths(paths.root, world.broadcast_object(paths.run_id))


def _describe(paths: RunPaths, job: Job, command: Sequence[str]) -> None:
    """Write the settings with their origins, the versions, the machine, the command and the paths of the data."""
    with writing(paths.root):
        durable.write_whole(paths.config, dump_config(job.settings))
        write_environment(paths.environment, command, job.data.paths)


def _output(loaded: LoadedConfig) -> Path | None:
    return Path(loaded.config.output.dir) if loaded.config.output.dir else None


def refuse_output(loaded: LoadedConfig, begun: Path | None) -> None:
    """Raise ConfigError or MachineError when a new run cannot be written to its folder; a run that was `begun` is there already."""
    output = _output(loaded)
    if begun is None and output is not None:
        refuse_used(output)
    refuse_unwritable(output)


def output_of_resumed(loaded: LoadedConfig) -> tuple[LoadedConfig, bool]:
    """Whether a folder or name was typed for a new run; the old one is then dropped. Raises what `refuse_output` raises."""
    typed = {key for key in ("output.dir", "output.name") if loaded.origins[key] in ("--output", "--set")}
    if run_to_go_on() is not None or not typed:
        return loaded, False
    new = with_values(loaded, dict.fromkeys({"output.dir", "output.name"} - typed), origin="default")
    refuse_output(new, None)
    return new, True
