"""What a resumed run does differently follows from the settings of the checkpoint, also if it has no curve."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from llamahome.config.load import LoadedConfig, load_config
from llamahome.errors import LlamaHomeError
from llamahome.monitoring.progress import Progress
from llamahome.resuming import (
    changed_rows,
    changed_settings,
    rate_of,
    refuse_other_objective,
    refuse_other_state,
    refuse_other_weights,
    show_rows,
    with_changes,
    with_plan,
)
from llamahome.rundir import RunPaths
from llamahome.training.run import first_state, make_plan
from llamahome.training.schedule import learning_rate

ROWS = 40


def test_the_command_that_shows_rows_is_one_that_a_shell_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = show_rows(["my rows.jsonl"], RunPaths(tmp_path / "my run", "my-run"), [3, 1])
    words = ["llamahome", "data", "show", "my rows.jsonl", "--config", "my run/config.yaml", "--row", "1,3"]
    assert shlex.split(command) == words


class KeptLines(Progress):
    """Keeps the lines and warnings."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def warn(self, message: str, consequence: str) -> None:
        self.lines.append(f"warning: {message}; {consequence}")


def configured(*assignments: str) -> LoadedConfig:
    fixed = ("training.learning_rate=0.1", "training.batch_size=4", "training.epochs=2", "training.warmup=2")
    return load_config(assignments=[*fixed, *assignments])


def resumed(step: int, *assignments: str, keeps_curve: bool = True) -> tuple[list[float], list[str]]:
    """Rates of a run of 20 steps resumed after `step` with other settings, and the lines that were shown."""
    saved, loaded = configured(), configured(*assignments)
    state = with_plan(first_state(100), saved, make_plan(saved.config.training, ROWS)) if keeps_curve else first_state(100)
    state = replace(state, step=step, consumed=4 * step)
    plan, progress = make_plan(loaded.config.training, ROWS, step=step, consumed=4 * step), KeptLines()
    state = with_changes(state, saved, loaded, plan, ROWS, progress)
    return [rate_of(state)(number) for number in range(plan.horizon)], progress.lines


@pytest.mark.parametrize("keeps_curve", [True, False])
def test_without_a_change_the_rates_are_as_planned_and_nothing_is_reported(keeps_curve: bool) -> None:
    rates, lines = resumed(7, keeps_curve=keeps_curve)
    assert rates == [learning_rate(step, peak=0.1, horizon=20, warmup=2, shape="cosine") for step in range(20)]
    assert lines == [] and changed_settings(configured(), configured()) is None


@pytest.mark.parametrize("change", ["training.epochs=4", "training.max_steps=40", "training.batch_size=2", "training.learning_rate=0.01"])
@pytest.mark.parametrize("change_too", ["lora.rank=4", "training.schedule=linear"])
def test_whatever_changes_the_rate_is_reported_with_the_rates_before_and_after(change: str, change_too: str) -> None:
    key, value = change.split("=")
    rates, lines = resumed(7, change, change_too)
    before = learning_rate(6, peak=0.1, horizon=20, warmup=2, shape="cosine")
    assert f"learning rate {before:.2e} in step 7, {rates[7]:.2e} in step 8" in lines[0]
    assert rates[7] <= before
    assert f"{key} " in str(changed_settings(configured(), configured(change))) and value in str(
        changed_settings(configured(), configured(change))
    )


def test_extending_a_finished_run_warns_and_names_a_setting_that_helps() -> None:
    rates, lines = resumed(20, "training.epochs=4")
    assert max(rates[20:]) < 0.001 and "warning" in lines[-1] and "--set schedule.on_extend=replan" in lines[-1]
    rates, lines = resumed(20, "training.epochs=4", "schedule.on_extend=replan")
    assert rates[20] > 0.05 and not any("warning" in line for line in lines)


def test_a_change_of_a_warm_up_that_is_over_is_reported_as_without_effect() -> None:
    rates, lines = resumed(7, "training.warmup=5")
    assert rates == resumed(7)[0] and lines == ["training.warmup has no effect any more: the warm-up was over after step 2"]


