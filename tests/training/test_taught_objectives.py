"""Distillation and GRPO equal a plain model's logits and autograd, in loss and gradients, however rows or answers are packed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.support.models import examples_of, plain_model, save_tiny
from tests.support.runs import Learner, Method, make_learner
from tests.training.test_step import cut, distance, moved
from torch import Tensor, nn

from llamahome.data.records import Example, Microbatch
from llamahome.data.steps.answered import Answer, Prompt, lay_out_answers
from llamahome.data.steps.loader import Place, idle_microbatch, stay
from llamahome.data.steps.taught_steps import with_teacher
from llamahome.data.store import taught
from llamahome.model.lora_layers import adapters_off
from llamahome.training.distillation import DistillationObjective
from llamahome.training.objective import TrainingObjective
from llamahome.training.policy import MEASURED, PolicyObjective

LENGTHS, TOP, WEIGHT, TEMPERATURE = (31, 18, 9, 40, 2, 13), 6, 0.6, 1.7
BUDGETS = (1, 45, 1000)
"""One document a pass, a few, all."""
METHODS: tuple[Method, ...] = ("lora", "full")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def logits_of(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """Of transformers' own forward and attention, one document."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(input_ids=torch.tensor([[int(token) for token in tokens]]), use_cache=False).logits[0].float()
    model.set_attn_implementation(ours)
    return logits


