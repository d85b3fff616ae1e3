"""An adapter that is trained further computes and learns as PEFT's own, whatever its ranks, scales and layers."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, VeraConfig, get_peft_model
from tests.support.models import examples_of, microbatch_of, objective_of, our_model, save_tiny

from llamahome.errors import ConfigError
from llamahome.model.lora import load_lora, quiet_peft
from llamahome.model.place import trained_parameters

KINDS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    "vera": {"r": 12, "target_modules": ["v_proj", "down_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["v_proj", "o_proj"]},
    "ranks by pattern": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "some layers": {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "a regular expression": {"r": 3, "target_modules": r".*\.mlp\.(up|gate)_proj"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


def saved_adapter(base: Path, folder: Path, *, vera: bool = False, **settings) -> Path:
    """An adapter as another tool saves it, every value random."""
    torch.manual_seed(0)
    with quiet_peft():
        kind = VeraConfig if vera else PeftLoraConfig
        adapted = get_peft_model(our_model(base), kind(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in trained_parameters(adapted).values():
            parameter += 0.1 * torch.randn(parameter.shape)
    adapted.save_pretrained(folder)
    return folder


def loss_and_gradients(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = objective_of(model.get_base_model()).loss_sum(microbatch_of(examples_of([9, 5, 12])))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in trained_parameters(model).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_pefts(base: Path, tmp_path: Path, kind: str) -> None:
    folder = saved_adapter(base, tmp_path / "adapter", vera=kind == "vera", **KINDS[kind])
    ours = load_lora(our_model(base), folder, base="tiny", dropout=0.0, lean=True)
    with quiet_peft():
        theirs = PeftModel.from_pretrained(our_model(base), str(folder), is_trainable=True)
    (loss, gradients), (their_loss, their_gradients) = loss_and_gradients(ours), loss_and_gradients(theirs)
    assert gradients.keys() == their_gradients.keys() and len(gradients) > 0
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_it_starts_with_the_very_values_of_the_adapter(base: Path, tmp_path: Path) -> None:
    folder = saved_adapter(base, tmp_path / "adapter", **KINDS["ranks by pattern"])
    ours = load_lora(our_model(base), folder, base="elsewhere", dropout=0.1, lean=True)
    ours.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    config = copy.copy(ours.peft_config["default"])
    assert (config.base_model_name_or_path, config.lora_dropout) == ("elsewhere", 0.1)


def test_an_adapter_of_another_width_is_refused_with_both_shapes(base: Path, tmp_path: Path) -> None:
    folder = saved_adapter(save_tiny(tmp_path / "wide", "llama", hidden_size=64), tmp_path / "adapter", **KINDS["plain"])
    with pytest.raises(ConfigError) as refusal:
        load_lora(our_model(base), folder, base="tiny", dropout=0.0, lean=True)
    problem = refusal.value.problems[0]
    assert problem.code == "model.weights-do-not-fit" and "64" in problem.message and "32" in problem.message


def test_an_adapter_of_more_layers_is_refused(base: Path, tmp_path: Path) -> None:
    folder = saved_adapter(save_tiny(tmp_path / "deep", "llama", num_hidden_layers=4), tmp_path / "adapter", **KINDS["plain"])
    with pytest.raises(ConfigError, match=r"layers\.2"):
        load_lora(our_model(base), folder, base="tiny", dropout=0.0, lean=True)
