"""Adapters are on the named layers of the decoder, never on a router that is not named; PEFT loads them unchanged."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.support.experts import FAMILIES, ROUTERS, some_tokens, tiny_experts
from tests.support.families import family_model
from tests.support.models import our_model, plain_model, save_tiny
from torch import nn
from transformers import PreTrainedModel

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError
from llamahome.model.adapter import restore_model, save_model
from llamahome.model.adapter_coverage import coverage_lines
from llamahome.model.lora import add_lora, quiet_peft
from llamahome.model.lora_layers import LEAN, LeanLoraWeight
from llamahome.model.place import trained_parameters
from llamahome.model.targets import choose, matrices, shortest_suffixes


def adapted(model: PreTrainedModel, targets: str | list[str] = "all-linear", **changes) -> PeftModel:
    return add_lora(model, LoraConfig(**{"rank": 4, "target_modules": targets, **changes}), base="tiny", seed=1, lean=True)


def two_steps(model: PeftModel) -> dict[str, torch.Tensor]:
    """Train two steps; returns the gradients of the second, when B is no longer zero."""
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        tokens = some_tokens()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
        optimizer.step()
    assert gradients.keys() == parameters.keys()
    return gradients


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=some_tokens(), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_of_a_mixture_learns_none_is_on_a_router_and_peft_loads_all(family: str, tmp_path: Path) -> None:
    base = tiny_experts(family)
    plain = copy.deepcopy(base)
    linear = {each.path for each in matrices(plain) if each.form == "linear"}
    model = adapted(base)
    gradients = two_steps(model)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert not [name for name in gradients if re.search(ROUTERS, name)]
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in gradients} == linear
    assert all(parameter.dtype == torch.float32 for parameter in trained_parameters(model).values())
    plain.config.save_pretrained(tmp_path / "base")
    save_model(model, tmp_path / "saved", base=tmp_path / "base")
    with quiet_peft():
        again = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "saved"))
    expected = logits(model)
    assert (logits(plain) - expected).norm() > 1e-2 * expected.norm()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    other = adapted(copy.deepcopy(plain))
    restore_model(other, tmp_path / "saved")
    assert all(torch.equal(actual, trained_parameters(model)[name]) for name, actual in trained_parameters(other).items())


STACKED = {"jetmoe": ["mlp.input_linear", "output_linear", "experts.input_linear"]}
"""Names of the stacked experts by family; gate_up_proj and down_proj in all others."""


@pytest.mark.parametrize("family", FAMILIES)
def test_named_stacked_experts_learn_and_are_saved(family: str, tmp_path: Path) -> None:
    plain = tiny_experts(family)
    names = STACKED.get(family, ["experts.gate_up_proj", "experts.down_proj"])
    model = adapted(copy.deepcopy(plain), names)
    every = [each for each in matrices(model.get_base_model()) if each.form == "stacked"]
    assert every and all(each.adapted for each in every)
    assert not [each for each in matrices(model.get_base_model()) if each.adapted and each.form != "stacked"]
    assert all(gradient.abs().sum() > 0 for gradient in two_steps(model).values())
    plain.config.save_pretrained(tmp_path / "base")
    save_model(model, tmp_path / "saved", base=tmp_path / "base")
    with quiet_peft():
        again = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "saved"))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    other = adapted(copy.deepcopy(plain), names)
    restore_model(other, tmp_path / "saved")
    assert all(torch.equal(actual, trained_parameters(model)[name]) for name, actual in trained_parameters(other).items())


@pytest.mark.parametrize("family", ["deepseek-v3", "glm4-moe", "ernie"])
def test_a_weight_adapted_as_a_parameter_equals_pefts_forward(family: str) -> None:
    plain, results = tiny_experts(family), []
    for lean in (True, False):
        model = add_lora(copy.deepcopy(plain), LoraConfig(rank=4), base="tiny", seed=1, lean=lean)
        weights = [module for module in model.modules() if isinstance(module, LeanLoraWeight)]
        assert bool(weights) is lean and any(isinstance(module, LEAN) for module in model.modules()) is lean
        gradients = two_steps(model)
        results.append((logits(model), gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for name, expected in their_gradients.items():
        assert (our_gradients[name] - expected).norm() <= 1e-3 * expected.norm(), name


@pytest.mark.parametrize(
    ("family", "named", "expected"),
    [
        ("mixtral", ["gate"], {"mlp.gate": 2}),
        ("gpt-oss", ["router"], {"mlp.router": 2}),
        ("hunyuan", ["wg"], {"gate.wg": 2}),
        ("llama4", ["feed_forward.router"], {"feed_forward.router": 2}),
        ("mixtral", ["w1", "w2", "w3"], {"experts.gate_up_proj": 2, "experts.down_proj": 2}),
        ("qwen3-moe", ["gate_up_proj", "down_proj"], {"experts.gate_up_proj": 2, "experts.down_proj": 2}),
        ("qwen3-moe", ["experts"], {"experts.gate_up_proj": 2, "experts.down_proj": 2}),
        ("deepseek-v3", ["mlp.gate_proj"], {"gate_proj": 1}),
        ("deepseek-v3", ["gate_proj", "up_proj"], {"gate_proj": 2, "up_proj": 2, "experts.gate_up_proj": 1}),
        ("qwen2-moe", r".*layers\.1\..*\.(q|v)_proj", {"q_proj": 1, "v_proj": 1}),
        ("qwen2-moe", "shared_expert_gate", {"mlp.shared_expert_gate": 2}),
        ("olmoe", ["model.layers.1.self_attn.o_proj", "layers.0.self_attn.k_proj"], {"k_proj": 1, "o_proj": 1}),
    ],
    ids=str,
)
def test_names_select_what_peft_selects(family: str, named: str | list[str], expected: dict[str, int], tmp_path: Path) -> None:
    plain = tiny_experts(family)
    model = adapted(copy.deepcopy(plain), named)
    text = coverage_lines(model.get_base_model())[0]
    assert re.search(r"kinds?: (.*);", text)[1] == ", ".join(f"{name} {count}" for name, count in expected.items())
    assert all(gradient.abs().sum() > 0 for gradient in two_steps(model).values())
    plain.config.save_pretrained(tmp_path / "base")
    save_model(model, tmp_path / "saved", base=tmp_path / "base")
    with quiet_peft():
        again = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "saved"))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "named", "reason"),
    [
        ("qwen3-moe", ["gate_proj"], "gate_proj is a part of gate_up_proj, in which the experts are stacked"),
        ("qwen3-moe", ["lm_head"], "lm_head is the output head"),
        ("mixtral", ["embed_tokens"], "embed_tokens is an embedding"),
        (
            "mixtral",
            ["no_such"],
            "called no_such; there are k_proj, o_proj, q_proj, v_proj, experts.down_proj, experts.gate_up_proj, mlp.gate",
        ),
        ("mixtral", "q_(proj", "valid regular expression"),
    ],
    ids=str,
)
def test_the_error_for_a_name_without_adapter_gives_the_reason(family: str, named: str | list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=r"lora\.no-such-module") as error:
        adapted(tiny_experts(family), named)
    (problem,) = error.value.problems
    assert reason in problem.message
    if problem.hint:
        typed = problem.hint.removeprefix("--set 'lora.target_modules=[").removesuffix("]'")
        assert adapted(tiny_experts(family), typed.split(", "))


@pytest.mark.parametrize(
    ("changes", "hint"), [({"dropout": 0.1}, "--set lora.dropout=0"), ({"use_dora": True}, "--set lora.use_dora=false")], ids=str
)
def test_dropout_and_dora_are_refused_if_peft_adapts_parameters(changes: dict, hint: str) -> None:
    for family, named in (("mixtral", ["experts"]), ("deepseek-v3", "all-linear")):
        with pytest.raises(ConfigError, match=r"lora\.not-plain") as error:
            adapted(tiny_experts(family), named, **changes)
        assert error.value.problems[0].hint == hint
    assert two_steps(adapted(tiny_experts("mixtral"), **changes)), "where no parameter is adapted they work"


def test_the_coverage_counts_layers_and_weights() -> None:
    base = tiny_experts("mixtral")
    model = adapted(base)
    first, second, third = coverage_lines(base)
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    total = sum(parameter.numel() for parameter in base.parameters())
    shown = f"{trained:,} parameters, {trained / total:.2%} of the weights"
    assert first == f"adapters on 8 layers of 4 kinds: q_proj 2, k_proj 2, v_proj 2, o_proj 2; {shown}"
    attention, experts, router, head = 2 * (2 * 32 * 32 + 2 * 32 * 16), 2 * (96 * 32 + 48 * 32) * 4 // 2, 2 * 4 * 32, 96 * 32
    share = (experts + router + head) / (attention + experts + router + head)
    assert second == (
        "without adapters: experts.gate_up_proj and experts.down_proj (fused experts, a token passes 50% of them), lm_head (output head), "
        f"mlp.gate (router); {share:.1%} of the weights that a token passes"
    )
    assert "--set 'lora.target_modules=[all-linear, experts.down_proj, experts.gate_up_proj]'" in third
    again = tiny_experts("mixtral")
    adapted(again, ["all-linear", "experts.down_proj", "experts.gate_up_proj"])
    assert len(coverage_lines(again)) == 2 and "experts.gate_up_proj 2" in coverage_lines(again)[0]


def test_the_coverage_of_a_model_without_experts_has_two_lines(tmp_path: Path) -> None:
    base = our_model(save_tiny(tmp_path, "llama"))
    adapted(base)
    first, second = coverage_lines(base)
    assert first.startswith("adapters on 14 layers of 7 kinds") and "lm_head (output head)" in second


def test_modules_that_read_images_get_no_adapters() -> None:
    """The image layers have the same names as the decoder's, so full paths are needed; only the decoder's layers get adapters and learn."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sight = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config={**text, "num_key_value_heads": 2, "head_dim": 8}, vision_config=sight, mm_tokens_per_image=4)
    model = adapted(Gemma3ForConditionalGeneration(config).eval())
    names = {name.split(".lora_")[0] for name in trained_parameters(model)}
    assert len(names) == 14 and all(".language_model." in name for name in names)
    assert "vision_tower" in coverage_lines(model.get_base_model())[-1]


