"""Where rounding alone makes a large difference it is accepted with the proof, and what is wrong is refused as before."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.model.export.test_gguffile import read_facts
from tests.model.export.test_merge import save_adapter
from tests.support.models import save_tiny
from torch import Tensor

from llamahome.model.export.gguffile import file_name, gguf_config, write_gguf
from llamahome.model.export.merge import TrainedWeights
from llamahome.model.export.merged import write_merged
from llamahome.model.export.rounded import Written, accept_rounding, is_rounded
from llamahome.model.export.verify import Difference, compare, exported_logits, trained_logits

PROMPTS = [list(range(5, 60)), list(range(100, 160))]
Spoil = Callable[[str, Tensor], Tensor]


class Spoilt(TrainedWeights):
    """Weights that a wrong merge would give."""

    spoil: Spoil

    def read(self, name: str) -> Tensor:
        return self.spoil(name, super().read(name))


def checked(
    base: Path, adapter: Path, folder: Path, *, kind: torch.dtype, spoil: Spoil | None = None, known: bool = False, streams: bool = True
) -> Difference:
    """The difference of a merged export in `kind`, spoilt while it was written, and if that is `known`, while it is checked too."""
    weights, written = TrainedWeights(base, adapter), TrainedWeights(base, adapter)
    if spoil is not None:
        written = Spoilt(base, adapter)
        written.spoil = spoil
    folder.mkdir()
    write_merged(folder, written, base=base, dtype=kind)
    trained = trained_logits(adapter, base, weights, PROMPTS)
    quant = {torch.bfloat16: "bf16", torch.float16: "f16"}[kind]
    found = compare(trained, exported_logits(folder, base, weights, PROMPTS, to="merged"), quant=quant)
    tight = replace(found, tolerance=found.greatest / 2)  # as if the model were more sensitive
    export = Written(folder, "merged", base, adapter, (written if known else weights) if streams else None)
    return accept_rounding(tight, export, trained, PROMPTS, say=lambda _: None)


@pytest.fixture(params=["llama", "qwen2-moe"])
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    base = save_tiny(tmp_path / "base", request.param)
    return base, save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8)


@pytest.mark.parametrize("streams", [True, False], ids=["from files", "in memory"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_rounded_numbers_are_accepted(adapted: tuple[Path, Path], kind: torch.dtype, streams: bool, tmp_path: Path) -> None:
    found = checked(*adapted, tmp_path / "out", kind=kind, streams=streams)
    assert found.holds and found.tolerance == found.greatest > 0


def _one(name: str, weight: Tensor) -> Tensor:
    """One number of one tensor is a little off."""
    changed = weight.clone()
    if name.endswith("q_proj.weight"):
        changed.view(-1)[7] *= 1.02
    return changed


def _swapped(name: str, weight: Tensor) -> Tensor:
    return weight.flip(0) if name.endswith("up_proj.weight") else weight


@pytest.mark.parametrize("streams", [True, False], ids=["from files", "in memory"])
@pytest.mark.parametrize("spoil", [_one, _swapped])
def test_numbers_that_were_not_only_rounded_are_refused(adapted: tuple[Path, Path], spoil: Spoil, streams: bool, tmp_path: Path) -> None:
    assert not checked(*adapted, tmp_path / "out", kind=torch.bfloat16, spoil=spoil, streams=streams).holds


def test_a_wrong_merge_is_refused_though_it_was_rounded_rightly(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    assert not checked(*adapted, tmp_path / "out", kind=torch.bfloat16, spoil=_swapped, known=True).holds


@pytest.mark.parametrize("quant", ["bf16", "f16"])
def test_a_gguf_file_of_rounded_numbers_is_accepted_and_another_one_is_not(tmp_path: Path, quant: str) -> None:
    base = save_tiny(tmp_path / "base", "qwen2-moe")
    adapter = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8)
    weights, config = TrainedWeights(base, adapter), gguf_config(base)
    trained = trained_logits(adapter, base, weights, PROMPTS)
    for written, right in ((weights, True), (TrainedWeights(base), False)):
        folder = tmp_path / f"out-{right}"
        folder.mkdir()
        write_gguf(folder / file_name("mine", quant), written, config, read_facts(base), quant=quant, name="mine")
        found = compare(trained, exported_logits(folder, base, weights, PROMPTS, to="gguf"), quant=quant)
        tight = replace(found, tolerance=found.greatest / 2)
        assert accept_rounding(tight, Written(folder, "gguf", base, adapter, weights), trained, PROMPTS, say=lambda _: None).holds == right


def test_half_a_unit_is_the_bound_also_of_the_smallest_numbers() -> None:
    exact = torch.cat([torch.randn(1000), torch.randn(1000) * 1e-6, torch.zeros(3)])
    for kind in (torch.float16, torch.bfloat16):
        assert is_rounded(exact.to(kind), exact, kind)
        beside = exact.to(kind).float() * (1 + 2 * torch.finfo(kind).eps)
        assert not is_rounded(beside, exact, kind)
    assert not is_rounded(exact.to(torch.bfloat16), exact, torch.float16) and not is_rounded(exact[:-1], exact, torch.float16)
