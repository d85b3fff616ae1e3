"""Activation checkpointing changes only the memory; place() reports unused settings; weights are sharded if they do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.models import CPU, backend_named, examples_of, microbatch_of, objective_of, our_model, save_tiny
from torch import nn

from llamahome.config.schema import Config, LoraConfig
from llamahome.distributed.world import World
from llamahome.model.backends.cpu.backend import CpuBackend
from llamahome.model.load import load_model
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import (
    choose_strategy,
    count_weights,
    needs_checkpointing,
    place,
    sums_each_pass,
    trained_parameters,
    weight_bytes,
)
from llamahome.model.precision import Precision

ALONE = World(0, 1, 0, CPU)
GIB = 2**30


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(llama: Path, method: str, dropout: float, backend: str) -> None:
    batch, results, kept = microbatch_of(examples_of([30, 12, 3])), [], []
    for checkpointing in (False, True):
        model = our_model(llama)
        if method == "lora":
            add_lora(model, LoraConfig(rank=4, dropout=dropout), base="tiny", seed=0, lean=True)
        assert place(model, world=ALONE, checkpointing=checkpointing, sync_batch_norm=False) == [] and model.training
        sizes: list[int] = []
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = objective_of(model, backend).loss_sum(batch)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in trained_parameters(model).values())])
        kept.append(sum(sizes))
    assert all(torch.equal(without, with_) for without, with_ in zip(*results, strict=True))
    assert kept[1] < kept[0] / 2, "nothing was recomputed"


def test_dropout_is_active_in_training(llama: Path) -> None:
    model = our_model(llama)
    add_lora(model, LoraConfig(rank=4, dropout=0.4), base="tiny", seed=0, lean=True)
    place(model, world=ALONE, checkpointing=False, sync_batch_norm=False)
    gradients = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        objective_of(model).loss_sum(microbatch_of(examples_of([30]))).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained_parameters(model).values()]))
        model.zero_grad()
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def test_batch_normalization_is_converted_and_its_absence_is_reported(llama: Path) -> None:
    model = our_model(llama)
    assert "nothing to do" in " ".join(place(model, world=ALONE, checkpointing=False, sync_batch_norm=True))
    model.add_module("norm", nn.BatchNorm1d(3))
    assert "over all processes" in " ".join(place(model, world=ALONE, checkpointing=False, sync_batch_norm=True))
    assert isinstance(model.norm, nn.SyncBatchNorm)


def test_each_trained_parameter_is_listed_once(llama: Path) -> None:
    model = our_model(llama)
    everything = trained_parameters(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len({id(parameter) for parameter in everything.values()}) == len(everything) == len(list(model.parameters()))


def test_checkpointing_is_chosen_if_activations_do_not_fit(llama: Path) -> None:
    model = our_model(llama)

    def estimate(backend: str, tokens: int, longest: int) -> int:
        return backend_named(backend).kept_bytes(Config(), model, tokens, longest=longest, compiled=False)

    needed = estimate("cpu", 1000, 200)
    assert estimate("cpu", 2000, 200) == pytest.approx(2 * needed, rel=1e-6)
    assert estimate("cpu", 1000, 400) > needed
    assert estimate("cuda", 1000, 200) < needed < estimate("reference", 1000, 200), "who keeps how many probabilities"
    for free, expected in ((needed, True), (2 * needed, False)):
        assert needs_checkpointing(needed, free_bytes=free) is expected


def kept_bytes(objective: Objective, batch: Any) -> int:
    """Bytes of distinct memory that a forward pass keeps for the backward pass, without the weights."""
    known = {each.untyped_storage().data_ptr() for each in objective.model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        objective.loss_sum(batch).backward()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("kind", ["llama", "llama-mha", "qwen2"])
@pytest.mark.parametrize("method", ["lora", "lora float32", "full"])
def test_the_estimate_for_compiled_passes_equals_the_memory_that_they_keep(tmp_path: Path, kind: str, method: str) -> None:
    storage = torch.bfloat16 if method == "lora" else torch.float32
    backend = CpuBackend(Precision(storage, torch.float32 if method == "lora float32" else torch.bfloat16, "a test"))
    if reason := backend.cannot_compile():
        pytest.skip(reason)
    folder = save_tiny(tmp_path / kind, kind, hidden_size=128, intermediate_size=320, head_dim=32, num_hidden_layers=8)
    model = load_model(folder, dtype=storage, device=CPU)
    if method != "full":
        add_lora(model, LoraConfig(rank=2), base="tiny", seed=0, lean=True)
    model.train()
    backend.compile(model)
    lengths = [200] * 5
    config = Config.model_validate({"training": {"method": method.split()[0]}})
    estimate, plain = (backend.kept_bytes(config, model, sum(lengths), longest=200, compiled=compiled) for compiled in (True, False))
    kept = kept_bytes(Objective(model, backend), microbatch_of(examples_of(lengths)))
    assert 0.85 * estimate <= kept <= 1.05 * estimate < plain


def world_of(size: int, local: int) -> World:
    return World(0, size, 0, CPU, local)


@pytest.mark.parametrize(
    ("wanted", "size", "local", "needed", "expected"),
    [
        ("auto", 1, 1, 500, "replicate"),
        ("shard", 1, 1, 1, "replicate"),
        ("auto", 8, 8, 40, "replicate"),
        ("auto", 8, 8, 60, "shard"),
        ("auto", 16, 8, 390, "hybrid"),
        ("auto", 16, 8, 500, "shard"),
        ("replicate", 8, 8, 500, "replicate"),
        ("hybrid", 8, 8, 1, "shard"),
        ("hybrid", 16, 8, 1, "hybrid"),
        ("shard", 16, 8, 1, "shard"),
    ],
)
def test_the_strategy_follows_memory_and_machines(wanted: str, size: int, local: int, needed: int, expected: str) -> None:
    chosen = choose_strategy(wanted, method="lora", needed=needed * GIB, free=70 * GIB, world=world_of(size, local))
    assert chosen.strategy == expected and chosen.reason
    if wanted == "auto" and size > 1:
        assert "lora" in chosen.reason and "GiB" in chosen.reason


def test_weights_are_counted_from_the_headers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    weights = sum(each.numel() for each in our_model(folder).parameters())
    assert count_weights(folder) == weights
    assert weight_bytes(weights, method="lora", storage=torch.bfloat16) == 2 * weights
    assert weight_bytes(weights, method="full", storage=torch.float32) == 16 * weights


@pytest.mark.parametrize(
    ("method", "strategy", "size", "needed", "each_pass"),
    [
        ("full", "shard", 8, 120, False),
        ("full", "shard", 8, 140, True),
        ("full", "hybrid", 16, 140, True),
        ("lora", "shard", 8, 140, False),
    ],
)
def test_unsharded_gradients_are_kept_between_passes_only_if_they_fit(
    method: str, strategy: str, size: int, needed: int, each_pass: bool
) -> None:
    """49 of 70 GiB may be used: an eighth of `needed` for the shard of a process, a quarter for unsharded gradients."""
    world = world_of(size, 8)
    assert choose_strategy(strategy, method=method, needed=needed * GIB, free=70 * GIB, world=world).sums_each_pass == each_pass
    if method == "full":
        assert sums_each_pass(strategy, needed=needed * GIB, free=70 * GIB, world=world) == each_pass
