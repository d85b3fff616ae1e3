"""The `models` commands list, describe and fetch base models."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from llamahome.cli import options


@click.group("models", cls=options.Group)
def models_app() -> None:
    """Base models: list, describe and fetch them."""


@models_app.command("list")
@options.as_json
def list_models(as_json: bool) -> None:
    """List the base models on this machine, and the starter."""
    from llamahome.rundir import BASE_MODELS, STARTER
    from llamahome.units import show_bytes

    models = {path.parent.name: _facts(path.parent) for path in sorted(BASE_MODELS.glob("*/config.json"))}
    if as_json:
        print(json.dumps([{"name": name, **facts} for name, facts in models.items()]))
        return
    for name, facts in models.items():
        print(f"{name:32} {facts['architecture']:24} {show_bytes(facts['weight_bytes']):>10}  {facts['folder']}")
    if STARTER not in models:
        print(f"{STARTER:32} not downloaded yet: llamahome models fetch {STARTER}")


@models_app.command()
@click.argument("name", help="A folder or a model's name.")
@options.as_json
def info(name: str, as_json: bool) -> None:
    """Describe a model on this machine: architecture, sizes, files, chat template."""
    from llamahome.errors import ConfigError, Problem
    from llamahome.rundir import BASE_MODELS
    from llamahome.units import show_bytes, show_count

    folder = next((path for path in (Path(name), BASE_MODELS / name) if (path / "config.json").is_file()), None)
    if folder is None and Path(name).is_dir():
        from llamahome.model.model_folder import check_folder

        with _hints_that_begin("llamahome models info"):
            check_folder(Path(name))
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


@models_app.command()
@click.argument("name", help="smollm2-135m-instruct or a hub id.")
def fetch(name: str) -> None:
    """Download a model, unless it is on this machine already."""
    from llamahome.logs import log_to_stderr

    log_to_stderr(debug=False)
    from llamahome.model.load import find_model

    with _hints_that_begin("llamahome models fetch"):
        print(find_model(name, say=options.note))


@contextmanager
def _hints_that_begin(command: str) -> Iterator[None]:
    """Put `command` in place of --model in the hints of errors, because the commands here take the model as their argument."""
    from llamahome.errors import LlamaHomeError

    try:
        yield
    except LlamaHomeError as error:
        problems = [replace(each, hint=each.hint and each.hint.replace("--model", command, 1)) for each in error.problems]
        raise type(error)(problems) from error


def _facts(folder: Path) -> dict[str, Any]:
    """What config.json and the headers of the weight files say; no weights are loaded."""
    from llamahome.errors import ConfigError, Problem

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(code="model.unreadable", message="config.json cannot be read", where=str(folder))) from error
    weights = sorted(folder.glob("*.safetensors"))
    settings = folder / "tokenizer_config.json"
    template = (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8")
    )
    return {
        "folder": str(folder),
        "architecture": (config.get("architectures") or ["unknown"])[0],
        **_numbers(folder, quantized=bool(config.get("quantization_config"))),
        "weight_bytes": sum(path.stat().st_size for path in weights),
        "dtype": config.get("dtype") or config.get("torch_dtype") or "unknown",
        "layers": config.get("num_hidden_layers", 0),
        "hidden_size": config.get("hidden_size", 0),
        "vocabulary": config.get("vocab_size", 0),
        "longest_context": config.get("max_position_embeddings", 0),
        "chat_template": "yes" if template else "no",
    }


def _numbers(folder: Path, *, quantized: bool) -> dict[str, Any]:
    """How many parameters there are, and how they are quantised: codes hold several numbers each, or none where they describe others."""
    from llamahome.model.limits import shapes_of

    if not quantized:
        return {"parameters": sum(math.prod(shape) for shape in shapes_of(folder).values())}
    from llamahome.errors import ConfigError
    from llamahome.model.export.quantized import method_of, open_weights, quantization_of

    method = method_of(quantization_of(folder) or {})
    try:
        return {"parameters": sum(math.prod(info.shape) for info in open_weights(folder).tensors.values()), "quantization": method}
    except ConfigError:  # in a way that is not read here
        return {"parameters": "unknown", "quantization": method}
