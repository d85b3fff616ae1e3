"""What can be trained is loaded as it is; what cannot is refused before any time is spent, with the reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.support.models import CPU, UNFIT, our_model, plain_model, save_tiny
from transformers import AutoModelForCausalLM

from llamahome.errors import ConfigError, LlamaHomeError, MachineError
from llamahome.model.attention import register_attention
from llamahome.model.load import find_model, head_of, load_model
from llamahome.model.packing import packing_of
from llamahome.model.probe import settle

REASONS = {
    "convolution": "its layers are not all plain or sliding attention (conv)",
    "recurrent": "its layers are not all plain or sliding attention (linear_attention)",
    "linear": "its layers are not all plain or sliding attention (linear_attention)",
    "sinks": "a mask or sinks of its own",
    "deaf": "it does not tell its attention where they begin",
    "own": "code of its own that cannot keep them apart",
    "state": "code of its own that cannot keep them apart",
}


def problem_of(error: pytest.ExceptionInfo[LlamaHomeError]) -> str:
    (problem,) = error.value.problems
    return f"{problem.code}: {problem.message}"


@pytest.mark.parametrize("kind", UNFIT)
def test_a_model_whose_tokens_could_see_other_documents_takes_them_one_at_a_time(tmp_path: Path, kind: str) -> None:
    packing = packing_of(our_model(save_tiny(tmp_path, kind)))
    assert packing.why_alone is not None and REASONS[kind] in packing.why_alone
    (line,) = packing.remarks(documents=400, passes=25)
    assert line.endswith("; about 400 small passes instead of 25 full ones")


class _Convolution(torch.nn.Module):
    """Adds what stands before a token, whose document it does not know, strongly enough to be seen in bfloat16."""

    def __init__(self, own: torch.nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x) + 20 * torch.nn.functional.pad(x, (0, 0, 1, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_between_documents_is_found_by_trying(dtype: torch.dtype) -> None:
    register_attention()
    leaky, tight = (plain_model("llama").to(dtype) for _ in range(2))
    leaky.get_decoder().layers[0].mlp = _Convolution(leaky.get_decoder().layers[0].mlp)
    assert settle(tight, head_of(tight)).why_alone is None
    assert "changes what follows it in the same pass" in str(settle(leaky, head_of(leaky)).why_alone)


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="its weights are quantized") as error:
        our_model(tmp_path)
    assert problem_of(error).startswith("model.unsupported")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        our_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({}, "model.no-config"),
        ({"config.json": "{}"}, "model.no-weights"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, "model.pickled-weights"),
        ({"adapter_config.json": "{}", "config.json": "{}"}, "model.is-an-adapter"),
    ],
)
def test_a_folder_that_is_no_base_model_says_what_it_is(tmp_path: Path, content: dict[str, str], code: str) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        find_model(str(tmp_path), say=lambda _: None)
    assert problem_of(error).startswith(code) and error.value.problems[0].hint


def test_a_folder_that_holds_a_model_one_floor_deeper_says_where(tmp_path: Path) -> None:
    deeper = tmp_path / "downloaded" / "the model"
    deeper.mkdir(parents=True)
    (deeper / "config.json").write_text("{}")
    (deeper / "model.safetensors").touch()
    with pytest.raises(ConfigError) as error:
        find_model(str(tmp_path), say=lambda _: None)
    assert error.value.problems[0].hint == f"--model '{deeper}'"


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_folder_is_unreadable_not_a_traceback(tmp_path: Path, damage: str) -> None:
    save_tiny(tmp_path)
    (tmp_path / damage).write_bytes((tmp_path / damage).read_bytes()[:200])
    with pytest.raises(ConfigError) as error:
        our_model(tmp_path)
    assert problem_of(error).startswith("model.unreadable")


def test_weights_that_are_missing_are_refused_rather_than_made_up(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"layers\.2") as error:
        our_model(tmp_path)
    assert problem_of(error).startswith("model.unreadable")


def test_an_unknown_name_suggests_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        find_model("smollm2-135m-instuct", say=lambda _: None)
    assert problem_of(error).startswith("model.not-found") and error.value.problems[0].hint == "--model smollm2-135m-instruct"


def test_a_hub_id_offline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set") as error:
        find_model("nobody/no-such-model-at-all", say=lambda _: None)
    assert problem_of(error).startswith("model.hub-failed")


def test_names_are_folders_or_folders_under_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = save_tiny(tmp_path / "data/models/base/tiny")
    assert find_model("tiny", say=lambda _: None).resolve() == made == find_model(str(made), say=lambda _: None)
    shutil.move(made, tmp_path / "here")
    assert find_model("here", say=lambda _: None) == Path("here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_the_saved_one_in_one_type(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny(tmp_path, "llama")
    ours, theirs = load_model(tmp_path, dtype=dtype, device=CPU), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for (name, found), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert found.dtype == dtype and torch.equal(found, expected), name


def test_the_head_carries_scale_cap_and_bias(tmp_path: Path) -> None:
    granite = head_of(our_model(save_tiny(tmp_path / "granite", "granite")))
    assert granite.scale == pytest.approx(1 / 3) and granite.softcap is None and granite.bias_V is None
    assert head_of(our_model(save_tiny(tmp_path / "gemma2", "gemma2"))).softcap == 3.0
    assert head_of(our_model(save_tiny(tmp_path / "phi", "phi"))).bias_V is not None
