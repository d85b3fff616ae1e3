"""Answers are drawn by (seed, position, number) alone, a resumed run goes on bit for bit, and a tiny model learns what is rewarded."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models import KINDS, examples_of, our_model, save_tiny
from tests.support.runs import ALONE, Learner, RunOptions, close_run, make_learner, make_run, table_of

from llamahome.checkpoint.state import TrainerState
from llamahome.data.steps.answered import Prompt, prompts_of
from llamahome.data.text.tokens import load_tokenizer
from llamahome.errors import ConfigError, OutOfMemory
from llamahome.model.generate import draw_answers, generate
from llamahome.model.sampling import Sampling
from llamahome.model.shard import replicated
from llamahome.monitoring.throughput import PartClock
from llamahome.signals import Left
from llamahome.training.loop import train
from llamahome.training.metric_file import REWARD, load_function
from llamahome.training.policy import PolicyObjective
from llamahome.training.rollouts import AnsweredSteps, Drawing, Reward, advantages
from llamahome.training.run import Run, StepLoss, first_state

PROMPTS = [[5, 9, 11], [7] * 12, [30, 31, 32, 33, 34], [5, 9, 11]]
END = [2]
DRAWN = Sampling(temperature=1.0, seed=3, max_new_tokens=7)
VOWELS = "def score(answer, reference):\n    return sum(letter in 'aeiou' for letter in answer) / max(1, len(answer))\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("kind", [*KINDS, "state"])
def test_the_draws_of_a_prompt_depend_on_its_number_and_not_on_its_batch(tmp_path: Path, kind: str) -> None:
    model = our_model(save_tiny(tmp_path, kind))
    numbers = (4, 0, 17, 2)
    together = draw_answers(model, PROMPTS, end_ids=END, sampling=replace(DRAWN, numbers=numbers))
    alone = [draw_answers(model, [p], end_ids=END, sampling=replace(DRAWN, numbers=(n,)))[0] for p, n in zip(PROMPTS, numbers, strict=True)]
    assert together == alone
    assert together[0] != together[3]  # the same prompt with another number


def test_an_answer_keeps_its_end_token_and_says_if_it_was_cut(llama: Path) -> None:
    model = our_model(llama)
    sampling = replace(DRAWN, numbers=tuple(range(40)), max_new_tokens=30)
    (greedy,) = generate(model, [PROMPTS[0]], end_ids=[], max_new_tokens=3)
    drawn = draw_answers(model, [PROMPTS[0]] * 40, end_ids=list(range(2, 40)), sampling=sampling)
    for ids, ended in drawn:
        assert ended == (ids[-1] in range(2, 40)) and not any(token in range(2, 40) for token in ids[:-1])
        assert ended or len(ids) == 30
    assert {ended for _, ended in drawn} == {True, False} or all(ended for _, ended in drawn)
    assert draw_answers(model, [PROMPTS[0]], end_ids=greedy[1:2], sampling=Sampling(max_new_tokens=9, seed=0)) == [(greedy[:2], True)]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.booleans())
def test_advantages_are_rewards_less_their_mean_and_zero_without_spread(rewards: list[float], divide: bool) -> None:
    found = advantages(rewards, divide_by_std=divide)
    if len(set(rewards)) == 1:
        assert found.values == [0.0] * len(rewards) and found.std == 0
        return
    spread = statistics.stdev(rewards)
    assert found.std == pytest.approx(spread)
    expected = [(reward - statistics.fmean(rewards)) / (spread if divide else 1.0) for reward in rewards]
    assert found.values == pytest.approx(expected)


def test_a_prompt_ends_where_the_last_answer_begins_and_that_is_the_reference() -> None:
    (example,) = examples_of([9])
    example.targets[:] = [False, True, True, False, False, True, True, False, True]
    (prompt,) = prompts_of(table_of([example]), [17], begin=40)
    tokens = example.tokens.tolist()
    assert prompt == Prompt(40, 17, tuple(tokens[:8]), (tokens[8],), "rows.jsonl", 1)


def reward_file(folder: Path, text: str) -> str:
    (folder / "reward.py").write_text(text, encoding="utf-8")
    return f"{folder / 'reward.py'}:score"


def answering(learner: Learner, run: Run, base: Path, reward: str, *, group_size: int = 4, beta: float = 0.05) -> Run:
    """`run` on the model's own answers."""
    tokenizer = load_tokenizer(base)
    drawing = Drawing(
        group_size=group_size,
        sampling=Sampling(temperature=1.0, max_new_tokens=6),
        reward=Reward(load_function(reward, REWARD), tokenizer, lambda number: {"number": number}),
        divide_by_std=False,
        seed=7,
    )
    objective = PolicyObjective(learner.objective, 1.0, beta)
    steps = AnsweredSteps(run.loader, drawing, learner.objective.model, replicated(learner.model, ALONE), PartClock())  # type: ignore[arg-type]
    return replace(run, loader=steps, loss=StepLoss(objective.loss_sum, objective.units, objective.measured))


