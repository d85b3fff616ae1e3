"""Every decoder family of transformers gives the same results for packed documents, and its saved adapters load in PEFT.

The slow run writes docs/Models.md, which also lists the families of which no tiny model could be made.
"""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from tests.support.families import FAMILIES, VOCABULARY, family_model
from tests.support.models import CPU, microbatch_of, objective_of, plain_loss
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from llamahome.config.schema import LoraConfig
from llamahome.data.records import Example
from llamahome.errors import LlamaHomeError
from llamahome.model.adapter import save_model
from llamahome.model.generate import generate
from llamahome.model.load import load_model
from llamahome.model.lora import add_lora
from llamahome.model.packing import packing_of

LENGTHS = (17, 4, 9)
FEW = ("bloom", "falcon", "gpt2", "jamba", "mamba", "lfm2", "llama4_text")
"""Alibi, own attention code, recurrent states, hybrids, learned positions, a decoder that get_decoder() does not find."""
_ROUNDING = {"hrm_text": 1e-3}
"""Relative tolerance of gradients, 1e-4 for other families; hrm_text runs its layers dozens of times, which adds rounding."""
_IN_DOUBLE = {"hrm_text"}
"""With adapters transformers' float32 differs from its float64 by 3.5e-5, and ours from its float64 by 2e-7."""
_NOT_IN_BFLOAT16 = {"hrm_text"}
"""Runs its layers dozens of times, so that bfloat16 rounds too much for any comparison."""
TABLE = Path(__file__).resolve().parents[2] / "docs" / "Models.md"


@dataclass(frozen=True)
class _Row:
    name: str
    runs: str
    lora: str = ""


_ROWS: dict[str, _Row] = {}
_NOT_TESTED: dict[str, str] = {}


@pytest.mark.parametrize("family", [pytest.param(family, marks=[pytest.mark.medium] * (family != "gpt2")) for family in FEW])
def test_a_family_equals_transformers_on_each_document(tmp_path: Path, family: str) -> None:
    _check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_transformers_on_each_document_or_is_refused(tmp_path: Path, family: str) -> None:
    try:
        family_model(family)
    except Exception as error:  # noqa: BLE001  # a config class may raise anything for tiny sizes
        _NOT_TESTED[family] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:90]}"
        pytest.skip(f"no tiny model can be made: {_NOT_TESTED[family]}")
    _ROWS[family] = _check(family, tmp_path)


@pytest.mark.slow
def test_the_table_of_families_is_written() -> None:
    if len(_ROWS) + len(_NOT_TESTED) < len(FAMILIES):
        pytest.skip("only a run of all families writes docs/Models.md")
    assert sum(not row.runs.startswith("refused") for row in _ROWS.values()) >= 60
    TABLE.write_text(_table(), encoding="utf-8")


def _check(family: str, folder: Path) -> _Row:
    plain = family_model(family)
    plain.save_pretrained(folder / "base")
    name = type(plain).__name__
    try:
        ours = load_model(folder / "base", dtype=torch.float32, device=CPU).eval()
    except LlamaHomeError as error:
        return _Row(name, "refused: " + error.problems[0].message.removeprefix("this model cannot be trained: "))
    plain = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    why = packing_of(ours).why_alone
    if family not in _NOT_IN_BFLOAT16:
        in_bfloat16 = packing_of(load_model(folder / "base", dtype=torch.bfloat16, device=CPU)).why_alone
        assert (in_bfloat16 is None) == (why is None), in_bfloat16
    _same_loss_and_gradients(ours, plain)
    answers = _same_answers(ours, plain)
    how = "packed" if why is None else f"one document a pass: {why}"
    return _Row(name, how + answers, _round_trip(ours, folder))


def _examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for number, length in enumerate(LENGTHS):
        tokens = torch.randint(4, VOCABULARY - 12, (length,), generator=generator).numpy().astype("int32")
        targets = torch.arange(length).numpy() > 0
        examples.append(Example("rows.jsonl", number, number + 1, tokens, targets))
    return examples


