"""`llamahome train --from-adapter`: an adapter is trained further on other data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.projects import Project, RunFiles, chats, write_rows

FIRST = ("train", "chats.jsonl", "--set", "lora.rank=8", "--set", "lora.target_modules=[q_proj,down_proj]")
SECOND = ("train", "more.jsonl", "--eval-data", "held.jsonl", "--set", "data.eval_split=0", "--set", "evaluation.rows=all")
SECOND += ("--set", "checkpoint.every=2 steps", "--from-adapter", "one")


@pytest.fixture(scope="module")
def chained(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the run `one`, and the run `two` that began with its adapter."""
    project = make_project(tmp_path_factory.mktemp("chain") / "project")
    write_rows(project.folder / "more.jsonl", chats(24, seed=7))
    write_rows(project.folder / "held.jsonl", chats(6, seed=9))
    project.type(*FIRST, "--output", "one").expect(0)
    project.type(*SECOND, "--output", "two").expect(0)
    return project


@pytest.fixture
def project(chained: Project, tmp_path: Path) -> Project:
    copy = Project(tmp_path / "copy", chained.prompt)
    shutil.copytree(chained.folder, copy.folder, symlinks=True)
    return copy


def _config(project: Project, run: str) -> dict:
    return json.loads((project.folder / run / "final/adapter_config.json").read_text())


def _adapter(project: Project, folder: str, **changes) -> str:
    """A copy of the adapter of `one` with other fields in its config."""
    shutil.copytree(project.folder / "one/final", project.folder / folder)
    path = project.folder / folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.medium
def test_rank_and_layers_are_the_adapters_own(chained: Project) -> None:
    one, two = _config(chained, "one"), _config(chained, "two")
    assert [one[key] for key in ("r", "lora_alpha", "use_rslora", "use_dora")] == [
        two[key] for key in ("r", "lora_alpha", "use_rslora", "use_dora")
    ]
    assert set(one["target_modules"]) == set(two["target_modules"]) and two["r"] == 8


def test_the_first_loss_is_the_one_that_the_adapter_has(chained: Project) -> None:
    measured = chained.type("train-eval", "one", "held.jsonl", "--json").expect(0).json
    (untrained, *_) = chained.type("runs", "show", "two", "--json").expect(0).json["evaluations"]
    assert untrained["step"] == 0 and untrained["eval/loss"] == pytest.approx(measured["eval/loss"], rel=1e-6)


@pytest.mark.medium
def test_a_run_goes_on_bit_for_bit_when_the_first_adapter_is_gone(project: Project) -> None:
    project.type(
        *SECOND, "--output", "killed", "--set", "checkpoint.async=false", at=[("llamahome.training.loop:train_step", 4, ["SIGKILL"])]
    )
    shutil.rmtree(project.folder / "one")
    project.type("train-resume", "killed").expect(0)
    straight, resumed = (RunFiles(project.folder, project.folder / run) for run in ("two", "killed"))
    assert resumed.weights() == straight.weights()
    assert "tokenizer.json" in {path.name for path in (project.folder / "killed/final").iterdir()}


@pytest.mark.medium
def test_runs_show_tells_where_it_began_also_when_that_is_gone(project: Project) -> None:
    project.type(*SECOND, "--output", "second").expect(0)
    project.type("train", "chats.jsonl", "--from-adapter", "second", "--output", "three").expect(0)
    lineage = project.type("runs", "show", "three", "--json").expect(0).json["lineage"]
    assert [Path(each["path"]).parent.name for each in lineage] == ["second", "one"]
    shutil.rmtree(project.folder / "one")
    (project.folder / "second/final/adapter_model.safetensors").write_bytes(b"other")
    shown = project.type("runs", "show", "three").expect(0).out
    assert "second/final, changed since)" in shown and "which began with" in shown and "one/final, gone)" in shown


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--set", "lora.rank=4"), "model.adapter-differs", "lora.rank is 4, and the adapter has 8"),
        (("--set", "lora.use_dora=true"), "model.adapter-differs", "lora.use_dora is true"),
        (("--method", "full"), "model.not-trainable-adapter", "full training changes every weight"),
        (("--from-adapter", "tiny"), "model.not-trainable-adapter", "holds no adapter"),
        (("--from-adapter", "nowhere"), "model.not-found", "nowhere"),
    ],
)
def test_what_contradicts_the_adapter_is_refused_with_both_values(chained: Project, words: tuple[str, ...], code: str, said: str) -> None:
    answer = chained.type(*SECOND, *words, "--output", "refused").expect(2)
    assert answer.codes == [code] and said in answer.err
    assert not (chained.folder / "refused").exists()


def test_the_same_value_is_no_contradiction(chained: Project) -> None:
    chained.type("plan", *SECOND[1:-2], "--from-adapter", "one", "--set", "lora.rank=8").expect(0)


def test_what_the_adapter_decided_is_chosen_by_nobody_and_what_was_typed_is(chained: Project) -> None:
    settings = ("--config", "two/config.yaml", "--set", "model.adapter=null", "--set", "training.method=full")
    checked = chained.type("config", "check", *settings).expect(0)
    assert "two/config.yaml" in checked.out and "warning[" not in checked.err, checked.err
    shown = chained.type("config", "show", *settings, "--json").expect(0).json
    assert shown["lora.rank"]["value"] == 8 and shown["lora.rank"]["origin"].startswith("the adapter ")
    typed = chained.type("config", "check", *settings, "--set", "lora.rank=8").expect(0)
    assert "lora.rank 8 has no effect" in typed.err and typed.err.count("warning[") == 1
    by_hand = chained.type("config", "check", "--config", "one/config.yaml", "--set", "training.method=full").expect(0)
    assert "one/config.yaml:" in by_hand.err and by_hand.err.count("warning[") == 2


@pytest.mark.parametrize("changes", [{"peft_type": "IA3"}, {"bias": "all"}, {"layer_replication": [[0, 2]]}])
def test_an_adapter_that_cannot_be_trained_exactly_is_refused_with_the_reason(project: Project, changes: dict) -> None:
    answer = project.type(*SECOND[:-1], _adapter(project, "foreign", **changes), "--output", "refused").expect(2)
    assert answer.codes == ["model.not-trainable-adapter"] and next(iter(changes)).partition("_type")[0] in answer.err.lower() + "peft"


def test_another_adapter_at_resume_is_refused(chained: Project) -> None:
    answer = chained.type("train-resume", "two", "--max-steps", "9", "--set", "model.adapter=chats.jsonl").expect(2)
    assert answer.codes == ["model.adapter-differs"]


@pytest.mark.slow
def test_two_processes_begin_with_the_same_adapter(project: Project) -> None:
    project.shell(*SECOND, "--output", "pair", "--world-size", "2").expect(0)
    records = [project.type("runs", "show", run, "--json").expect(0).json["evaluations"][0]["eval/loss"] for run in ("two", "pair")]
    assert records[0] == pytest.approx(records[1], rel=1e-6)
