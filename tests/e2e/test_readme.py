"""Every command that README.md or docs/*.md tell people to type is typed here, in a project that has what they talk about.

Commands stand in fenced bash blocks or in indented lines. What make hands over to llamahome is taken from `make -n` and typed as well.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from tests.support.projects import ROOT, Project, Prompt, chats, labelled, pairs, write_rows

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
STORIES = {
    "Recipes.md": "each command needs the ones before it: tests/e2e/test_recipes.py",
    "Sweep.md": "each trains many times: tests/e2e/test_sweep.py",
}
NAMES = {
    "checkpoint-1000": "checkpoint-5",
    "checkpoint-40": "checkpoint-5",
    "<data_path>": "chats.jsonl",
    "DATA_PATH": "chats.jsonl",
    "<data>": "chats.jsonl",
    "<name>": "tiny",
    "<run>": "latest",
    "<model>": "tiny",
    "<step>": "5",
    "MODEL": "tiny",
    "KEY": "training.epochs",
}
"""What a page calls something, and what it is called here; `<run-id>` is the run's id."""
ELSEWHERE = {
    r"make (setup|test|test-slow|check|bench|docs|clean|help)\b": "targets that train nothing: tests/test_make.py, tests/test_setup.py",
    r"make$": "tests/test_make.py",
    r".*--num-nodes|.*NUM_NODES=": "several machines: tests/distributed/test_launch.py",
    r".*(--world-size|WORLD_SIZE=) ?(4|8)": "four processes: tests/e2e/test_processes.py",
    r".*model\.quantization=": "a base whose layers have whole blocks: tests/e2e/test_quantization.py",
    r"llamahome plan\b": "tests/planning/test_estimate.py",
    r"llamahome dashboard\b": "a server: tests/dashboard/test_access.py",
    r".*--tasks\b": "lm-eval, which is no part of the lock: tests/e2e/test_lm_eval.py",
    r".*mine\.py": "a function of the user's: tests/e2e/test_evaluate_page.py, tests/e2e/test_learning.py",
    r".*distill\.teacher": "needs what a teacher said: tests/e2e/test_learning.py",
    r"llamahome serve\b": "a server: tests/e2e/test_serve.py",
    r".* < ": "rows from a pipe: tests/e2e/test_chat.py",
    r".*training\.restart": "a process that watches another: tests/e2e/test_supervision.py",
    r"llamahome verify-resume\b": "three processes: tests/e2e/test_verify_resume.py",
}
"""Commands that are run by other tests, by pattern."""
LONGER = re.compile(r"llamahome (doctor|data sample|train-distributed)\b")
"""Commands that take seconds; the others are typed in the fast tests."""
FILES = re.compile(r"[\w./-]+\.(?:jsonl|json|yaml|jinja)")


@dataclass(frozen=True)
class Told:
    """A command and the page that tells it."""

    page: str
    text: str


def commands_of(page: Path) -> list[str]:
    """Lines that begin with `llamahome` or `make` in fenced bash blocks and in indented code, without comments, each once."""
    found, fence = [], None
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        opening = re.match(r"\s*```(\w*)", line)
        if opening:
            fence = opening[1] if fence is None else None
            continue
        is_code = fence in ("bash", "sh", "console") or (fence is None and line.startswith("    "))
        bare = re.split(r"\s+#\s", line.strip().removeprefix("$ "))[0].strip()
        if is_code and re.match(r"(llamahome|make)( |$)", bare):
            found.append(re.split(r"\s{3,}", bare)[0])
    return list(dict.fromkeys(found))


TOLD = [Told(page.name, text) for page in PAGES for text in commands_of(page)]
HERE = [told for told in TOLD if told.page not in STORIES and not any(re.match(pattern, told.text) for pattern in ELSEWHERE)]


