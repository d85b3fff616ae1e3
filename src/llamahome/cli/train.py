"""train, train-distributed, train-resume, train-eval: from words to a call of pipeline.py, and from its result to the end block."""

import gc
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig

_DATA = "Files (JSONL, JSON, CSV, Parquet, text), folders, globs, or org/name on the hub; several are read together."
DataPaths = Annotated[list[str], typer.Argument(help=_DATA, metavar="DATA_PATH...")]
Model = Annotated[str | None, typer.Option("--model", help="Base model: a folder, a name, or a hub id [model.name].")]
Output = Annotated[str | None, typer.Option("--output", help="Folder of this run [output.dir].")]
ConfigFiles = Annotated[list[Path] | None, typer.Option("--config", help="Settings file; may be given again.")]
WorldSize = Annotated[int | None, typer.Option("--world-size", help="Processes over all machines [distributed.world_size].")]
NumNodes = Annotated[
    str | None,
    typer.Option("--num-nodes", help="Machines: 2, or at least one and at most two, 1:2 [distributed.num_nodes].", metavar="COUNT"),
]
NodeRank = Annotated[int | None, typer.Option("--node-rank", help="Number of this machine [distributed.node_rank].")]
MasterAddr = Annotated[str | None, typer.Option("--master-addr", help="Address of machine 0 [distributed.master_addr].")]
MasterPort = Annotated[int | None, typer.Option("--master-port", help="Port on machine 0 [distributed.master_port].")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the data [training.epochs].")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="End at this step [training.max_steps].")]
Method = Annotated[str | None, typer.Option("--method", help="lora or full [training.method].")]
EvalData = Annotated[str | None, typer.Option("--eval-data", help="Rows to evaluate on [data.eval_path].")]
Assignments = Annotated[list[str] | None, typer.Option("--set", help="Any setting, as section.key=value; may be given again.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log of libraries.")]

SETTING_OF = {
    "--model": "model.name",
    "--output": "output.dir",
    "--world-size": "distributed.world_size",
    "--num-nodes": "distributed.num_nodes",
    "--node-rank": "distributed.node_rank",
    "--master-addr": "distributed.master_addr",
    "--master-port": "distributed.master_port",
    "--epochs": "training.epochs",
    "--max-steps": "training.max_steps",
    "--method": "training.method",
    "--eval-data": "data.eval_path",
}
"""What the flags of all commands set."""


def flag_values(typed: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Flags and what was typed behind them (None: nothing), as `load_config` takes them."""
    return {SETTING_OF[flag]: (flag, value) for flag, value in typed.items()}


def train(
    data_path: DataPaths,
    model: Model = None,
    output: Output = None,
    config: ConfigFiles = None,
    world_size: WorldSize = None,
    num_nodes: NumNodes = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    method: Method = None,
    eval_data: EvalData = None,
    assignments: Assignments = None,
    node_rank: NodeRank = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    debug: Debug = False,
) -> None:
    """Teach a model your data.

    Examples:
      llamahome train data/training/raw
      llamahome train chats.jsonl --epochs 3 --output output/chats
      llamahome train chats.jsonl --method full --set training.batch_size=16
    """
    from llamahome.config.load import load_config
    from llamahome.distributed.failures import run_to_go_on, tie_to_launcher
    from llamahome.logs import log_to_stderr

    tie_to_launcher()
    log_to_stderr(debug=debug)
    places = {"--node-rank": node_rank, "--master-addr": master_addr, "--master-port": master_port}
    work = {"--epochs": epochs, "--max-steps": max_steps, "--method": method, "--eval-data": eval_data}
    typed = {"--model": model, "--output": output, "--world-size": world_size, "--num-nodes": num_nodes} | places | work
    loaded = load_config(config or [], flags=flag_values(typed), assignments=assignments or [])
    if run_to_go_on() is None:
        _refuse_early(loaded, data_path)
    if _launched(loaded):
        return
    with importing_torch():
        from llamahome import pipeline
        from llamahome.cli.ending import show_result

    show_result(pipeline.train(data_path, loaded, command=sys.argv), data_path)


def train_resume(
    target: Annotated[
        str, typer.Argument(help="A checkpoint, a run folder, a run id or a part of one, or `latest`.", metavar="CHECKPOINT")
    ],
    output: Annotated[str | None, typer.Option("--output", help="Go on in a new run in this folder; the old one stays as it is.")] = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    assignments: Assignments = None,
    allow_changed: Annotated[
        list[str] | None, typer.Option("--allow-changed", help="Go on although `data` or `base` changed; may be given again.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Go on with a stopped run, bit for bit as if it had not been stopped; or from it in a new run.

    Examples:
      llamahome train-resume latest
      llamahome train-resume output/training/checkpoint-40 --epochs 2
      llamahome train-resume brisk-otter --output output/gentler --set training.learning_rate=1e-5
    """
    from llamahome.checkpoint.store import CONFIG, choose
    from llamahome.checkpoint.target import resolve
    from llamahome.config.load import LoadedConfig, read_saved_config, with_assignments
    from llamahome.distributed.failures import run_to_go_on, tie_to_launcher
    from llamahome.errors import Problem, UsageError
    from llamahome.logs import log_to_stderr

    tie_to_launcher()
    log_to_stderr(debug=debug)
    target = str(run_to_go_on() or target)
    unknown = sorted(set(allow_changed or []) - {"data", "base"})
    if unknown:
        message = f"{unknown[0]!r} cannot be allowed to change; data and base can"
        raise UsageError(Problem(code="usage.bad-choice", message=message, where="--allow-changed", hint="--allow-changed data"))

    flags = flag_values({"--output": output, "--epochs": epochs, "--max-steps": max_steps})

    def change(saved: Path) -> LoadedConfig:
        return with_assignments(read_saved_config(saved), assignments or [], flags=flags)

    paths, folder = resolve(target)
    if _launched(change((folder or choose(paths, warn=lambda _: None)) / CONFIG)):
        return
    with importing_torch():
        from llamahome import pipeline
        from llamahome.cli.ending import show_result

    result = pipeline.resume(target, change, allowed=allow_changed or [], command=sys.argv)
    data_path = result.outcome.state.extra["data_path"]
    show_result(result, [data_path] if isinstance(data_path, str) else data_path)


def train_eval(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint, a model folder or a model's name.", metavar="MODEL")],
    data: Annotated[list[str], typer.Argument(help=_DATA, metavar="DATA...")],
    config: ConfigFiles = None,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Measure a model on rows: loss, perplexity, token accuracy.

    Examples:
      llamahome train-eval output/training/final data/eval/test.jsonl
      llamahome train-eval smollm2-135m-instruct chats.jsonl --json
    """
    from llamahome.config.load import load_config
    from llamahome.data.files.locate import locate
    from llamahome.data.files.splits import to_measure
    from llamahome.logs import log_to_stderr

    log_to_stderr(debug=debug)
    loaded = load_config(config or [], assignments=assignments or [])
    locate(data, wanted=to_measure(loaded.config.data))
    with importing_torch():
        from llamahome import pipeline
    from llamahome.units import many

    found = pipeline.evaluate(model, data[0] if len(data) == 1 else data, loaded)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{found['model']} on {many(found['rows'], 'row')} of {shlex.join(data)} ({found['targets']:,} targets)")
    print(f"  loss            {found['eval/loss']:.4f} nats per target")
    print(f"  perplexity      {found['eval/perplexity']:.2f}")
    print(f"  token accuracy  {found['eval/token_accuracy']:.1%}")


def _refuse_early(loaded: "LoadedConfig", data_path: list[str]) -> None:
    """What needs no torch to be refused: data that is not there, an output that holds something or cannot be written."""
    from llamahome.data.files.locate import locate
    from llamahome.data.files.splits import to_evaluate, to_train
    from llamahome.rundir import refuse_unwritable, refuse_used

    output = Path(loaded.config.output.dir) if loaded.config.output.dir else None
    if output is not None and loaded.config.distributed.node_rank == 0:  # the others come to a run that machine 0 may have begun
        refuse_used(output)
    refuse_unwritable(output)
    locate(data_path, wanted=to_train(loaded.config.data))
    if loaded.config.data.eval_path is not None:
        locate(loaded.config.data.eval_path, wanted=to_evaluate(loaded.config.data))


@contextmanager
def importing_torch() -> Iterator[None]:
    """Importing torch and transformers takes seconds in which nothing else can be said, and fixes how its threads wait.

    Modules stay, so nobody looks for garbage among them, now or later; measured: a quarter less time (docs/log.md).
    """
    _settle_torch()
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # a full disk behind stderr is no reason to stop
            print("loading torch and transformers ...", file=sys.stderr, flush=True)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _settle_torch() -> None:
    """How its threads wait and what it keeps is read once, when it is imported."""
    from llamahome.distributed.processors import bound_caches, keep_freed_memory, share_processors

    share_processors(os.environ)
    bound_caches(os.environ)
    keep_freed_memory(os.environ)
    if "--debug" not in sys.argv:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what its stores warn of while they wait becomes an error of ours


def _launched(loaded: "LoadedConfig") -> bool:
    """Check the settings; start the processes when there must be more than this one, and leave with their exit status when it is not 0."""
    from llamahome.config.check import check_config
    from llamahome.distributed.launch import launch, needs_launch
    from llamahome.errors import ConfigError

    _settle_torch()  # before GPUs are counted, for which torch is imported
    if problems := check_config(loaded.config, loaded.origins):
        raise ConfigError(problems)
    count = needs_launch(loaded.config.distributed, os.environ)
    if not count:
        return False
    status = launch(sys.argv[1:], loaded.config.distributed, say=lambda text: print(text, file=sys.stderr, flush=True))
    if status:
        raise typer.Exit(status)
    return True
