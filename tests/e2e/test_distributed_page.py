"""The commands of docs/Distributed.md are typed: those of one machine as they stand, those of several on loopback with fewer processes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from tests.e2e.test_readme import commands_of, handed_over
from tests.support.processes import left_of
from tests.support.projects import ROOT, Project, chats, write_rows
from tests.support.workers import free_port

PAGE = ROOT / "docs/Distributed.md"
TOLD = commands_of(PAGE)
LAUNCHES = [text for text in TOLD if text.startswith("llamahome launch")]
SEVERAL = [text for text in TOLD if re.search(r"NUM_NODES|--num-nodes", text) and text not in LAUNCHES]
ONE = [text for text in TOLD if text not in (*LAUNCHES, *SEVERAL)]
FOREIGN = re.findall(r"^    ((?:torchrun|srun|mpirun) .*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
ONCE = {"LLAMAHOME_TRAINING__MAX_STEPS": "1", "LLAMAHOME_TRAINING__EPOCHS": "3", "LLAMAHOME_MODEL__NAME": "tiny"}


@pytest.fixture
def furnished(project: Project) -> Project:
    write_rows(project.folder / "data/training/raw/rows.jsonl", chats(24))
    return project


def here(text: str, *, processes: int | None = None, port: int | None = None) -> list[str]:
    """The words that follow `llamahome`; the address is this machine's, and of processes there are `processes`."""
    text = handed_over(text) if text.startswith("make") else text
    words = shlex.split(text)[1:]
    for option, value in (("--world-size", processes), ("--master-addr", "127.0.0.1")):
        if option in words and value is not None:
            words[words.index(option) + 1] = str(value)
    return [*words, *(["--master-port", str(port)] if port else [])]


def ended(project: Project, commands: Sequence[Sequence[str]], *, seconds: float = 240, **variables: str) -> list[tuple[int, str]]:
    """Exit status and stderr of commands that run side by side in the project."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **ONCE, **variables}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(words, cwd=project.folder, env=environment, **streams) for words in commands]
    try:
        return [(process.returncode, err) for process in started for err in [process.communicate(timeout=seconds)[1]]]
    finally:
        for process in started:
            process.kill()


def trained(project: Project, processes: int) -> None:
    (run,) = project.runs()
    assert project.run.checkpoints == [1] and (project.run.root / "final/adapter_model.safetensors").is_file()
    assert len(list((project.folder / "output/runs" / run / "logs").glob("rank-*.log"))) == processes
    assert left_of(project) == []


def test_the_page_tells_commands_of_every_kind() -> None:
    assert len(ONE) >= 3 and len(SEVERAL) == 2 and len(LAUNCHES) == 3
    assert [shlex.split(text)[0] for text in FOREIGN] == ["torchrun", "srun", "mpirun"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ONE)
def test_a_command_for_one_machine_trains(furnished: Project, text: str) -> None:
    words = here(text)
    processes = int(words[words.index("--world-size") + 1]) if "--world-size" in words else 1
    ((status, err),) = ended(furnished, [[sys.executable, "-m", "llamahome", *words]])
    assert status == 0, err
    trained(furnished, processes)


@pytest.mark.slow
def test_the_commands_for_several_machines_train_together(furnished: Project) -> None:
    port = free_port()
    commands = [[sys.executable, "-m", "llamahome", *here(text, processes=2, port=port)] for text in SEVERAL]
    for status, err in ended(furnished, commands):
        assert status == 0, err
    trained(furnished, 2)


@pytest.mark.slow
@pytest.mark.parametrize("text", FOREIGN)
def test_a_command_under_another_launcher_trains(furnished: Project, text: str) -> None:
    words = shlex.split(text)
    launcher = Path(sys.executable).with_name(words[0])
    found = str(launcher) if launcher.is_file() else shutil.which(words[0])
    if found is None:
        pytest.skip(f"{words[0]} is not installed; tests/distributed/test_joining.py joins with its variables")
    ((status, err),) = ended(furnished, [[found, *words[1:]]])
    assert status == 0, err
    trained(furnished, 4)


@pytest.mark.parametrize("text", LAUNCHES)
def test_a_file_for_a_cluster_is_complete(furnished: Project, text: str) -> None:
    words, _, file = text.partition(" > ")
    printed = furnished.type(*shlex.split(words)[1:]).expect(0).out
    assert "train-distributed" in printed and "data/training/raw" in printed and "chats" in printed
    if file.endswith(".slurm"):
        assert printed.startswith("#!") and subprocess.run(["bash", "-n"], input=printed, text=True, check=False).returncode == 0
    else:
        documents = list(YAML(typ="safe").load_all(printed))
        assert all(documents) and "train-distributed" in json.dumps(documents, default=str)