def options(folder: Path, **changes) -> RunOptions:
    return RunOptions(
        table_of(examples_of([8, 12, 5, 9, 14, 6, 11, 7])),
        folder,
        **{"batch_size": 2, "steps": 6, "settings": {"refuse_spikes": False}, **changes},
    )


def trained(
    base: Path,
    folder: Path,
    reward: str,
    *,
    state: TrainerState | None = None,
    restore: Path | None = None,
    group_size: int = 4,
    beta: float = 0.05,
    **changes,
) -> Learner:
    learner = make_learner(base, "lora", rank=8)
    if restore is not None:
        learner.restore(restore)
    run = answering(learner, make_run(learner, options(folder, **changes)), base, reward, group_size=group_size, beta=beta)
    train(run, state or first_state(60))
    close_run(run)
    return learner


def recorded(folder: Path, name: str) -> list[float]:
    lines = (folder / "metrics/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[name] for line in lines if name in json.loads(line)]


def test_a_resumed_run_draws_the_same_answers_and_ends_with_the_same_bits(llama: Path, tmp_path: Path) -> None:
    reward = reward_file(tmp_path, VOWELS)
    whole = trained(llama, tmp_path / "whole", reward, save_every="3 steps")
    state = replace(first_state(60), step=3, consumed=6)
    resumed = trained(llama, tmp_path / "resumed", reward, state=state, restore=tmp_path / "whole/checkpoint-3", start=6)
    for name, weight in whole.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name
    for metric in ("train/loss", "train/reward", "train/answer_tokens", "train/divergence"):
        assert recorded(tmp_path / "resumed", metric) == recorded(tmp_path / "whole", metric)[3:]


@pytest.mark.medium
def test_another_layout_of_a_step_has_the_same_answers(llama: Path, tmp_path: Path) -> None:
    learner = make_learner(llama, "lora")
    run = answering(learner, make_run(learner, options(tmp_path)), llama, reward_file(tmp_path, VOWELS))
    batch = next(run.loader)
    again = run.loader.lay_out_again(batch, 20)
    close_run(run)
    assert len(again.microbatches) > len(batch.microbatches) and run.loader.micro_batch_tokens == 20
    contents = [
        sorted(tuple(tokens.tolist()) for each in step.microbatches for tokens in torch.split(each.tokens_T, list(each.lengths)))
        for step in (batch, again)
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 8


@pytest.mark.medium
def test_a_tiny_model_learns_what_is_rewarded(llama: Path, tmp_path: Path) -> None:
    changes = {"steps": 25, "peak": 0.1, "micro_batch_tokens": 4000, "group_size": 16, "beta": 0.0}
    trained(llama, tmp_path / "run", reward_file(tmp_path, VOWELS), **changes)
    rewards = recorded(tmp_path / "run", "train/reward")
    assert statistics.fmean(rewards[-5:]) > statistics.fmean(rewards[:5]) + 0.2, rewards


RAISES = "def score(answer, reference, row):\n    if row['number'] >= 0:\n        raise KeyError('points')\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RAISES, r"training\.reward-failed.*score raised KeyError: 'points' on the row rows\.jsonl:\d(?s:.*)3 .*raise KeyError"),
        (
            "def score(answer, reference):\n    return 'good'\n",
            r"reward-failed.*score returned 'good' \(str\), and a reward is a finite number",
        ),
        ("def score(answer, reference):\n    return float('nan')\n", r"reward-failed.*returned nan"),
        ("def score(answer, reference):\n    return 10**400\n", r"reward-failed.*returned 1000"),
        ("def score(answer, reference):\n    return 1e300 * len(answer)\n", r"reward-failed.*finite number of at most 1e\+30 in size"),
        ("import asyncio\ndef score(answer, reference):\n    raise asyncio.CancelledError\n", r"reward-failed.*CancelledError on the row"),
        (
            "def score(answer, reference):\n    return 10**5000\n",
            r"reward-failed.*returned a whole number of thousands of digits \(int\), and a reward is a finite number",
        ),
    ],
)
def test_a_reward_that_fails_names_the_row_and_the_line(llama: Path, tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trained(llama, tmp_path / "run", reward_file(tmp_path, text))


@pytest.mark.parametrize("fails", [False, True])
def test_a_reward_that_changes_the_working_directory_leaves_that_of_the_run(tmp_path: Path, fails: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    changes = f"import os\nos.chdir({str(tmp_path / 'elsewhere')!r})\n"
    text = f"{changes}def score(answer, reference):\n    os.chdir('/')\n    return 1 / {int(not fails)}\n"
    before = Path.cwd()
    function = load_function(reward_file(tmp_path, text), REWARD)
    assert Path.cwd() == before
    if fails:
        with pytest.raises(ConfigError, match="ZeroDivisionError"):
            function.score("", "a", "b")
    else:
        assert function.score("", "a", "b") == 1.0
    assert Path.cwd() == before


def test_a_reward_without_a_function_is_named_as_it_was_typed() -> None:
    with pytest.raises(ConfigError, match=r"mine\.score: there is no such file"):
        load_function("mine.score", REWARD)


@pytest.mark.parametrize("place", ["file", "function"])
def test_a_reward_that_changes_the_settings_of_torch_leaves_those_of_the_run(tmp_path: Path, place: str) -> None:
    """As a file does that loads a reward model."""
    changes = "torch.set_grad_enabled(False), torch.set_default_dtype(torch.float64), torch.set_num_threads(7)"
    at_import, in_call = (changes, "1") if place == "file" else ("", changes)
    text = f"import torch\n{at_import}\ndef score(answer, reference):\n    {in_call}\n    return 1.0\n"
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    function = load_function(reward_file(tmp_path, text), REWARD)
    assert function.score("", "a", "b") == 1.0
    assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()) == before


def test_a_function_has_the_settings_of_torch_that_its_file_was_left_with(tmp_path: Path) -> None:
    text = (
        "import torch\ntorch.set_default_dtype(torch.bfloat16)\ntorch.set_grad_enabled(False)\nmodel = torch.nn.Linear(4, 1)\n"
        "def score(answer, reference):\n    return model(torch.ones(4)).requires_grad + model(torch.ones(4)).item() * 0\n"
    )
    assert load_function(reward_file(tmp_path, text), REWARD).score("", "a", "b") == 0.0
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


def test_a_stop_of_the_run_passes_through_a_function_and_every_other_error_is_its_own(tmp_path: Path) -> None:
    text = "class Odd(BaseException):\n    pass\ndef score(answer, reference):\n    raise {}\n"
    with pytest.raises(ConfigError, match="score raised Odd"):
        load_function(reward_file(tmp_path, text.format("Odd")), REWARD).score("", "a", "b")
    for stop in (KeyboardInterrupt, Left):
        name = f"__import__('{stop.__module__}', fromlist=['x']).{stop.__name__}"
        with pytest.raises(stop):
            load_function(reward_file(tmp_path, text.format(f"{name}(2)")), REWARD).score("", "a", "b")


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("def points(answer, reference):\n    return 1\n", "has no function 'score'", None),
        ("def scores(answer, reference):\n    return 1\n", "has no function 'score'", "--reward .*:scores"),
        ("def score(answer):\n    return 1\n", r"cannot be a reward: a reward takes \(answer, reference\)", None),
        ("score = 1 +\n", "cannot be imported: SyntaxError", None),
    ],
)
def test_a_file_without_a_usable_function_is_refused(tmp_path: Path, text: str, words: str, hint: str | None) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_function(reward_file(tmp_path, text), REWARD)
    (problem,) = refused.value.problems
    assert problem.code == "training.reward-unreadable"
    assert hint is None or (problem.hint is not None and re.fullmatch(hint, problem.hint))


def test_batches_that_do_not_fit_are_halved_and_a_single_answer_that_does_not_fit_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = reward_file(tmp_path, VOWELS)

    def step_with(most: int) -> Callable[[], Sequence[tuple[int, ...]]]:
        learner = make_learner(llama, "lora")
        learner.model.register_forward_pre_hook(lambda module, args, kwargs: _refuse(kwargs, most), with_kwargs=True)
        run = answering(learner, make_run(learner, options(tmp_path / str(most))), llama, reward)
        try:
            return [microbatch.lengths for microbatch in next(run.loader).microbatches]  # type: ignore[return-value]
        finally:
            close_run(run)

    assert step_with(3) == step_with(1000)
    with pytest.raises(OutOfMemory, match=r"a prompt of .* tokens and an answer of 6 do not fit"):
        step_with(0)


def _refuse(kwargs: dict, most: int) -> None:
    if kwargs["input_ids"].shape[0] > most:
        raise torch.OutOfMemoryError("too much")
