"""Saved models load in transformers and PEFT with the same logits, restored models are bit-equal, and a moved base is found."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from tests.support.models import CPU, backend_named, examples_of, microbatch_of, objective_of, our_model, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError
from llamahome.model.adapter import open_trained, restore_model, save_model
from llamahome.model.adapter_folder import base_of, is_adapter
from llamahome.model.backends.backend import Documents
from llamahome.model.fingerprints import fingerprint
from llamahome.model.load import head_of
from llamahome.model.lora import add_lora, quiet_peft
from llamahome.model.packing import last_hidden
from llamahome.model.place import trained_parameters
from llamahome.model.precision import Precision

TOKENS = torch.arange(4, 20)
FORMS = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "vera": {"use_vera": True, "rank": 24},
    "vera with dropout": {"use_vera": True, "dropout": 0.3},
}


@pytest.fixture(scope="module", params=["llama", "phi", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def adapted(folder: Path, *, seed: int = 0, **changes) -> PeftModel:
    """A model with an adapter whose values are all changed."""
    config = LoraConfig(**{"rank": 4, "target_modules": "all-linear", **changes})
    return moved(add_lora(our_model(folder), config, base=str(folder), seed=seed, lean=True), seed)


def moved(model: torch.nn.Module, seed: int):
    random = torch.Generator().manual_seed(seed)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return model


def our_logits(model: PreTrainedModel) -> torch.Tensor:
    model.eval()
    documents = Documents((len(TOKENS),))
    hidden = last_hidden(model, TOKENS, torch.arange(len(TOKENS)), documents, attend=backend_named("cpu").attend)
    head = head_of(model)
    return torch.nn.functional.linear(hidden, head.weight_VD, head.bias_V).detach()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_written_config_is_the_same_whatever_order_the_sets_of_peft_have(llama: Path, tmp_path: Path) -> None:
    model = adapted(llama, modules_to_save=["lm_head", "embed_tokens"])
    written = set()
    for number, ascending in enumerate((True, False)):
        for name in ("target_modules", "modules_to_save"):
            names = sorted(getattr(model.peft_config["default"], name), reverse=not ascending)
            setattr(model.peft_config["default"], name, _Ordered(names))
        save_model(model, tmp_path / str(number), base=llama)
        written.add((tmp_path / str(number) / "adapter_config.json").read_bytes())
    assert len(written) == 1
    assert json.loads(written.pop())["target_modules"] == sorted(model.peft_config["default"].target_modules)


class _Ordered(set):
    """A set that lists its members in a given order, as another process may."""

    def __init__(self, members: list[str]) -> None:
        super().__init__(members)
        self._members = members

    def __iter__(self):
        return iter(self._members)


@pytest.mark.parametrize("form", FORMS)
def test_peft_alone_gives_the_same_logits(llama: Path, tmp_path: Path, form: str) -> None:
    model = adapted(llama, **FORMS[form])
    save_model(model, tmp_path / "saved", base=llama)
    with quiet_peft():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "saved").eval()
    bound = 3e-5 if form == "dora" else 1e-5  # PEFT adds (gain - 1) times the outputs of the base, which rounds otherwise
    torch.testing.assert_close(loaded(input_ids=TOKENS[None]).logits[0].detach(), our_logits(model.get_base_model()), rtol=1e-5, atol=bound)


def test_peft_alone_loads_an_adapter_of_any_architecture(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    save_model(model, tmp_path / "saved", base=base)
    with quiet_peft():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved").eval()
    torch.testing.assert_close(loaded(input_ids=TOKENS[None]).logits[0].detach(), our_logits(model.get_base_model()), rtol=1e-5, atol=1e-5)


def test_transformers_alone_gives_the_same_logits(base: Path, tmp_path: Path) -> None:
    model = moved(our_model(base), 3)
    save_model(model, tmp_path / "saved", base=base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.dtype == torch.float32 and loaded.config.use_cache
    torch.testing.assert_close(loaded(input_ids=TOKENS[None]).logits[0].detach(), our_logits(model), rtol=1e-5, atol=1e-5)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_folder_holds_safetensors_and_text_and_the_tokenizer(llama: Path, tmp_path: Path, method: str) -> None:
    model = adapted(llama) if method == "lora" else our_model(llama)
    save_model(model, tmp_path, base=llama)
    weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    names = files(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".jinja"}
    assert {weights, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert [name for name in names if name.endswith(".safetensors")] == [weights]
    assert "README.md" not in names
    theirs, ours = AutoTokenizer.from_pretrained(llama), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.chat_template == theirs.chat_template and ours("Hello there").input_ids == theirs("Hello there").input_ids


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_saved_generation_config_equals_the_bases(llama: Path, tmp_path: Path, method: str) -> None:
    """Also a config that transformers refuses to save: a temperature without sampling, as in several published models."""
    base = tmp_path / "base"
    save_tiny(base)
    written = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 0], "bos_token_id": 0}
    (base / "generation_config.json").write_text(json.dumps(written))
    save_model(adapted(base) if method == "lora" else our_model(base), tmp_path / "saved", base=base)
    assert json.loads((tmp_path / "saved/generation_config.json").read_text()) == written


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_is_restored_bit_by_bit(llama: Path, tmp_path: Path, form: str) -> None:
    model = adapted(llama, seed=1, **FORMS[form])
    save_model(model, tmp_path, base=llama)
    other = adapted(llama, seed=2, **FORMS[form])
    restore_model(other, tmp_path)
    for (name, actual), expected in zip(trained_parameters(other).items(), trained_parameters(model).values(), strict=True):
        assert actual.requires_grad and actual.dtype == torch.float32 and torch.equal(actual, expected), name


def test_a_full_model_is_restored_bit_by_bit_in_place(base: Path, tmp_path: Path) -> None:
    model = moved(our_model(base), 1)
    save_model(model, tmp_path, base=base)
    other = our_model(base)
    before = {name: parameter.data_ptr() for name, parameter in other.named_parameters()}
    restore_model(other, tmp_path)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]) and parameter.data_ptr() == before[name]
    tied = other.get_input_embeddings().weight is other.get_output_embeddings().weight
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


@pytest.mark.parametrize("other", [{"rank": 8}, {"target_modules": ["q_proj"]}, {"use_dora": True}, {"use_vera": True}], ids=str)
def test_an_adapter_of_another_shape_is_refused(llama: Path, tmp_path: Path, other: dict) -> None:
    for number, (saved, expected) in enumerate([({}, other), (other, {})]):
        folder = tmp_path / str(number)
        save_model(adapted(llama, **saved), folder, base=llama)
        with pytest.raises(ConfigError) as error:
            restore_model(adapted(llama, **expected), folder)
        assert error.value.problems[0].code == "model.weights-do-not-fit" and error.value.problems[0].hint


def test_a_full_model_of_another_shape_is_refused(llama: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", intermediate_size=40)
    with pytest.raises(ConfigError) as error:
        restore_model(our_model(llama), tmp_path)
    assert error.value.problems[0].code == "model.weights-do-not-fit"


def test_a_truncated_adapter_is_refused(llama: Path, tmp_path: Path) -> None:
    save_model(adapted(llama), tmp_path, base=llama)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError):
        restore_model(adapted(llama), tmp_path)
    with pytest.raises(ConfigError):
        open_trained(tmp_path, dtype=torch.float32, device=CPU, say=lambda _: None)


@pytest.mark.parametrize("form", FORMS)
def test_an_opened_adapter_is_the_trained_model(llama: Path, tmp_path: Path, form: str) -> None:
    model = adapted(llama, **FORMS[form])
    save_model(model, tmp_path, base=llama)
    assert is_adapter(tmp_path) and not is_adapter(llama) and base_of(tmp_path) == str(llama)
    opened = open_trained(tmp_path, dtype=torch.float32, device=CPU, say=lambda _: None)
    torch.testing.assert_close(our_logits(opened), our_logits(model.get_base_model()), rtol=1e-5, atol=1e-5)


def test_an_adapter_created_by_peft_is_opened_completely(tmp_path: Path) -> None:
    """An adapter with a bias uses PEFT's forward."""
    base = save_tiny(tmp_path / "base", "phi")
    with quiet_peft():
        settings = PeftLoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "dense"], lora_bias=True)
        theirs = moved(get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings), 4)
        theirs.peft_config["default"].base_model_name_or_path = str(base)
        warnings.filterwarnings("ignore", message=".*invalid shape", category=PeftWarning)  # PEFT takes its own biases for torn matrices
        theirs.save_pretrained(tmp_path / "saved")
    opened = open_trained(tmp_path / "saved", dtype=torch.float32, device=CPU, say=lambda _: None)
    torch.testing.assert_close(our_logits(opened), theirs.eval()(input_ids=TOKENS[None]).logits[0].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_an_opened_adapter_is_evaluated_under_autocast_too(llama: Path, tmp_path: Path, form: str) -> None:
    save_model(adapted(llama, **FORMS[form]), tmp_path, base=llama)
    opened = open_trained(tmp_path, dtype=torch.float32, device=CPU, say=lambda _: None).eval()
    batch = microbatch_of(examples_of([20, 9, 3]))
    exact = objective_of(opened).stats(batch).loss_sum
    low = objective_of(opened, precision=Precision(torch.float32, torch.bfloat16, "a test")).stats(batch).loss_sum
    assert abs(low - exact) < 0.02 * exact


def test_an_opened_full_model_is_that_model(llama: Path, tmp_path: Path) -> None:
    model = moved(our_model(llama), 5)
    save_model(model, tmp_path, base=llama)
    opened = open_trained(tmp_path, dtype=torch.float32, device=CPU, say=lambda _: None)
    torch.testing.assert_close(our_logits(opened), our_logits(model), rtol=1e-5, atol=1e-5)


def test_the_fingerprint_changes_with_any_weight_of_a_small_model_and_any_setting(llama: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "same", "llama")
    before = fingerprint(tmp_path / "same")
    assert before == fingerprint(llama)
    weights = tmp_path / "same/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 3] ^= 1
    weights.write_bytes(content)
    assert fingerprint(tmp_path / "same") != before
    save_tiny(tmp_path / "other", "llama", rms_norm_eps=1e-4)
    assert fingerprint(tmp_path / "other") != before
