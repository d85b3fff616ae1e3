"""New rows of an embedding are trained as PEFT and transformers train them, and both load the saved rows."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft import LoraConfig as PeftLoraConfig
from tests.support.models import CPU, VOCABULARY, microbatch_of, objective_of, our_model, plain_loss, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llamahome.config.schema import LoraConfig
from llamahome.data.records import Example
from llamahome.errors import ConfigError
from llamahome.model.adapter import open_trained, restore_model, save_model, trained_rows
from llamahome.model.lora import add_lora, quiet_peft
from llamahome.model.place import trained_parameters
from llamahome.model.vocabulary import grow_embeddings, refuse_lost_bias

NEW = 5
ROWS = VOCABULARY + NEW
KINDS = {"llama": ("llama", {}), "untied": ("llama-mha", {}), "bias": ("phi", {}), "positions": ("gpt2", {})}
"""A tied head; an untied head; a head with a bias; a tied head and a position table."""


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, changes = KINDS[request.param]
    return save_tiny(tmp_path_factory.mktemp(request.param), kind, **changes)


def example() -> Example:
    """An example with old and new tokens as inputs and as targets."""
    tokens = torch.tensor([5, 9, VOCABULARY, 7, VOCABULARY + 4, VOCABULARY + 1, 11, VOCABULARY, 8], dtype=torch.int32)
    targets = torch.tensor([False, True, True, False, True, True, True, True, False])
    return Example("rows.jsonl", 0, 1, tokens.numpy(), targets.numpy())


def adapted(base: Path, *, seed: int = 0) -> PeftModel:
    model = our_model(base)
    new = grow_embeddings(model, ROWS)
    config = LoraConfig(rank=4, target_modules="all-linear")
    return moved(add_lora(model, config, base=str(base), seed=seed, lean=True, new_rows=new), seed)


def moved(model: torch.nn.Module, seed: int):
    random = torch.Generator().manual_seed(seed)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return model


def plain_base(base: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model.resize_token_embeddings(ROWS)
    return model


def our_loss(model: PreTrainedModel, of: Example) -> float:
    return float(objective_of(model.eval()).stats(microbatch_of([of])).loss_sum)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is not None}


def test_new_rows_start_as_the_mean_and_old_rows_do_not_change(base: Path) -> None:
    before, model = our_model(base), our_model(base)
    assert grow_embeddings(model, ROWS) == range(VOCABULARY, ROWS)
    assert grow_embeddings(model, ROWS) == grow_embeddings(model, 7) == range(0)
    for was, now in (
        (before.get_input_embeddings(), model.get_input_embeddings()),
        (before.get_output_embeddings(), model.get_output_embeddings()),
    ):
        assert torch.equal(now.weight[:VOCABULARY], was.weight) and now.weight.shape[0] == ROWS
        torch.testing.assert_close(now.weight[VOCABULARY:], was.weight.mean(0).expand(NEW, -1))
    tied = before.get_input_embeddings().weight is before.get_output_embeddings().weight
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


@pytest.mark.parametrize("base", ["llama", "untied", "positions"], indirect=True)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_loss_and_gradients_of_an_adapter_with_new_rows_equal_pefts(base: Path, tmp_path: Path, backend: str) -> None:
    ours = adapted(base)
    save_model(ours, tmp_path, base=base)
    with quiet_peft():
        theirs = PeftModel.from_pretrained(plain_base(base), tmp_path, is_trainable=True).eval()
    expected = plain_loss(theirs, example())
    expected.backward()
    objective = objective_of(ours.get_base_model(), backend)
    got = objective.loss_sum(microbatch_of([example()]))
    torch.testing.assert_close(got.detach().float(), expected.detach(), rtol=1e-5, atol=1e-5)
    got.backward()
    want, have = gradients(theirs), gradients(ours)
    assert want.keys() == have.keys() and any("trainable_tokens" in name for name in want)
    for name, gradient in want.items():
        torch.testing.assert_close(have[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_head_with_a_bias_cannot_be_resized_for_adapters(tmp_path: Path) -> None:
    """PEFT ignores the bias of such a head, so the loaded adapter would give another model."""
    for kind, refused in (("phi", True), ("llama", False)):
        model = our_model(save_tiny(tmp_path / kind, kind))
        grow_embeddings(model, ROWS)
        refuse_lost_bias(model, tmp_path, method="full")
        with pytest.raises(ConfigError) if refused else nullcontext():
            refuse_lost_bias(model, tmp_path, method="lora")


def test_pefts_loader_resizes_the_base(tmp_path: Path) -> None:
    """AutoPeftModelForCausalLM resizes the base to the tokenizer in the adapter's folder."""
    base = save_tiny(tmp_path / "base", "llama-mha")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{number}>" for number in range(VOCABULARY + NEW - len(tokenizer))])
    tokenizer.save_pretrained(base)
    assert len(tokenizer) == ROWS
    model = adapted(base)
    save_model(model, tmp_path / "saved", base=base)
    with quiet_peft():
        theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert our_loss(model.get_base_model(), example()) == pytest.approx(plain_loss(theirs, example()).item(), rel=1e-5)


