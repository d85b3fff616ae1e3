"""Every command has the options that users and other programs rely on, and --help shows its examples."""

import click
import pytest
from click.testing import CliRunner

from llamahome.cli.app import app

TRAIN = "--model --output --config --world-size --num-nodes --epochs --max-steps --method --eval-data --set"
OPTIONS = {
    "train": TRAIN,
    "train-distributed": f"{TRAIN} --node-rank --master-addr --master-port",
    "train-resume": "--output --set --allow-changed --epochs --max-steps",
    "train-eval": "--json",
    "chat": "--prompt --system --compare --temperature --top-p --top-k --repetition-penalty --seed --max-new-tokens --json",
    "serve": "--port --host --api-key --temperature --max-new-tokens",
    "data check": "--json --fix",
    "data stats": "--json",
    "data show": "--json -n",
    "data sample": "--rows",
    "models list": "--json",
    "models info": "--json",
    "runs list": "--json",
    "runs show": "--json",
    "config show": "--json",
    "config check": "--json",
    "config explain": "--json",
}


@pytest.mark.parametrize("words", OPTIONS)
def test_a_command_has_the_promised_options(words: str) -> None:
    command: click.Command = app
    for word in words.split():
        assert isinstance(command, click.Group)
        command = command.commands[word]
    names = {name for option in command.params for name in option.opts}
    assert set(OPTIONS[words].split()) <= names


@pytest.mark.parametrize("words", ["train", "train-resume", "train-eval", "plan", "chat", "serve"])
def test_help_shows_one_example_per_line(words: str) -> None:
    shown = CliRunner().invoke(app, [*words.split(), "--help"], terminal_width=60).stdout
    lines = [line.strip() for line in shown.split("Examples:\n")[1].split("\n\n")[0].splitlines()]
    assert len(lines) > 1 and all(line.startswith(f"llamahome {words} ") for line in lines)
