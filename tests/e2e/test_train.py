"""`llamahome train` and what it leaves: files, metrics, weights that other tools load."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.support.projects import Project, RunFiles, chats, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamahome.model.adapter import open_trained

STEP_METRICS = {
    "train/loss",
    "train/grad_norm",
    "train/learning_rate",
    "train/tokens",
    "train/targets",
    "speed/tokens_per_s",
    "speed/targets_per_s",
    "time/data",
    "time/forward",
    "time/backward",
    "time/exchange",
    "time/update",
    "memory/rss",
    "memory/peak",
}
EVALUATION_METRICS = {"eval/loss", "eval/perplexity", "eval/token_accuracy"}


@pytest.fixture(scope="module")
def trained(make_project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after `llamahome train chats.jsonl` with sample prompts and a checkpoint at each second step."""
    project = make_project(tmp_path_factory.mktemp("trained") / "project")
    words = ("--set", "evaluation.sample_prompts=1", "--set", "checkpoint.every=2 steps", "--set", "monitoring.system_every=0.05 s")
    answer = project.shell("train", "chats.jsonl", *words).expect(0)
    (project.folder / "stdout").write_text(answer.out)
    (project.folder / "stderr").write_text(answer.err)
    return project


@pytest.mark.medium
def test_a_run_lives_where_the_design_says(trained: Project) -> None:
    (run_id,) = trained.runs()
    link = trained.folder / "output/training"
    assert link.is_symlink() and link.readlink() == Path("runs") / run_id
    root = trained.folder / "output/runs" / run_id
    assert {path.name for path in root.iterdir()} == {
        "config.yaml", "environment.json", "run_id", "logs", "final", "checkpoint-4", "checkpoint-5", "report.html",
    }  # fmt: skip
    assert [path.name for path in (root / "logs").iterdir()] == ["rank-0.log"]
    checkpoint = root / "checkpoint-5"
    assert {path.name for path in checkpoint.iterdir()} == {"trainer_state.json", "config.yaml", "model", "optimizer", "MANIFEST.json"}
    assert {path.name for path in (checkpoint / "optimizer").iterdir()} == {"optimizer.safetensors", "optimizer.json"}
    for folder in (root / "final", checkpoint / "model"):
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    logs = {path.name for path in (trained.folder / "data/metrics/logs" / run_id).iterdir()}
    assert logs == {"metrics.jsonl", "events.jsonl", "system.jsonl", "samples.jsonl", "status.json", "summary.json"}
    assert list((trained.folder / "data/metrics/tensorboard" / run_id).glob("events.out.tfevents.*"))