def gradients(learner: Learner, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*learner.parameters.items(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_equals_plain(learner: Learner, objective: TrainingObjective, batches: list[Microbatch], plain: Tensor) -> list[Tensor]:
    """Loss and gradients over all micro-batches; returns what was measured."""
    sums = torch.stack([objective.loss_sum(batch) for batch in batches]).sum(0)
    torch.testing.assert_close(sums[0], plain.detach(), rtol=1e-5, atol=1e-5)
    assert distance(gradients(learner, sums[0]), gradients(learner, plain)) < 1e-5
    return list(sums[1:].detach())


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> tuple[taught.Taught, list[Example], nn.Module]:
    """What another tiny model says about some examples, stored, and that model."""
    folder, examples, teacher = tmp_path_factory.mktemp("taught"), examples_of(LENGTHS), plain_model("llama", seed=9)
    values = []
    for example in examples:
        logs = logits_of(teacher, example.tokens)[example.targets.nonzero()[0] - 1].detach().log_softmax(-1)
        best = logs.topk(TOP)
        rest = logs.scatter(1, best.indices, -torch.inf).logsumexp(-1)
        values.append((best.indices.int().numpy(), best.values.numpy(), rest.numpy()))
    found = taught.TaughtValues(*(np.concatenate(each) for each in zip(*values, strict=True)))
    taught.write_part(folder, 0, examples, found, stamp="s")
    sizes = {"examples": len(examples), "targets": len(found.rest), "parts": 1}
    names = {"teacher": "t", "teacher_fingerprint": "f", "tokenizer": "t", "data": (), "data_fingerprint": "d"}
    taught.finish(folder, taught.About(stamp="s", top_k=TOP, **sizes, **names))
    return taught.Taught(folder), examples, teacher


def plain_distillation(student: nn.Module, teacher: nn.Module, examples: list[Example]) -> Tensor:
    total = torch.zeros(())
    for example in examples:
        learned = example.targets.nonzero()[0]
        own, theirs = (logits_of(model, example.tokens)[learned - 1].softmax(-1) for model in (student, teacher))
        best = theirs.topk(TOP).indices

        def outcomes(shares: Tensor, best: Tensor = best) -> Tensor:
            parts = shares.gather(1, best)
            soft = torch.cat([parts, 1 - parts.sum(-1, keepdim=True)], -1) ** (1 / TEMPERATURE)
            return soft / soft.sum(-1, keepdim=True)

        divergence = F.kl_div(outcomes(own).log(), outcomes(theirs.detach()), reduction="sum") * TEMPERATURE**2
        labels = torch.from_numpy(example.tokens[learned].astype(np.int64))
        total = total + WEIGHT * divergence + (1 - WEIGHT) * F.nll_loss(own.log(), labels, reduction="sum")
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_distillation_equals_a_plain_model_however_it_is_packed(
    llama: Path, lesson: tuple[taught.Taught, list[Example], nn.Module], method: Method, budget: int
) -> None:
    stored, examples, teacher = lesson
    learner = moved(make_learner(llama, method))
    objective = DistillationObjective(learner.objective, WEIGHT, TEMPERATURE)
    batches = [with_teacher(stored, stay)(batch) for batch in cut(examples, budget)]
    assert {objective.units(batch) for batch in batches} == {(batch.num_targets,) * 3 for batch in batches}
    plain = plain_distillation(learner.model, teacher, examples)
    cross_entropy, divergence = assert_equals_plain(learner, objective, batches, plain)
    torch.testing.assert_close((1 - WEIGHT) * cross_entropy + WEIGHT * divergence, plain.detach(), rtol=1e-5, atol=1e-5)


def answers_of(lengths: Sequence[tuple[int, int]]) -> list[Answer]:
    """Random answers: tokens of prompt and answer, an advantage, and figures that can be told apart."""
    random = np.random.default_rng(4)
    found = []
    for number, (before, behind) in enumerate(lengths):
        prompt, answer = (tuple(random.integers(4, 300, size).tolist()) for size in (before, behind))
        shown = Prompt(number, number, prompt, (5,), "rows.jsonl", number + 1)
        found.append(Answer(shown, answer, float(random.normal()), tuple(float(number * 10 + place) for place in range(len(MEASURED)))))
    return found


def plain_policy(learner: Learner, answers: list[Answer], *, beta: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the divergence and the entropy, summed over tokens."""
    total, divergences, surprise = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for answer in answers:
        tokens, labels = [*answer.prompt.tokens, *answer.tokens], torch.tensor(answer.tokens)[:, None]
        places = slice(len(answer.prompt.tokens) - 1, len(tokens) - 1)
        own = (logits_of(learner.model, tokens)[places] / temperature).log_softmax(-1).gather(1, labels)
        with torch.no_grad(), adapters_off(learner.model):
            before = (logits_of(learner.model, tokens)[places] / temperature).log_softmax(-1).gather(1, labels)
        divergence = torch.exp(before - own) - (before - own) - 1
        total = total - answer.advantage * torch.exp(own - own.detach()).sum() + beta * divergence.sum()
        divergences, surprise = divergences + divergence.sum().detach(), surprise - own.sum().detach()
    return total, divergences, surprise


@pytest.mark.parametrize(("method", "beta"), [("lora", 0.0), ("lora", 0.4), ("full", 0.0)])
@pytest.mark.parametrize("budget", BUDGETS)
def test_grpo_equals_a_plain_model_however_answers_are_packed(llama: Path, method: Method, beta: float, budget: int) -> None:
    learner, answers = moved(make_learner(llama, method)), answers_of([(20, 9), (3, 1), (14, 25), (14, 4), (8, 12)])
    objective = PolicyObjective(learner.objective, 0.8, beta)
    batches = lay_out_answers(answers, micro_batch_tokens=budget, place=Place(0, 1, False), deliver=stay)
    plain, divergence, surprise = plain_policy(learner, answers, beta=beta, temperature=0.8)
    measured = dict(zip(objective.measured, assert_equals_plain(learner, objective, batches, plain), strict=True))
    for place, name in enumerate(MEASURED):
        assert float(measured[name]) == sum(answer.measured[place] for answer in answers)
    torch.testing.assert_close(measured["entropy"], surprise, rtol=1e-5, atol=1e-5)
    if beta:
        torch.testing.assert_close(measured["divergence"], divergence, rtol=1e-4, atol=1e-5)
    units = [sum(each) for each in zip(*map(objective.units, batches), strict=True)]
    assert units == [51, *[5] * len(MEASURED), *[51] * (len(objective.measured) - len(MEASURED))]
    assert sorted(key for batch in batches for key in batch.keys) == [0, 1, 2, 3, 4]


def test_every_answer_is_on_one_rank_and_ranks_that_must_pass_equally_often_get_idle_passes() -> None:
    answers = answers_of([(20, 9), (3, 1), (14, 25)])
    for size in (1, 2, 3, 4):
        ranks = [lay_out_answers(answers, micro_batch_tokens=40, place=Place(rank, size, True), deliver=stay) for rank in range(size)]
        assert len({len(batches) for batches in ranks}) == 1
        assert sorted(key for batches in ranks for batch in batches for key in batch.keys) == [0, 1, 2]


def test_the_reference_is_the_base_and_adapters_are_trained_as_before_behind_it(llama: Path) -> None:
    learner = moved(make_learner(llama, "lora"))
    base, trained = make_learner(llama, "lora"), set(learner.parameters)
    (batch,) = cut(examples_of(LENGTHS), 1000)
    torch.testing.assert_close(learner.objective.reference_logs(batch), base.objective.reference_logs(batch), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(learner.objective.reference_logs(batch).sum(), -learner.objective.loss_sum(batch).detach())
    assert {name for name, parameter in learner.model.named_parameters() if parameter.requires_grad} == trained
    with pytest.raises(KeyError), adapters_off(learner.model):
        raise KeyError
    assert {name for name, parameter in learner.model.named_parameters() if parameter.requires_grad} == trained


def test_an_idle_pass_adds_nothing(llama: Path) -> None:
    learner = make_learner(llama, "lora")
    idle = idle_microbatch(index=3)
    for objective in (DistillationObjective(learner.objective, WEIGHT, TEMPERATURE), PolicyObjective(learner.objective, 1.0, 0.1)):
        assert set(objective.units(idle)) == {0}
        sums = objective.loss_sum(idle)
        assert sums.shape == (1 + len(objective.measured),) and not sums.detach().any()
        assert all(not gradient.any() for gradient in gradients(learner, sums[0]).values())
