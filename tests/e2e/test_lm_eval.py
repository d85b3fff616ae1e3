"""`--tasks` runs a task of a local folder in a real lm-eval, offline, with the chat template, for the model and its base."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from tests.support.beside import python_with
from tests.support.projects import ROOT, Project, chats, write_rows

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: my-tasks/rows.jsonl
test_split: test
output_type: {kind}
doc_to_text: "What is the capital of {{{{country}}}}?"
doc_to_target: "{{{{capital}}}}"
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
WORDS = 'doc_to_choice: ["Paris", "mat"]'
UNTIL = 'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 4\n  do_sample: false'


def run(python: Path, project: Project, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [str(python), "-m", "llamahome", "train-eval", *words]
    return subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_local_tasks_run_in_lm_eval(project: Project) -> None:
    python = python_with("lm-eval>=0.4.13,<0.5")
    project.type("train", "chats.jsonl", "--max-steps", "2").expect(0)
    write_rows(project.folder / "my-tasks/rows.jsonl", [{"country": "France", "capital": "Paris"}] * 4)
    (project.folder / "my-tasks/one.yaml").write_text(TASK.format(name="capitals", kind="multiple_choice", more=WORDS, metric="acc"))
    (project.folder / "my-tasks/two.yaml").write_text(TASK.format(name="spelling", kind="generate_until", more=UNTIL, metric="exact_match"))
    page = (ROOT / "docs/Evaluate.md").read_text(encoding="utf-8")
    for command in re.findall(r"^    llamahome train-eval (.*--tasks.*)$", page, flags=re.MULTILINE):
        write_rows(project.folder / "data/eval/test.jsonl", chats(3))
        done = run(python, project, *command.split(), "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert "capitals/acc" in found["metrics"] and found["metrics"].keys() == found["base"]["metrics"].keys()
        assert 0 <= found["metrics"]["capitals/acc"] <= 1 and ("loss" in found) == ("test.jsonl" in command)
    refused = run(python, project, "latest", "--tasks", "my-tasks:capitalss")
    assert refused.returncode == 2 and "evaluation.unknown-task" in refused.stderr
