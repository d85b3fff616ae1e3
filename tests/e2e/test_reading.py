"""Commands that only read: train-eval, chat, models, runs, data, config. With --json, stdout is JSON and nothing else."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.models import save_tiny
from tests.support.projects import Project, chats, write_rows

from llamahome.config.schema import Config


@pytest.fixture(scope="module")
def trained(make_project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a run that was evaluated on eval.jsonl, whose rows were not in its training data."""
    project = make_project(tmp_path_factory.mktemp("trained") / "project")
    write_rows(project.folder / "eval.jsonl", chats(9, seed=7))
    words = ("--eval-data", "eval.jsonl", "--set", "data.eval_split=auto", "--set", "evaluation.sample_prompts=2")
    project.type("train", "chats.jsonl", *words).expect(0)
    return project


@pytest.mark.parametrize("target", ["run", "id", "latest", "link", "checkpoint", "checkpoint model", "final", "elsewhere"])
def test_evaluating_a_run_by_any_name_equals_its_last_evaluation(trained: Project, tmp_path: Path, target: str) -> None:
    root = trained.run.paths.root
    names = {
        "run": str(root.relative_to(trained.folder)),
        "id": root.name,
        "latest": "latest",
        "link": "output/training",
        "checkpoint": "output/training/checkpoint-6",
        "checkpoint model": "output/training/checkpoint-6/model",
        "final": "output/training/final",
        "elsewhere": str(root / "final"),
    }
    result = trained.type("train-eval", names[target], "eval.jsonl", "--json").expect(0).json
    for metric in ("eval/loss", "eval/perplexity", "eval/token_accuracy"):
        assert math.isclose(result[metric], trained.run.by_step(metric)[6], rel_tol=1e-6)
    assert result["rows"] == 9 and result["targets"] < result["tokens"]


def test_evaluating_the_base_equals_the_evaluation_before_training(trained: Project) -> None:
    for name in ("tiny", "data/models/base/tiny"):
        result = trained.type("train-eval", name, "eval.jsonl", "--json").expect(0).json
        assert math.isclose(result["eval/loss"], trained.run.by_step("eval/loss")[0], rel_tol=1e-6)
    assert "loss" in trained.type("train-eval", "tiny", "eval.jsonl").expect(0).out


def test_evaluating_changes_no_file(trained: Project) -> None:
    before = trained.files()
    trained.type("train-eval", "latest", "eval.jsonl").expect(0)
    after = trained.files()
    assert {path: after[path] for path in before} == before
    assert all(path.startswith("data/training/processed/") for path in set(after) - set(before))


@pytest.mark.parametrize("model", ["tiny", "latest", "output/training/final", "output/training/checkpoint-6", "output/training"])
def test_a_prompt_is_answered_on_stdout_only_and_always_the_same(trained: Project, model: str) -> None:
    first, second = (trained.type("chat", model, "--prompt", "hello there", "--max-new-tokens", "5").expect(0) for _ in range(2))
    assert first.out == second.out and first.out.endswith("\n")


def test_a_conversation_on_stdin_answers_each_line_and_ends_at_an_empty_one(trained: Project) -> None:
    words = ("chat", "latest", "--max-new-tokens", "3", "--system", "You are a cat.")
    answer = trained.type(*words, stdin="hello\nwhat is the capital of France?\n").expect(0)
    assert "Traceback" not in answer.err and answer.out.count("\n") >= 2
    assert trained.type(*words, stdin="hello\n\nnobody reads this\n").expect(0).out == trained.type(*words, stdin="hello\n").out


def test_local_models_are_listed_and_described(trained: Project, tmp_path: Path) -> None:
    (listed,) = trained.type("models", "list", "--json").expect(0).json
    described = trained.type("models", "info", "tiny", "--json").expect(0).json
    assert listed == described
    assert described["architecture"] == "LlamaForCausalLM" and described["layers"] == 2 and described["chat_template"] == "yes"
    save_tiny(tmp_path / "other")
    assert trained.type("models", "info", str(tmp_path / "other"), "--json").expect(0).json["parameters"] == described["parameters"]
    assert "tiny" in trained.type("models", "list").expect(0).out and "layers" in trained.type("models", "info", "tiny").expect(0).out
    assert trained.type("models", "fetch", "tiny").expect(0).out.strip() == "data/models/base/tiny"


def test_runs_are_listed_and_shown(trained: Project) -> None:
    (run,) = trained.type("runs", "list", "--json").expect(0).json
    assert run["state"] == "finished" and (run["step"], run["horizon"]) == (6, 6)
    assert run["loss"] == trained.run.by_step("train/loss")[6] and run["eval_loss"] == trained.run.by_step("eval/loss")[6]
    shown = trained.type("runs", "show", run["run_id"].rsplit("-", 1)[1], "--json").expect(0).json
    assert shown["settings"]["data.eval_path"] == "eval.jsonl" and "training.seed" not in shown["settings"]
    assert [step for step, _ in shown["losses"]] == [1, 2, 3, 4, 5, 6] and shown["checkpoints"][-1]["step"] == 6
    assert run["run_id"] in trained.type("runs", "list").expect(0).out
    assert "checkpoint-6" in trained.type("runs", "show", "latest").expect(0).out


