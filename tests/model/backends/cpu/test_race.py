"""Who multiplies is measured once per machine and kept; a file that says nothing is written anew."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from llamahome.model.backends.cpu import race as racing
from llamahome.model.backends.cpu.linears import Fan, fan_shape
from llamahome.model.backends.cpu.native import Kernels, cache_folder, load_kernels
from llamahome.model.backends.cpu.race import Multipliers, Shape, Speeds, race, told

SMALL, OTHER = Shape(40, 32, 48, torch.float32), Shape(40, 32, 64, torch.float32)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = load_kernels()
    if isinstance(found, str):
        pytest.skip(found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return found


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Shapes that were measured; each time another result."""
    measured: list[Shape] = []

    def note(shape: Shape, kernels: Kernels) -> Speeds:
        measured.append(shape)
        return Speeds(len(measured) + 1, 0.5, 2.0)

    monkeypatch.setattr(racing, "_measured", note)
    return measured


def kept(kernels: Kernels) -> Path:
    return cache_folder() / f"{kernels.name}.json"


def test_a_shape_is_measured_and_both_kinds_of_products_take_part(kernels: Kernels) -> None:
    (speeds,) = race([SMALL], kernels).values()
    assert all(ratio > 0 for ratio in (speeds.forward, speeds.inputs, speeds.weights))
    assert f"{SMALL.inputs} -> {SMALL.outputs}: forward" in told({SMALL: speeds})


def test_what_was_found_is_kept(kernels: Kernels, races: list[Shape]) -> None:
    first = race([SMALL], kernels)
    assert race([SMALL, OTHER], kernels)[SMALL] == first[SMALL]
    assert races == [SMALL, OTHER]
    assert told(first) == "32 -> 48: forward ours (2.00), inputs torch (0.50), weights ours (2.00)"


def test_another_number_of_threads_is_another_race(kernels: Kernels, races: list[Shape], monkeypatch: pytest.MonkeyPatch) -> None:
    race([SMALL], kernels)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    race([SMALL], kernels)
    assert races == [SMALL, SMALL]


def test_long_passes_are_one_shape(kernels: Kernels, races: list[Shape]) -> None:
    wide = [Shape(tokens, 4096, 4096, torch.float32) for tokens in (900, 1000)]
    assert set(race(wide, kernels)) == set(wide) and len(races) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"a": 1}', '{"a": [1, 2]}', '{"a": [1, 2, NaN]}', '{"a": [1, 2, -1]}', '{"a": [1, 2, "x"]}']
)
def test_a_damaged_file_is_ignored_and_rewritten(kernels: Kernels, races: list[Shape], text: str) -> None:
    kept(kernels).parent.mkdir(parents=True)
    kept(kernels).write_text(text)
    race([SMALL], kernels)
    race([SMALL], kernels)
    assert races == [SMALL] and len(json.loads(kept(kernels).read_text())) == 1


def test_without_a_place_to_keep_it_each_run_measures(kernels: Kernels, races: list[Shape], tmp_path: Path) -> None:
    (tmp_path / "llamahome").write_text("in the way")
    race([SMALL], kernels)
    race([SMALL], kernels)
    assert races == [SMALL, SMALL]


def test_types_that_we_do_not_multiply_do_not_race(kernels: Kernels, races: list[Shape]) -> None:
    assert race([Shape(40, 32, 48, torch.float64)], kernels) == {} and races == []


@pytest.mark.parametrize("speeds", [None, Speeds(2, 2, 2), Speeds(2, 0.5, 2), Speeds(0.5, 2, 0.5), Speeds(0.5, 0.5, 0.5)], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_a_fan_gives_the_same_whoever_multiplies(kernels: Kernels, speeds: Speeds | None, trained: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 48), nn.Linear(32, 16)]
    x, grad = torch.randn(20, 32, requires_grad=True), torch.randn(20, 64)
    for layer in layers:
        layer.requires_grad_(trained)
    wanted = [x, *(parameter for layer in layers for parameter in layer.parameters())] if trained else [x]
    plain = torch.cat([layer(x) for layer in layers], -1)
    expected = [plain.detach().clone(), *torch.autograd.grad(plain, wanted, grad)]
    fan = Fan(layers, compute=torch.float32, kernels=kernels, speeds=speeds)
    assert fan.usable and fan_shape(layers, tokens=20, compute=torch.float32) == Shape(20, 32, 64, torch.float32)
    out = fan(x)
    for found, right in zip([out, *torch.autograd.grad(out, wanted, grad)], expected, strict=True):
        torch.testing.assert_close(found, right)


def test_speeds_say_who_multiplies(kernels: Kernels) -> None:
    assert Multipliers.of(kernels) == Multipliers(kernels, kernels, kernels)
    assert Multipliers.of(kernels, Speeds(1.2, 0.9, 1.1)) == Multipliers(kernels, None, kernels)
    assert Multipliers.of(None, Speeds(2, 2, 2)) == Multipliers(None, None, None)
