"""A base is rounded for the inputs that its layers get behind those that are rounded already, and the same base gives the same bytes."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.gradients import inputs_and_gradients, same_inputs
from tests.support.models import CPU, plain_model, save_tiny
from torch import Tensor, nn

from llamahome.errors import ConfigError
from llamahome.model import calibration, layer_chain, quantized_sizes
from llamahome.model.compensated import to_int8_for, to_nf4_for
from llamahome.model.export.verify import load_dequantized, load_plain
from llamahome.model.export.weightstore import WeightStore
from llamahome.model.layer_chain import CannotCalibrate, Watched, rows_of_text
from llamahome.model.load import load_model
from llamahome.model.packed_weight import EightBit, PackedWeight, packed_weights
from llamahome.model.quantize import write_quantized
from llamahome.model.rounding import BLOCK, SMALL_BLOCK, to_nf4

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
SHORT_TEXT = 24


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_chain, "ROW_TOKENS", SHORT_TEXT)


def quiet(line: str) -> None:
    pass


def is_int8(weight: PackedWeight) -> bool:
    return isinstance(weight.packed, EightBit)


def text_of(folder: Path) -> Tensor:
    return rows_of_text(folder, load_model(folder, dtype=torch.float32, device=CPU))


@torch.no_grad()
def plain_moments(model: nn.Module, path: str, text: Tensor, weights: Tensor) -> Tensor:
    """The sum of w x x^T over what the linear layer `path` gets in a plain forward pass over all of `text`; `weights` holds w."""
    found: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, 1)))
    model(input_ids=text, use_cache=False)
    handle.remove()
    return (found[0] * weights.flatten()[:, None]).t() @ found[0]


def plain_weights(model: nn.Module, text: Tensor) -> dict[str, Tensor]:
    """For each linear layer, how much the tokens count in the exact model: half alike, half by g^2 of all layers with the same inputs."""
    found = inputs_and_gradients(model, text)
    sums = {path: sum(found[other][1].square().sum(-1) for other in same_inputs(found, path)) for path in found}
    return {path: (1 + each / each.mean()) / 2 for path, each in sums.items()}


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["llama-mha", "gemma2", "phi3"])
def test_each_layer_is_rounded_for_what_it_gets_behind_the_rounded_ones(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny(tmp_path / "tiny", kind, **SIZES)
    seen: list[tuple[list[Tensor], Tensor]] = []

    def watched(fit: Callable[..., list[Any]], weights: Sequence[Tensor], moments: Tensor) -> list[Any]:
        seen.append(([weight.detach().clone() for weight in weights], moments.clone()))
        return fit(weights, moments)

    for fit in (to_nf4_for, to_int8_for):
        monkeypatch.setattr(calibration, fit.__name__, partial(watched, fit))
    write_quantized(base, "nf4", tmp_path / "copy", say=quiet)
    text, exact, rounded = text_of(base), load_plain(base), load_dequantized(tmp_path / "copy")
    weights = plain_weights(load_plain(base), text)
    for number in range(2):  # the layers before it are rounded, it is not yet
        model = load_plain(base)
        for before in range(number):
            model.model.layers[before].load_state_dict(rounded.model.layers[before].state_dict())
        paths = [
            f"model.layers.{number}.{name}" for name, module in model.model.layers[number].named_modules() if type(module) is nn.Linear
        ]
        for path in paths:
            weight = exact.get_submodule(path).weight
            (moments,) = [each for weights, each in seen if any(torch.equal(weight, other) for other in weights)]
            expected = plain_moments(model, path, text, weights[path])
            assert (moments - expected).norm() <= 1e-4 * expected.norm(), path
    in_8_bits = {path for path, weight in packed_weights(load_model(tmp_path / "copy", dtype=torch.float32, device=CPU)) if is_int8(weight)}
    assert len(seen) <= 2 * 4 + len(in_8_bits), "layers with the same inputs and bits are rounded together"


@pytest.mark.medium
def test_the_same_base_gives_the_same_bytes_and_draws_of_others_stay(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "tiny", "llama-mha", **SIZES)
    state = torch.get_rng_state()
    for name in ("one", "two"):
        write_quantized(base, "nf4", tmp_path / name, say=quiet)
        assert torch.equal(torch.get_rng_state(), state)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.medium
def test_the_rounded_base_is_nearer_to_the_base_than_a_plainly_rounded_one_on_other_text(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "tiny", "llama-mha", **SIZES, initializer_range=0.1)
    write_quantized(base, "nf4", tmp_path / "copy", say=quiet)
    exact, fitted, plain = load_plain(base), load_dequantized(tmp_path / "copy"), load_plain(base)
    text = torch.randint(4, 320, (16, 40), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for module in plain.model.modules():
            if type(module) is nn.Linear:
                to_nf4(module.weight).fill(module.weight.data)
        expected = exact(input_ids=text).logits
        ours, theirs = ((model(input_ids=text).logits - expected).square().mean() for model in (fitted, plain))
    assert ours < 0.8 * theirs


def nearest_of(base: Path, copy: Path, block: int) -> bool:
    """Whether every packed weight of `copy` is what plain rounding gives."""
    packed, store = dict(packed_weights(load_model(copy, dtype=torch.float32, device=CPU))), WeightStore(base)
    return all(torch.equal(weight.packed.codes, to_nf4(store.read(name), block).codes) for name, weight in packed.items())


def test_a_base_without_a_tokenizer_is_rounded_plainly_and_the_line_says_why(tmp_path: Path) -> None:
    base, lines = save_tiny(tmp_path / "tiny", "llama-mha", **SIZES), list[str]()
    for path in base.glob("tokenizer*"):
        path.unlink()
    write_quantized(base, "nf4", tmp_path / "copy", say=lines.append)
    assert [line for line in lines if "each number is rounded for itself" in line and "no tokenizer" in line]
    assert nearest_of(base, tmp_path / "copy", SMALL_BLOCK)


def test_layers_that_are_no_chain_are_not_run_one_by_one(tmp_path: Path) -> None:
    model, text = plain_model("llama", **SIZES), torch.arange(4, 12).view(1, 8)
    first, second = model.model.layers
    second.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2, *inputs[1:]), prepend=True)
    with pytest.raises(CannotCalibrate, match="something else"):
        Watched(model, text)
    assert not first._forward_hooks and not first._forward_pre_hooks, "nothing stays on the model"


@pytest.mark.parametrize(("allowed", "count"), [(1000, 64), (31, 28), (1, 16)])
def test_the_text_has_the_more_rows_the_fewer_weights_there_are(
    allowed: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny(tmp_path / "tiny", **SIZES)
    weights = sum(weight.numel() for weight in load_plain(base).model.layers.parameters())
    monkeypatch.setattr(layer_chain, "ROW_TOKENS", 256)
    monkeypatch.setattr(layer_chain, "MOST_WORK", allowed * 256 * weights)
    rows = text_of(base)
    assert rows.shape == (count, 256) and rows.max() < 320
    assert len(rows.unique(dim=0)) == count


def test_a_base_that_is_too_large_is_rounded_plainly_and_the_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_sizes, "MOST_FITTED", 1000)
    base, lines = save_tiny(tmp_path / "tiny", "llama-mha", **SIZES), list[str]()
    write_quantized(base, "nf4", tmp_path / "copy", say=lines.append)
    assert "each number is rounded for itself" in lines[1] and "min on two cores" in lines[1]
    assert nearest_of(base, tmp_path / "copy", BLOCK)


def test_a_base_with_a_number_that_is_not_finite_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = save_tiny(tmp_path / "tiny", **SIZES)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError) as error:
        write_quantized(base, "nf4", tmp_path / "made" / "copy", say=quiet)
    assert error.value.problems[0].code == "model.not-finite" and not list((tmp_path / "made").iterdir())
