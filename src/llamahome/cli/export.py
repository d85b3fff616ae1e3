"""`export` writes a trained model in the form that another tool loads."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamahome.cli import options
from llamahome.cli.train import importing_torch

if TYPE_CHECKING:
    from llamahome.export import Exported

FORMS = ("adapter", "merged", "gguf", "ollama")


@click.command(
    epilog=options.examples(
        "llamahome export latest --to merged",
        "llamahome export latest --to gguf --quant q8_0",
        "llamahome export output/training/final --to ollama --output my-model",
    )
)
@click.argument("model", help="A run, a checkpoint, a model folder, a model's name, or `latest`.")
@click.option(
    "--to",
    type=click.Choice(FORMS),
    required=True,
    help="adapter: a PEFT folder; merged: a Hugging Face folder; gguf: a file for llama.cpp; ollama: a file and its Modelfile.",
)
@click.option("--quant", help="Type of the weights: f32, bf16, f16; for gguf and ollama also q8_0, q5_1, q5_0, q4_1, q4_0.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="A new folder; by default one in output/exports/.")
@click.option(
    "--system",
    metavar="TEXT",
    help="For ollama: the system message that the Modelfile sets; '' for none. By default the one that all training rows begin with.",
)
@click.option("--push", metavar="HUB_ID", help="Also upload the export to this repository of a hub (org/name), with your own login.")
@click.option("--public", is_flag=True, help="With --push: everybody may read the repository; by default it is private.")
@options.assignments
@options.debug
@options.as_json
@options.pass_overrides
def export(overrides: options.Overrides, /, model: str, debug: bool, as_json: bool, **wanted: Any) -> None:
    """Export a trained model, and compare the export with it."""
    from llamahome.logs import log_to_stderr

    log_to_stderr(debug=debug)
    loaded = overrides.load()
    with importing_torch():
        from llamahome.export import Wanted
        from llamahome.export import export as write

    exported = write(model, Wanted(**wanted), loaded=loaded, say=options.note)
    click.echo(json.dumps(exported.as_json()) if as_json else "\n".join(_lines(exported)))


def _lines(exported: "Exported") -> list[str]:
    difference = exported.difference
    close = f"{difference.greatest:.3g} in a logit at most ({difference.tolerance:.3g} accepted)"
    lines = [
        f"exported    {exported.path}",
        f"files       {', '.join(name for name in exported.files if name.endswith(('.safetensors', '.gguf', 'Modelfile')))}",
        f"difference  {close}; the same next token at {difference.same_choices:.1%} of {difference.positions} positions",
        "next:",
    ]
    lines += [f"  {command}" for command in exported.commands]
    if exported.pushed is not None:
        lines.append(f"pushed      {exported.pushed}")
    return [*lines, "in Python:", "", exported.script] if exported.script is not None else lines