def _same_loss_and_gradients(ours: PreTrainedModel, plain: PreTrainedModel) -> None:
    examples = _examples()
    objective_of(ours).loss_sum(microbatch_of(examples)).backward()
    theirs = [copy.deepcopy(plain) for _ in examples]  # each as if just loaded
    expected = [plain_loss(model, example) for model, example in zip(theirs, examples, strict=True)]
    with torch.no_grad():
        torch.testing.assert_close(objective_of(ours).loss_sum(microbatch_of(examples)), sum(expected), rtol=1e-5, atol=0)
    sum(expected).backward()
    summed = {name: [dict(model.named_parameters())[name].grad for model in theirs] for name, _ in plain.named_parameters()}
    checked = 0
    for name, parameter in ours.named_parameters():
        parts = [gradient for gradient in summed[name] if gradient is not None]
        if not parts:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        expected = torch.stack(parts).sum(0)
        distance = (parameter.grad - expected).norm()
        assert distance <= _ROUNDING.get(plain.config.model_type, 1e-4) * expected.norm() + 1e-4, name
        checked += 1
    assert checked
    ours.zero_grad()


def _same_answers(ours: PreTrainedModel, plain: PreTrainedModel) -> str:
    """Compare the answers; returns a remark if transformers cannot generate, else an empty string."""
    prompts = [[5, 6, 7, 8, 9, 10, 11], [40, 41]]
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = []
    for prompt in prompts:
        alone = copy.deepcopy(plain)
        alone.generation_config = GenerationConfig()
        row = torch.tensor([prompt])
        try:
            generated = alone.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=settings)
        except (IndexError, RuntimeError, TypeError, AttributeError) as error:
            return f"; answers not compared, transformers itself fails: {type(error).__name__}"
        expected.append(generated[0, len(prompt) :].tolist())
    assert generate(ours, prompts, end_ids=[], max_new_tokens=5) == expected
    return ""


def _round_trip(ours: PreTrainedModel, folder: Path) -> str:
    """Save adapters on all linear layers and check that PEFT loads them with the same loss."""
    examples = _examples()
    adapted = add_lora(ours, LoraConfig(rank=2), base=str(folder / "base"), seed=0, lean=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    save_model(adapted, folder / "adapter", base=folder / "base")
    wide = torch.float64 if ours.config.model_type in _IN_DOUBLE else torch.float32
    with torch.no_grad():
        loss = objective_of(ours.to(wide)).loss_sum(microbatch_of(examples))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = []
        for example in examples:
            model = AutoModelForCausalLM.from_pretrained(folder / "base")
            theirs = PeftModel.from_pretrained(model, str(folder / "adapter")).eval().to(wide)
            with torch.no_grad():
                expected.append(plain_loss(theirs.get_base_model(), example))
    torch.testing.assert_close(loss, sum(expected), rtol=1e-5, atol=0)
    layers = sum("lora_A" in name for name, _ in adapted.named_parameters())
    return f"{layers} layers, loads in PEFT"


def _table() -> str:
    packed = sum(row.runs.startswith("packed") for row in _ROWS.values())
    alone = sum(row.runs.startswith("one document") for row in _ROWS.values())
    lines = [
        "# Models",
        "",
        f"`make test-slow` wrote this page with transformers {transformers.__version__}, which has {len(FAMILIES)} decoder families.",
        "For each family it tests a tiny model: loss, gradients of every weight and greedy answers equal those of transformers on each",
        "document alone, and the saved adapter gives the same loss in PEFT.",
        "",
        f"{packed} families are packed, {alone} run one document a pass (docs/decisions/0013-one-document-a-pass.md),",
        f"and {len(_ROWS) - packed - alone} are refused. For {len(_NOT_TESTED)} families no tiny model could be made; see below.",
        "",
        "| family | class | how it runs | LoRA |",
        "|---|---|---|---|",
        *(f"| {family} | {row.name} | {row.runs.replace('|', '/')} | {row.lora} |" for family, row in sorted(_ROWS.items())),
        "",
        "## Not tested",
        "",
        *(f"- {family}: {why}" for family, why in sorted(_NOT_TESTED.items())),
    ]
    return "\n".join(lines) + "\n"