def test_nothing_is_pickled(trained: Project) -> None:
    """A pickle begins with the byte of its protocol, a zip of pickles (torch.save) with PK."""
    for path, content in trained.files().items():
        assert not path.endswith((".pt", ".pth", ".bin", ".pkl", ".ckpt"))
        assert content[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"), path


def test_each_step_has_one_record_with_the_public_names(trained: Project) -> None:
    lines = trained.run.lines("metrics")
    assert all({"t", "step"} <= set(line) and all(isinstance(value, int | float) for value in line.values()) for line in lines)
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert all(set(line) - {"t", "step", "time/evaluate", "time/save", "speed/mfu"} == STEP_METRICS for line in steps)
    evaluations = [line for line in lines if "eval/loss" in line]
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == 5
    assert all(set(line) - {"t", "step"} == EVALUATION_METRICS for line in evaluations)
    assert all(math.isclose(line["eval/perplexity"], math.exp(line["eval/loss"]), rel_tol=1e-12) for line in evaluations)
    assert [line["t"] for line in lines] == sorted(line["t"] for line in lines)


def test_tokens_and_targets_count_from_the_start_of_the_run(trained: Project) -> None:
    shown = [json.loads(line) for line in trained.type("data", "show", "chats.jsonl", "-n", "99", "--json").expect(0).out.splitlines()]
    everything = {"tokens": sum(len(row["tokens"]) for row in shown), "targets": sum(t["target"] for row in shown for t in row["tokens"])}
    held_out = trained.type("train-eval", "tiny", "chats.jsonl", "--json").expect(0).json
    assert {name: held_out[name] for name in everything} == everything
    for name, total in everything.items():
        counts = list(trained.run.by_step(f"train/{name}").values())
        assert counts == sorted(set(counts)) and 0.7 * total < counts[-1] < total, "20 of 24 rows, each once"
    state = json.loads((trained.run.root / "checkpoint-5/trainer_state.json").read_text())
    assert (state["tokens"], state["targets"], state["consumed"]) == (*counts_of(trained.run, 5), 20)


def counts_of(run: RunFiles, step: int) -> tuple[float, float]:
    return run.by_step("train/tokens")[step], run.by_step("train/targets")[step]


def test_tensorboard_holds_the_same_values_under_the_same_names(trained: Project) -> None:
    events = EventAccumulator(str(trained.folder / trained.run.paths.tensorboard_dir))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert names >= STEP_METRICS | EVALUATION_METRICS
    assert {name.split("/")[0] for name in names} <= {"train", "eval", "speed", "time", "memory", "system", "energy"}
    for name in ("train/loss", "eval/loss", "train/learning_rate"):
        written = trained.run.by_step(name)
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown.keys() == written.keys()
        assert all(math.isclose(shown[step], value, rel_tol=1e-6) for step, value in written.items())


def test_what_happened_how_it_stands_and_what_the_model_said_are_written_down(trained: Project) -> None:
    run = trained.run
    kinds = [event["kind"] for event in run.lines("events")]
    assert [kind for kind in kinds if kind != "alert"] == ["started", "saved", "saved", "saved", "finished"]
    status = json.loads((trained.folder / run.paths.metrics_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["horizon"], status["reason"]) == ("finished", 5, 5, "finished")
    samples = run.lines("samples")
    assert {sample["step"] for sample in samples} == set(run.by_step("eval/loss"))
    assert len({(sample["prompt"], sample["reference"]) for sample in samples}) == 1
    assert all(0 <= line["system/cpu"] <= 1 or line["system/cpu"] <= 100 for line in run.lines("system"))
    environment = json.loads((run.root / "environment.json").read_text())
    assert "train" in " ".join(map(str, environment["command"])) and "chats.jsonl" in str(environment["command"])


def test_the_resolved_settings_name_their_origins_and_load_again(trained: Project) -> None:
    text = (trained.run.root / "config.yaml").read_text()
    assert "auto" not in [line.split("#")[0].split(":")[-1].strip() for line in text.splitlines() if "micro_batch_tokens" in line]
    assert "batch_size: 4  # .config/training_config.yaml:2" in text and '  every: "2 steps"  # --set' in text
    config = trained.type("config", "show", "--config", "output/training/config.yaml", "--json").expect(0).json
    assert config["training.batch_size"]["value"] == 4 and config["model.name"]["value"] == "tiny"


def test_the_end_block_names_result_files_and_next_commands_that_stay_true(trained: Project) -> None:
    out = (trained.folder / "stdout").read_text()
    run = f"output/runs/{trained.runs()[0]}"
    for said in (
        "held-out loss",
        f"model       {run}/final",
        f"checkpoint  {run}/checkpoint-5",
        "prompt ",
        "reference ",
        "before ",
        "after ",
    ):
        assert said in out
    assert "<|im_start|>" not in out and "output/training" not in out
    commands = [line.strip().split()[1:] for line in out.splitlines() if line.startswith("  llamahome ")]
    assert [command[0] for command in commands] == ["chat", "train-eval", "runs"]
    for command in commands:
        trained.type(*command, *(["--prompt", "hello", "--max-new-tokens", "2"] if command[0] == "chat" else [])).expect(0)


def test_phases_are_told_on_stderr_without_carriage_returns(trained: Project) -> None:
    err = (trained.folder / "stderr").read_text()
    assert "\r" not in err and "\x1b" not in err and "[1/3] data ..." in err and "step=5/5" in err
    assert err.count("format messages") == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers so
def test_peft_loads_the_adapter_and_computes_the_same_logits(trained: Project) -> None:
    base = AutoModelForCausalLM.from_pretrained(trained.folder / "data/models/base/tiny", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(trained.run.root / "final")).eval()
    before = logits_of(AutoModelForCausalLM.from_pretrained(trained.folder / "data/models/base/tiny", dtype=torch.float32))
    same_logits(theirs, trained.run.root / "final", before)


def same_logits(theirs: torch.nn.Module, folder: Path, before: torch.Tensor) -> None:
    ours = open_trained(folder, dtype=torch.float32, device=torch.device("cpu"), say=lambda line: None)
    ours.set_attn_implementation("eager")
    assert torch.allclose(logits_of(theirs), logits_of(ours), rtol=0, atol=1e-5)
    assert not torch.allclose(logits_of(theirs), before, rtol=0, atol=1e-3)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(4, 40)[None]).logits


def test_the_base_that_peft_finds_by_the_adapters_own_word_is_the_one_trained_on(trained: Project) -> None:
    recorded = json.loads((trained.run.root / "final/adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(recorded) == trained.folder / "data/models/base/tiny"


def test_the_last_checkpoint_and_the_final_model_are_the_same_weights(trained: Project) -> None:
    assert trained.run.weights("final") == trained.run.weights("checkpoint-5/model") != trained.run.weights("checkpoint-4/model")


def test_full_training_saves_what_transformers_loads(project: Project) -> None:
    project.type("train", "chats.jsonl", "--method", "full", "--set", "training.learning_rate=0.001").expect(0)
    final = project.run.root / "final"
    assert {path.name for path in final.glob("*.safetensors")} == {"model.safetensors"}
    theirs = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(project.folder / "data/models/base/tiny", dtype=torch.float32)
    same_logits(theirs, final, logits_of(base))
    assert AutoTokenizer.from_pretrained(final).chat_template
    losses = project.run.by_step("eval/loss")
    assert losses[5] < losses[0]


FORMATS = {
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
    "text": lambda q, a: {"text": f"{q} {a}"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_recognized_and_trained_on(project: Project, name: str) -> None:
    turns = [[turn["content"] for turn in row["messages"]] for row in chats(12)]
    write_rows(project.folder / "rows.jsonl", [FORMATS[name](*each) for each in turns])
    answer = project.type("train", "rows.jsonl", "--max-steps", "2").expect(0)
    assert f"format {name}" in answer.err
    assert list(project.run.by_step("train/loss")) == [1, 2]


@pytest.mark.medium
def test_chats_mean_the_same_in_every_chat_format(project: Project) -> None:
    turns = [[turn["content"] for turn in row["messages"]] for row in chats(12)]
    losses = {}
    for name in ("messages", "sharegpt", "alpaca"):
        write_rows(project.folder / "rows.jsonl", [FORMATS[name](*each) for each in turns])
        project.type("train", "rows.jsonl", "--max-steps", "2", "--set", "data.eval_split=0").expect(0)
        losses[name] = project.run.by_step("train/loss")
    assert losses["messages"] == losses["sharegpt"] == losses["alpaca"]


@pytest.mark.medium
def test_output_puts_a_run_exactly_there_and_it_is_the_newest(project: Project) -> None:
    done = project.type("train", "chats.jsonl", "--max-steps", "1", "--output", "my runs/first").expect(0)
    assert "  llamahome chat 'my runs/first/final'" in done.out and "saved='my runs/first/checkpoint-1'" in done.err
    there = project.folder / "my runs/first"
    assert (there / "final/adapter_model.safetensors").is_file() and not project.runs()
    assert (project.folder / "output/training").resolve() == there
    shown = project.type("runs", "show", "my runs/first", "--json").expect(0).json
    assert shown["state"] == "finished" and shown["folder"] == "my runs/first"
    again = project.type("train-resume", "my runs/first", "--set", "training.max_steps=2").expect(0)
    assert "  llamahome chat 'my runs/first/final'" in again.out and "saved='my runs/first/checkpoint-2'" in again.err


def test_a_folder_with_many_files_is_one_data_set(project: Project) -> None:
    for number in range(3):
        write_rows(project.folder / f"raw/part-{number}.jsonl", chats(8, seed=number))
    answer = project.type("train", "raw", "--max-steps", "1", "--eval-data", "chats.jsonl", "--set", "data.eval_split=auto").expect(0)
    assert "24 examples to train on, 24 held out" in answer.err
    assert load_file(project.run.root / "final/adapter_model.safetensors")
