"""A base is quantised once, in bitsandbytes' layout, and a model beside it computes what the numbers that its weights stand for give."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.model.test_lora import weights_up
from tests.support.models import CPU, backend_named, examples_of, microbatch_of, our_model, plain_loss, save_tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome import durable
from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError, MachineError
from llamahome.model import layer_chain
from llamahome.model.adapter import save_model, wrap_plain
from llamahome.model.export.quantized import open_weights
from llamahome.model.export.verify import load_dequantized
from llamahome.model.export.weightstore import WeightStore
from llamahome.model.load import load_model
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.packed_weight import PackedWeight, packed_bytes, packed_weights, widen_all
from llamahome.model.place import trained_parameters
from llamahome.model.quantize import write_quantized
from llamahome.model.quantized_copy import quantized_base
from llamahome.model.quantized_sizes import Kind, sizes_of
from llamahome.model.rounding import BLOCK, SMALL_BLOCK, to_int8, to_nf4
from llamahome.rundir import QUANTIZED_MODELS

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
KINDS: tuple[Kind, ...] = ("nf4", "int8")
WIDEST_GAP = 0.16
"""Half of the widest gap between two values of NF4, from -1 to -0.696, rounded up."""


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def short_text() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_chain, "ROW_TOKENS", 24)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama-mha", **SIZES)


@pytest.fixture(scope="module", params=KINDS)
def quantized(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / request.param
    write_quantized(base, request.param, folder, say=quiet)
    return folder


@pytest.mark.parametrize("shape", [(3, 64), (96, 128), (257, 320)], ids=str)
@pytest.mark.parametrize("block", [BLOCK, SMALL_BLOCK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_is_further_off_than_half_a_gap(shape: tuple[int, int], dtype: torch.dtype, block: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :block] = 0.0
    four, eight = torch.empty(shape), torch.empty(shape)
    to_nf4(weight, block).fill(four)
    to_int8(weight).fill(eight)
    blocks, rows = weight.float().view(-1, block), weight.float()
    scale_error = blocks.abs().amax() / 127  # of scales that are quantised to 8 bits
    assert ((four.view(-1, block) - blocks).abs() <= WIDEST_GAP * blocks.abs().amax(1, keepdim=True) + scale_error).all()
    assert ((eight - rows).abs() <= rows.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    assert four[0, :block].abs().max() < scale_error


def test_head_embedding_and_norms_stay_as_they_are_and_the_rest_takes_half_a_byte(base: Path, quantized: Path) -> None:
    model = load_model(quantized, dtype=torch.float32, device=CPU)
    packed, original = dict(packed_weights(model)), WeightStore(base)
    assert sorted(packed) == sorted(name for name in original.tensors if name.endswith("proj.weight")) and len(packed) == 14
    for name, weight in model.named_parameters():
        assert name in packed or torch.equal(weight, original.read(name)), name
    stored = sum(packed_bytes(weight.packed) for weight in packed.values())
    sizes = sizes_of(base, "nf4" if "nf4" in quantized.name else "int8")
    assert (sizes.layers, sizes.nbytes) == (14, stored)


@pytest.mark.parametrize(("block", "most"), [(BLOCK, 0.53), (SMALL_BLOCK, 0.54)])
def test_a_layer_of_usual_size_takes_little_more_than_half_a_byte_a_parameter(block: int, most: float) -> None:
    assert packed_bytes(to_nf4(torch.ones(576, 576), block)) <= most * 576 * 576


def losses_and_gradients(model: PreTrainedModel, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    value = loss()
    value.backward()
    found = {"loss": value.detach()}
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None, name
        found[name.removeprefix("base_model.model.")] = parameter.grad
    return found


@pytest.mark.parametrize("how", ["reference", "cpu", "cpu compiled"])
def test_loss_and_gradients_are_those_of_peft_on_the_dequantised_weights(quantized: Path, how: str, tmp_path: Path) -> None:
    examples = examples_of([19, 7, 33])
    backend = backend_named(how.partition(" ")[0])
    ours = load_model(quantized, dtype=torch.float32, device=CPU)
    adapted = add_lora(ours, LoraConfig(rank=4, alpha=6), base="tiny", seed=1, lean=True)
    weights_up(adapted)
    save_model(adapted, tmp_path, base=quantized)
    if how == "cpu compiled":
        if backend.cannot_compile() is not None:
            pytest.skip("no compiler")
        assert backend.compile(ours) > 0
    found = losses_and_gradients(ours, lambda: Objective(ours, backend).loss_sum(microbatch_of(examples)))
    theirs = wrap_plain(load_dequantized(quantized).float(), tmp_path)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    plain = losses_and_gradients(theirs, lambda: torch.stack([plain_loss(theirs, example) for example in examples]).sum())
    assert found.keys() == plain.keys() and len(found) == 29
    for name, value in found.items():
        assert (value - plain[name]).norm() <= 1e-5 * plain[name].norm(), name
    assert len(list(packed_weights(ours))) == 14, "no copy was put in the place of a packed weight"


def test_the_backward_pass_keeps_no_widened_weight(quantized: Path) -> None:
    model = load_model(quantized, dtype=torch.float32, device=CPU)
    adapted = add_lora(model, LoraConfig(rank=4, alpha=6), base="tiny", seed=1, lean=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        Objective(model, backend_named("reference")).loss_sum(microbatch_of(examples_of([9])))
    shapes = {tuple(weight.shape) for _, weight in packed_weights(adapted)}
    assert any(isinstance(tensor, PackedWeight) for tensor in kept)
    assert not [tensor.shape for tensor in kept if type(tensor) is Tensor and tuple(tensor.shape) in shapes]


def test_a_packed_weight_cannot_be_changed_and_can_be_widened_for_good(quantized: Path) -> None:
    model = load_model(quantized, dtype=torch.bfloat16, device=CPU)
    layer = model.get_decoder().layers[0].mlp.up_proj
    with pytest.raises(RuntimeError, match="frozen"), torch.no_grad():
        layer.weight.add_(1.0)
    before, x = layer.weight.widened(), torch.ones(2, 64, dtype=torch.bfloat16)
    out = layer(x)
    widen_all(model)
    assert type(layer.weight) is nn.Parameter and torch.equal(layer.weight, before) and torch.equal(layer(x), out)
    assert not list(packed_weights(model))


def test_the_copy_is_made_once_and_named_by_the_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    folder = quantized_base(base, "nf4", say=lines.append)
    assert folder.parent == QUANTIZED_MODELS and "quantised once" in lines[0]
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    lines.clear()
    assert quantized_base(base, "nf4", say=lines.append) == folder and len(lines) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    other = save_tiny(tmp_path / "tiny", "llama-mha", seed=5, **SIZES)
    assert quantized_base(other, "nf4", say=quiet) != folder
    with pytest.raises(ConfigError) as error:
        quantized_base(folder, "nf4", say=quiet)
    assert error.value.problems[0].code == "model.quantized-twice"


def test_the_copy_is_whole_or_not_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(operation: str, path: Path, source: Path | None) -> None:
        if operation == "rename":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "observer", full_disk)
    with pytest.raises(MachineError) as error:
        write_quantized(base, "nf4", tmp_path / "made" / "copy", say=quiet)
    assert error.value.problems[0].code == "model.quantized-not-written"
    assert list((tmp_path / "made").iterdir()) == []


def test_what_killed_processes_left_is_removed_and_what_others_write_stays(base: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left, others = (tmp_path / f".another-nf4-0123.{pid}.tmp" for pid in (process.pid, os.getppid()))
    for folder in (left, others):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    write_quantized(base, "nf4", tmp_path / "copy", say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([others.name, "copy"])


def test_a_weight_that_is_not_finite_is_refused_with_its_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "tiny", **SIZES)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj") as error:
        write_quantized(folder, "int8", tmp_path / "copy", say=quiet)
    assert error.value.problems[0].code == "model.not-finite" and not (tmp_path / "copy").exists()


def test_layers_whose_rows_are_no_whole_blocks_stay_as_they_are(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", **SIZES | {"intermediate_size": 96})
    write_quantized(folder, "nf4", tmp_path / "copy", say=quiet)
    assert {name.split(".")[-2] for name, _ in packed_weights(our_model(tmp_path / "copy"))} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj"),
    }
    skipped = json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    held = {name.removesuffix(".weight") for name, _ in packed_weights(our_model(tmp_path / "copy"))}
    assert set(skipped) - held == {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_without_such_layers_is_refused(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", kind, **{"n_embd": 64, "hidden_size": 64} if kind == "gpt2" else {})
    with pytest.raises(ConfigError) as error:
        write_quantized(folder, "nf4", tmp_path / "copy", say=quiet)
    assert error.value.problems[0].code == "model.nothing-to-quantize"


def test_other_families_are_quantised_where_their_layers_are_linear(tmp_path: Path) -> None:
    for kind in ("phi3", "mixtral"):
        folder = save_tiny(tmp_path / kind, kind, **SIZES)
        write_quantized(folder, "nf4", tmp_path / f"{kind}-nf4", say=quiet)
        model, plain = our_model(tmp_path / f"{kind}-nf4"), open_weights(tmp_path / f"{kind}-nf4")
        packed = dict(packed_weights(model))
        assert packed and not any("experts" in name or "lm_head" in name or "gate.weight" in name for name in packed)
        for name, weight in packed.items():
            assert torch.equal(weight.widened(), plain.read(name)), name
