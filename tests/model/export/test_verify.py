"""An export is compared for real: another model, a missing adapter and numbers that are none are refused, large models by streaming too."""

from pathlib import Path

import pytest
import torch
from tests.model.export.test_merge import save_adapter
from tests.support.models import save_tiny

from llamahome.errors import ConfigError
from llamahome.model.export import verify
from llamahome.model.export.merge import TrainedWeights
from llamahome.model.export.merged import write_merged
from llamahome.model.export.verify import compare, exported_logits, load_dequantized, load_plain, logits_of, stream, trained_logits
from llamahome.model.export.weightstore import WeightStore
from llamahome.model.load import load_model
from llamahome.model.packed_weight import packed_weights
from llamahome.model.quantize import write_quantized
from llamahome.model.quantized_sizes import Kind

PROMPTS = [[5, 9, 200, 31], [7, 8, 9, 10, 11, 12]]


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Path, Path]:
    base = save_tiny(tmp_path / "base")
    return base, save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8)


def merged(adapted: tuple[Path, Path], folder: Path, *, with_adapter: bool = True) -> Path:
    base, adapter = adapted
    folder.mkdir()
    write_merged(folder, TrainedWeights(base, adapter if with_adapter else None), base=base, dtype=torch.float32)
    return folder


@pytest.mark.parametrize("large", [False, True], ids=["loaded whole", "layer by layer"])
def test_a_right_export_passes_and_one_without_its_adapter_is_refused(
    adapted: tuple[Path, Path], large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "LARGE", 0 if large else 1 << 40)
    base, adapter = adapted
    weights = TrainedWeights(base, adapter)
    trained = trained_logits(adapter, base, weights, PROMPTS)
    right = exported_logits(merged(adapted, tmp_path / "right"), base, weights, PROMPTS, to="merged")
    compare(trained, right, quant="f32").require("the export")
    wrong = exported_logits(merged(adapted, tmp_path / "wrong", with_adapter=False), base, weights, PROMPTS, to="merged")
    with pytest.raises(ConfigError) as error:
        compare(trained, wrong, quant="f32").require("the export")
    assert error.value.problems[0].code == "export.differs" and error.value.problems[0].hint is None
    with pytest.raises(ConfigError) as error:
        compare(trained, wrong, quant="bf16").require("the export")
    assert str(error.value.problems[0].hint).startswith("--quant f32 "), "it tells a wrong export from a rounded one"


def test_numbers_that_are_none_are_refused() -> None:
    logits = [torch.randn(3, 8, generator=torch.Generator().manual_seed(0))]
    for spoilt in (float("nan"), float("inf")):
        other = [logits[0].clone()]
        other[0][1, 2] = spoilt
        with pytest.raises(ConfigError):
            compare(logits, other, quant="q4_0").require("the export")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3", "gpt2"])
def test_a_streamed_model_has_the_logits_of_a_loaded_one(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", kind)
    store = WeightStore(folder)
    model = stream(folder, store.read, store)
    if model is None:
        assert kind == "gpt2", "its files name tensors without the prefix that they have in memory"
        return
    for mine, theirs in zip(logits_of(load_plain(folder), PROMPTS), logits_of(model, PROMPTS), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)
    assert all(parameter.is_meta for parameter in model.parameters()), "weights are dropped after they computed"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("base", ["qwen2-moe", "mixtral"])
def test_a_quantised_mixture_of_experts_is_read_though_its_files_name_experts_one_by_one(base: str, kind: Kind, tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", base, hidden_size=64, head_dim=16)
    write_quantized(plain, kind, tmp_path / "copy", say=lambda line: None)
    read = load_dequantized(tmp_path / "copy")
    packed = load_model(tmp_path / "copy", dtype=torch.float32, device=torch.device("cpu"))
    weights = {name: weight.widened() for name, weight in packed_weights(packed)}
    assert len(weights) > 0
    for name, parameter in read.named_parameters():
        expected = weights[name] if name in weights else packed.get_parameter(name)
        torch.testing.assert_close(parameter, expected.float(), rtol=0, atol=0, check_device=False)
