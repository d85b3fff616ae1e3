"""The choice between our products and torch's is measured once per machine and cached; a damaged cache is replaced."""

import json
from pathlib import Path

import pytest
import torch
from tests.support.levels import kernels_or_skip
from torch import nn

from llamahome.model.backends.cpu.autotune import ProductDispatch, ProductShape, Speedups, autotune, details, summary
from llamahome.model.backends.cpu.merged_linear import MergedLinear, merged_shape
from llamahome.model.backends.cpu.native import Kernels, cache_folder, load_kernels

SMALL, OTHER = ProductShape(40, 32, 48, torch.float32), ProductShape(40, 32, 64, torch.float32)


class Measure:
    """Records the shapes that are measured; each measurement has another result."""

    def __init__(self) -> None:
        self.shapes: list[ProductShape] = []

    def __call__(self, shape: ProductShape, kernels: Kernels) -> Speedups:
        self.shapes.append(shape)
        return Speedups(len(self.shapes) + 1, 0.5, 2.0)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    kernels = kernels_or_skip()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return kernels


@pytest.fixture
def measure() -> Measure:
    return Measure()


def cache_file(kernels: Kernels) -> Path:
    return cache_folder() / f"{kernels.name}.json"


def test_every_kind_of_product_is_measured(kernels: Kernels) -> None:
    (speedups,) = autotune([SMALL], kernels).values()
    assert all(speedup > 0 for speedup in (speedups.forward, speedups.inputs, speedups.weights))
    assert f"{SMALL.inputs} -> {SMALL.outputs}: forward" in details({SMALL: speedups})


def test_results_are_cached(kernels: Kernels, measure: Measure) -> None:
    first = autotune([SMALL], kernels, measure=measure)
    assert autotune([SMALL, OTHER], kernels, measure=measure)[SMALL] == first[SMALL]
    assert measure.shapes == [SMALL, OTHER]
    assert details(first) == "32 -> 48: forward ours (2.00), inputs torch (0.50), weights ours (2.00)"


def test_the_summary_names_the_speed_and_what_torch_computes() -> None:
    mixed = summary({SMALL: Speedups(2.0, 0.5, 3.0)})
    assert mixed == "our matrix products are 2.00 to 3.00 times as fast as torch's on this machine; torch computes 1 of 3"
    assert summary({SMALL: Speedups(2.0, 2.0, 2.0)}).endswith("on this machine")
    assert summary({SMALL: Speedups(0.5, 0.5, 0.5)}) == "torch's matrix products are faster than ours on this machine and are used"


def test_another_number_of_threads_is_measured_again(kernels: Kernels, measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    autotune([SMALL], kernels, measure=measure)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    autotune([SMALL], kernels, measure=measure)
    assert measure.shapes == [SMALL, SMALL]


def test_long_passes_share_a_measurement(kernels: Kernels, measure: Measure) -> None:
    wide = [ProductShape(tokens, 4096, 4096, torch.float32) for tokens in (900, 1000)]
    assert set(autotune(wide, kernels, measure=measure)) == set(wide) and len(measure.shapes) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"a": 1}', '{"a": [1, 2]}', '{"a": [1, 2, NaN]}', '{"a": [1, 2, -1]}', '{"a": [1, 2, "x"]}']
)
def test_a_damaged_file_is_ignored_and_replaced(kernels: Kernels, measure: Measure, text: str) -> None:
    cache_file(kernels).parent.mkdir(parents=True)
    cache_file(kernels).write_text(text)
    autotune([SMALL], kernels, measure=measure)
    autotune([SMALL], kernels, measure=measure)
    assert measure.shapes == [SMALL] and len(json.loads(cache_file(kernels).read_text())) == 1


def test_without_a_cache_folder_each_run_measures(kernels: Kernels, measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "llamahome").write_text("a file where the folder should be")
    autotune([SMALL], kernels, measure=measure)
    autotune([SMALL], kernels, measure=measure)
    assert measure.shapes == [SMALL, SMALL]


def test_dtypes_without_kernels_are_not_measured(kernels: Kernels, measure: Measure) -> None:
    assert autotune([ProductShape(40, 32, 48, torch.float64)], kernels, measure=measure) == {} and measure.shapes == []


@pytest.mark.parametrize(
    "speedups", [None, Speedups(2, 2, 2), Speedups(2, 0.5, 2), Speedups(0.5, 2, 0.5), Speedups(0.5, 0.5, 0.5)], ids=str
)
@pytest.mark.parametrize("trained", [False, True])
def test_merged_layers_equal_the_layers_with_any_choice_and_without_kernels(speedups: Speedups | None, trained: bool) -> None:
    loaded = load_kernels()
    kernels = loaded if isinstance(loaded, Kernels) else None
    torch.manual_seed(0)
    layers = [nn.Linear(32, 48), nn.Linear(32, 16)]
    x, grad = torch.randn(20, 32, requires_grad=True), torch.randn(20, 64)
    for layer in layers:
        layer.requires_grad_(trained)
    inputs = [x, *(parameter for layer in layers for parameter in layer.parameters())] if trained else [x]
    plain = torch.cat([layer(x) for layer in layers], -1)
    expected = [plain.detach().clone(), *torch.autograd.grad(plain, inputs, grad)]
    merged = MergedLinear(layers, compute=torch.float32, kernels=kernels, speedups=speedups)
    assert merged.usable and merged_shape(layers, tokens=20, compute=torch.float32) == ProductShape(20, 32, 64, torch.float32)
    out = merged(x)
    for ours, theirs in zip([out, *torch.autograd.grad(out, inputs, grad)], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_speedups_choose_the_kernels_or_torch(kernels: Kernels) -> None:
    assert ProductDispatch.of(kernels) == ProductDispatch(kernels, kernels, kernels)
    assert ProductDispatch.of(kernels, Speedups(1.2, 0.9, 1.1)) == ProductDispatch(kernels, None, kernels)
    assert ProductDispatch.of(None, Speedups(2, 2, 2)) == ProductDispatch(None, None, None)