def test_an_adapter_with_new_rows_is_opened_and_restored_unchanged(base: Path, tmp_path: Path) -> None:
    model = adapted(base, seed=1)
    save_model(model, tmp_path, base=base)
    assert trained_rows(tmp_path) == ROWS and trained_rows(base) == 0
    opened = open_trained(tmp_path, dtype=torch.float32, device=CPU, say=lambda _: None)
    assert our_loss(opened, example()) == pytest.approx(our_loss(model.get_base_model(), example()), rel=1e-5)
    other = adapted(base, seed=2)
    restore_model(other, tmp_path)
    for name, parameter in trained_parameters(model).items():
        assert torch.equal(trained_parameters(other)[name], parameter), name


def test_a_fully_trained_model_with_new_rows_is_loaded_by_transformers_alone(base: Path, tmp_path: Path) -> None:
    model = our_model(base)
    grow_embeddings(model, ROWS)
    save_model(moved(model, 3), tmp_path, base=base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert loaded.config.vocab_size == ROWS == loaded.get_output_embeddings().weight.shape[0]
    expected = plain_loss(loaded, example()).item()
    assert our_loss(model, example()) == pytest.approx(expected, rel=1e-5)


def test_without_new_rows_adapters_train_no_row(base: Path, tmp_path: Path) -> None:
    model = add_lora(our_model(base), LoraConfig(rank=2), base=str(base), seed=0, lean=True)
    assert not any("trainable_tokens" in name for name in trained_parameters(model))
    save_model(model, tmp_path, base=base)
    assert trained_rows(tmp_path) == 0


def test_an_adapter_with_tokens_trained_by_peft_is_opened(base: Path, tmp_path: Path) -> None:
    """The trained rows exist in the base and are given as a list."""
    with quiet_peft():
        turned = "gpt2" in AutoConfig.from_pretrained(base).model_type
        settings = PeftLoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules="all-linear", trainable_token_indices=[5, 9], fan_in_fan_out=turned
        )
        theirs = moved(get_peft_model(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), settings), 4)
        theirs.peft_config["default"].base_model_name_or_path = str(base)
        theirs.save_pretrained(tmp_path)
    old = Example("rows.jsonl", 0, 1, torch.tensor([5, 9, 7, 5, 9], dtype=torch.int32).numpy(), torch.ones(5).bool().numpy())
    old.targets[0] = False
    opened = open_trained(tmp_path, dtype=torch.float32, device=CPU, say=lambda _: None)
    expected = plain_loss(theirs.eval(), old).item()
    assert our_loss(opened, old) == pytest.approx(expected, rel=1e-4)
