"""Every command has the options that other programs and people were promised."""

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from llamahome.cli.app import app

TRAIN = "--model --output --config --world-size --num-nodes --epochs --max-steps --method --eval-data --set"
OPTIONS = {
    "train": TRAIN,
    "train-distributed": f"{TRAIN} --node-rank --master-addr --master-port",
    "train-resume": "--output --set --allow-changed --epochs --max-steps",
    "train-eval": "--json",
    "chat": "--prompt",
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
def test_a_command_takes_the_options_that_were_promised(words: str) -> None:
    command = get_command(app)
    for word in words.split():
        command = command.commands[word]
    known = {name for option in command.params for name in option.opts}
    assert set(OPTIONS[words].split()) <= known


@pytest.mark.parametrize("words", ["train", "train-resume", "train-eval", "plan", "chat"])
def test_examples_stand_one_on_a_line(words: str) -> None:
    shown = CliRunner().invoke(app, [*words.split(), "--help"], terminal_width=60).stdout
    lines = [line.strip() for line in shown.split("Examples:\n")[1].split("\n\n")[0].splitlines()]
    assert len(lines) > 1 and all(line.startswith(f"llamahome {words} ") for line in lines)
