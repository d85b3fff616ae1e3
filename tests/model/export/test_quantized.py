"""A base that bitsandbytes quantised is read as the numbers it stands for, and merged into them; other quantisations are refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model.export.test_merge import save_adapter
from tests.support.beside import python_with
from tests.support.models import save_tiny
from tests.support.tokenizers import save_tokenizer
from tests.support.workers import ROOT, worker_environment
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llamahome.errors import ConfigError
from llamahome.model.adapter import wrap_plain
from llamahome.model.export.merge import TrainedWeights
from llamahome.model.export.merged import write_merged
from llamahome.model.export.quantized import DequantizedStore, method_of, open_weights, quantization_of, why_not_run
from llamahome.model.export.verify import compare, load_dequantized, load_plain, logits_of
from llamahome.model.generate import as_transformers_runs_it
from llamahome.model.load import load_model
from llamahome.model.packed_weight import packed_weights
from llamahome.model.quantize import write_quantized
from llamahome.model.quantized_sizes import Kind
from llamahome.model.rounding import scale_table, to_int8, to_nf4

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 stored as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}
PROMPTS = [[5, 9, 200, 31], [7, 8, 9, 10, 11, 12]]


def save_quantized(folder: Path, kind: str, *, intermediate_size: int = 128) -> Path:
    """A tiny model as bitsandbytes and transformers save it, and the model that it was made of in `folder`/plain."""
    pytest.importorskip("bitsandbytes", reason="the last test here runs this file with it")
    plain = save_tiny(folder / "plain", hidden_size=64, intermediate_size=intermediate_size, head_dim=16)
    settings = BitsAndBytesConfig(**KINDS[kind])
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=torch.bfloat16).save_pretrained(folder / "base")
    return save_tokenizer(folder / "base", vocabulary=320)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_numbers_that_bitsandbytes_reads(kind: str, tmp_path: Path) -> None:
    base = save_quantized(tmp_path, kind)
    import bitsandbytes.functional as functional

    weights, original, read = open_weights(base), open_weights(tmp_path / "plain"), 0
    assert {name: info.shape for name, info in weights.tensors.items()} == {name: info.shape for name, info in original.tensors.items()}
    for path, module in load_plain(base).named_modules():
        if type(module).__name__ == "Linear4bit":
            expected = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            expected = functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
        else:
            continue
        torch.testing.assert_close(weights.read(f"{path}.weight").to(expected.dtype), expected)
        read += 1
    assert read == 14


def test_blocks_that_run_over_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    base = save_quantized(tmp_path, "nf4", intermediate_size=96)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = open_weights(tmp_path / "plain").read(name).flatten()
    blocks = weight.reshape(-1, 64).abs().amax(1, keepdim=True)
    off = (open_weights(base).read(name).reshape(-1, 64) - weight.reshape(-1, 64)).abs()
    assert (off <= 0.16 * blocks).all(), "half of the widest gap between two values of nf4"
    assert "wrongly" in (why_not_run(base) or "")


@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_model_computes_what_peft_computes_on_the_quantised_base(kind: str, dora: bool, tmp_path: Path) -> None:
    base = save_quantized(tmp_path, kind)
    adapter = save_adapter(tmp_path / "plain", tmp_path / "adapter", r=4, lora_alpha=8, use_dora=dora)
    (tmp_path / "out").mkdir()
    write_merged(tmp_path / "out", TrainedWeights(base, adapter), base=base, dtype=torch.float32)
    assert quantization_of(tmp_path / "out") is None
    mine, theirs = (logits_of(model, PROMPTS) for model in (load_plain(tmp_path / "out"), wrap_plain(load_plain(base), adapter)))
    found = compare(theirs, mine, quant="f32")
    assert found.greatest < (1.5 if kind == "int8" else 0.1 if dora else 1e-4)
    assert found.same_choices > 0.85
    dequantized = wrap_plain(load_dequantized(base), adapter)
    assert compare(logits_of(dequantized, PROMPTS), mine, quant="f32").greatest < 1e-4


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_transformers_with_bitsandbytes_loads_what_we_quantise(kind: Kind, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the last test here runs this file with it")
    import bitsandbytes.functional as functional

    plain = save_tiny(tmp_path / "plain", hidden_size=64, intermediate_size=128, head_dim=16)
    write_quantized(plain, kind, tmp_path / "ours", say=lambda line: None)
    exact = open_weights(plain)
    settings = BitsAndBytesConfig(**KINDS["nf4 twice" if kind == "nf4" else kind])
    theirs = dict(AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=torch.float32).named_modules())
    packed, read = dict(packed_weights(load_model(tmp_path / "ours", dtype=torch.float32, device=torch.device("cpu")))), 0
    for path, module in AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).named_modules():
        if type(module).__name__ == "Linear4bit":
            loaded = functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            own = functional.dequantize_4bit(theirs[path].weight.data, theirs[path].weight.quant_state).float()
        elif type(module).__name__ == "Linear8bitLt":
            loaded = functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB).float()
            own = functional.int8_vectorwise_dequant(theirs[path].weight.CB, theirs[path].weight.SCB).float()
        else:
            if (in_8_bits := packed.get(f"{path}.weight")) is not None:
                assert torch.equal(module.weight, in_8_bits.widened()), path
                read += 1
            continue
        ours = packed[f"{path}.weight"].widened()
        assert (loaded - ours).norm() <= 1e-6 * ours.norm(), path
        weight = exact.read(f"{path}.weight")
        nearest = torch.empty_like(weight)
        (to_nf4(weight) if kind == "nf4" else to_int8(weight)).fill(nearest)
        assert (own - nearest).norm() <= 0.01 * nearest.norm(), "bitsandbytes rounds to the same numbers, but for ties"
        read += 1
    assert read == len(packed) == 14
    if kind == "nf4":
        assert torch.equal(scale_table(), functional.create_dynamic_map())


def test_transformers_with_bitsandbytes_computes_our_logits_with_some_layers_in_8_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the last test here runs this file with it")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 1}
    plain = save_tiny(tmp_path / "plain", **sizes)
    load_plain(plain).bfloat16().save_pretrained(plain)
    write_quantized(plain, "nf4", tmp_path / "ours", say=lambda line: None)
    theirs = load_plain(tmp_path / "ours")
    kinds = {path: type(module).__name__ for path, module in theirs.named_modules() if path.endswith("_proj")}
    in_4_bits = {name.removesuffix(".weight") for name in DequantizedStore(tmp_path / "ours").quantized}
    assert in_4_bits == {path for path, kind in kinds.items() if kind == "Linear4bit"} < kinds.keys()
    ours = load_model(tmp_path / "ours", dtype=torch.float32, device=torch.device("cpu"))
    with as_transformers_runs_it(ours):
        found = compare(logits_of(theirs, PROMPTS), logits_of(ours, PROMPTS), quant="f32")
    assert found.greatest < 1e-4


def test_other_quantisations_are_refused_by_their_name(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for settings in ({"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "bits": 4}, {"quant_method": "fp8"}):
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(ConfigError) as error:
            open_weights(base)
        assert error.value.problems[0].code == "export.quantized"
        assert str(settings["quant_method"]) in error.value.problems[0].message
    assert method_of({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}) == "bitsandbytes, nf4"


def test_a_weight_without_its_scales_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = save_quantized(tmp_path, "nf4 twice")
    tensors = load_file(base / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight.nested_absmax")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError) as error:
        open_weights(base)
    assert "nested_absmax is in no file" in error.value.problems[0].message


@pytest.mark.slow
def test_everything_here_holds_with_bitsandbytes() -> None:
    """bitsandbytes is not among the installed packages, because PEFT imports it at every start, which takes a second."""
    if "bitsandbytes" in sys.modules:
        pytest.skip("this is that run")
    command = [str(python_with("bitsandbytes>=0.50,<1")), "-m", "pytest", "-q", "-p", "no:xdist", "-W", "ignore", __file__]
    done = subprocess.run(command, cwd=ROOT, env=worker_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout
