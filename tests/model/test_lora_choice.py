"""Layers by number, ranks and scales by pattern, whole modules and initial values: as PEFT computes them, and as it loads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.support.models import CPU, examples_of, microbatch_of, objective_of, our_model, plain_loss, save_tiny
from transformers import AutoModelForCausalLM

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError
from llamahome.model.adapter import open_trained, restore_model, save_model, wrap_plain
from llamahome.model.lora import add_lora, quiet_peft
from llamahome.model.place import trained_parameters

PATTERNS = {"rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.up_proj": 2}, "alpha_pattern": {"down_proj": 3.0, "q_proj": 20.0}}
CHANGES: dict[str, dict[str, Any]] = {
    "layers": {"layers": [1]},
    "patterns": PATTERNS,
    "patterns and rslora": {**PATTERNS, "use_rslora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["lm_head", "embed_tokens"], "layers": ["0-0"]},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
}


@pytest.fixture(scope="module", params=["llama", "llama-mha"], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


def adapted(base: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, move: bool = True, **changes: Any) -> PeftModel:
    config = LoraConfig(**{"rank": 4, "alpha": 6, **changes})
    model = add_lora(our_model(base, dtype=dtype), config, base=str(base), seed=seed, lean=True)
    random = torch.Generator().manual_seed(seed)
    for parameter in trained_parameters(model).values() if move else ():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is not None}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_loss_and_gradients_equal_those_of_peft_with_the_saved_adapter(base: Path, tmp_path: Path, backend: str, changes: dict) -> None:
    (example,) = examples_of([14])
    ours = adapted(base, **changes)
    save_model(ours, tmp_path, base=base)
    with quiet_peft():
        plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        theirs = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True).eval()
    expected = plain_loss(theirs, example)
    expected.backward()
    got = objective_of(ours.get_base_model(), backend).loss_sum(microbatch_of([example]))
    torch.testing.assert_close(got.detach().float(), expected.detach(), rtol=1e-5, atol=1e-5)
    got.backward()
    want, have = gradients(theirs), gradients(ours)
    assert want.keys() == have.keys() == trained_parameters(ours).keys()
    for name, gradient in want.items():
        assert (have[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("changes", [CHANGES["patterns"], CHANGES["head"], CHANGES["both"]], ids=["patterns", "head", "both"])
def test_what_is_saved_is_opened_restored_and_merged_unchanged(base: Path, tmp_path: Path, changes: dict) -> None:
    batch, tokens = microbatch_of(examples_of([14])), torch.arange(4, 14)[None]
    ours = adapted(base, seed=1, **changes)
    save_model(ours, tmp_path, base=base)
    loss = float(objective_of(ours.get_base_model()).stats(batch).loss_sum)
    opened = open_trained(tmp_path, dtype=torch.float32, device=CPU, say=lambda _: None)
    assert float(objective_of(opened).stats(batch).loss_sum) == pytest.approx(loss, rel=1e-5)
    other = adapted(base, seed=2, **changes)
    restore_model(other, tmp_path)
    for name, parameter in trained_parameters(ours).items():
        assert torch.equal(trained_parameters(other)[name], parameter), name
    logits = []
    for merge in (False, True):
        model = wrap_plain(our_model(base), tmp_path, merge=merge)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            logits.append(model(input_ids=tokens).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_layers_ranks_and_scales_are_those_that_were_asked_for(base: Path) -> None:
    names = trained_parameters(adapted(base, layers=["1-1"], **PATTERNS))
    assert names and all(".layers.1." in name for name in names)
    ranks = {name.split(".")[-4]: weight.shape[0] for name, weight in names.items() if "lora_A" in name}
    assert (ranks["q_proj"], ranks["up_proj"], ranks["k_proj"]) == (6, 2, 4)


def test_whole_modules_are_trained_in_float32_beside_a_base_in_bfloat16(base: Path) -> None:
    batch, losses = microbatch_of(examples_of([14])), []
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(base, dtype=dtype, modules_to_save=["lm_head", "embed_tokens", "norm"])
        assert {weight.dtype for weight in trained_parameters(model).values()} == {torch.float32}
        for backend in ("reference", "cpu"):
            loss = objective_of(model.get_base_model(), backend).loss_sum(batch)
            loss.backward()
            losses.append(loss.item())
            assert gradients(model).keys() == trained_parameters(model).keys()
    assert losses == pytest.approx([losses[0]] * 4, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"layers": [0, 2]}, "lora.no-such-layer", "layers 0 to 1"),
        ({"layers": ["0-5"]}, "lora.no-such-layer", "layers 0 to 1"),
        ({"rank_pattern": {"q_porj": 2}}, "lora.no-such-module", "'q_porj' matches no layer"),
        ({"alpha_pattern": {"lm_head": 2.0}}, "lora.no-such-module", "'lm_head' matches no layer"),
        ({"modules_to_save": ["lm_haed"]}, "lora.no-such-module", "no module 'lm_haed'"),
        ({"modules_to_save": ["mlp"]}, "lora.no-such-module", "no module 'mlp'"),
        ({"modules_to_save": ["q_proj"]}, "lora.no-such-module", "q_proj gets an adapter"),
    ],
    ids=str,
)
def test_a_name_that_selects_nothing_is_refused(base: Path, changes: dict, code: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        adapted(base, **changes)
    assert error.value.problems[0].code == code
    assert error.value.problems[0].hint is None or "porj" not in error.value.problems[0].hint


def test_new_rows_of_a_module_that_is_trained_whole_are_refused(base: Path) -> None:
    config = LoraConfig(modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="its new rows alone") as error:
        add_lora(our_model(base), config, base=str(base), seed=0, lean=True, new_rows=[3])
    assert error.value.problems[0].code == "lora.rows-twice"
