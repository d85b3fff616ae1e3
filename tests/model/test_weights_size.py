"""The size of a base as a run loads it, whether it can be streamed, and the refusal of one that fits neither way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.models import CPU, our_model, save_tiny

from llamahome.config.schema import Config
from llamahome.distributed.world import World
from llamahome.errors import Problem
from llamahome.model.export.weightstore import WeightStore
from llamahome.model.file_pages import pages_of, unchanged_mappings
from llamahome.model.load import load_model
from llamahome.model.packed_weight import PackedWeight, packed_bytes
from llamahome.model.quantize import write_quantized
from llamahome.model.quantized_sizes import Kind, more_bytes, quantized_names, sizes_of
from llamahome.model.weights_size import BaseSize, refuse_larger_than_memory, size_in, size_quantized

MB = 10**6
BF16 = torch.bfloat16


def test_only_tensors_in_the_dtype_of_the_run_stay_in_their_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(64, 64, dtype=BF16)}, tmp_path / "model.safetensors")
    assert size_in(tmp_path, BF16) == BaseSize(64 * 64 * 2, 64 * 64 * 2, "")
    assert size_in(tmp_path, torch.float32) == BaseSize(64 * 64 * 4, 0, "BF16")
    (tmp_path / "other.safetensors").write_bytes(b"\x02" + bytes(7) + json.dumps({}).encode())
    assert size_in(tmp_path, BF16).mapped == 64 * 64 * 2
    save_file({"b": torch.zeros(64)}, tmp_path / "norms.safetensors")
    assert size_in(tmp_path, BF16) == BaseSize(64 * 64 * 2 + 64 * 2, 64 * 64 * 2, "F32"), "a few norms are converted, and held"


def test_single_experts_do_not_stay_because_they_are_stacked(tmp_path: Path) -> None:
    """As a model of transformers shows, whose experts lie in no file after it was loaded."""
    folder = save_tiny(tmp_path / "experts", "qwen2-moe")
    size, model = size_in(folder, torch.float32), our_model(folder)
    assert size.joined and not size.mapped and size.why_held(BF16) == "its experts are stacked as they are loaded"
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
    assert experts and pages_of(experts, unchanged_mappings()) == []


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_size_of_a_quantised_copy_is_known_before_it_is_written(tmp_path: Path, kind: Kind, dtype: torch.dtype) -> None:
    """But for what describes the weights, a few hundred bytes for each, and room in nf4 that is less than the smallest layer takes."""
    base = save_tiny(tmp_path / "base", hidden_size=256, intermediate_size=1024, head_dim=64, num_key_value_heads=1)
    planned = size_quantized(base, dtype, sizes_of(base, kind))
    write_quantized(base, kind, tmp_path / "copy", say=lambda _: None)
    weights = load_model(tmp_path / "copy", dtype=dtype, device=CPU).parameters()
    held = sum(packed_bytes(each.packed) if isinstance(each, PackedWeight) else each.nbytes for each in weights)
    smallest = min(more_bytes(WeightStore(base), name) for name in quantized_names(WeightStore(base), base))
    assert planned.nbytes <= held * 1.02 + (smallest if kind == "nf4" else 0) and held <= planned.nbytes * 1.02
    assert bool(planned.mapped) == bool(size_in(tmp_path / "copy", dtype).mapped) == (dtype == torch.float32), "the embedding is in float32"


def refusal(
    size: BaseSize, folder: Path, *, ranks: int = 1, strategy: Any = "replicate", free: int = 100 * MB, **training: Any
) -> Problem | None:
    config = Config.model_validate({"training": training})
    world = World(0, ranks, 0, CPU, ranks)
    return refuse_larger_than_memory(config, size, folder, BF16, strategy=strategy, world=world, free=free)


FEWER_BITS, ADAPTERS = "--set model.quantization=nf4, or a smaller --model", "--method lora, or a smaller --model"
MAPPED, CONVERTED, HALF = BaseSize(120 * MB, 120 * MB, ""), BaseSize(120 * MB, 0, "F32"), BaseSize(120 * MB, 0, "F16")


@pytest.mark.parametrize(
    ("size", "ranks", "strategy", "why", "hint"),
    [
        (CONVERTED, 1, "replicate", "the files hold F32 and the run computes from bfloat16", "--set model.dtype=float32"),
        (
            HALF,
            1,
            "replicate",
            "the files hold F16 and the run computes from bfloat16",
            "--set model.quantization=nf4, or a smaller --model",
        ),
        (BaseSize(300 * MB, 300 * MB, ""), 2, "replicate", "that is for one process, and these are 2", "--world-size 1"),
        (BaseSize(300 * MB, 300 * MB, ""), 2, "shard", "that is for one process, and these are 2", "--world-size 1"),
        (CONVERTED, 2, "replicate", "the files hold F32", "--set model.dtype=float32"),
    ],
)
def test_a_base_that_can_be_neither_held_nor_streamed_is_refused_with_the_reason(
    tmp_path: Path, size: BaseSize, ranks: int, strategy: str, why: str, hint: str
) -> None:
    problem = refusal(size, tmp_path, ranks=ranks, strategy=strategy)
    assert problem is not None and problem.code == "model.larger-than-memory"
    assert why in problem.message and "95.4 MiB are free" in problem.message and problem.hint == hint
    assert ("in each process" in problem.message) == (ranks > 1)


@pytest.mark.parametrize(
    ("size", "ranks", "strategy"),
    [
        (MAPPED, 1, "replicate"),
        (CONVERTED, 2, "shard"),
        (MAPPED, 2, "replicate"),
        (BaseSize(90 * MB, 0, "F32"), 1, "replicate"),
    ],
)
def test_a_base_that_is_streamed_shared_or_small_enough_is_not_refused(tmp_path: Path, size: BaseSize, ranks: int, strategy: str) -> None:
    assert refusal(size, tmp_path, ranks=ranks, strategy=strategy) is None


def test_full_fine_tuning_counts_gradients_and_optimizer(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    size = size_in(base, torch.float32)
    problem = refusal(size, base, free=int(3.9 * size.nbytes), method="full")
    assert problem is not None and "with gradients and optimizer" in problem.message and problem.hint == ADAPTERS
    assert refusal(size, base, free=int(4.1 * size.nbytes), method="full") is None
