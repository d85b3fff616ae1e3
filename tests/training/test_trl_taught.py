"""Distillation and GRPO are TRL's losses of the same rows and have its gradients. Skipped without TRL: test_trl.py says how to get it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.models import examples_of, plain_model, save_tiny
from tests.support.runs import Method, make_learner
from tests.training.test_step import cut, distance, moved
from tests.training.test_taught_objectives import LENGTHS, answers_of, gradients, logits_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamahome.data.records import Microbatch
from llamahome.data.steps.answered import Answer, lay_out_answers
from llamahome.data.steps.loader import Place, stay
from llamahome.data.steps.taught_steps import IDS, LOGS, REST
from llamahome.model.lora_layers import adapters_off
from llamahome.training.distillation import DistillationObjective
from llamahome.training.policy import PolicyObjective

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def learned_logits(model: nn.Module, batch: Microbatch) -> Tensor:
    """[N, vocabulary] at the targets, each document alone."""
    rows = [logits_of(model, document.tolist()) for document in torch.split(batch.tokens_T, list(batch.lengths))]
    return torch.cat(rows)[batch.rows_N]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_distillation_on_all_tokens_is_the_loss_of_trl(llama: Path, temperature: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    learner, teacher = moved(make_learner(llama, "lora")), plain_model("llama", seed=9)
    (batch,) = cut(examples_of(LENGTHS), 1000)
    own, theirs = learned_logits(learner.model, batch), learned_logits(teacher, batch).detach()
    best = theirs.log_softmax(-1).sort(descending=True)  # the least likely token is the rest
    extra = {IDS: best.indices[:, :-1], LOGS: best.values[:, :-1], REST: best.values[:, -1]}
    ours = DistillationObjective(learner.objective, 1.0, temperature).loss_sum(replace(batch, extra=extra))[0]
    settings = {"beta": 0.0, "temperature": temperature, "reduction": "sum"}
    expected = gkd.GKDTrainer.generalized_jsd_loss(own[None], theirs[None], **settings) * temperature**2  # the factor is not in TRL's
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = gradients(learner, ours), gradients(learner, expected)
    assert distance(found, wanted) < 1e-5


def grpo_trainer(folder: Path, output: Path, **options: Any) -> Any:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sizes = {"per_device_train_batch_size": 2, "num_generations": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    return trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(output_dir=str(output), loss_type="dapo", gradient_checkpointing=False, **sizes, **options),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=tokenizer,
    )


def padded(parts: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and their mask."""
    width = max(map(len, parts))
    tokens, mask = torch.zeros(len(parts), width, dtype=torch.int64), torch.zeros(len(parts), width, dtype=torch.int64)
    for number, part in enumerate(parts):
        place = slice(width - len(part), width) if left else slice(len(part))
        tokens[number, place], mask[number, place] = torch.tensor(part), 1
    return tokens, mask


def reference_logs(model: nn.Module, answers: list[Answer], width: int, temperature: float) -> Tensor:
    """[B, T] of the model without its adapter."""
    found = torch.zeros(len(answers), width)
    with torch.no_grad(), adapters_off(model):
        for row, answer in zip(found, answers, strict=True):
            tokens = [*answer.prompt.tokens, *answer.tokens]
            logits = logits_of(model, tokens)[len(answer.prompt.tokens) - 1 : -1] / temperature
            row[: len(answer.tokens)] = logits.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    return found


@pytest.mark.parametrize(("method", "beta"), [("lora", 0.4), ("lora", 0.0), ("full", 0.0)])
def test_grpo_is_the_loss_of_trl(llama: Path, method: Method, beta: float, tmp_path: Path) -> None:
    trainer = grpo_trainer(llama, tmp_path, beta=beta, temperature=0.8)
    learner, answers = moved(make_learner(llama, method)), answers_of([(20, 9), (3, 1), (14, 25), (14, 4), (8, 12)])
    objective = PolicyObjective(learner.objective, 0.8, beta)
    batches = lay_out_answers(answers, micro_batch_tokens=45, place=Place(0, 1, False), deliver=stay)
    tokens = sum(batch.num_targets for batch in batches)
    ours = torch.stack([objective.loss_sum(batch)[0] for batch in batches]).sum() / tokens
    found = gradients(learner, ours)

    (prompts, prompt_mask), (completions, mask) = (
        padded([list(answer.prompt.tokens) for answer in answers], left=True),
        padded([list(answer.tokens) for answer in answers], left=False),
    )
    inputs = {"prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": completions, "completion_mask": mask}
    inputs |= {"advantages": torch.tensor([answer.advantage for answer in answers]), "num_items_in_batch": torch.tensor(tokens)}
    if beta:
        inputs["ref_per_token_logps"] = reference_logs(learner.model, answers, completions.shape[1], 0.8)
    trainer.model.eval()
    learner.model.set_attn_implementation("eager")
    pytest.importorskip("trl.trainer.utils").add_fused_lm_head(learner.model, temperature=0.8, outputs=("log_probs", "entropy"))
    expected = trainer._compute_loss(learner.model, inputs)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    if not beta:  # TRL 1.16's fused head gave a gradient of its divergence that finite differences of its loss did not; ours they did
        assert distance(found, gradients(learner, expected)) < 1e-5
