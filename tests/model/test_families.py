"""Every decoder family of the installed transformers: packed or one document after another, it learns what transformers itself would.

The slow test writes docs/Models.md from what it found, when all families ran.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tests.support.families import FAMILIES, VOCABULARY, tiny_model
from tests.support.models import CPU, backend_named, microbatch_of
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from llamahome.config.schema import LoraConfig
from llamahome.data.records import Example
from llamahome.errors import LlamaHomeError
from llamahome.model.adapter import open_trained, save_model
from llamahome.model.generate import generate
from llamahome.model.load import load_model
from llamahome.model.lora import add_lora, quiet_peft
from llamahome.model.manner import manner_of
from llamahome.model.objective import Objective
from llamahome.model.place import trained_parameters

PAGE = Path(__file__).parents[2] / "docs/Models.md"
LENGTHS = (9, 4, 14, 3)
KINDS = ("bloom", "deepseek_v3", "gpt2", "gpt_oss", "jamba", "llama", "mamba", "qwen3_next")
"""One of each kind: learned positions, alibi, sinks, latent attention, state spaces, hybrids."""
HEAD = """# Models

Every decoder family of transformers {version}, tried with a model of a few layers and random weights. In each family that trains, four
documents of different lengths gave the loss and the gradients that transformers gives for each row alone, answers were those of
transformers, and an adapter that was saved came back through PEFT with equal logits. *Packed*: all documents of a pass are computed
together. *One by one*: documents run one after another, for the reason named; that is right, and slower for short rows.

This page is written by `make test-slow` (tests/model/test_families.py).

"""


def rows() -> list[list[int]]:
    return [[5 + (7 * row + 5 * place) % (VOCABULARY - 10) for place in range(length)] for row, length in enumerate(LENGTHS)]


def loss_of(model: PreTrainedModel) -> Tensor:
    """Ours, of all rows in one micro-batch; each token but the first is learned."""
    examples = []
    for number, row in enumerate(rows()):
        learned = np.array([False] + [True] * (len(row) - 1))
        examples.append(Example("rows.jsonl", number, number + 1, np.array(row, dtype=np.int32), learned))
    return Objective(model, backend_named("cpu")).loss_sum(microbatch_of(examples))


def plain_loss(model: PreTrainedModel) -> Tensor:
    """transformers' own, row by row."""
    losses = []
    for row in rows():
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="sum"))
    return torch.stack(losses).sum()


def tried(family: str, folder: Path) -> dict[str, str]:
    """One line of the table; AssertionError where something is wrong."""
    made = tiny_model(family)
    if made is None:
        return {"how": "not tried: it has parts that are not text"}
    made.save_pretrained(folder / "base")
    try:
        ours = load_model(folder / "base", dtype=torch.float32, device=CPU).eval()
    except LlamaHomeError as error:
        return {"how": f"refused: {error.problems[0].message.removeprefix('this model cannot be trained: ')}"}
    plain = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    assert_learns_alike(ours, plain)
    assert_answers_alike(ours, plain)
    alone = manner_of(ours).why_alone
    return {"how": "packed" if alone is None else f"one by one: {alone}", "adapter": through_peft(ours, folder)}


def assert_learns_alike(ours: PreTrainedModel, plain: PreTrainedModel) -> None:
    loss, expected = loss_of(ours), plain_loss(plain)
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)
    loss.backward()
    expected.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        found, wanted = (torch.zeros_like(each) if each.grad is None else each.grad for each in (parameter, theirs[name]))
        assert (found - wanted).norm() <= 1e-3 * wanted.norm() + 1e-5, name
        parameter.grad = None


def assert_answers_alike(ours: PreTrainedModel, plain: PreTrainedModel) -> None:
    prompts = [row[:6] for row in rows()]
    found = generate(ours, prompts, end_ids=[2], max_new_tokens=5)
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
    plain.generation_config = GenerationConfig()
    for prompt, answer in zip(prompts, found, strict=True):
        wanted: Any = plain.generate(input_ids=torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        assert answer == (wanted[: wanted.index(2)] if 2 in wanted else wanted)


def through_peft(ours: PreTrainedModel, folder: Path) -> str:
    """Trains an adapter for one step, saves it, and compares what PEFT and llamahome read."""
    try:
        adapted = add_lora(ours, LoraConfig(rank=2, alpha=4), base=str(folder / "base"), seed=1, lean=True)
    except LlamaHomeError as error:
        return f"refused: {error.problems[0].message}"
    trained = trained_parameters(ours)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    loss_of(ours).backward()
    optimizer.step()
    save_model(adapted, folder / "adapter", base=folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    with quiet_peft():
        theirs = peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    again = open_trained(folder / "adapter", dtype=torch.float32, device=CPU, say=lambda _: None).eval()
    ours.eval()
    wanted = loss_of(ours).item()
    assert math.isclose(plain_loss(theirs).item(), wanted, rel_tol=1e-5)
    assert math.isclose(loss_of(again).item(), wanted, rel_tol=1e-5)
    return f"{len(trained) // 2} layers"


@pytest.mark.parametrize("family", KINDS)
def test_one_family_of_each_kind_learns_what_transformers_would(family: str, tmp_path: Path) -> None:
    found = tried(family, tmp_path)
    assert found["how"].startswith(("packed", "one by one")) and found["adapter"].endswith("layers")


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[str, str]]]:
    """What was found, by family; written down when nothing is missing."""
    found: dict[str, dict[str, str]] = {}
    yield found
    if len(found) == len(FAMILIES):
        write_page(found)


def write_page(found: dict[str, dict[str, str]]) -> None:
    import transformers

    trained = {family: line for family, line in found.items() if line["how"].startswith(("packed", "one by one"))}
    page = HEAD.format(version=transformers.__version__)
    packed = sum(line["how"] == "packed" for line in trained.values())
    page += f"{len(trained)} families train: {packed} packed, {len(trained) - packed} one by one.\n\n"
    page += "| family | documents | adapters |\n|---|---|---|\n"
    page += "".join(f"| {family} | {line['how']} | {line['adapter']} |\n" for family, line in trained.items())
    page += "\n## Not trained\n\n| family | why |\n|---|---|\n"
    page += "".join(f"| {family} | {line['how']} |\n" for family, line in found.items() if family not in trained)
    PAGE.write_text(page, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_what_transformers_would_or_is_refused_with_the_reason(
    family: str, tmp_path: Path, table: dict[str, dict[str, str]]
) -> None:
    try:
        made = tiny_model(family)
    except Exception as error:  # noqa: BLE001  # whatever a config of sizes that it does not know raises
        table[family] = {"how": f"not tried: no tiny model could be made ({type(error).__name__})"}
        return
    del made
    table[family] = tried(family, tmp_path)
