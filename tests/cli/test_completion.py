"""Shell completion: the script is shown or installed once, and answers with commands, options and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from llamahome.cli.app import app
from llamahome.errors import UsageError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_bash_completes_commands_and_options() -> None:
    def completed(*words: str) -> list[str]:
        request = {"_LLAMAHOME_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        done = subprocess.run(
            [sys.executable, "-m", "llamahome"], env={**os.environ, **request}, capture_output=True, text=True, check=False
        )
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert completed("llamahome", "train-") == ["train-distributed", "train-resume", "train-eval"]
    assert completed("llamahome", "train", "--max") == ["--max-steps"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_shown_for_the_current_shell(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    result = CliRunner().invoke(app, ["--show-completion"])
    assert result.exit_code == 0 and f"_LLAMAHOME_COMPLETE={shell}_complete" in result.stdout


@pytest.mark.parametrize(("shell", "start_up"), [("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", None)])
def test_installing_twice_adds_one_line_and_keeps_the_others(
    home: Path, shell: str, start_up: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELL", shell)
    if start_up is not None:
        (home / start_up).write_text("alias a=b\n")
    for _ in range(2):
        result = CliRunner().invoke(app, ["--install-completion"])
        assert result.exit_code == 0 and f"{shell} completion installed in {home}" in result.stdout
    if start_up is not None:
        lines = (home / start_up).read_text().splitlines()
        assert lines[0] == "alias a=b" and len([line for line in lines if line]) == 2


def test_another_shell_is_refused_with_those_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/nu")
    result = CliRunner().invoke(app, ["--show-completion"])
    assert isinstance(result.exception, UsageError) and "bash, zsh, fish" in result.exception.problems[0].message
