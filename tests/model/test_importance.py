"""Layers whose rounding to 4 bits costs the loss most get 8, within the bytes that are allowed, and everything else knows it."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.model.test_lora import weights_up
from tests.model.test_quantize import losses_and_gradients
from tests.support.gradients import inputs_and_gradients, same_inputs
from tests.support.models import CPU, backend_named, examples_of, microbatch_of, plain_loss, save_tiny
from torch import Tensor, nn

from llamahome.config.schema import LoraConfig
from llamahome.data.records import Example
from llamahome.model import layer_chain
from llamahome.model.adapter import save_model, wrap_plain
from llamahome.model.export.quantized import open_weights
from llamahome.model.export.verify import load_dequantized, load_plain
from llamahome.model.export.weightstore import WeightStore
from llamahome.model.generate import as_transformers_runs_it
from llamahome.model.importance import LinearLayer, importance_of, token_weights, worth_most
from llamahome.model.layer_chain import chain_of, rows_of_text
from llamahome.model.load import load_model
from llamahome.model.load_packed import hold_in_8_bits
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.packed_weight import EightBit, PackedWeight, packed_bytes, packed_weights
from llamahome.model.quantize import write_quantized
from llamahome.model.quantized_sizes import MOST_BYTES, more_bytes, packed_size, sizes_of
from llamahome.model.rounding import SMALL_BLOCK, in_steps, steps_for, to_nf4

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 1}


@pytest.fixture(scope="module", autouse=True)
def short_text() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_chain, "ROW_TOKENS", 24)
        yield


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, as most bases are."""
    folder = tmp_path_factory.mktemp("base") / "wide"
    save_tiny(folder, **SIZES)
    load_plain(folder).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy") / "copy"
    write_quantized(base, "nf4", folder, say=quiet)
    return folder


def plain_gains(folder: Path, rows: Tensor) -> dict[str, float]:
    """Half the sum over tokens of (g . dW x)^2 for each linear layer, in 4 bits less that in 8."""
    model, found = load_plain(folder).float(), {}
    for path, (x, gradient) in inputs_and_gradients(model, rows).items():
        weight = model.get_submodule(path).weight.detach()
        costs = []
        for packed in (to_nf4(weight, SMALL_BLOCK), in_steps(weight, steps_for(weight))):
            rounded = torch.empty_like(weight)
            packed.fill(rounded)
            costs.append(float(((gradient * (x @ (rounded - weight).t())).sum(-1) ** 2).sum()) / 2)
        found[path] = costs[0] - costs[1]
    return found


def watched(folder: Path) -> tuple[dict[str, LinearLayer], Tensor]:
    """What is found of the layers of `folder`, and the rows of the text."""
    model = load_model(folder, dtype=torch.float32, device=CPU)
    rows, path_of = rows_of_text(folder, model), {module: path for path, module in model.named_modules()}
    before = [weight.requires_grad for weight in model.parameters()]
    paths = [path for path, module in model.named_modules() if type(module) is nn.Linear and path != "lm_head"]
    with as_transformers_runs_it(model):
        found = importance_of(chain_of(model, rows), paths, path_of, kept_together=250)  # two and a half batches
    assert [weight.requires_grad for weight in model.parameters()] == before
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.get_decoder().layers)
    return found, rows


@pytest.mark.parametrize("kind", ["llama-mha", "gemma2", "phi3"])
def test_gains_and_tokens_are_those_of_a_backward_pass_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", kind, hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.1)
    found, rows = watched(folder)
    gains, plain = plain_gains(folder, rows), inputs_and_gradients(load_plain(folder), rows)
    assert found.keys() == gains.keys() and len(found) >= 8
    for path, layer in found.items():
        assert layer.gain == pytest.approx(gains[path], rel=1e-3) and layer.gain > 0, path
        expected = plain[path][1].square().sum(-1)
        torch.testing.assert_close(torch.cat(layer.tokens), expected.flatten(), rtol=1e-3, atol=1e-4 * float(expected.max()))
        assert layer.inputs_of == same_inputs(plain, path)[0]


