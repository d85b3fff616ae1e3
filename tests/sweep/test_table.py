"""The table of a sweep: which figure ranks the settings, and what is said where figures do not compare."""

from dataclasses import replace

import pytest

from llamahome.config.load import LoadedConfig, load_config
from llamahome.errors import LlamaHomeError
from llamahome.sweep.grid import Trial, make_grid
from llamahome.sweep.table import best_trial, draw, make_rows, records, table_lines, tied
from llamahome.sweep.trials import Progress, best_of


def load(assignments: list[str]) -> LoadedConfig:
    return load_config(assignments=assignments, environment={})


def trial(number: int, value: str, figure: str = "pair_accuracy", *, final: str = "last") -> Trial:
    return Trial(number, {"preference.beta": value}, 0, (), final, figure)


def finished(losses: dict[int, float], scores: dict[int, float] | None = None, *, targets: int = 10_000) -> Progress:
    figure = "loss" if scores is None else "pair_accuracy"
    return Progress("finished", step=2, horizon=2, targets=targets, first=1.0, losses=losses, figure=figure, scores=scores or {})


LOW_LOSS = (trial(1, "0.1"), finished({1: 0.2, 2: 0.3}, {1: 0.8, 2: 0.6}))
HIGH_ACCURACY = (trial(2, "20"), finished({1: 5.0, 2: 4.0}, {1: 0.7, 2: 0.9}))


def test_where_constants_of_the_loss_are_listed_the_higher_accuracy_is_the_better_setting() -> None:
    rows = make_rows([LOW_LOSS, HIGH_ACCURACY])
    assert best_trial(rows) == HIGH_ACCURACY[0] and [row.mean for row in rows] == [0.9, 0.6] and tied(rows) == 1
    assert [record["trial"] for record in records(rows)] == ["002", "001"]
    assert [record["best_loss"] for record in records(rows)] == [4.0, 0.2], "losses stay losses"
    lines = list(table_lines(rows))
    assert lines[0].startswith("ranked by held-out pair accuracy, higher first") and "0.9000" in lines[2]
    assert "Held-out pair accuracy of the final model" in draw(rows)


def test_the_final_model_is_that_of_the_step_with_the_lowest_loss_if_the_best_is_kept() -> None:
    rows = make_rows([(replace(LOW_LOSS[0], final="best"), LOW_LOSS[1])])
    assert rows[0].mean == 0.8 and best_of(LOW_LOSS[1]) == (1, 0.8)


def test_accuracies_that_differ_by_less_than_their_noise_are_tied() -> None:
    few = [(each, replace(progress, targets=16)) for each, progress in (LOW_LOSS, HIGH_ACCURACY)]
    assert tied(make_rows(few)) == 2


def test_losses_over_other_tokens_are_named() -> None:
    lengths = [(trial(number, "1", "loss"), finished({2: 1.0}, targets=targets)) for number, targets in ((1, 300), (2, 200))]
    assert any("200 to 300 of them" in line for line in table_lines(make_rows(lengths)))
    assert not any("of them" in line for line in table_lines(make_rows(lengths[:1])))


@pytest.mark.parametrize(
    ("assignments", "figure"),
    [
        (["training.objective=dpo", "preference.beta=0.1,0.5"], "pair_accuracy"),
        (["training.objective=simpo", "preference.gamma=0.5,1"], "pair_accuracy"),
        (["training.objective=kto", "preference.desirable_weight=1,2"], "answer_accuracy"),
        (["training.objective=dpo", "training.learning_rate=1e-5,1e-4"], "loss"),
        (["lora.rank=4,8"], "loss"),
        (["training.objective=sft,distill", "distill.teacher=taught"], "loss"),
        (["lora.rank=4,8", "evaluation.metric=exact"], "exact"),
        (["training.objective=grpo", "grpo.reward=mine.py:score", "evaluation.metric=mine.py:score", "grpo.beta=0,0.1"], "score"),
        (["evaluation.metric=exact,f1"], "loss"),
    ],
)
def test_what_ranks_the_runs_depends_on_what_is_listed(assignments: list[str], figure: str) -> None:
    assert {each.figure for each in make_grid(assignments, 1, load).trials} == {figure}


def test_runs_that_learn_from_rewards_are_not_ranked_by_a_loss() -> None:
    with pytest.raises(LlamaHomeError) as refused:
        make_grid(["training.objective=grpo", "grpo.reward=mine.py:score", "training.learning_rate=1e-5,1e-4"], 1, load)
    assert [problem.hint for problem in refused.value.problems] == ["--set evaluation.metric=mine.py:score"]


def test_the_best_step_is_that_of_the_metric_that_chose_the_final_model() -> None:
    progress = Progress("finished", horizon=2, losses={1: 0.2, 2: 0.3}, figure="exact", scores={1: 0.4, 2: 0.6})
    chosen = replace(LOW_LOSS[0], figure="exact", chosen_by="exact")
    for final, mean in (("best", 0.6), ("last", 0.6)):
        assert make_rows([(replace(chosen, final=final), progress)])[0].mean == mean
    better_before = replace(progress, scores={1: 0.9, 2: 0.6})
    rows = make_rows([(replace(chosen, final="best"), better_before), (replace(chosen, number=2, values={"a": "b"}), progress)])
    assert [row.mean for row in rows] == [0.9, 0.6] and tied(rows) == 1, "one seed does not say how much a score varies"
    assert next(iter(table_lines(rows))) == "ranked by held-out exact, higher first"


@pytest.mark.parametrize("objectives", ["sft,dpo", "dpo,ipo", "kto,sft", "orpo,simpo"])
def test_objectives_that_judge_answers_by_other_rewards_are_refused(objectives: str) -> None:
    with pytest.raises(LlamaHomeError) as refused:
        make_grid([f"training.objective={objectives}"], 1, load)
    assert [problem.code for problem in refused.value.problems] == ["sweep.losses-differ"]