def test_rows_are_shown_as_tokens_with_their_targets(trained: Project) -> None:
    lines = trained.type("data", "show", "chats.jsonl", "-n", "200", "--json").expect(0).out.splitlines()
    shown = [json.loads(line) for line in lines]
    assert [row["row"] for row in shown] == list(range(24)) and {row["source"] for row in shown} == {"chats.jsonl"}
    for row, chat in zip(shown, chats(24), strict=True):
        learned = "".join(token["text"] for token in row["tokens"] if token["target"])
        assert learned == chat["messages"][1]["content"] + "<|im_end|>"
        assert all(set(token) == {"id", "text", "target"} for token in row["tokens"])
    assert "learned" in trained.type("data", "show", "chats.jsonl", "-n", "1").expect(0).out


@pytest.mark.medium
def test_the_sample_can_be_trained_on(project: Project) -> None:
    assert "20 rows in data/training/raw/" in project.type("data", "sample", "data/training/raw", "--rows", "20").expect(0).out
    answer = project.type("train", "data/training/raw", "--max-steps", "1").expect(0)
    assert "20 rows, format messages" in answer.err


def test_settings_are_shown_checked_explained_and_described(project: Project) -> None:
    shown = project.type("config", "show", "--set", "training.seed=3", "--json", LLAMAHOME_LORA__RANK="4").expect(0).json
    assert shown["training.seed"] == {"value": 3, "origin": "--set"}
    assert shown["lora.rank"] == {"value": 4, "origin": "LLAMAHOME_LORA__RANK"}
    assert shown["training.batch_size"]["origin"].startswith(".config/training_config.yaml:")
    assert shown["training.warmup"] == {"value": Config().training.warmup, "origin": "default"}
    assert project.type("config", "check", "--json").expect(0).json["ok"] is True
    assert project.type("config", "explain", "training.epochs", "--json").expect(0).json["default"] == "auto"
    assert "epochs" in project.type("config", "schema").expect(0).json["$defs"]["TrainingConfig"]["properties"]
    written = project.type("config", "show").expect(0).out
    (project.folder / "all.yaml").write_text(written)
    again = project.type("config", "show", "--config", "all.yaml", "--json").expect(0).json
    assert {key: value["value"] for key, value in again.items()} | {"training.seed": 3, "lora.rank": 4} == {
        key: value["value"] for key, value in shown.items()
    }


def test_init_writes_valid_files(project: Project) -> None:
    for path in (project.folder / ".config").iterdir():
        path.unlink()
    project.type("config", "init").expect(0)
    written = {path.name for path in (project.folder / ".config").iterdir()}
    assert written == {"training_config.yaml", "distributed_config.yaml", "schema.json"}
    project.type("config", "check").expect(0)


def imported_by(project: Project, *words: str) -> set[str]:
    """Top-level names of all modules that a command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "llamahome", *words]
    done = subprocess.run(command, cwd=project.folder, capture_output=True, text=True, check=True)
    return {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_help_imports_neither_torch_nor_the_settings(project: Project) -> None:
    modules = imported_by(project, "--help")
    assert "click" in modules and not modules & {"torch", "transformers", "peft", "pydantic", "numpy", "ruamel", "tokenizers"}


@pytest.mark.parametrize("words", [("config", "check"), ("config", "show"), ("runs", "list"), ("models", "list")], ids=" ".join)
def test_commands_that_only_read_files_import_no_torch(project: Project, words: tuple[str, ...]) -> None:
    assert not imported_by(project, *words) & {"torch", "transformers", "peft"}


def test_data_show_imports_no_torch(project: Project) -> None:
    assert not imported_by(project, "data", "show", "chats.jsonl") & {"torch", "peft"}


def test_every_command_has_help(project: Project) -> None:
    top = project.type("--help").expect(0).out
    commands = re.findall(r"^  ([a-z][a-z-]+)  ", top.split("Commands:")[1], flags=re.MULTILINE)
    assert set(commands) >= {"train", "train-distributed", "train-resume", "train-eval", "chat", "data", "models", "runs", "config"}
    for command in commands:
        out = project.type(command, "--help").expect(0).out
        assert f"Usage: llamahome {command}" in out
        for subcommand in re.findall(r"^  ([a-z][a-z-]+)  ", out.split("Commands:")[1], flags=re.MULTILINE) if "Commands:" in out else []:
            assert f"Usage: llamahome {command} {subcommand}" in project.type(command, subcommand, "--help").expect(0).out
