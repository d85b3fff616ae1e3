"""chat and models: talk to a model, and see which base models are here."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llamahome.cli.train import importing_torch

models_app = typer.Typer(help="Base models: what is here, what they are, and fetching them.", no_args_is_help=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def chat(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint, a model folder, a model's name, or `latest`.", metavar="MODEL")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="One question instead of a conversation.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 always gives the likeliest answer.")] = 0.0,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="Any setting, as section.key=value.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log of libraries.")] = False,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends the conversation.

    Examples:
      llamahome chat latest
      llamahome chat output/training/final --prompt "What is the capital of France?"
    """
    from llamahome.config.load import load_config
    from llamahome.logs import log_to_stderr

    log_to_stderr(debug=debug)
    loaded = load_config(assignments=assignments or [])
    with importing_torch():
        from llamahome.conversation import open_chat

    reply = open_chat(model, loaded, say=_say, max_new_tokens=max_new_tokens, temperature=temperature)
    turns: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    for question in [prompt] if prompt is not None else iter(_ask, ""):
        turns.append({"role": "user", "content": _readable(question)})
        answer = reply(turns, _write)
        print(flush=True)
        turns.append({"role": "assistant", "content": answer})


def _ask() -> str:
    """The next question; empty at the end of the conversation."""
    try:
        return _readable(input("you> " if sys.stdin.isatty() else "")).strip()
    except EOFError:
        return ""


def _readable(text: str) -> str:
    """`text` with a replacement character for every byte that was not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@models_app.command("list")
def list_models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """The base models that are here, and the starter."""
    from llamahome.rundir import BASE_MODELS
    from llamahome.units import show_bytes

    starter = "smollm2-135m-instruct"
    found = {path.parent.name: _facts(path.parent) for path in sorted(BASE_MODELS.glob("*/config.json"))}
    if as_json:
        print(json.dumps([{"name": name, **facts} for name, facts in found.items()]))
        return
    for name, facts in found.items():
        print(f"{name:32} {facts['architecture']:24} {show_bytes(facts['weight_bytes']):>10}  {facts['folder']}")
    if starter not in found:
        print(f"{starter:32} not here yet: llamahome models fetch {starter}")


@models_app.command("info")
def info(
    name: Annotated[str, typer.Argument(help="A folder or a model's name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a model that is here is: architecture, sizes, files, chat template."""
    from llamahome.errors import ConfigError, Problem
    from llamahome.rundir import BASE_MODELS
    from llamahome.units import show_bytes, show_count

    folder = next((path for path in (Path(name), BASE_MODELS / name) if (path / "config.json").is_file()), None)
    if folder is None:
        hint = "llamahome models list"
        raise ConfigError(Problem(code="model.not-here", message=f"the model {name!r} is not on this machine", hint=hint))
    facts = _facts(folder)
    if as_json:
        print(json.dumps({"name": name, **facts}))
        return
    for key, value in facts.items():
        text = show_bytes(value) if key.endswith("_bytes") else show_count(value) if isinstance(value, int) else str(value)
        print(f"{key.replace('_', ' '):20} {text}")


@models_app.command("fetch")
def fetch(name: Annotated[str, typer.Argument(help="smollm2-135m-instruct or a hub id.")]) -> None:
    """Bring a model here; does nothing when it is here already."""
    from llamahome.logs import log_to_stderr

    log_to_stderr(debug=False)
    from llamahome.model.load import find_model

    print(find_model(name, say=_say))


def _facts(folder: Path) -> dict[str, Any]:
    """From config.json and the headers of the weights, without loading them."""
    from llamahome.errors import ConfigError, Problem
    from llamahome.model.limits import shapes_of

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(code="model.unreadable", message="config.json cannot be read", where=str(folder))) from error
    weights = sorted(folder.glob("*.safetensors"))
    template = (folder / "chat_template.jinja").is_file() or '"chat_template"' in _text(folder / "tokenizer_config.json")
    return {
        "folder": str(folder),
        "architecture": (config.get("architectures") or ["unknown"])[0],
        "parameters": sum(math.prod(shape) for shape in shapes_of(folder).values()),
        "weight_bytes": sum(path.stat().st_size for path in weights),
        "dtype": config.get("dtype") or config.get("torch_dtype") or "unknown",
        "layers": config.get("num_hidden_layers", 0),
        "hidden_size": config.get("hidden_size", 0),
        "vocabulary": config.get("vocab_size", 0),
        "longest_context": config.get("max_position_embeddings", 0),
        "chat_template": "yes" if template else "no",
    }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