def test_the_saved_names_select_the_same_layers_in_peft(tmp_path: Path) -> None:
    """A dense layer whose name PEFT takes for single experts is named by its weight."""
    plain = tiny_experts("deepseek-v3")
    adapted(copy.deepcopy(plain)).save_pretrained(str(tmp_path), save_embedding_layers=False)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(written["target_parameters"]) == ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]
    with quiet_peft():
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path))
    ours = adapted(copy.deepcopy(plain))
    assert {name for name, _ in theirs.named_parameters() if "lora_" in name} == set(trained_parameters(ours))


def test_shortened_names_select_nothing_else() -> None:
    every = ["a.0.q", "a.1.q", "b.0.q", "a.0.w", "b.w"]
    assert shortest_suffixes(["a.0.w", "b.w"], every) == ["w"]
    assert shortest_suffixes(["a.0.q", "a.1.q"], every) == ["1.q", "a.0.q"]
    assert choose(plain_model("llama"), ["v_proj"]).modules == [f"model.layers.{n}.self_attn.v_proj" for n in (0, 1)]


def test_stacked_matrices_of_a_model_without_experts_are_not_called_experts() -> None:
    text = " ".join(coverage_lines(adapted(family_model("recurrent_gemma")).get_base_model()))
    assert "rg_lru.input_gate_weight" in text
    assert "expert" not in text


@pytest.mark.parametrize("tied", [True, False])
def test_trained_new_rows_are_not_listed_as_without_adapter(tied: bool) -> None:
    model = plain_model("llama", tie_word_embeddings=tied)
    made = add_lora(model, LoraConfig(rank=2), base="tiny", seed=0, lean=True, new_rows=range(4, 8))
    assert "trainable_tokens" not in " ".join(coverage_lines(made.get_base_model()))


@pytest.mark.parametrize("family", ["qwen3-next", "qwen2-moe"])
def test_a_shared_expert_as_wide_as_there_are_experts_gets_adapters(family: str) -> None:
    model = tiny_experts(family, num_experts=16, shared_expert_intermediate_size=16)
    forms = {each.path.partition("mlp.")[2]: each.form for each in matrices(model) if "shared_expert" in each.path}
    assert forms == {
        **{f"shared_expert.{name}_proj": "linear" for name in ("gate", "up", "down")},
        "shared_expert_gate": "router",
    }