@pytest.fixture(scope="module")
def furnished(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a finished run, rows in data/training/raw, and a small model under the starter's name."""
    project = make_project(tmp_path_factory.mktemp("furnished") / "project")
    models = project.folder / "data/models/base"
    shutil.copytree(models / "tiny", models / "smollm2-135m-instruct")
    write_rows(project.folder / "data/training/raw/rows.jsonl", chats(24))
    project.type("train", "data/training/raw", "--set", "output.name=brisk-otter").expect(0)
    return project


def typed(text: str, run_id: str) -> list[str]:
    """The words after `llamahome`, with the names of this project; of alternatives in [brackets] nothing."""
    text = re.sub(r"\[[^\]]*\]", "", text).replace("<run-id>", run_id)
    for name, here in NAMES.items():
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?!\w)", here, text)
    return shlex.split(text)[1:]


def handed_over(text: str) -> str:
    """The llamahome command that a make command ends in."""
    done = subprocess.run(["make", "-n", *shlex.split(text)[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage:" not in done.stdout, done.stdout
    lines = [line for line in done.stdout.replace("\\\n", " ").splitlines() if ".venv/bin/llamahome train" in line]
    return "llamahome" + lines[-1].split(".venv/bin/llamahome")[1]


def furnish(project: Project, words: list[str]) -> None:
    """Make the files that a command names: rows, settings, a template."""
    template = project.folder / "data/models/base/tiny/chat_template.jinja"
    made = {after for word, after in pairwise(words) if word == "--fix"}
    for path in (project.folder / name for name in FILES.findall(" ".join(words)) if name not in made):
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".yaml":
            path.write_text("training: {seed: 1}\n")
        elif path.suffix == ".jinja":
            shutil.copyfile(template, path)
        else:
            rows_of = {"pairs.jsonl": pairs, "labels.jsonl": labelled}.get(path.name, chats)
            write_rows(path, rows_of(24))


@pytest.mark.parametrize(
    "told",
    [pytest.param(told, id=f"{told.page}: {told.text}", marks=[pytest.mark.medium] * bool(LONGER.match(told.text))) for told in HERE],
)
def test_a_command_that_a_page_tells_works(furnished: Project, tmp_path: Path, told: Told) -> None:
    project = Project(tmp_path / "project", furnished.prompt)
    shutil.copytree(furnished.folder, project.folder, symlinks=True)
    text = handed_over(told.text) if told.text.startswith("make") else told.text
    words = typed(text, furnished.runs()[0])
    if words[:2] != ["data", "sample"]:
        furnish(project, words)
    if words[:2] == ["config", "init"]:
        shutil.rmtree(project.folder / ".config")
    limits = {"LLAMAHOME_TRAINING__MAX_STEPS": "1"} if words[0].startswith("train") and words[0] != "train-resume" else {}
    project.type(*words, stdin="hello\n\n", **limits).expect(0)


def test_the_pages_tell_commands_at_all() -> None:
    assert {told.page for told in TOLD} >= {"README.md"} and len(HERE) >= 5


@pytest.fixture(scope="module")
def known(prompt: Prompt, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every command; of a group, what is in it."""
    project = Project(tmp_path_factory.mktemp("help"), prompt)
    names = re.findall(r"^  ([a-z][a-z-]+)  ", project.type("--help").out.split("Commands:")[1], flags=re.MULTILINE)
    pages = {name: project.type(name, "--help").out for name in names}
    return {name: set(re.findall(r"^  ([a-z]+)  ", page.partition("Commands:")[2], flags=re.MULTILINE)) for name, page in pages.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_that_a_page_mentions_exists(known: dict[str, set[str]], page: Path) -> None:
    """Also in running text and tables: `llamahome runs list`, `make train`."""
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z][a-z-]*)", text)) - targets == set()
    for command in re.findall(r"`llamahome ([a-z][a-z \\|-]*)", text):
        first, *rest = re.split(r"\s+", command.replace("\\", "").strip())
        assert first in known, command
        alternatives = [part.split() for part in " ".join(rest).split("|")] if known[first] else []
        inner = [words[0] for words in alternatives if words and re.fullmatch(r"[a-z]+", words[0])]
        assert set(inner) <= known[first] or not inner, command
