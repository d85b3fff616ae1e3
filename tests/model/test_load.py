"""Models that can be trained load unchanged; others are refused with the reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.support.models import CPU, NOT_PACKABLE, our_model, plain_model, save_tiny
from transformers import AutoModelForCausalLM

from llamahome.errors import ConfigError, LlamaHomeError, MachineError
from llamahome.model.attention import register_attention
from llamahome.model.load import find_model, head_of, load_model
from llamahome.model.packing import packing_of
from llamahome.model.probe import choose_packing

REASONS = {
    "convolution": "its layers are not all plain or sliding attention (conv)",
    "recurrent": "its layers are not all plain or sliding attention (linear_attention)",
    "linear": "its layers are not all plain or sliding attention (linear_attention)",
    "sinks": "a mask or sinks of its own",
    "no-documents": "it does not tell its attention where they begin",
    "own": "code of its own that cannot keep them apart",
    "state": "code of its own that cannot keep them apart",
}


def problem_of(error: pytest.ExceptionInfo[LlamaHomeError]) -> str:
    (problem,) = error.value.problems
    return f"{problem.code}: {problem.message}"


@pytest.mark.parametrize("kind", NOT_PACKABLE)
def test_a_model_that_cannot_separate_documents_runs_them_one_at_a_time(tmp_path: Path, kind: str) -> None:
    packing = packing_of(our_model(save_tiny(tmp_path, kind)))
    assert packing.why_alone is not None and REASONS[kind] in packing.why_alone
    (line,) = packing.remarks(documents=400, passes=25)
    assert line.endswith("; about 400 small passes instead of 25 full ones")


class _Convolution(torch.nn.Module):
    """Adds a share of the previous token's value, also across documents; without its gradient if `detached`."""

    def __init__(self, own: torch.nn.Module, share: float, *, detached: bool = False) -> None:
        super().__init__()
        self.own, self.share, self.detached = own, share, detached

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.own(x)
        before = torch.nn.functional.pad(out, (0, 0, 1, -1))
        return out + self.share * (before.detach() if self.detached else before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 20])
def test_the_probe_finds_a_leak_between_documents_however_weak(dtype: torch.dtype, kind: str, share: float) -> None:
    register_attention()
    model = plain_model(kind).to(dtype)
    attention = model.get_decoder().layers[0].self_attn
    attention.v_proj = _Convolution(attention.v_proj, share)
    why = choose_packing(model, head_of(model)).why_alone
    assert (why is not None) == (share > 0)
    assert why is None or ("a document changes" in why and "in the same pass" in why)


@pytest.mark.parametrize(("kind", "shares"), [("llama", [0.02]), ("mixtral", [0.0, 0.001, 0.01]), ("qwen2-moe", [0.0, 0.001])])
def test_the_probe_finds_a_weak_leak_without_a_gradient_in_bfloat16(kind: str, shares: list[float]) -> None:
    register_attention()
    for share in shares:
        model = plain_model(kind).bfloat16()
        attention = model.get_decoder().layers[0].self_attn
        attention.v_proj = _Convolution(attention.v_proj, share, detached=True)
        weights = [id(weight) for weight in model.parameters()]
        why = choose_packing(model, head_of(model)).why_alone
        assert (why is not None and "a document changes another" in why) if share else why is None
        assert [id(weight) for weight in model.parameters()] == weights and model.dtype == torch.bfloat16


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="its weights are quantised") as error:
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
def test_the_error_for_a_folder_that_is_no_base_model_says_what_it_is(tmp_path: Path, content: dict[str, str], code: str) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        find_model(str(tmp_path), say=lambda _: None)
    assert problem_of(error).startswith(code) and error.value.problems[0].hint


def test_the_hint_for_a_folder_around_a_model_names_the_subfolder(tmp_path: Path) -> None:
    deeper = tmp_path / "downloaded" / "the model"
    deeper.mkdir(parents=True)
    (deeper / "config.json").write_text("{}")
    (deeper / "model.safetensors").touch()
    with pytest.raises(ConfigError) as error:
        find_model(str(tmp_path), say=lambda _: None)
    assert error.value.problems[0].hint == f"--model '{deeper}'"


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_folder_is_reported_as_unreadable(tmp_path: Path, damage: str) -> None:
    save_tiny(tmp_path)
    (tmp_path / damage).write_bytes((tmp_path / damage).read_bytes()[:200])
    with pytest.raises(ConfigError) as error:
        our_model(tmp_path)
    assert problem_of(error).startswith("model.unreadable")


def test_missing_weights_are_refused_not_initialized(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"layers\.2") as error:
        our_model(tmp_path)
    assert problem_of(error).startswith("model.unreadable")


def test_the_hint_for_an_unknown_name_is_the_closest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        find_model("smollm2-135m-instuct", say=lambda _: None)
    assert problem_of(error).startswith("model.not-found") and error.value.problems[0].hint == "--model smollm2-135m-instruct"


def test_the_error_for_a_hub_id_offline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set") as error:
        find_model("nobody/no-such-model-at-all", say=lambda _: None)
    assert problem_of(error).startswith("model.hub-failed")


def test_a_path_below_the_folders_of_runs_and_data_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    with pytest.raises(ConfigError) as error:
        find_model("output/nothing", say=lambda _: None)
    assert problem_of(error).startswith("model.not-found")


def test_names_are_folders_or_folders_under_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = save_tiny(tmp_path / "data/models/base/tiny")
    assert find_model("tiny", say=lambda _: None).resolve() == made == find_model(str(made), say=lambda _: None)
    shutil.move(made, tmp_path / "here")
    assert find_model("here", say=lambda _: None) == Path("here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_equals_the_saved_one_in_one_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny(tmp_path, "llama")
    ours, theirs = load_model(tmp_path, dtype=dtype, device=CPU), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for (name, actual), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert actual.dtype == dtype and torch.equal(actual, expected), name


def test_the_head_has_scale_cap_and_bias(tmp_path: Path) -> None:
    granite = head_of(our_model(save_tiny(tmp_path / "granite", "granite")))
    assert granite.scale == pytest.approx(1 / 3) and granite.softcap is None and granite.bias_V is None
    assert head_of(our_model(save_tiny(tmp_path / "gemma2", "gemma2"))).softcap == 3.0
    assert head_of(our_model(save_tiny(tmp_path / "phi", "phi"))).bias_V is not None