def test_half_of_the_weight_of_tokens_is_that_of_their_gradients() -> None:
    one, other = LinearLayer(tokens=[torch.tensor([1.0, 2.0]), torch.tensor([0.0])]), LinearLayer(tokens=[torch.ones(2), torch.ones(1)])
    found = token_weights([one, other], 2)
    assert found is not None
    torch.testing.assert_close(torch.cat(found), torch.tensor([1.0, 1.25, 0.75]))
    assert token_weights([one, LinearLayer()], 2) is None, "it did not run"
    assert token_weights([LinearLayer(tokens=[torch.zeros(2)])], 1) is None


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=12), st.integers(0, 120))
def test_the_greatest_gains_for_a_byte_stay_within_the_room(layers: list[tuple[float, int]], room: int) -> None:
    gains, more = {str(n): gain for n, (gain, _) in enumerate(layers)}, {str(n): size for n, (_, size) in enumerate(layers)}
    chosen = worth_most(gains, more, room)
    left = room - sum(more[path] for path in chosen)
    assert left >= 0 and all(gains[path] > 0 for path in chosen)
    for path in gains.keys() - chosen:
        better = [other for other in chosen if gains[other] / more[other] >= gains[path] / more[path]]
        assert gains[path] == 0 or more[path] > room - sum(more[other] for other in better)


@pytest.mark.medium
def test_some_layers_get_8_bits_and_all_take_at_most_062_bytes_a_number(base: Path, written: Path) -> None:
    original, sizes = WeightStore(base), sizes_of(base, "nf4", WeightStore(written))
    packed = dict(packed_weights(load_model(written, dtype=torch.bfloat16, device=CPU)))
    linear = [name for name in original.tensors if name.endswith("proj.weight")]
    assert packed.keys() == set(linear)
    int8 = [name for name in linear if isinstance(packed[name].packed, EightBit)]
    assert int8 and sizes.int8_layers == len(int8) and sizes.layers == len(linear) - len(int8)
    assert {name.removesuffix(".weight") for name in int8} | {"lm_head"} == skipped_in(written)
    for name in int8:
        assert torch.equal(packed[name].widened(), WeightStore(written).read(name)), "nothing is lost by holding it in 8 bits"
        exact = original.read(name).float()
        assert (packed[name].widened().float() - exact).norm() <= 0.02 * exact.norm(), name
    numbers, held = sum(original.read(name).numel() for name in linear), sum(packed_bytes(each.packed) for each in packed.values())
    assert (sizes.packed_numbers, sizes.packed_bytes) == (numbers, held)
    assert held <= MOST_BYTES * numbers < held + smallest(original, linear)
    assert f"and {len(int8)} that lose most by it" in sizes.line("nf4")


def test_the_file_has_the_size_that_is_said(base: Path, written: Path) -> None:
    sizes, size = sizes_of(base, "nf4", WeightStore(written)), (written / "model.safetensors").stat().st_size
    descriptions = 1024 * sizes.layers
    assert sizes.file_bytes <= size <= sizes.file_bytes + descriptions + 20_000 and sizes.all_bytes < sizes.file_bytes


@given(st.lists(st.floats(-3e4, 3e4, width=32), min_size=4, max_size=4), st.sampled_from([torch.bfloat16, torch.float32]))
def test_only_numbers_that_int8_holds_exactly_are_held_in_it(numbers: list[float], dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 1, bias=False, dtype=dtype)
    weight = torch.tensor([numbers]).to(dtype)
    layer.weight.data.copy_(weight)
    exact = in_steps(weight, steps_for(weight))
    rounded = nn.Linear(4, 1, bias=False, dtype=dtype)
    exact.fill(rounded.weight.data)
    expected = rounded.weight.detach().clone()
    hold_in_8_bits([layer, rounded])
    assert torch.equal(whole(layer.weight), weight), "whatever it is held in"
    assert isinstance(rounded.weight, PackedWeight) and torch.equal(whole(rounded.weight), expected)


def whole(weight: Tensor) -> Tensor:
    return weight.widened() if isinstance(weight, PackedWeight) else weight.detach()


