"""Rules across settings."""

import pytest

from llamahome.config.check import METRICS, check_config, config_warnings
from llamahome.config.load import load_config, with_values
from llamahome.training.answer_metric import FROM_TARGETS
from llamahome.training.scores import BUILT_IN

CONTRADICTIONS = {
    "split-needs-text": (["data.on_overlong=split", "data.format=messages"], "truncate"),
    "two-evaluations": (["data.eval_split=0.1", "data.eval_path=e.jsonl"], "auto"),
    "share-or-count": (["data.eval_split=1.5"], "data.eval_split=2"),
    "warmup-too-long": (["training.warmup=20", "training.max_steps=10"], "training.warmup=1"),
    "nothing-to-train": (["lora.target_modules=[]"], "all-linear"),
    "nothing-to-watch": (["data.eval_split=0", "evaluation.early_stop_patience=3"], "auto"),
    "no-such-node": (["distributed.num_nodes=2", "distributed.node_rank=2"], "node_rank=1"),
    "objective-and-format": (["training.objective=dpo", "data.format=messages"], "data.format=preference"),
    "not-of-objective": (["training.objective=dpo", "preference.gamma=0.5"], "training.objective=simpo"),
    "metric-of-answers": (["training.objective=orpo", "evaluation.metric=token_accuracy"], "evaluation.metric=loss"),
    "reference-needs-rows": (["training.objective=ipo", "data.streaming=true"], "data.streaming=false"),
    "no-prompts": (["training.objective=grpo", "grpo.reward=a.py:f", "data.train_on=all"], "data.train_on=last"),
    "no-reference": (["training.objective=grpo", "grpo.reward=a.py:f", "grpo.beta=0.1", "training.method=full"], "grpo.beta=0"),
    "uneven-world": (["distributed.num_nodes=2", "distributed.world_size=5"], "world_size=4"),
}
WITHOUT_EFFECT = [
    ["lora.rank=4", "training.method=full"],
    ["model.dtype=float32", "training.method=full"],
    ["data.max_bad_share=0.5"],
    ["model.chat_template=x.jinja", "data.format=text"],
    ["data.train_on=last", "data.format=text"],
    ["data.train_on=last", "training.objective=dpo"],
    ["data.train_on=all", "training.objective=kto"],
    ["evaluation.every=5 steps", "data.eval_split=0"],
    ["checkpoint.keep_best=2", "data.eval_split=0"],
    ["distributed.master_port=2000"],
    ["training.epochs=2", "training.max_steps=5"],
    ["distill.weight=0.2"],
    ["grpo.group_size=4", "training.objective=distill", "distill.teacher=taught"],
    ["training.refuse_spikes=false", "training.objective=grpo", "grpo.reward=a.py:f"],
]


def load(tmp_path, assignments):
    return load_config(assignments=assignments, environment={}, folder=tmp_path)


def errors(loaded):
    return check_config(loaded.config, loaded.origins)


def warnings(loaded):
    return config_warnings(loaded.config, loaded.origins)


def test_the_defaults_contradict_nothing(tmp_path):
    assert errors(load(tmp_path, [])) == warnings(load(tmp_path, [])) == []


@pytest.mark.parametrize("code", CONTRADICTIONS)
def test_a_contradiction_is_an_error_and_its_hint_resolves_it(tmp_path, code):
    assignments, remedy = CONTRADICTIONS[code]
    (problem,) = errors(load(tmp_path, assignments))
    assert problem.code == f"config.{code}"
    assert problem.where == "--set" and remedy in problem.hint
    assert errors(load(tmp_path, [*assignments, problem.hint.removeprefix("--set ")])) == []


@pytest.mark.parametrize(("name", "remedy"), [("exat", "exact"), ("Json_Equal", "json_equal"), ("nonsense", "loss"), ("", "loss")])
def test_an_unknown_metric_is_an_error_and_its_hint_resolves_it(tmp_path, name, remedy):
    (problem,) = errors(load(tmp_path, [f"evaluation.metric='{name}'"]))
    assert problem.code == "evaluation.unknown-metric" and problem.hint == f"--set evaluation.metric={remedy}"


def test_every_metric_of_an_evaluation_and_a_function_of_the_users_are_known(tmp_path):
    assert {*METRICS} == {*FROM_TARGETS, *BUILT_IN}
    for name in (*METRICS, "mine.py:score", "mine.py"):
        assert errors(load(tmp_path, [f"evaluation.metric={name}"])) == []


@pytest.mark.parametrize(
    "assignments",
    [
        ["data.on_overlong=split"],
        ["data.on_overlong=split", "data.format=text"],
        ["data.eval_path=e.jsonl"],
        ["data.eval_path=e.jsonl", "data.eval_split=0"],
        ["data.eval_path=e.jsonl", "data.eval_split=0", "evaluation.early_stop_patience=3"],
        ["data.eval_split=40"],
        ["training.warmup=10", "training.max_steps=10"],
        ["distributed.num_nodes=2", "distributed.world_size=4", "distributed.node_rank=1"],
        ["lora.target_modules=[]", "training.method=full"],
    ],
)
def test_settings_that_fit_together_are_no_error(tmp_path, assignments):
    assert errors(load(tmp_path, assignments)) == []


@pytest.mark.parametrize(("size", "nodes", "names"), [(1, 2, "2 or 4"), (5, 2, "4 or 6"), (7, 3, "6 or 9"), (2, 3, "3 or 6")])
def test_an_uneven_world_size_names_the_sizes_that_work(tmp_path, size, nodes, names):
    (problem,) = errors(load(tmp_path, [f"distributed.world_size={size}", f"distributed.num_nodes={nodes}"]))
    assert names in problem.message


def test_all_contradictions_are_reported_at_once(tmp_path):
    all_of_them = [
        part
        for code, (parts, _) in CONTRADICTIONS.items()
        if code not in ("share-or-count", "nothing-to-watch") and "training.objective" not in parts[0]
        for part in parts
    ]
    assert len(errors(load(tmp_path, all_of_them))) == 6


@pytest.mark.parametrize("assignments", WITHOUT_EFFECT, ids=lambda each: each[0])
def test_a_chosen_setting_without_effect_is_a_warning_that_says_why(tmp_path, assignments):
    loaded = load(tmp_path, assignments)
    key = assignments[0].partition("=")[0]
    (problem,) = warnings(loaded)
    assert problem.code == "config.no-effect" and problem.message.startswith(key) and "has no effect: " in problem.message
    assert errors(loaded) == []


def test_a_resolved_value_is_not_a_chosen_one(tmp_path):
    loaded = with_values(load(tmp_path, ["training.method=full"]), {"model.dtype": "float32", "lora.rank": 8}, origin="auto: probed")
    assert warnings(loaded) == []


def test_several_machines_need_an_address(tmp_path):
    codes = [problem.code for problem in warnings(load(tmp_path, ["distributed.num_nodes=2"]))]
    assert codes == ["config.address-of-self"]
    assert warnings(load(tmp_path, ["distributed.num_nodes=2", "distributed.master_addr=10.0.0.1"])) == []


def test_more_processes_than_examples_are_a_warning(tmp_path):
    (problem,) = warnings(load(tmp_path, ["distributed.world_size=8", "training.batch_size=4"]))
    assert problem.code == "config.idle-processes" and "4 have nothing to do" in problem.message