@pytest.mark.parametrize(("old", "new"), [("sft", "dpo"), ("dpo", "orpo"), ("dpo", "ipo"), ("sft", "grpo"), ("kto", "sft")])
@pytest.mark.parametrize(("method", "begin"), [("lora", "--from-adapter run/model"), ("full", "--model run/model")])
def test_another_objective_is_refused_with_what_trains_further_with_it(old: str, new: str, method: str, begin: str) -> None:
    saved, loaded = (configured(f"training.objective={name}", f"training.method={method}") for name in (old, new))
    refuse_other_objective(saved, saved, checkpoint="run/model")
    with pytest.raises(LlamaHomeError) as refused:
        refuse_other_objective(saved, loaded, checkpoint="run/model")
    (problem,) = refused.value.problems
    assert problem.code == "training.objective-differs" and problem.where == "--set"
    assert f"--set training.objective={old}, or" in str(problem.hint) and f"{begin} --set training.objective={new}" in str(problem.hint)


def test_a_change_of_the_constants_of_a_loss_says_which_figures_do_not_compare() -> None:
    rates, lines = resumed(7, "preference.beta=0.5", "preference.sft_weight=0.2")
    assert rates == resumed(7)[0] and len(lines) == 1
    assert "preference.beta and preference.sft_weight are part of the loss" in lines[0] and "eval/pair_accuracy does" in lines[0]
    assert resumed(0, "preference.beta=0.5")[1] == []


@pytest.mark.parametrize(
    ("changed", "allowed", "updated", "code"),
    [
        ("training.optimizer=adafactor", (), True, "training.optimizer-differs"),
        ("training.optimizer=adafactor", ("base", "data"), True, "training.optimizer-differs"),
        ("training.optimizer=adafactor", (), False, None),
        ("model.quantization=nf4", (), True, "checkpoint.base-changed"),
        ("model.quantization=nf4", ("base",), True, None),
        ("training.weight_decay=0.1", (), True, None),
    ],
)
def test_another_optimizer_or_quantization_is_refused_unless_nothing_is_lost(
    changed: str, allowed: tuple[str, ...], updated: bool, code: str | None
) -> None:
    if code is None:
        refuse_other_state(configured(), configured(changed), allowed=allowed, updated=updated)
        return
    with pytest.raises(LlamaHomeError) as refused:
        refuse_other_state(configured(), configured(changed), allowed=allowed, updated=updated)
    (problem,) = refused.value.problems
    assert problem.code == code and f"--set {changed.partition('=')[0]}=" in str(problem.hint)


@pytest.mark.parametrize(
    ("assignment", "reason", "hint"),
    [
        ("training.method=full", "other weights", "training.method=lora"),
        ("lora.rank=4", "shapes", "lora.rank=16"),
        ("lora.use_dora=true", "shapes", "lora.use_dora=false"),
        ("lora.use_vera=true", "shapes", "lora.use_vera=false"),
        ("lora.alpha=64", "another strength", "lora.alpha=32"),
        ("lora.use_rslora=true", "another strength", "lora.use_rslora=false"),
    ],
)
def test_settings_that_belong_to_the_weights_are_refused(assignment: str, reason: str, hint: str) -> None:
    with pytest.raises(LlamaHomeError) as caught:
        refuse_other_weights(configured(), configured(assignment))
    problem = caught.value.problems[0]
    assert problem.code == "training.weights-differ" and reason in problem.message and hint in str(problem.hint)


def test_settings_of_adapters_are_not_asked_of_a_run_without_one() -> None:
    refuse_other_weights(configured("training.method=full"), configured("training.method=full", "lora.rank=4"))
    refuse_other_weights(configured(), configured("lora.dropout=0.1", "training.seed=1"))


def test_changed_settings_of_data_are_named() -> None:
    assert changed_rows(configured(), configured("data.train_on=last")) == "data.train_on assistant -> last"
    assert changed_rows(configured(), configured("training.seed=1")) == ""