def skipped_in(folder: Path) -> set[str]:
    return set(json.loads((folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"])


def smallest(store: WeightStore, names: list[str]) -> int:
    return min(store.tensors[name].nbytes for name in names)


def test_the_layers_in_8_bits_are_those_that_gain_most_for_a_byte(base: Path, written: Path) -> None:
    gains, original = plain_gains(base, watched(base)[1]), WeightStore(base)
    more = {path: more_bytes(original, f"{path}.weight") for path in gains}
    shapes = [original.tensors[f"{path}.weight"].shape for path in gains]
    room = int(MOST_BYTES * sum(map(math.prod, shapes))) - sum(packed_size(shape, SMALL_BLOCK) for shape in shapes)
    assert skipped_in(written) - {"lm_head"} == worth_most(gains, more, room)


def test_the_same_base_gives_the_same_layers_8_bits_and_gives_the_same_bytes(base: Path, written: Path, tmp_path: Path) -> None:
    write_quantized(base, "nf4", tmp_path / "again", say=quiet)
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_what_is_expected_before_it_is_written_is_about_what_is_written(base: Path, written: Path) -> None:
    before, after = sizes_of(base, "nf4"), sizes_of(base, "nf4", WeightStore(written))
    assert before.all_bytes == pytest.approx(after.all_bytes, rel=0.02) and before.int8_layers is None
    assert before.file_bytes == pytest.approx(after.file_bytes, rel=0.02) and before.packed_numbers == after.packed_numbers
    assert "and some that lose most by it" in before.line("nf4")


def test_logits_are_those_of_the_numbers_that_the_files_stand_for(base: Path, written: Path) -> None:
    text = torch.randint(4, 320, (2, 30), generator=torch.Generator().manual_seed(1))
    ours, plain, dequantized = load_model(written, dtype=torch.float32, device=CPU), load_plain(base).float(), open_weights(written)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name in dequantized.tensors:
                weight.copy_(dequantized.read(name))
        expected = plain(input_ids=text).logits
        found = load_dequantized(written).float()(input_ids=text).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    with as_transformers_runs_it(ours), torch.no_grad():
        assert (ours(input_ids=text).logits - expected).norm() <= 1e-5 * expected.norm()


def test_layers_that_are_too_large_for_the_room_all_get_4_bits(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", "llama-mha", hidden_size=64, intermediate_size=128, head_dim=16)
    write_quantized(folder, "nf4", tmp_path / "copy", say=quiet)
    assert skipped_in(tmp_path / "copy") == {"lm_head"} and sizes_of(folder, "nf4").int8_numbers == 0


def _of_peft(written: Path, adapter: Path, examples: Sequence[Example], dtype: torch.dtype) -> dict[str, Tensor]:
    """Losses and gradients by transformers and PEFT on the weights as they are after rounding."""
    model = wrap_plain(load_dequantized(written).float(), adapter).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return losses_and_gradients(model, lambda: torch.stack([plain_loss(model, example) for example in examples]).sum())


@pytest.mark.parametrize("how", ["reference", "cpu", "cpu compiled"])
def test_loss_and_gradients_beside_layers_in_4_and_8_bits_are_those_of_peft(base: Path, written: Path, how: str, tmp_path: Path) -> None:
    examples, backend = examples_of([9, 7, 12]), backend_named(how.partition(" ")[0])
    ours = load_model(written, dtype=torch.float32, device=CPU)
    adapted = add_lora(ours, LoraConfig(rank=4, alpha=6), base="wide", seed=1, lean=True)
    weights_up(adapted)
    save_model(adapted, tmp_path, base=written)
    if how == "cpu compiled":
        if backend.cannot_compile() is not None:
            pytest.skip("no compiler")
        plain_base = load_model(base, dtype=torch.float32, device=CPU)
        add_lora(plain_base, LoraConfig(rank=4, alpha=6), base="wide", seed=1, lean=True)
        fused = backend_named("cpu").compile(plain_base)
        assert backend.compile(ours) == fused > 0, "as much is fused, though some weights of a layer are in 4 bits and some in 8"
    found = losses_and_gradients(ours, lambda: Objective(ours, backend).loss_sum(microbatch_of(examples)))
    plain, exact = (_of_peft(written, tmp_path, examples, dtype) for dtype in (torch.float32, torch.float64))
    assert found.keys() == plain.keys() and len(found) == 29
    for name, value in found.items():  # in float32 PEFT itself is up to 1.6e-5 beside the exact gradients of these large weights
        rounding = (plain[name] - exact[name]).norm()
        assert (value - exact[name]).norm() <= max(1e-5 * exact[name].norm(), 2 * rounding), name
